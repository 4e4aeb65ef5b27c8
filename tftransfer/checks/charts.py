"""The pictures of a report: learning curves, confusion matrix, predicted against true."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tftransfer.checks import drawing
from tftransfer.report import CONFUSION, CURVES, NUMBERS, Picture
from tftransfer.tasks import Task

_CELLS_WITH_NUMBERS = 30
_TICK_LABELS = 40


def learning_curves(history: Mapping[str, Sequence[float]], phases: Iterable[Mapping[str, Any]] = ()) -> Picture:
    """Draw loss and metric of training and validation per epoch, phases marked.

    Args:
        history: One list per metric over all phases: `loss`, `val_loss`, `accuracy`, `val_accuracy`, ....
        phases: Dicts with the `name` and the `epochs` of each phase. Defaults to none: nothing is marked.

    Returns:
        A picture with one panel for the loss and one for the first metric that has a validation value.
    """
    metrics = [name for name in history if f"val_{name}" in history and name not in ("loss", "loss_error")][:1]
    names = ["loss", *metrics]
    drawn = drawing.figure(height=2.3 * len(names) + 0.2)
    panels = drawn.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        _curve(axes, history, name)
        _mark_phases(axes, phases, with_names=axes is panels[0])
    panels[0].legend(fontsize=drawing.FONT - 1, frameon=False)
    panels[-1].set_xlabel("epoch", fontsize=drawing.FONT, color=drawing.INK)
    title = "Learning curves: " + " and ".join(_words(name) for name in names)
    caption = "Per epoch, over all phases. Training values are measured while the weights still move."
    return Picture(title, drawing.png(drawn), caption, CURVES, f"{title}. {_summary(history, names)}")


def _curve(axes: Axes, history: Mapping[str, Sequence[float]], name: str) -> None:
    drawing.style(axes, y=_words(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = ((name, "train", drawing.BLUE, "-"), (f"val_{name}", "validation", drawing.ORANGE, "--"))
    for key, label, color, dashes in lines:
        values = np.asarray(history.get(key, ()), float)
        epochs = np.arange(1, len(values) + 1)
        marker = "o" if len(values) <= 30 else None
        axes.plot(epochs, values, dashes, color=color, label=label, marker=marker, markersize=3, linewidth=1.5)
    axes.set_xlim(0.4, max(len(history.get(name, ())), 1) + 0.6)  # also for one epoch, whose point is a place, no span


def _mark_phases(axes: Axes, phases: Iterable[Mapping[str, Any]], with_names: bool) -> None:
    began = 0
    for phase in phases:
        if began:
            axes.axvline(began + 0.5, color=drawing.GRAY, linestyle=":", linewidth=1)
        if with_names:
            name = drawing.text(phase["name"], 18)
            above = axes.get_xaxis_transform()  # x in epochs, y as a share of the panel
            axes.text(began + 0.6, 1.03, name, transform=above, fontsize=drawing.FONT - 1, color=drawing.GRAY)
        began += phase["epochs"]


def _summary(history: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    last = [(key, history[key][-1]) for name in names for key in (name, f"val_{name}") if history.get(key)]
    return "At the last epoch: " + ", ".join(f"{_words(key)} {value:.3g}" for key, value in last) + "."


def _words(name: str) -> str:
    return name.replace("val_", "validation ").replace("_", " ")


def confusion_picture(matrix: np.ndarray, labels: Sequence[str]) -> Picture:
    """Draw a confusion matrix: rows are the true classes, each cell's shade is its share of the row.

    Args:
        matrix: `(classes, classes)` counts, `matrix[true, predicted]`.
        labels: The classes' names; with more than 40 only some are written.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    drawn = drawing.figure(height=4.9)
    axes = drawn.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    drawing.style(axes, x="predicted", y="true").grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    _name_classes(axes, labels)
    if len(labels) <= _CELLS_WITH_NUMBERS:
        _write_counts(axes, matrix, shares)
    bar = drawn.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=[0, 0.5, 1], format="{x:.0%}")
    bar.ax.tick_params(labelsize=drawing.FONT - 2)
    bar.outline.set_visible(False)
    caption = "Rows are the true classes, columns what the model says; the shade is the share of the row."
    wrong = int(matrix.sum() - np.trace(matrix))
    alt = f"Confusion matrix of {len(labels)} classes: {wrong} of {int(matrix.sum())} off the diagonal."
    return Picture("Confusion matrix", drawing.png(drawn), caption, CONFUSION, alt)


def _name_classes(axes: Axes, labels: Sequence[str]) -> None:
    step = math.ceil(len(labels) / _TICK_LABELS)
    places = range(0, len(labels), step)
    names = [drawing.text(labels[place], 14) for place in places]
    size = max(4.5, min(drawing.FONT, 190 / len(places)))
    axes.set_xticks(places, names, fontsize=size, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(places, names, fontsize=size)


def _write_counts(axes: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    size = max(3.5, min(drawing.FONT, 130 / len(matrix)))
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if shares[row, column] > 0.5 else drawing.INK
            axes.text(column, row, str(int(count)), ha="center", va="center", fontsize=size, color=color)


def predicted_against_true(task: Task, targets: np.ndarray, predicted: np.ndarray) -> Picture:
    """Draw predicted against true numbers, one panel for each number (the first six)."""
    names = task.labels[:6]
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    drawn = drawing.figure(height=4.6 if columns == 1 else 2.5 * rows)
    panels = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for number, name in enumerate(names):
        _scatter(panels[number], targets[:, number], predicted[:, number])
        panels[number].set_title(drawing.text(name), fontsize=drawing.FONT, color=drawing.INK)
    caption = "Each point is a test example; on the dashed line the prediction is exact."
    return Picture("Predicted against true", drawing.png(drawn), caption, NUMBERS)


def _scatter(axes: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    drawing.style(axes, x="true", y="predicted")
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, color=drawing.GRAY, linestyle="--", linewidth=1)
    opacity = float(np.clip(60 / len(true), 0.15, 0.8))
    axes.plot(true, predicted, "o", color=drawing.BLUE, markersize=4, alpha=opacity, markeredgewidth=0)
