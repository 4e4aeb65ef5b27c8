"""A few examples side by side, with words above each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tftransfer.checks import drawing
from tftransfer.data.examples import Examples
from tftransfer.report import Picture


def gallery(
    examples: Examples,
    entries: Sequence[tuple[int, Sequence[str]]],
    title: str,
    caption: str,
    section: str,
    told: str,
    columns: int = 3,
    shapes: Sequence[float] = (),
) -> Picture:
    """Draw examples under what is said of each, in rows; only their pictures are read.

    Args:
        examples: One split.
        entries: The place of each example in it, and the lines above it.
        title, caption, section: Of the picture in the report.
        told: The same in words, for those who do not see it.
        columns: How many in a row. Defaults to 3.
        shapes: Height over width of each as it is stored, to undo the stretching. Defaults to none: squares.
    """
    rows = math.ceil(len(entries) / columns)
    # A fixed grid: finding a layout takes seconds.
    drawn = drawing.figure(height=6.6 / columns * rows, layout=None)
    for place, (index, lines) in enumerate(entries):
        row, column = divmod(place, columns)
        corner = (column / columns + 0.01, 1 - (row + 1) / rows + 0.01 / rows)
        axes = drawn.add_axes((*corner, 1 / columns - 0.02, 0.73 / rows))
        axes.set_axis_off()
        picture = np.asarray(examples.pictures.load(tf.constant(index, tf.int64)))
        aspect = shapes[place] * picture.shape[1] / picture.shape[0] if shapes else None
        axes.imshow(picture, aspect=aspect)
        words = "\n".join(drawing.text(line, 20) for line in lines)
        axes.set_title(words, fontsize=drawing.FONT - 1, color=drawing.INK, pad=4)
    return Picture(title, drawing.png(drawn), caption, section, f"{title}: {told}.")
