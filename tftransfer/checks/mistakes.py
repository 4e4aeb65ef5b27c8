"""The mistakes that are worth looking at: the surest wrong answers and the largest errors, as pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tftransfer.checks.gallery import gallery
from tftransfer.data.examples import Examples
from tftransfer.report import MISTAKES, Findings, Table
from tftransfer.tasks import Task

_CAPTION = (
    "Above each picture: what the model says, and how sure it is or how far off. "
    "Some may be wrong labels in the data rather than mistakes of the model."
)


@dataclass(frozen=True)
class Mistake:
    """One example that the model gets wrong.

    Args:
        index: Its place in the split.
        true, predicted: What it is and what the model says, in words.
        how_much: How sure the model was, or how large the error is, such as `"98 %"`.
    """

    index: int
    true: str
    predicted: str
    how_much: str


def confident_mistakes(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> list[Mistake]:
    """Rank the wrong answers of a single-label task by their probability, the surest first."""
    predicted, confidence = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
    wrong = np.flatnonzero(predicted != targets)
    ranked = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return [
        Mistake(
            int(i),
            task.labels[targets[i]],
            task.labels[predicted[i]],
            f"{confidence[i]:.0%}".replace("%", " %"),
        )
        for i in ranked
    ]


def label_mistakes(task: Task, truth: np.ndarray, given: np.ndarray, probabilities: np.ndarray) -> list[Mistake]:
    """Rank examples by how far the probability of their worst wrong label is from the truth."""
    gaps = np.where(truth != given, np.abs(probabilities - truth), 0.0).max(axis=1)
    ranked = [int(i) for i in np.argsort(-gaps, kind="stable") if (truth[i] != given[i]).any()]
    return [
        Mistake(i, _names(task, truth[i]), _names(task, given[i]), f"off by {100 * gaps[i]:.0f} points") for i in ranked
    ]


def _names(task: Task, row: np.ndarray) -> str:
    return ", ".join(label for label, set_ in zip(task.labels, row, strict=True) if set_) or "none"


def largest_errors(targets: np.ndarray, predicted: np.ndarray) -> list[Mistake]:
    """Rank examples by their error in standard deviations of the targets, summed over the numbers."""
    deviation = targets.std(axis=0)
    errors = np.abs(predicted - targets) / np.where(deviation > 0, deviation, 1)
    ranked = np.argsort(-errors.sum(axis=1), kind="stable")
    return [
        Mistake(
            int(i),
            _numbers(targets[i]),
            _numbers(predicted[i]),
            f"off by {_numbers(predicted[i] - targets[i])}",
        )
        for i in ranked
        if errors[i].any()
    ]


def _numbers(row: np.ndarray) -> str:
    return ", ".join(f"{number:.3g}" for number in row)


def show(examples: Examples, mistakes: list[Mistake], title: str) -> Findings:
    """Return mistakes as one picture and as a table of their files; nothing where there are none."""
    if not mistakes:
        return Findings()
    rows = tuple((examples.names[m.index], m.true, m.predicted, m.how_much) for m in mistakes)
    table = Table("Their files", ("file", "true", "predicted", "how sure, how far"), rows, section=MISTAKES)
    told = "; ".join(f"{m.true} taken for {m.predicted} ({m.how_much})" for m in mistakes)
    entries = [(m.index, (m.predicted, m.how_much, f"true: {m.true}")) for m in mistakes]
    return Findings(tables=(table,), pictures=(gallery(examples, entries, title, _CAPTION, MISTAKES, told),))
