"""A learning-rate range test: raise the rate from step to step, and see where the loss breaks out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import keras
import numpy as np

from tftransfer import schedules, trainable, training
from tftransfer.checks import drawing
from tftransfer.data import Data, order
from tftransfer.errors import InputError, check, is_number
from tftransfer.report import CURVES, Picture
from tftransfer.strategies import Phase
from tftransfer.tasks import Task

_SMOOTHING = 0.9  # of the losses, as in Smith's successors
_BREAKS_OUT = 4.0  # times the lowest loss


@dataclass(frozen=True)
class RateTest:
    """The outcome of a learning-rate range test.

    Args:
        rates: Learning rate of each step, rising.
        losses: Smoothed training loss of each step.
        suggestion: A tenth of the rate at which the loss is lowest: still falling steeply, well below where it
            breaks out.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float

    def picture(self) -> Picture:
        """Draw loss over learning rate, the suggestion marked."""
        drawn = drawing.figure(height=2.6)
        axes = drawing.style(drawn.subplots(), "learning rate", "training loss, smoothed")
        axes.set_xscale("log")
        axes.plot(self.rates, self.losses, color=drawing.BLUE, linewidth=1.5)
        axes.axvline(self.suggestion, color=drawing.ORANGE, linestyle="--", linewidth=1.5)
        caption = f"The dashed line marks {self.suggestion:.2g}, a tenth of the rate with the lowest loss."
        return Picture("Learning-rate range test", drawing.png(drawn), caption, CURVES)


def find_learning_rate(
    model: keras.Model,
    task: Task,
    data: Data,
    phase: Phase | None = None,
    *,
    high: float = 1.0,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> RateTest:
    """Raise the learning rate from step to step until the training loss breaks out, and suggest one well below.

    Args:
        model: Its weights and `trainable` flags are the same afterwards.
        task, data: Only training examples decide.
        phase: What trains and how; its own rate and schedule are not used. Defaults to everything, plainly.
        high: The last rate, above 0; the first is a millionth of it. Defaults to 1.
        steps: How many, at least 10; more than an epoch's are rounded to whole epochs. Defaults to 100.
        seed, batch_size: As for `fine_tune`.

    Returns:
        Rates, losses and the suggestion; `.picture().png` is a plot of them.

    Raises:
        InputError: If the very first loss is not finite.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.
    """
    check(is_number(high) and high > 0, "high", "a number above 0", high)
    check(phase is None or isinstance(phase, Phase), "phase", "a Phase", phase)
    check(isinstance(steps, int) and steps >= 10, "steps", "a whole number from 10", steps)
    check(isinstance(batch_size, int) and batch_size >= 1, "batch_size", "a whole number from 1", batch_size)
    per_epoch = order.steps_per_epoch(len(data.train), batch_size)
    epochs = max(round(steps / per_epoch), 1)
    steps = min(steps, per_epoch) if epochs == 1 else epochs * per_epoch
    ranged = replace(
        phase or Phase("range test", "all"),
        schedule="exponential",
        learning_rate=high,
        warmup=0.0,
        epochs=epochs,
        patience=0,
        average=None,
    )
    watch = _BatchLosses(len(data.train), batch_size)
    with trainable.as_it_was(model):
        training.fine_tune(
            model,
            task,
            data,
            (ranged,),
            callbacks=[watch],
            seed=seed,
            batch_size=batch_size,
            max_steps=steps if epochs == 1 else None,
        )
    if not watch.smoothed:
        raise InputError("the loss of the first step is not finite: look at the pictures, or at the network's outputs")
    rate = schedules.learning_rate(ranged, steps)
    rates = tuple(float(rate(step)) for step in range(len(watch.smoothed)))
    return RateTest(rates, tuple(watch.smoothed), rates[int(np.argmin(watch.smoothed))] / 10)


class _BatchLosses(keras.callbacks.Callback):
    """Collect each batch's loss, smoothed, from Keras' running means, and stop when it breaks out."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__()
        self._count, self._batch_size = count, batch_size
        self._sum = 0.0
        self._average = 0.0
        self.smoothed: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._sum = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        seen = min((batch + 1) * self._batch_size, self._count)
        total = (logs or {}).get("loss", math.nan) * seen
        loss = (total - self._sum) / (seen - batch * self._batch_size)
        self._sum = total
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING ** (len(self.smoothed) + 1))
        if not math.isfinite(smoothed) or (self.smoothed and smoothed > _BREAKS_OUT * min(self.smoothed)):
            self.model.stop_training = True
        else:
            self.smoothed.append(smoothed)
