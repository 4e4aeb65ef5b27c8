"""Regression: one or several numbers per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tftransfer.errors import InputError
from tftransfer.tasks.single_label import check_labels

_LARGEST = float(np.finfo(np.float32).max)


class ScaledSquaredError(keras.losses.Loss):
    """The mean squared error of numbers that are divided by a scale each.

    Args:
        scale: One number above 0 per output.

    Example:
        >>> float(ScaledSquaredError((10.0,))([[0.0]], [[20.0]]))
        4.0
    """

    def __init__(self, scale: tuple[float, ...]) -> None:
        super().__init__(name="scaled_squared_error")
        self._scale = scale

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Return `(batch,)`, the mean over the outputs."""
        y_true, y_pred = keras.ops.convert_to_tensor(y_true), keras.ops.convert_to_tensor(y_pred)
        error = (keras.ops.cast(y_true, "float32") - keras.ops.cast(y_pred, "float32")) / self._scale
        return keras.ops.mean(keras.ops.square(error), axis=-1)


@dataclass(frozen=True)
class Regression:
    """One number per name in `labels`, in the units of the data.

    Args:
        labels: The names of the numbers, in the order of the network's outputs. Defaults to `("value",)`.
        name: What `report.json` calls the task. Defaults to `"image_regression"`.

    Example:
        >>> Regression(labels=("width", "height")).encode(["1.5|2"]).tolist()
        [[1.5, 2.0]]
    """

    labels: tuple[str, ...] = ("value",)
    name: str = "image_regression"

    def __post_init__(self) -> None:
        check_labels(self.labels, at_least=1)

    @property
    def kind(self) -> str:
        return "regression"

    @property
    def main_metric(self) -> str:
        return "mean_absolute_error"

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def encode(self, raw: Sequence[str]) -> np.ndarray:
        """Return `(n, numbers)` float32 from numbers separated by `|`."""
        return np.array([self._numbers(text) for text in raw], np.float32).reshape(-1, self.num_outputs)

    def _numbers(self, text: str) -> list[float]:
        try:
            numbers = [float(part) for part in text.split("|")]
        except ValueError:
            numbers = []
        # Python reads 1_000 as a number; targets are float32, in which 1e39 is infinite.
        is_sound = "_" not in text and all(abs(number) <= _LARGEST for number in numbers)
        if len(numbers) != self.num_outputs or not is_sound:
            raise InputError(
                f"a label must hold {self.num_outputs} finite numbers separated by `|`, at most {_LARGEST:.2g} "
                f"(float32). Received: {text!r}"
            )
        return numbers

    def example_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return ones."""
        return np.ones(len(targets), np.float32)

    def loss(self, from_logits: bool, targets: np.ndarray | None = None) -> keras.losses.Loss:
        """Return the mean squared error, each number in units of its deviation in `targets` `(n, numbers)`.

        So training does not depend on the units of the data: in metres and in micrometres it takes the same steps.
        """
        deviation = np.ones(self.num_outputs) if targets is None else targets.std(axis=0, dtype=np.float64)
        return ScaledSquaredError(tuple(np.where(deviation > 0, deviation, 1.0).tolist()))

    def metrics(self, from_logits: bool) -> list[keras.metrics.Metric]:
        """Return the mean absolute error."""
        return [keras.metrics.MeanAbsoluteError(name="mean_absolute_error")]

    def probabilities(self, outputs: tf.Tensor, from_logits: bool) -> tf.Tensor:
        """Return the numbers themselves, `(batch, numbers)` float32."""
        return tf.cast(outputs, tf.float32)

    def answers(self, outputs: tf.Tensor, from_logits: bool) -> dict[str, tf.Tensor]:
        """Return `values` `(batch, numbers)` in manifest order."""
        return {"values": self.probabilities(outputs, from_logits)}

    def measure(self, targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
        """Return the mean absolute and root mean squared error over all numbers, and R squared."""
        error = probabilities - targets
        spread = float(((targets - targets.mean(axis=0)) ** 2).sum())
        return {
            "mean_absolute_error": float(np.abs(error).mean()),
            "root_mean_squared_error": float(np.sqrt((error**2).mean())),
            "r_squared": 1 - float((error**2).sum()) / spread if spread else None,
        }
