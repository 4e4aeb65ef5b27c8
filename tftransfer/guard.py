"""Steps whose numbers are not finite: they are skipped and counted, and several in a row lead back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tftransfer.errors import DivergedError
from tftransfer.optimizers import own
from tftransfer.soundness import named
from tftransfer.trainable import is_generator

IN_A_ROW = 5
"""After so many skipped steps in a row training goes back to the best weights so far, at half the rate."""

ROLLBACKS = 3
"""So many times in one phase; the next time training stops."""

_LISTED = 32  # skipped steps whose numbers are remembered, the first ones
_TOLD = 3  # of them that are told, each with its examples
Names = Callable[[int], Sequence[str]]


class _Trained(Protocol):
    """What the guard needs of the model that trains."""

    optimizer: Any
    distribute_strategy: tf.distribute.Strategy

    def set_weights(self, weights: list[np.ndarray]) -> None: ...


@dataclass(frozen=True)
class Skipped:
    """What a phase's guard has counted.

    Args:
        total: How many steps were skipped.
        steps: The numbers of the first ones in the phase, from 0.
        rollbacks: How often training went back.
        rate: The factor on the learning rate that this has led to.
    """

    total: int = 0
    steps: tuple[int, ...] = ()
    rollbacks: int = 0
    rate: float = 1.0

    def sentence(self, names: Names) -> str:
        """Say in plain words what happened; empty if nothing did.

        Args:
            names: From a step's number to the names of its examples.

        Example:
            >>> Skipped(1, (7,)).sentence(lambda step: ["a.jpg", "b.jpg"])
            '1 step was skipped because its loss or gradients were not finite: step 7 (a.jpg, b.jpg)'
        """
        if not self.total:
            return ""
        count, of = ("1 step was", "its") if self.total == 1 else (f"{self.total} steps were", "their")
        told = "; ".join(f"step {step} ({named(names(step))})" for step in self.steps[:_TOLD])
        more = f" and {self.total - _TOLD} more" if self.total > _TOLD else ""
        back = ""
        if self.rollbacks:
            times = "once" if self.rollbacks == 1 else f"{self.rollbacks} times"
            back = f"; training went back to the best weights {times}, at {self.rate:g} of the rate in the end"
        return f"{count} skipped because {of} loss or gradients were not finite: {told}{more}{back}"


class Guard:
    """Keeps steps whose numbers are not finite from changing anything but the number of the step.

    A step with a loss or a gradient that is not finite, on whichever device, leaves weights, moments, moving statistics
    and averages bit for bit; order, schedule and every random choice go on as if it had been taken. What `float16`
    training skips by itself to find its scale of the loss is not counted.

    After `IN_A_ROW` of them in a row the weights are those that `way_back` gives, the moments begin anew and the rate
    is halved from there on; after `ROLLBACKS` times `DivergedError` ends the training.

    Args:
        phase: What the phase is called.
        start: How many of its steps were done by an earlier call. Defaults to 0.
        names: From a step's number in the phase to the names of its examples. Defaults to none.

    Attributes:
        way_back: Gives the weights to go back to, as `set_weights` takes them.
    """

    def __init__(self, phase: str = "", start: int = 0, names: Names = lambda step: ()) -> None:
        self.phase, self.start, self.names = phase, start, names
        self.way_back: Callable[[], list[np.ndarray]] | None = None
        self._in_a_row = _counter(0, "skipped_in_a_row")
        self._total = _counter(0, "skipped")
        self._before = _counter(0, "skipped_before")  # in the epochs that have ended
        self._steps = _counter([-1] * _LISTED, "skipped_steps")
        self._rollbacks = _counter(0, "rollbacks")
        self._fresh_since = _counter(0, "moments_since")
        self.rate = tf.Variable(1.0, trainable=False, dtype=tf.float32, name="rate_factor")

    def counters(self) -> dict[str, tf.Variable]:
        """Return everything that a run needs to go on from here, by name: it sets these variables."""
        return {
            "skipped_in_a_row": self._in_a_row,
            "skipped": self._total,
            "skipped_before": self._before,
            "skipped_steps": self._steps,
            "rollbacks": self._rollbacks,
            "moments_since": self._fresh_since,
            "rate_factor": self.rate,
        }

    def skipped(self) -> Skipped:
        """Return what was counted so far."""
        steps = tuple(int(step) for step in self._steps.numpy() if step >= 0)
        return Skipped(int(self._total.numpy()), steps, int(self._rollbacks.numpy()), float(self.rate.numpy()))

    def sentence(self) -> str:
        """Say in plain words what happened; empty if nothing did."""
        return self.skipped().sentence(self.names)

    def end_epoch(self) -> int:
        """Return how many steps of the epoch were skipped, also before the run was interrupted; the next one begins."""
        total = int(self._total.numpy())
        skipped = total - int(self._before.numpy())
        self._before.assign(total)
        return skipped

    @property
    def too_many(self) -> bool:
        """Whether it is time to go back."""
        return int(self._in_a_row.numpy()) >= IN_A_ROW

    def goes_on(self) -> tf.Tensor:
        """Return the same, inverted, in a graph."""
        return tf.convert_to_tensor(self._in_a_row) < IN_A_ROW

    def apply(
        self,
        optimizer: keras.optimizers.Optimizer,
        gradients: Sequence[Any],
        variables: Sequence[keras.Variable],
        loss: tf.Tensor,
        before: Sequence[tuple[keras.Variable, tf.Tensor]],
    ) -> tf.Tensor:
        """Take a step if its numbers are finite on every device, in a replica's context.

        Args:
            optimizer: It is built.
            gradients, variables: As `apply_gradients` takes them.
            loss: This device's, not scaled.
            before: From `moving_before`, what the step has to leave as it was if it is skipped.

        Returns:
            Whether it was taken, a scalar boolean.
        """
        finite_loss, finite_gradients = _on_every_device(tf.math.is_finite(loss), _finite(gradients))
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        # Where the scale of the loss can still fall it is the scale that was too large.
        overflow = scaled and finite_loss & ~finite_gradients & (tf.convert_to_tensor(optimizer.dynamic_scale) > 1.0)
        fault = ~(finite_loss & finite_gradients)
        fault = fault & ~overflow if scaled else fault

        def take(gradients: Sequence[Any]) -> None:
            self._in_a_row.assign(0)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        def skip(values: Sequence[tf.Tensor]) -> None:
            for (variable, _), value in zip(before, values, strict=True):
                variable.assign(value)
            self._count(tf.cast(optimizer.iterations, tf.int64))
            _pass_over(optimizer)

        def everywhere(strategy: tf.distribute.Strategy, *given: Any) -> None:
            gradients, values, fault, overflow = given
            fault, overflow = (strategy.experimental_local_results(one)[0] for one in (fault, overflow))

            def sound() -> None:
                on_each(strategy, take, gradients)

            def scale_down() -> None:
                optimizer.step_counter.assign(0)
                optimizer.dynamic_scale.assign(optimizer.dynamic_scale * 0.5)
                on_each(strategy, lambda: _pass_over(optimizer))

            def taken() -> None:
                _either(overflow, scale_down, sound) if scaled else sound()

            _either(fault, lambda: on_each(strategy, skip, values), taken)

        values = [value for _, value in before]
        tf.distribute.get_replica_context().merge_call(everywhere, args=(list(gradients), values, fault, overflow))
        return ~fault

    def _count(self, step: tf.Tensor) -> None:
        here = tf.range(_LISTED, dtype=tf.int64) == tf.convert_to_tensor(self._total)
        self._steps.assign(tf.where(here, self.start + step, tf.convert_to_tensor(self._steps)))
        self._total.assign_add(1)
        self._in_a_row.assign_add(1)

    def take_over(self, trained: _Trained) -> None:
        """Tell a model's optimizer from which step on its moments count, before its step is traced."""
        since = int(self._fresh_since.numpy())
        if since:
            own(trained.optimizer).count_from(since)

    def roll_back(self, trained: _Trained) -> None:
        """Go back to the best weights so far, with fresh moments and at half the rate.

        Raises:
            DivergedError: If that was of no use before.
        """
        if self.way_back:
            trained.set_weights(self.way_back())
        if int(self._rollbacks.numpy()) >= ROLLBACKS:
            raise DivergedError(self._told())
        with trained.distribute_strategy.scope():
            own(trained.optimizer).restart()
        self._fresh_since.assign(int(trained.optimizer.iterations.numpy()))
        self._rollbacks.assign_add(1)
        self.rate.assign(self.rate * 0.5)
        self._in_a_row.assign(0)

    def _told(self) -> str:
        return (
            f"phase {self.phase!r} diverged: {IN_A_ROW} steps in a row had a loss or gradients that are not finite, "
            f"and so they had after training had gone back to its best weights {ROLLBACKS} times, at half the rate "
            f"each time; {self.sentence()}. If it is always the same examples, look at them or leave them "
            "out; else lower the learning rate, or compute in float32"
        )


def moving_before(model: keras.Model) -> list[tuple[keras.Variable, tf.Tensor]]:
    """Return what a step in training mode moves beside what trains, and its value now: statistics of normalisation.

    The states of random layers are left out: they go on.
    """
    variables = [
        variable
        for layer in model._flatten_layers()
        if layer.trainable or not isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer._non_trainable_variables
        if not is_generator(variable)
    ]
    return [(variable, tf.identity(tf.convert_to_tensor(variable))) for variable in variables]


def _counter(value: Any, name: str) -> tf.Variable:
    """Return a variable of which each device changes its own copy, all in the same way."""
    return tf.Variable(value, trainable=False, dtype=tf.int64, name=name)


def _finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Return whether all numbers are finite: then so is their sum, unless it leaves float32, which is as bad."""
    parts = [getattr(gradient, "values", gradient) for gradient in gradients if gradient is not None]
    return tf.math.is_finite(tf.add_n([tf.reduce_sum(tf.cast(part, tf.float32)) for part in parts]))


def _on_every_device(*holds: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Return whether something holds on all devices, where it may on some."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return holds
    fails = tf.cast(~tf.stack(holds), tf.float32)
    return tuple(tf.unstack(context.all_reduce(tf.distribute.ReduceOp.SUM, fails) == 0.0, len(holds)))


def on_each(strategy: tf.distribute.Strategy, function: Callable[..., None], *given: Any) -> None:
    """Call a function once for each device, from where all of them are in view."""
    strategy.extended.call_for_each_replica(function, args=given)


def _either(holds: tf.Tensor, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Do one thing or the other."""

    def done(what: Callable[[], None]) -> tf.Tensor:
        what()
        return tf.constant(0)

    tf.cond(holds, lambda: done(then), lambda: done(otherwise))


def _pass_over(optimizer: keras.optimizers.Optimizer) -> None:
    """Let the number of the step go on; averages of weights begin with the weights, if it was the first."""
    inner = own(optimizer)
    if inner.use_ema:
        first = tf.equal(tf.cast(inner.iterations, tf.int64), 0)
        pairs = zip(inner._trainable_variables, inner._model_variables_moving_average, strict=True)
        for variable, average in pairs:
            value, start = tf.convert_to_tensor(average), tf.convert_to_tensor(variable)
            average.assign(tf.where(first, tf.cast(start, value.dtype), value))
    inner.iterations.assign_add(1)
