"""The learning rate of a phase, step by step."""

from __future__ import annotations

from typing import Any

import keras

from tftransfer.strategies import Phase

RANGE = 1e6  # from the first to the last rate of an exponential rise
START = 25.0  # a cycle begins at the peak divided by this, as in Smith & Topin's code


@keras.saving.register_keras_serializable("tftransfer")
class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    """Rise along a cosine from a 25th of the peak, then fall along another to zero.

    Args:
        peak: The highest rate.
        steps: Of the whole phase.
        warmup_steps: In which the rate rises.

    Example:
        >>> [round(float(OneCycle(0.1, 4, 2)(step)), 3) for step in range(5)]
        [0.004, 0.052, 0.1, 0.05, 0.0]

    Source: Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120; along cosines as in fastai.
    """

    def __init__(self, peak: float, steps: int, warmup_steps: int) -> None:
        super().__init__()
        self.peak, self.steps, self.warmup_steps = peak, steps, warmup_steps

    def __call__(self, step: Any) -> Any:
        ops = keras.ops
        step = ops.cast(step, "float32")
        risen = ops.clip(step / max(self.warmup_steps, 1), 0.0, 1.0)
        fallen = ops.clip((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 0.0, 1.0)
        low = self.peak / START
        rising = self.peak + (low - self.peak) * (1 + ops.cos(risen * 3.141592653589793)) / 2
        falling = self.peak * (1 + ops.cos(fallen * 3.141592653589793)) / 2
        return ops.where(step < self.warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps}


class Scaled(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times a factor that may change on the way.

    Args:
        schedule: The schedule.
        factor: A scalar variable.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, factor: Any) -> None:
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def __call__(self, step: Any) -> Any:
        return self.schedule(step) * keras.ops.convert_to_tensor(self.factor)


def learning_rate(phase: Phase, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a phase's learning rate per step.

    Args:
        phase: The phase.
        steps: Steps of the whole phase.

    Example:
        >>> rate = learning_rate(Phase("probe", learning_rate=0.1, warmup=0.5), steps=4)
        >>> [round(float(rate(step)), 3) for step in range(5)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if phase.schedule == "exponential":
        return keras.optimizers.schedules.ExponentialDecay(phase.learning_rate / RANGE, max(steps - 1, 1), RANGE)
    warmup = round(phase.warmup * steps)
    if phase.schedule == "one_cycle":
        return OneCycle(phase.learning_rate, steps, warmup)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else phase.learning_rate,
        decay_steps=max(steps - warmup, 1),
        alpha=0.0 if phase.schedule == "cosine" else 1.0,
        warmup_target=phase.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
