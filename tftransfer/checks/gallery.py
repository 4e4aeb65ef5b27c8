"""A few examples side by side, with words above each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tftransfer.checks import drawing
from tftransfer.data.examples import Examples
from tftransfer.report import Picture

_COLUMNS = 3


def gallery(
    examples: Examples,
    entries: Sequence[tuple[int, Sequence[str]]],
    title: str,
    caption: str,
    section: str,
    told: str,
) -> Picture:
    """Draw examples under what is said of each, three in a row; only their pictures are read.

    Args:
        examples: One split.
        entries: The place of each example in it, and the lines above it.
        title, caption, section: Of the picture in the report.
        told: The same in words, for those who do not see it.
    """
    rows = math.ceil(len(entries) / _COLUMNS)
    drawn = drawing.figure(height=2.2 * rows, layout=None)  # a fixed grid: finding a layout takes seconds
    for place, (index, lines) in enumerate(entries):
        row, column = divmod(place, _COLUMNS)
        corner = (column / _COLUMNS + 0.01, 1 - (row + 1) / rows + 0.01 / rows)
        axes = drawn.add_axes((*corner, 1 / _COLUMNS - 0.02, 0.73 / rows))
        axes.set_axis_off()
        axes.imshow(np.asarray(examples.pictures.load(tf.constant(index, tf.int64))))
        words = "\n".join(drawing.text(line, 20) for line in lines)
        axes.set_title(words, fontsize=drawing.FONT - 1, color=drawing.INK, pad=4)
    return Picture(title, drawing.png(drawn), caption, section, f"{title}: {told}.")
