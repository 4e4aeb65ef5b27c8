"""How much better a model is on what it has seen, in a sentence, and what may help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tftransfer.report import CURVES, Findings, Table
from tftransfer.tasks import Task

CHANCE = 2.0  # standard errors
_NOTHING_LEARNED = (
    "A lower `--learning-rate` may help, or `--strategy freeze_then_unfreeze`, which fits the head first."
)
SMALL = 0.01  # a gap of less than this does not matter, however certain it is


def overfitting(
    task: Task,
    training: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    phases: Sequence[dict[str, Any]],
) -> Findings:
    """Compare a trained model on training and validation examples, without augmentation or dropout.

    Args:
        task: What the outputs mean.
        training, validation: Targets and the task's probabilities (or numbers) of each.
        phases: The strategy as the report has it, for advice.

    Returns:
        A table with a plain sentence below: most models fitted to few examples show a gap, so it is no verdict.
    """
    what = "squared error" if task.kind == "regression" else "accuracy"
    seen, unseen = (_scores(task, *pair) for pair in (training, validation))
    scale = float(np.var(training[0])) or 1.0 if what == "squared error" else 1.0
    gap = Gap(
        what,
        float(seen.mean()),
        float(unseen.mean()),
        math.sqrt(seen.var() / len(seen) + unseen.var() / len(unseen)),
        SMALL * scale,
        float(_scores(task, validation[0], _one_answer(training[0], validation[1])).mean()),
    )
    rows = (("training", len(seen), gap.seen), ("validation", len(unseen), gap.unseen))
    percent = () if what == "squared error" else (what,)
    note = f"{gap.sentence(phases)} Validation chose the epoch, so that on new examples the gap is a little wider."
    return Findings(
        tables=(Table("Seen and unseen examples", ("split", "examples", what), rows, note, CURVES, percent),)
    )


@dataclass(frozen=True)
class Gap:
    """How far apart a model is on examples that it has seen and others.

    Args:
        what: `"accuracy"`, where more is better, or `"squared error"`.
        seen, unseen: Mean of it on training and validation examples.
        error: Standard error of their difference.
        small: A difference up to this does not matter, however certain it is.
        constant: Mean on validation examples of the one answer that fits training examples best. Defaults to None.
    """

    what: str
    seen: float
    unseen: float
    error: float
    small: float = SMALL
    constant: float | None = None

    def sentence(self, phases: Sequence[dict[str, Any]]) -> str:
        """Say what the gap means, and which strategy may reduce it.

        Example:
            >>> Gap("accuracy", 1.0, 0.98, 0.02).sentence([]).partition(": ")[2]
            'no more apart than chance (standard error 0.02).'
        """
        sign = -1 if self.what == "squared error" else 1
        worse = sign * (self.seen - self.unseen)
        said = f"{self.what.capitalize()} is {self.seen:.3g} on training and {self.unseen:.3g} on validation examples: "
        if self.constant is not None and sign * (self.unseen - self.constant) <= 0:
            return f"{said}no better than one answer for all, {self.constant:.3g}. {_NOTHING_LEARNED}"
        if abs(worse) <= CHANCE * self.error:
            return f"{said}no more apart than chance (standard error {self.error:.2g})."
        if worse < 0:
            return f"{said}better on what it has not seen, so the two splits differ in difficulty."
        if worse <= self.small:
            return f"{said}a small gap, too certain to be chance (standard error {self.error:.2g})."
        return f"{said}the model has learned some of them by heart. {remedy(phases)}"


def remedy(phases: Sequence[dict[str, Any]]) -> str:
    """Name a strategy that may reduce the gap: one that trains or moves less than the one that was used.

    Example:
        >>> remedy([{"selector": "all", "augmentation": "none"}])
        '`--strategy freeze_then_unfreeze:augmentation=strong` may reduce it; so would more examples.'
    """
    last = phases[-1] if phases else {}
    augmentation = last.get("augmentation", "none")
    better = "strong_no_flip" if augmentation.endswith("no_flip") else "strong"
    if last.get("selector") == "head" and not last.get("adapter"):
        decay = 10 * (last.get("weight_decay") or 0.1)
        strategy = f"linear_probe:weight_decay={decay:g}"
    elif last.get("selector") != "all" or last.get("adapter") or last.get("penalty"):
        strategy = "linear_probe"
    elif augmentation != better:
        strategy = f"freeze_then_unfreeze:augmentation={better}"
    else:
        strategy = f"l2_sp:augmentation={better}"
    return f"`--strategy {strategy}` may reduce it; so would more examples."


def _one_answer(targets: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return what would be given if each example had the mean of the targets for an answer."""
    shares = np.bincount(targets, minlength=like.shape[1]) / len(targets) if targets.ndim == 1 else targets.mean(axis=0)
    return np.broadcast_to(shares, like.shape)


def _scores(task: Task, targets: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return one number per example: right or wrong, the share of labels that are right, or the squared error."""
    if task.kind == "regression":
        return np.square(targets - given).reshape(len(targets), -1).mean(axis=1)
    if targets.ndim == 1:
        return (np.argmax(given, axis=1) == targets).astype(float)
    return ((given >= getattr(task, "threshold", 0.5)) == (targets >= 0.5)).mean(axis=1)
