"""Single-label classification: each example belongs to exactly one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from sklearn import metrics as sklearn_metrics

from tftransfer.errors import InputError, nearest


@dataclass(frozen=True)
class SingleLabel:
    """One class per example, at least two classes.

    Args:
        labels: The class names, in the order of the network's outputs.
        name: What `report.json` calls the task. Defaults to `"image_classification"`.
        label_smoothing: Share of the target spread over all classes, in [0, 1). Defaults to 0.0.
        balance: Whether every class gets the same total weight in the loss. Defaults to False.

    Example:
        >>> task = SingleLabel(labels=("cat", "dog"))
        >>> task.encode(["dog", "cat"]).tolist()
        [1, 0]
    """

    labels: tuple[str, ...]
    name: str = "image_classification"
    label_smoothing: float = 0.0
    balance: bool = False

    def __post_init__(self) -> None:
        check_labels(self.labels, at_least=2)
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"`label_smoothing` must be in [0, 1). Received: label_smoothing={self.label_smoothing}")

    @property
    def kind(self) -> str:
        return "single_label"

    @property
    def main_metric(self) -> str:
        return "accuracy"

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def encode(self, raw: Sequence[str]) -> np.ndarray:
        """Return `(n,)` int32 class numbers."""
        return encode_names(raw, self.labels)

    def example_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return ones, or with `balance` weights that give every class that occurs the same total."""
        if not self.balance:
            return np.ones(len(targets), np.float32)
        counts = np.bincount(targets, minlength=self.num_outputs)
        return (len(targets) / np.count_nonzero(counts) / counts[targets]).astype(np.float32)

    def loss(self, from_logits: bool, targets: np.ndarray | None = None) -> keras.losses.Loss:
        """Return cross-entropy on class numbers, smoothed if asked."""
        if not self.label_smoothing:
            return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
        return SmoothedCrossentropy(self.num_outputs, self.label_smoothing, from_logits)

    def metrics(self, from_logits: bool) -> list[keras.metrics.Metric]:
        """Return accuracy."""
        return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]

    def probabilities(self, outputs: tf.Tensor, from_logits: bool) -> tf.Tensor:
        """Return the softmax of logits, `(batch, classes)` float32; probabilities pass unchanged."""
        outputs = tf.cast(outputs, tf.float32)
        return tf.nn.softmax(outputs) if from_logits else outputs

    def answers(self, outputs: tf.Tensor, from_logits: bool) -> dict[str, tf.Tensor]:
        """Return `label` and `probability` `(batch,)` and `probabilities` `(batch, classes)`."""
        probabilities = self.probabilities(outputs, from_logits)
        label = tf.gather(tf.constant(self.labels), tf.argmax(probabilities, axis=-1))
        return {
            "label": label,
            "probability": tf.reduce_max(probabilities, axis=-1),
            "probabilities": probabilities,
        }

    def measure(self, targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
        """Return accuracy, macro precision, recall and F1, and log loss (scikit-learn's definitions).

        Macro averages run over all classes of the task; a class that neither occurs nor is predicted counts 0.
        """
        classes = np.arange(self.num_outputs)
        predicted = probabilities.argmax(axis=-1)
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
            targets, predicted, labels=classes, average="macro", zero_division=0
        )
        return {
            "accuracy": float(np.mean(predicted == targets)),
            "macro_precision": float(precision),
            "macro_recall": float(recall),
            "macro_f1": float(f1),
            "log_loss": cross_entropy(targets, probabilities),
        }


@keras.saving.register_keras_serializable("tftransfer")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy on class numbers whose targets are smoothed (Szegedy et al. 2016, arXiv:1512.00567).

    Keras smooths one-hot targets only; this one takes `(batch,)` class numbers, as the rest of the toolkit does.

    Args:
        num_classes: The number of classes.
        label_smoothing: Share of the target spread evenly over all classes, in (0, 1).
        from_logits: Whether the predictions are logits.
    """

    def __init__(
        self,
        num_classes: int,
        label_smoothing: float,
        from_logits: bool = True,
        reduction: str = "sum_over_batch_size",
        name: str = "smoothed_crossentropy",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.from_logits = from_logits

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        one_hot = keras.ops.one_hot(keras.ops.cast(y_true, "int32"), self.num_classes)
        return keras.losses.categorical_crossentropy(
            one_hot, y_pred, from_logits=self.from_logits, label_smoothing=self.label_smoothing
        )

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("num_classes", "label_smoothing", "from_logits")}
        return {**super().get_config(), **own}


def check_labels(labels: Sequence[str], at_least: int) -> None:
    """Refuse label names that are too few or that occur twice."""
    if len(labels) < at_least:
        raise InputError(f"`labels` must name at least {at_least} classes. Received: labels={tuple(labels)!r}")
    twice = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twice:
        raise InputError(f"`labels` must be unique. Received twice: {', '.join(map(repr, twice))}")


def encode_names(raw: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Turn class names into `(n,)` int32 class numbers, refusing names that are not known."""
    numbers = {label: number for number, label in enumerate(labels)}
    for label in raw:
        if label not in numbers:
            raise InputError(f"label {label!r} is not a class of this task.{nearest(label, labels)}")
    return np.array([numbers[label] for label in raw], np.int32)


def cross_entropy(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of -log p(target), with p kept away from 0 by float32's epsilon."""
    chosen = probabilities[np.arange(len(targets)), targets]
    return float(-np.log(np.clip(chosen, np.finfo(np.float32).eps, 1.0)).mean())
