"""Metrics that Keras lacks."""

from __future__ import annotations

from typing import Any

import keras


class LossError(keras.metrics.Metric):
    """The standard error of a mean loss: how far it would move with other examples of the same kind.

    Args:
        loss: A Keras loss whose `call` gives one number per example (or several, which are averaged).
        name: The metric's name. Defaults to `"loss_error"`.

    Example:
        >>> metric = LossError(keras.losses.MeanAbsoluteError())
        >>> metric.update_state([[0.0], [0.0], [0.0], [0.0]], [[1.0], [1.0], [3.0], [3.0]])
        >>> float(metric.result())  # mean 2, deviation 1, four examples
        0.5

    Source: Cochran 1977, "Sampling Techniques", section 2.11 for weights (effective number of examples: Kish 1965).
    """

    def __init__(self, loss: keras.losses.Loss, name: str = "loss_error") -> None:
        super().__init__(name=name, dtype="float32")
        self._loss = loss
        weights, squared_weights, losses, squares = (
            self.add_variable((), "zeros", name=part) for part in ("weights", "squared_weights", "losses", "squares")
        )
        self._sums = (weights, squared_weights, losses, squares)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: targets, outputs and one weight per example (without them all count alike)."""
        ops = keras.ops
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        losses = ops.cast(self._loss.call(y_true, y_pred), "float32")
        if len(losses.shape) > 1:
            losses = ops.mean(losses, axis=list(range(1, len(losses.shape))))
        weights = ops.ones_like(losses) if sample_weight is None else ops.cast(sample_weight, "float32")
        added = (weights, weights * weights, weights * losses, weights * losses * losses)
        for total, values in zip(self._sums, added, strict=True):
            total.assign_add(ops.sum(values))

    def result(self) -> Any:
        """Return the standard error; 0 before the first example."""
        ops = keras.ops
        weights, squared_weights, losses, squares = (ops.convert_to_tensor(total) for total in self._sums)
        counted = ops.maximum(weights, 1e-12)
        variance = ops.maximum(squares / counted - ops.square(losses / counted), 0.0)
        return ops.sqrt(variance * squared_weights) / counted
