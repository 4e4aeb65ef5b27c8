"""Penalties that hold a network near what it knew: added to the loss while a phase trains, never saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer.data import Examples, order
from tftransfer.errors import check, is_number

Term = Callable[[Any, tf.Tensor], tf.Tensor]
"""From the inputs of the part that trains, and its features, to a scalar that is added to the loss."""


@dataclass(frozen=True)
class Source:
    """What a backbone knew before: pictures of its old task, and the linear layer that reads it off the features.

    Args:
        name: What the report calls it.
        examples: Labelled pictures of the old task, for the importance of weights.
        test: Others, on which forgetting is measured.
        kernel: `(features, classes)` float32.
        bias: `(classes,)` float32.
        before: Accuracy of this layer on `test` before tuning, in [0, 1].
    """

    name: str
    examples: Examples
    test: Examples
    kernel: np.ndarray
    bias: np.ndarray
    before: float


@dataclass(frozen=True)
class Subject:
    """What a penalty is prepared for.

    Args:
        body: From the inputs of the part that trains to the features that the head reads.
        below: From pictures to those inputs.
        held: The variables below the head that train.
        examples: Training examples of the new task.
        source: The old task, if known.
        seed: Decides every random choice.
    """

    body: keras.Model
    below: Callable[[tf.Tensor], Any]
    held: tuple[keras.Variable, ...]
    examples: Examples
    source: Source | None
    seed: int


@dataclass(frozen=True)
class L2SP:
    """Pull the weights below the head towards where the phase began: `strength / 2` times the squared distance.

    It takes the place of weight decay there, which would pull to zero at the same time.

    Use it when few examples would carry a pretrained network far away; it needs nothing but the weights.

    Args:
        strength: From 0. Defaults to 0.1.

    Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    arXiv:1802.01483.
    """

    strength: float = 0.1
    replaces_decay = True

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def basis(self, source: Source | None) -> str:
        """Say what the network is held to, for table and report."""
        return "held to the weights that the phase began with"

    def prepare(self, subject: Subject) -> Term:
        """Remember the weights as they are."""
        ones = [1.0] * len(subject.held)
        return _distance(subject.held, ones, self.strength)


@dataclass(frozen=True)
class EWC:
    """Pull each weight towards where the phase began, as strongly as the old task depends on it.

    The importance is the diagonal of the Fisher information: of the old task's answers where the source is known (with
    labels drawn from the answers themselves), else of the features, by random projections of them. It is
    scaled to mean 1, so that `strength` means what it does for `L2SP`.

    Args:
        strength: From 0. Defaults to 0.1.
        examples: How many pictures the importance is measured on, from 1. Defaults to 256.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv:1612.00796.
    """

    strength: float = 0.1
    examples: int = 256
    replaces_decay = True

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        check(isinstance(self.examples, int) and self.examples >= 1, "examples", "a whole number from 1", self.examples)

    def basis(self, source: Source | None) -> str:
        """Say what the network is held to, for table and report."""
        of = f"the old task ({source.name})" if source else "the new pictures' features, as no old task was given"
        return f"held to the weights that the phase began with, by their importance for {of}"

    def prepare(self, subject: Subject) -> Term:
        """Measure the importance of each weight and remember the weights as they are."""
        importance = fisher(subject, self.examples)
        mean = sum(float(tf.reduce_sum(part)) for part in importance) / sum(map(_size, importance))
        return _distance(subject.held, [part / max(mean, 1e-30) for part in importance], self.strength)


@dataclass(frozen=True)
class DistillFromSource:
    """Keep what the old task answers to the new task's pictures: learning without forgetting.

    The network of the phase's beginning is the teacher. With a source its softened answers are kept (the old head stays
    as it is), without one the features themselves.

    Args:
        strength: Weight of the term, from 0. Defaults to 1.
        temperature: Divides the old task's logits, from 1 to 100. Defaults to 2.

    Source: Li & Hoiem 2016, "Learning without Forgetting", arXiv:1606.09282.
    """

    strength: float = 1.0
    temperature: float = 2.0
    replaces_decay = False

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        softens = is_number(self.temperature) and 1 <= self.temperature <= 100
        check(softens, "temperature", "a number from 1 to 100", self.temperature)

    def basis(self, source: Source | None) -> str:
        """Say what the network is held to, for table and report."""
        return f"held to its answers to {source.name}" if source else "held to its features, as no old task was given"

    def prepare(self, subject: Subject) -> Term:
        """Remember the weights as they are: they are the teacher."""
        kept = _kept(subject.held)
        scale = _mean_square(subject) if subject.source is None else 1.0

        def term(inputs: Any, features: tf.Tensor) -> tf.Tensor:
            with keras.StatelessScope(list(zip(subject.held, kept, strict=True))):
                taught = tf.stop_gradient(subject.body(inputs, training=False))
            if subject.source is None:
                taught, features = tf.cast(taught, tf.float32), tf.cast(features, tf.float32)
                return self.strength * tf.reduce_mean(tf.square(features - taught)) / scale
            return self.strength * self._divergence(subject.source, taught, features)

        return term

    def _divergence(self, source: Source, taught: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
        """Return the mean divergence of the softened answers, on the scale of the loss (Hinton's factor)."""
        teacher, student = (
            tf.nn.log_softmax((tf.cast(x, tf.float32) @ source.kernel + source.bias) / self.temperature)
            for x in (taught, features)
        )
        divergence = tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)
        return self.temperature**2 * tf.reduce_mean(divergence)


Penalty = L2SP | EWC | DistillFromSource


def fisher(subject: Subject, count: int) -> list[tf.Tensor]:
    """Return the diagonal Fisher information of each held variable, as a mean over single pictures.

    Args:
        subject: What trains, and on which pictures.
        count: How many pictures at the most; the first ones in the order of the seed.

    Returns:
        One tensor per variable of `subject.held`, of its shape.
    """
    source = subject.source
    examples = source.examples if source else subject.examples
    sums = [tf.Variable(tf.zeros(variable.shape)) for variable in subject.held]
    held = [variable.value for variable in subject.held]

    @tf.function
    def add(picture: tf.Tensor, key: tf.Tensor) -> None:
        inputs = subject.below(picture)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(held)
            features = tf.cast(subject.body(inputs, training=False), tf.float32)
            answer = _drawn_log_likelihood(features, source, key) if source else _projection(features, key)
        for total, gradient in zip(sums, tape.gradient(answer, held), strict=True):
            if gradient is not None:
                total.assign_add(tf.square(tf.convert_to_tensor(gradient)))

    batches = order.batches(examples, 1, seed=subject.seed, phase=0, steps=min(count, len(examples)))
    seen = 0
    for picture, _, _ in batches:
        add(picture, tf.constant([subject.seed, seen], tf.int64))
        seen += 1
    return [total / seen for total in sums]


def _drawn_log_likelihood(features: tf.Tensor, source: Source, key: tf.Tensor) -> tf.Tensor:
    """Return the log-likelihood of a label drawn from the network's own answer (the true Fisher, not the empirical)."""
    logs = tf.nn.log_softmax(features @ source.kernel + source.bias)
    label = tf.random.stateless_categorical(tf.stop_gradient(logs), 1, key)[0, 0]
    return logs[0, label]


def _projection(features: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Project features on a random direction: its squared gradient is, in the mean, the sum over all of them."""
    return tf.reduce_sum(features * tf.random.stateless_normal(tf.shape(features), key))


def _distance(held: Sequence[keras.Variable], importance: Sequence[Any], strength: float) -> Term:
    kept = _kept(held)

    def term(_inputs: Any, _features: tf.Tensor) -> tf.Tensor:
        parts = [
            tf.reduce_sum(weight * tf.square(tf.convert_to_tensor(variable) - start))
            for variable, start, weight in zip(held, kept, importance, strict=True)
        ]
        return strength / 2 * tf.add_n(parts)

    return term


def _mean_square(subject: Subject) -> float:
    """Return the mean square of the features of a few training pictures, which sets the scale of their changes."""
    pictures, _, _ = next(iter(order.in_order(subject.examples, 64)))
    features = tf.cast(subject.body(subject.below(pictures), training=False), tf.float32)
    return float(tf.reduce_mean(tf.square(features))) + 1e-12


def _kept(held: Sequence[keras.Variable]) -> list[tf.Tensor]:
    return [tf.identity(variable.value) for variable in held]


def _size(tensor: tf.Tensor) -> int:
    return math.prod(tensor.shape)


def _check_strength(strength: float) -> None:
    check(is_number(strength) and strength >= 0, "strength", "a number from 0", strength)
