"""What all pictures of a report share: size, colours, and bytes that depend on the contents alone.

Figures are matplotlib objects without pyplot, whose global state a library must not touch.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart by colour-blind readers, and by their lightness in print.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B7280"
INK = "#1F2933"
FONT = 10
_DOTS_PER_INCH = 160
_WIDTH = 5.0  # inches: 10 point letters are about 10 pixels high on a phone


def figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty white figure of the report's width and a height in inches."""
    empty = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, layout=layout, facecolor="white")
    FigureCanvasAgg(empty)
    return empty


def png(drawn: Figure) -> bytes:
    """Return a figure as PNG: same figure, same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the tables beside it show it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        crop: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08} if drawn.get_layout_engine() else {}
        drawn.savefig(buffer, format="png", metadata={"Software": None}, **crop)
    return buffer.getvalue()


def style(axes: Axes, x: str = "", y: str = "") -> Axes:
    """Give axes the report's look: two thin lines, small letters, a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA5B1")
    axes.tick_params(labelsize=FONT - 1, colors=INK, length=3, color="#9AA5B1")
    axes.grid(color="#E4E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, fontsize=FONT, color=INK)
    axes.set_ylabel(y, fontsize=FONT, color=INK)
    return axes


def text(label: str, length: int = 24) -> str:
    """Shorten a label in its middle for a picture, and keep matplotlib from reading `$` as mathematics.

    Example:
        >>> text("a very long name of class 12", 12)
        'a ver…ass 12'
    """
    one_line = "".join(letter if letter.isprintable() else " " for letter in label)
    half = length // 2
    shortened = one_line if len(one_line) <= length else f"{one_line[: length - half - 1]}…{one_line[-half:]}"
    return shortened.replace("$", r"\$")
