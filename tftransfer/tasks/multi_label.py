"""Multi-label classification: each example has any number of labels, also none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from sklearn import metrics as sklearn_metrics

from tftransfer.errors import InputError
from tftransfer.tasks.single_label import check_labels, encode_names

SEPARATOR = "|"


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels per example.

    Args:
        labels: The label names, in the order of the network's outputs.
        name: What `report.json` calls the task. Defaults to `"image_multi_label"`.
        label_smoothing: Share of the target moved towards one half, in [0, 1). Defaults to 0.0.
        balance: Whether examples with rare labels weigh more in the loss. Defaults to False.
        threshold: Probability from which a label counts as given, in (0, 1). Defaults to 0.5.

    Example:
        >>> MultiLabel(labels=("red", "round")).encode(["red|round", ""]).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    labels: tuple[str, ...]
    name: str = "image_multi_label"
    label_smoothing: float = 0.0
    balance: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_labels(self.labels, at_least=1)
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"`label_smoothing` must be in [0, 1). Received: label_smoothing={self.label_smoothing}")
        if not 0 < self.threshold < 1:
            raise InputError(f"`threshold` must be in (0, 1). Received: threshold={self.threshold}")

    @property
    def kind(self) -> str:
        return "multi_label"

    @property
    def main_metric(self) -> str:
        return "macro_f1"

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def encode(self, raw: Sequence[str]) -> np.ndarray:
        """Return `(n, labels)` float32 zeros and ones from labels separated by `|`."""
        targets = np.zeros((len(raw), self.num_outputs), np.float32)
        for row, text in enumerate(raw):
            targets[row, encode_names(split_labels(text), self.labels)] = 1
        return targets

    def example_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return ones, or with `balance` the mean inverse frequency of the example's labels, of mean 1."""
        if not self.balance:
            return np.ones(len(targets), np.float32)
        frequency = np.clip(targets.mean(axis=0), 1 / max(len(targets), 1), None)
        count = targets.sum(axis=1)
        inverse = (targets / frequency).sum(axis=1) / np.maximum(count, 1)
        weights = np.where(count > 0, inverse, 1.0)
        return (weights / weights.mean()).astype(np.float32)

    def loss(self, from_logits: bool, targets: np.ndarray | None = None) -> keras.losses.Loss:
        """Return binary cross-entropy over the labels."""
        return keras.losses.BinaryCrossentropy(from_logits=from_logits, label_smoothing=self.label_smoothing)

    def metrics(self, from_logits: bool) -> list[keras.metrics.Metric]:
        """Return the share of labels that are right, at the task's threshold."""
        threshold = float(np.log(self.threshold / (1 - self.threshold))) if from_logits else self.threshold
        return [keras.metrics.BinaryAccuracy(name="accuracy", threshold=threshold)]

    def probabilities(self, outputs: tf.Tensor, from_logits: bool) -> tf.Tensor:
        """Return the sigmoid of logits, `(batch, labels)` float32; probabilities pass unchanged."""
        outputs = tf.cast(outputs, tf.float32)
        return tf.sigmoid(outputs) if from_logits else outputs

    def answers(self, outputs: tf.Tensor, from_logits: bool) -> dict[str, tf.Tensor]:
        """Return the most likely label, all probabilities, and the labels above the threshold.

        `labels` and `scores` are `(batch, labels)`, sorted by falling score and padded with `""` and 0.
        """
        probabilities = self.probabilities(outputs, from_logits)
        scores, order = tf.math.top_k(probabilities, k=self.num_outputs)
        names = tf.gather(tf.constant(self.labels), order)
        given = scores >= self.threshold
        return {
            "label": names[:, 0],
            "probability": scores[:, 0],
            "probabilities": probabilities,
            "labels": tf.where(given, names, ""),
            "scores": tf.where(given, scores, 0.0),
        }

    def measure(self, targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
        """Return subset accuracy, macro precision, recall and F1, log loss and mean average precision.

        `accuracy` counts an example as right if all its labels are; a label without a positive example counts 0 in
        macro averages and is left out of the mean average precision.
        """
        predicted = (probabilities >= self.threshold).astype(int)
        truth = targets.astype(int)
        # One column would be read as two classes, present and absent: the numbers of "present" are the macro averages.
        average = "macro" if self.num_outputs > 1 else "binary"
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
            truth, predicted, average=average, zero_division=0
        )
        return {
            "accuracy": float((predicted == truth).all(axis=1).mean()),
            "macro_precision": float(precision),
            "macro_recall": float(recall),
            "macro_f1": float(f1),
            "log_loss": _log_loss(truth, probabilities),
            "mean_average_precision": _mean_average_precision(truth, probabilities),
        }


def split_labels(text: str) -> list[str]:
    """Split `"red|round"` into its labels; empty ones are dropped."""
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]


def _log_loss(truth: np.ndarray, probabilities: np.ndarray) -> float:
    epsilon = np.finfo(np.float32).eps
    clipped = np.clip(probabilities, epsilon, 1 - epsilon)
    return float(-np.where(truth == 1, np.log(clipped), np.log(1 - clipped)).mean())


def _mean_average_precision(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    present = truth.any(axis=0)
    if not present.any():
        return None
    return float(sklearn_metrics.average_precision_score(truth[:, present], probabilities[:, present]))
