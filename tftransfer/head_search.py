"""Try out many linear heads at once on features that are computed once: which rate and weight decay generalise best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tftransfer import schedules, transferability
from tftransfer.errors import check
from tftransfer.strategies import Phase
from tftransfer.tasks import Task

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.1, 1.0, 10.0)
_AT_ONCE = 2**24  # weights of heads that are trained side by side
Numbers = float | Sequence[float]
_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-7  # AdamW's


@dataclass(frozen=True)
class Tried:
    """How one kind of head did on examples that it had not seen.

    Args:
        learning_rate, weight_decay: Of `Phase`.
        loss: The task's, the mean over all examples, each out of its fold.
        error: Standard error of that mean.
    """

    learning_rate: float
    weight_decay: float
    loss: float
    error: float


def search(
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    task: Task,
    phase: Phase,
    *,
    rates: Sequence[float] = RATES,
    decays: Sequence[float] = DECAYS,
    dropout: float = 0.0,
    units: tuple[Numbers, Numbers] = (1.0, 0.0),
    folds: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[Tried, ...]:
    """Train a linear head with every rate and decay on every fold's rest, all of them in one batched product.

    Args:
        features: `(n, d)`, or `(views, n, d)`: each epoch sees one view in turn, or all of them if the phase averages
            views, and the loss is the mean over all. A fold holds out all views of its examples.
        targets, weights: As in `Examples`.
        task: What the targets mean.
        phase: Gives epochs and schedule, and says whether views are averaged.
        rates, decays: What is tried, each with each. Default to `RATES` and `DECAYS`.
        dropout: Share of features that is dropped in each step, in [0, 1). Defaults to 0.
        units: What a head gives is multiplied by the first, and the second is added, as `builders.in_units_of` does.
            Default to 1 and 0.
        folds: From 2; see `transferability.divided`. Defaults to 5.
        batch_size: Examples per step. Defaults to 32.
        seed: Decides folds, first weights, order and dropout. Defaults to 0.

    Returns:
        What was tried, the best first.

    Raises:
        InputError: If features and targets do not fit.
    """
    features = np.asarray(features, np.float32)
    features = features[None] if features.ndim == 2 else features
    fits = features.ndim == 3 and features.shape[1] == len(targets) > 1 and bool(np.isfinite(features).all())
    check(fits, "features", f"finite numbers (n, d) for the {len(targets)} targets, at least 2", features.shape)
    check(0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
    held_out = _folds(targets, folds, seed)
    candidates = [(rate, decay) for rate in rates for decay in decays]
    at_once = max(_AT_ONCE // (len(held_out) * features.shape[2] * task.num_outputs), 1)
    tried: list[Tried] = []
    for start in range(0, len(candidates), at_once):
        heads = _Heads(features, targets, weights, held_out, task, candidates[start : start + at_once], units, seed)
        tried += heads.trained(phase, dropout, batch_size)
    return tuple(sorted(tried, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf))


def _folds(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `(folds, n)`: which examples each fold holds out."""
    check(count >= 2, "folds", "at least 2", count)
    parts = transferability.divided(targets, count, seed)
    held_out = np.zeros((len(parts), len(targets)), np.float32)
    for number, (_, outside) in enumerate(parts):
        held_out[number, outside] = 1
    return held_out


class _Heads:
    """Heads side by side: for each candidate one per fold, `(heads, d, outputs)`; views are one after the other."""

    def __init__(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        held_out: np.ndarray,
        task: Task,
        candidates: Sequence[tuple[float, float]],
        units: tuple[Numbers, Numbers],
        seed: int,
    ) -> None:
        self._candidates, self._outside, self._seed, self._task = candidates, held_out, seed, task
        self._views, self._count, size = features.shape
        self._features = tf.constant(features.reshape(-1, size))
        self._targets = tf.constant(np.concatenate([targets] * self._views))
        self._weights = tf.constant(np.tile(weights * (1 - held_out), (len(candidates), self._views)), tf.float32)
        self._every = tf.constant(weights, tf.float32)
        self._units = [tf.constant(part, tf.float32) for part in units]
        self._loss = task.loss(True, targets)
        count = len(candidates) * len(held_out)
        limit = math.sqrt(6 / (size + task.num_outputs))
        kernel = tf.random.stateless_uniform((1, size, task.num_outputs), (seed, 0), -limit, limit)
        self._kernel = tf.Variable(tf.tile(kernel, (count, 1, 1)))
        self._bias = tf.Variable(tf.zeros((count, 1, task.num_outputs)))
        self._moments = [(tf.Variable(tf.zeros_like(v)), tf.Variable(tf.zeros_like(v))) for v in self._trained()]
        of_each = np.repeat(np.array(candidates, np.float32), len(held_out), axis=0)[:, :, None, None]
        self._rates, self._decays = tf.constant(of_each[:, 0]), tf.constant(of_each[:, 1])

    def _trained(self) -> tuple[tf.Variable, tf.Variable]:
        return self._kernel, self._bias

    def trained(self, phase: Phase, dropout: float, batch_size: int) -> list[Tried]:
        """Train all of them, and measure each on what it has not seen."""
        per_epoch = -(-self._count // batch_size)
        unit = schedules.learning_rate(dataclasses.replace(phase, learning_rate=1.0), per_epoch * phase.epochs)
        step = tf.function(self._step, reduce_retracing=True, autograph=False)
        generator = np.random.default_rng(self._seed)
        for epoch in range(phase.epochs):
            order = generator.permutation(self._count)
            shown = np.arange(self._views) if phase.average_views else np.array([epoch % self._views])
            for place in range(per_epoch):
                number = epoch * per_epoch + place
                chosen = order[place * batch_size : (place + 1) * batch_size]
                places = tf.constant((shown[:, None] * self._count + chosen).ravel())
                step(places, tf.constant(number, tf.int64), tf.cast(unit(number), tf.float32), tf.constant(dropout))
        return self._measured()

    def _step(self, chosen: tf.Tensor, number: tf.Tensor, rate: tf.Tensor, dropout: tf.Tensor) -> None:
        inputs = tf.gather(self._features, chosen)
        keeps = tf.random.stateless_uniform(tf.shape(inputs), tf.stack([self._seed, number])) >= dropout
        inputs = tf.where(keeps, inputs / (1 - dropout), 0.0)
        weights = tf.gather(self._weights, chosen, axis=1)
        with tf.GradientTape() as tape:
            losses = self._losses(inputs, tf.gather(self._targets, chosen)) * weights
            total = tf.reduce_sum(losses / tf.maximum(tf.reduce_sum(weights, axis=1, keepdims=True), 1e-6))
        done = tf.cast(number + 1, tf.float32)
        for variable, gradient, (first, second) in zip(
            self._trained(), tape.gradient(total, self._trained()), self._moments, strict=True
        ):
            first.assign(_FIRST * first + (1 - _FIRST) * gradient)
            second.assign(_SECOND * second + (1 - _SECOND) * tf.square(gradient))
            own = self._rates * rate
            if variable is self._kernel:
                variable.assign_sub(variable * own * self._decays)
            size = own * tf.sqrt(1 - _SECOND**done) / (1 - _FIRST**done)
            variable.assign_sub(size * first / (tf.sqrt(second) + _TINY))

    def _losses(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Return `(heads, n)`."""
        scale, offset = self._units
        logits = (tf.matmul(inputs[None], self._kernel) + self._bias) * scale + offset
        heads, count = logits.shape[0], tf.shape(inputs)[0]
        again = tf.tile(targets, [heads, *[1] * (len(targets.shape) - 1)])
        found = self._loss.call(again, tf.reshape(logits, (-1, logits.shape[-1])))
        return tf.reshape(found, (heads, count))

    def _measured(self) -> list[Tried]:
        every = self._losses(self._features, self._targets).numpy()
        by_view = every.reshape(len(self._candidates), len(self._outside), self._views, self._count)
        losses = by_view.mean(axis=2)
        unseen = (losses * self._outside).sum(axis=1)  # each example out of its fold
        weights = self._every.numpy()
        means = np.average(unseen, axis=1, weights=weights)
        errors = np.sqrt(np.average((unseen - means[:, None]) ** 2, axis=1, weights=weights) / len(weights))
        return [
            Tried(*map(float, (*one, mean, error)))
            for one, mean, error in zip(self._candidates, means, errors, strict=True)
        ]
