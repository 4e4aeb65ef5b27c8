"""Averages over weights: along the way (EMA), or between where a phase began and where it ended (WiSE-FT)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from tftransfer.errors import check, is_number

Score = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the weights: validation and the result use it.

    Use it where single steps are noisy: few examples, strong augmentation. It costs one more copy of the weights.

    Args:
        epochs: Over how many epochs it remembers, above 0. Defaults to 4.

    Example:
        >>> round(Ema(2.0).momentum(steps_per_epoch=10), 3)
        0.951

    Source: Polyak & Juditsky 1992, doi:10.1137/0330046.
    """

    epochs: float = 4.0

    def __post_init__(self) -> None:
        check(is_number(self.epochs) and self.epochs > 0, "epochs", "a number above 0", self.epochs)

    def momentum(self, steps_per_epoch: int) -> float:
        """Return the share of the average that stays in each step."""
        return math.exp(-1 / (self.epochs * steps_per_epoch))


@dataclass(frozen=True)
class WiseFt:
    """Interpolate between the weights that the phase began with and the tuned ones.

    Use it after a probe, where the network must not lose what it knew: along the line the old task's accuracy falls
    later than the new one's rises. Of the coefficients whose validation loss chance can't tell from the lowest, the
    one closest to the beginning is taken.

    Args:
        steps: Into how many parts the line is divided, from 1. Defaults to 10.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check(isinstance(self.steps, int) and self.steps >= 1, "steps", "a whole number from 1", self.steps)

    def finish(self, model: keras.Model, start: list[np.ndarray], score: Score) -> float:
        """Set a model to the chosen point of the line from `start` to its present weights.

        Args:
            model: The tuned model.
            start: Its weights when the phase began, as `model.get_weights()` gives them.
            score: Measures the model as it stands: validation loss and its standard error.

        Returns:
            The share of the tuned weights, in [0, 1].
        """
        tuned = model.get_weights()
        shares = [step / self.steps for step in range(self.steps + 1)]
        measured = []
        for share in shares:
            model.set_weights(_between(start, tuned, share))
            measured.append(score())
        chosen = shares[_first_as_good_as_the_best(measured)]
        model.set_weights(_between(start, tuned, chosen))
        return chosen


def _between(start: list[np.ndarray], end: list[np.ndarray], share: float) -> list[np.ndarray]:
    """Interpolate; both ends come out bit for bit, and whole numbers (states of generators) are the end's."""
    if share in (0.0, 1.0):
        return end if share else start
    return [
        (1 - share) * low + share * high if np.issubdtype(high.dtype, np.floating) else high
        for low, high in zip(start, end, strict=True)
    ]


def _first_as_good_as_the_best(measured: list[tuple[float, float]]) -> int:
    losses = [loss if math.isfinite(loss) else math.inf for loss, _ in measured]
    best = min(range(len(losses)), key=losses.__getitem__)
    error = measured[best][1]
    most = losses[best] + (error if math.isfinite(error) else 0.0)
    return next(index for index, loss in enumerate(losses) if loss <= most)
