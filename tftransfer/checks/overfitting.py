"""How much better a model is on what it has seen, in a sentence, and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tftransfer.report import CURVES, Findings, Table
from tftransfer.tasks import Task

CHANCE = 2.0  # standard errors
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
    gap = float(unseen.mean() - seen.mean()) if what == "squared error" else float(seen.mean() - unseen.mean())
    error = math.sqrt(seen.var() / len(seen) + unseen.var() / len(unseen))
    scale = float(np.var(training[0])) or 1.0 if what == "squared error" else 1.0
    overfits = gap > CHANCE * error and gap > SMALL * scale
    note = sentence(what, float(seen.mean()), float(unseen.mean()), error, overfits, phases)
    rows = (("training", len(seen), float(seen.mean())), ("validation", len(unseen), float(unseen.mean())))
    percent = () if what == "squared error" else (what,)
    return Findings(
        tables=(Table("Seen and unseen examples", ("split", "examples", what), rows, note, CURVES, percent),)
    )


def sentence(
    what: str, seen: float, unseen: float, error: float, overfits: bool, phases: Sequence[dict[str, Any]]
) -> str:
    """Say what the gap means, and which strategy would reduce it.

    Example:
        >>> sentence("accuracy", 1.0, 0.98, 0.02, False, [])
        'Accuracy is 1 on training and 0.98 on validation examples: no more apart than chance (standard error 0.02).'
    """
    said = f"{what.capitalize()} is {seen:.3g} on training and {unseen:.3g} on validation examples: "
    if not overfits:
        return f"{said}no more apart than chance (standard error {error:.2g})."
    return f"{said}the model has learned some of them by heart. {remedy(phases)}"


def remedy(phases: Sequence[dict[str, Any]]) -> str:
    """Name the strategy that would reduce the gap, given the one that was used.

    Example:
        >>> remedy([{"selector": "head"}])
        'The head alone does this: more examples, or a higher `weight_decay` in the probe, would reduce it.'
    """
    last = phases[-1] if phases else {}
    if last.get("selector") == "head" and not last.get("adapter"):
        return "The head alone does this: more examples, or a higher `weight_decay` in the probe, would reduce it."
    if last.get("augmentation", "none") == "none" and last.get("selector") == "all":
        return "`--strategy freeze_then_unfreeze` with its strong augmentation would reduce it."
    if last.get("selector") == "all" and not last.get("penalty"):
        return "`--strategy l2_sp`, or `partial:last=2`, which trains less, would reduce it."
    return "`--strategy linear_probe`, which trains the head alone, would reduce it; so would more examples."


def _scores(task: Task, targets: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return one number per example: right or wrong, the share of labels that are right, or the squared error."""
    if task.kind == "regression":
        return np.square(targets - given).reshape(len(targets), -1).mean(axis=1)
    if targets.ndim == 1:
        return (np.argmax(given, axis=1) == targets).astype(float)
    return ((given >= getattr(task, "threshold", 0.5)) == (targets >= 0.5)).mean(axis=1)
