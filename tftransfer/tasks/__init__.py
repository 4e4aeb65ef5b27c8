"""Tasks: what a network's outputs mean. One file each, and one line each in `_KINDS`."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tftransfer.errors import InputError
from tftransfer.tasks.multi_label import MultiLabel
from tftransfer.tasks.regression import Regression
from tftransfer.tasks.single_label import SingleLabel

_KINDS = {"single_label": SingleLabel, "multi_label": MultiLabel, "regression": Regression}

__all__ = ["MultiLabel", "Regression", "SingleLabel", "Task", "from_json", "kinds", "to_json"]


class Task(Protocol):
    """What training, checks and serving ask of a task; a frozen dataclass provides it."""

    @property
    def kind(self) -> str:
        """The task's word on the command line and in the manifest."""
        ...

    @property
    def name(self) -> str:
        """What `report.json` calls the task."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        ...

    @property
    def main_metric(self) -> str:
        """Name, among those of `measure`, the one that models are compared by."""
        ...

    @property
    def num_outputs(self) -> int:
        """How many numbers the network gives per example."""
        ...

    def encode(self, raw: list[str]) -> np.ndarray:
        """Turn labels as they stand in the data into targets."""
        ...

    def example_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return `(n,)` float32, each example's weight in the loss."""
        ...

    def loss(self, from_logits: bool, targets: np.ndarray | None = None) -> keras.losses.Loss:
        """Return the training loss; the training split's targets tell numbers their scale."""
        ...

    def metrics(self, from_logits: bool) -> list[keras.metrics.Metric]:
        """Return fresh metrics for one phase."""
        ...

    def probabilities(self, outputs: tf.Tensor, from_logits: bool) -> tf.Tensor:
        """Turn the network's outputs into probabilities (or numbers)."""
        ...

    def answers(self, outputs: tf.Tensor, from_logits: bool) -> dict[str, tf.Tensor]:
        """Return the named outputs of the SavedModel, labels included, as graph operations."""
        ...

    def measure(self, targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
        """Return the task's metrics; an undefined one is None."""
        ...


def kinds() -> tuple[str, ...]:
    """Name the kinds of task there are."""
    return tuple(_KINDS)


def to_json(task: Task) -> dict[str, Any]:
    """Describe a task for the manifest; `from_json` reads it back.

    Example:
        >>> to_json(SingleLabel(labels=("cat", "dog")))["kind"]
        'single_label'
    """
    return {"kind": task.kind, **dataclasses.asdict(task)}  # type: ignore[call-overload]


def from_json(description: dict[str, Any]) -> Task:
    """Read a task that `to_json` described.

    Raises:
        InputError: If the kind is not known to this version.
    """
    fields = dict(description)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise InputError(f"`kind` of the task must be one of {', '.join(_KINDS)}. Received: kind={kind!r}")
    return _KINDS[kind](**{**fields, "labels": tuple(fields["labels"])})
