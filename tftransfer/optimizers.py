"""AdamW and SGD whose learning rate differs per layer, in the step and in the weight decay alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer.errors import InputError


@dataclass(frozen=True)
class Moment:
    """What an optimizer remembers of one variable.

    Args:
        slots: One array per kind of moment, each of the variable's shape.
        age: How many steps went into them.
    """

    slots: tuple[np.ndarray, ...]
    age: int


def renamed(moments: Mapping[str, Moment], names: Mapping[str, str]) -> dict[str, Moment]:
    """Give moments other names, where there are any.

    Example:
        >>> list(renamed({"a": Moment((), 0), "b": Moment((), 0)}, {"a": "x"}))
        ['x', 'b']
    """
    return {names.get(name, name): moment for name, moment in moments.items()}


class _Layerwise(keras.optimizers.Optimizer):
    """What the optimizers below share: a factor per variable on rate and decay, and moments that can be carried over.

    Keras' optimizers know no rate per variable; scaling gradients does nothing under Adam, and scaling the update
    alone leaves the weight decay at the global rate.
    """

    multipliers: dict[str, float]

    def _layerwise(self, multipliers: Mapping[str, float] | None) -> None:
        self.multipliers = dict(multipliers or {})
        negative = {path: factor for path, factor in self.multipliers.items() if not factor >= 0}
        if negative:
            raise InputError(f"`multipliers` must be numbers from 0. Received: {negative!r}")
        self._factors: list[float] = []
        self._ages: list[int] = []

    def build(self, variables: list[keras.Variable]) -> None:
        """Create the moments, and look up each variable's factor."""
        if self.built:
            return
        self._factors = [self._factor(variable.path) for variable in variables]
        self._ages = [0] * len(variables)
        super().build(variables)

    def _factor(self, path: str) -> float:
        """Return a variable's factor; Keras puts a Sequential model's name before paths, but not after a load."""
        if path in self.multipliers:
            return self.multipliers[path]
        same = {one for key, one in self.multipliers.items() if key.endswith(f"/{path}") or path.endswith(f"/{key}")}
        return same.pop() if len(same) == 1 else 1.0

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Decay and step one variable at its own rate."""
        index = self._get_variable_index(variable)
        own_rate = keras.ops.cast(learning_rate, variable.dtype) * self._factors[index]
        if self.weight_decay and len(variable.shape) > 1 and self._use_weight_decay(variable):
            self.assign_sub(variable, variable * own_rate * self.weight_decay)
        self._step(gradient, variable, own_rate)

    def _step(self, gradient: tf.Tensor, variable: keras.Variable, rate: tf.Tensor) -> None:
        """Move one variable at its own rate, without decay."""
        raise NotImplementedError

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Do nothing: Keras would decay every variable at the global rate; `update_step` does it at its own."""

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Sum gradients over devices, if there are several: to do so registers a gradient for good.

        It would hold the graph of every step that was ever traced.
        """
        context = tf.distribute.get_replica_context()
        if context and context.num_replicas_in_sync == 1:
            return grads_and_vars
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _slots(self) -> Sequence[Sequence[keras.Variable]]:
        """Return the lists of moments, each in the order of the variables."""
        raise NotImplementedError

    def moments(self) -> dict[str, Moment]:
        """Return what the optimizer remembers, by variable path."""
        steps = int(keras.ops.convert_to_numpy(self.iterations))
        return {
            variable.path: Moment(
                tuple(keras.ops.convert_to_numpy(slot[index]) for slot in self._slots()), steps + self._ages[index]
            )
            for index, variable in enumerate(self._trainable_variables)
        }

    def start_from(self, variables: list[keras.Variable], moments: Mapping[str, Moment]) -> None:
        """Begin with another optimizer's moments where it had the same variables; the others begin afresh.

        Args:
            variables: What will be trained. Call this before the first step: the ages become part of the traced step.
            moments: From `moments()` of an optimizer of the same class.
        """
        self.build(variables)
        for index, variable in enumerate(variables):
            moment = moments.get(variable.path)
            if moment and self._fits(moment, variable):
                self._ages[index] = moment.age
                for slot, value in zip(self._slots(), moment.slots, strict=True):
                    slot[index].assign(value)

    def count_from(self, step: int) -> None:
        """Let the age of all moments count from a step on; call this before the step is traced, as `start_from`."""
        self._ages = [-step] * len(self._ages)

    def restart(self) -> None:
        """Forget all moments, whose age counts from here on, and let averages of weights begin with the weights."""
        for slots in self._slots():
            for slot in slots:
                slot.assign(keras.ops.zeros_like(slot))
        if self.use_ema:
            for average, variable in zip(self._model_variables_moving_average, self._trainable_variables, strict=True):
                average.assign(variable)
        self.count_from(int(keras.ops.convert_to_numpy(self.iterations)))

    def _fits(self, moment: Moment, variable: keras.Variable) -> bool:
        """Whether moments are of this kind of optimizer, of this variable's shape, and finite."""
        shapes = [slot.shape for slot in moment.slots]
        return shapes == [tuple(variable.shape)] * len(self._slots()) and all(map(_finite, moment.slots))


def _finite(slot: np.ndarray) -> bool:
    return bool(np.isfinite(slot).all())


def own(optimizer: keras.optimizers.Optimizer) -> Any:
    """Return the optimizer that takes the steps; Keras wraps it for float16 models, to scale the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


@keras.saving.register_keras_serializable("tftransfer")
class LayerwiseAdamW(_Layerwise, keras.optimizers.AdamW):
    """AdamW with a multiplier on the learning rate of each variable.

    The multiplier reaches the step and the weight decay. Kernels and other variables of rank two and more are decayed;
    biases and normalisation parameters are not, as is usual.

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
        if base_config.get("amsgrad"):
            raise InputError("`amsgrad` is not supported: its third moment would be lost between phases")
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            name=name,
            **base_config,
        )
        self._layerwise(multipliers)

    def _step(self, gradient: tf.Tensor, variable: keras.Variable, rate: tf.Tensor) -> None:
        age = self._ages[self._get_variable_index(variable)]
        keras.optimizers.AdamW.update_step(self, gradient, variable, rate * self._correction(age))

    def _correction(self, age: int) -> Any:
        """Correct the bias of the moments for their own age: Keras corrects for the age of the optimizer."""
        if not age:
            return 1.0
        steps = keras.ops.cast(self.iterations + 1, "float32")
        return self._bias_correction(steps + age) / self._bias_correction(steps)

    def _bias_correction(self, steps: Any) -> Any:
        return keras.ops.sqrt(1 - keras.ops.power(self.beta_2, steps)) / (1 - keras.ops.power(self.beta_1, steps))

    def _slots(self) -> Sequence[Sequence[keras.Variable]]:
        return self._momentums, self._velocities

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multipliers": self.multipliers}


@keras.saving.register_keras_serializable("tftransfer")
class LayerwiseSGD(_Layerwise, keras.optimizers.SGD):
    """SGD with momentum, decoupled weight decay, and a multiplier on the learning rate of each variable.

    Args:
        learning_rate, weight_decay, multipliers: As in `LayerwiseAdamW`.
        momentum: Share of the last step that is taken again, in [0, 1]. Defaults to 0.9.
        name: The optimizer's name.

    The momentum is an average of gradients, which each step multiplies by its own rate (as in PyTorch), so that it can
    be carried to a phase with another rate; at a constant rate the steps are those of `keras.optimizers.SGD`.

    Example:
        >>> optimizer = LayerwiseSGD(1e-2, multipliers={"stem/kernel": 0.1})
        >>> LayerwiseSGD.from_config(optimizer.get_config()).multipliers
        {'stem/kernel': 0.1}

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101 (SGDW).
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        weight_decay: float = 0.0,
        multipliers: Mapping[str, float] | None = None,
        momentum: float = 0.9,
        name: str = "layerwise_sgd",
        **base_config: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum, name=name, **base_config
        )
        self._layerwise(multipliers)

    def _step(self, gradient: tf.Tensor, variable: keras.Variable, rate: tf.Tensor) -> None:
        step = keras.ops.cast(gradient, variable.dtype)
        if self.momentum:
            average = self.momentums[self._get_variable_index(variable)]
            self.assign(average, self.momentum * average + step)
            step = step + self.momentum * average if self.nesterov else average
        self.assign_sub(variable, rate * step)

    def _slots(self) -> Sequence[Sequence[keras.Variable]]:
        return (self.momentums,) if self.momentum else ()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multipliers": self.multipliers}
