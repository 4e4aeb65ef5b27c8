"""AdamW whose learning rate differs per layer, in the step and in the weight decay alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tftransfer.errors import InputError


@keras.saving.register_keras_serializable("tftransfer")
class LayerwiseAdamW(keras.optimizers.AdamW):
    """AdamW with a multiplier on the learning rate of each variable.

    Scaling gradients does nothing under Adam, and scaling the update alone leaves the weight decay at the global
    rate; here the multiplier reaches both. Kernels and other variables of rank two and more are decayed; biases and
    normalisation parameters are not, as is usual.

    Args:
        learning_rate: A number or a `keras.optimizers.schedules.LearningRateSchedule`.
        weight_decay: Decoupled weight decay per unit of learning rate. Defaults to 0.004.
        multipliers: From `variable.path` to the factor on the learning rate, at least 0. A variable that is not
            named has the factor 1. Defaults to none.
        beta_1, beta_2, epsilon: As in `keras.optimizers.AdamW`.
        name: The optimizer's name.

    Example:
        >>> optimizer = LayerwiseAdamW(1e-3, multipliers={"stem/kernel": 0.1})
        >>> LayerwiseAdamW.from_config(optimizer.get_config()).multipliers
        {'stem/kernel': 0.1}

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Howard & Ruder 2018, arXiv:1801.06146 (rates per layer).
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.001,
        weight_decay: float = 0.004,
        multipliers: Mapping[str, float] | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "layerwise_adamw",
        **base_config: Any,  # what Keras' own get_config adds, such as clipnorm
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            name=name,
            **base_config,
        )
        self.multipliers = dict(multipliers or {})
        negative = {path: factor for path, factor in self.multipliers.items() if not factor >= 0}
        if negative:
            raise InputError(f"`multipliers` must be numbers from 0. Received: {negative!r}")
        self._factors: list[float] = []

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the moments, and look up each variable's factor."""
        self._factors = [self.multipliers.get(variable.path, 1.0) for variable in variables]
        super().build(variables)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Decay and step one variable at its own rate."""
        index = self._get_variable_index(variable)
        own_rate = keras.ops.cast(learning_rate, variable.dtype) * self._factors[index]
        if self.weight_decay and len(variable.shape) > 1:
            self.assign_sub(variable, variable * own_rate * self.weight_decay)
        super().update_step(gradient, variable, own_rate)

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Do nothing: Keras would decay every variable at the global rate; `update_step` does it at its own."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multipliers": self.multipliers}
