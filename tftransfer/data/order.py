"""The order of examples as a function of (seed, phase, step): any step needs none before it."""

from __future__ import annotations

import tensorflow as tf

from tftransfer.data.augment import Augmentation, augment, named
from tftransfer.data.examples import Examples
from tftransfer.errors import InputError

# How many pictures of one batch are read at the same time.
_PARALLEL_PICTURES = 8


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return how many batches an epoch has; the last one may be smaller.

    Example:
        >>> steps_per_epoch(10, 4)
        3
    """
    return -(-count // batch_size)


def batch_indices(count: int, batch_size: int, seed: int, phase: int, step: int | tf.Tensor) -> tf.Tensor:
    """Return which examples make up a step's batch.

    Every example comes exactly once per epoch, in an order that differs per epoch and phase. Works inside a
    graph.

    Args:
        count: Number of examples, from 1.
        batch_size: Examples per batch, from 1.
        seed: The run's seed, from 0.
        phase: Number of the phase, from 0.
        step: Number of the step in its phase, from 0; an int or a scalar tensor.

    Returns:
        `(batch_size,)` int64, fewer for the last batch of an epoch.

    Example:
        >>> sorted(int(i) for step in range(2) for i in batch_indices(5, 3, seed=0, phase=0, step=step))
        [0, 1, 2, 3, 4]
    """
    step = tf.cast(step, tf.int64)
    steps = steps_per_epoch(count, batch_size)
    epoch, place = step // steps, step % steps
    positions = tf.range(place * batch_size, tf.minimum((place + 1) * batch_size, count), dtype=tf.int64)
    key = _epoch_key(seed, phase, epoch)
    shuffled = tf.random.experimental.index_shuffle(positions, key, tf.constant(count - 1, tf.int64))
    return tf.ensure_shape(shuffled, (None,))


def batches(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    phase: int,
    steps: int,
    start: int = 0,
    augmentation: str | Augmentation = "none",
) -> tf.data.Dataset:
    """Return the training batches of a phase, from any step on, the same as a run from the beginning has.

    Args:
        examples: The training split.
        batch_size: Examples per batch, from 1.
        seed: Decides order and augmentation.
        phase: Number of the phase, from 0.
        steps: Number of batches.
        start: The first step, from 0. Defaults to 0.
        augmentation: An `Augmentation` or the name of one. Defaults to `"none"`.

    Returns:
        A data set of `(pictures, targets, weights)`: pictures float32 `(batch, height, width, 3)` in [0,
        255].

    Raises:
        InputError: If there are no examples or the augmentation is not known.
    """
    count = _checked_count(examples, batch_size)
    policy = named(augmentation)
    per_epoch = steps_per_epoch(count, batch_size)

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        chosen = batch_indices(count, batch_size, seed, phase, step)
        return _read(examples, chosen, policy, _epoch_key(seed, phase, step // per_epoch))

    return _mapped(tf.data.Dataset.range(start, start + steps), batch)


def in_order(examples: Examples, batch_size: int) -> tf.data.Dataset:
    """Return each example once, in order and as it is, for evaluation.

    Args:
        examples: Any split.
        batch_size: Examples per batch, from 1; the last batch may be smaller.

    Returns:
        A data set of `(pictures, targets, weights)` as `batches` gives.

    Raises:
        InputError: If there are no examples.
    """
    count = _checked_count(examples, batch_size)

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        chosen = tf.range(step * batch_size, tf.minimum((step + 1) * batch_size, count), dtype=tf.int64)
        return _read(examples, chosen, named("none"), tf.zeros(2, tf.int64))

    return _mapped(tf.data.Dataset.range(steps_per_epoch(count, batch_size)), batch)


def _epoch_key(seed: int, phase: int, epoch: tf.Tensor) -> tf.Tensor:
    """Return `(2,)` int64 that differs for every seed, phase and epoch."""
    key = tf.constant([seed, phase], tf.int64)
    return tf.random.experimental.stateless_fold_in(key, epoch)


def _checked_count(examples: Examples, batch_size: int) -> int:
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
    if not len(examples):
        raise InputError("`examples` must hold at least one example. Received none")
    return len(examples)


def _mapped(steps: tf.data.Dataset, batch: object) -> tf.data.Dataset:
    return steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def _read(
    examples: Examples, chosen: tf.Tensor, policy: Augmentation, key: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Read the chosen examples; an example's augmentation depends on the key and its own number alone."""

    def picture(index: tf.Tensor) -> tf.Tensor:
        own_key = tf.random.experimental.stateless_fold_in(key, index)
        return augment(examples.pictures.load(index), policy, own_key)

    pictures = tf.map_fn(
        picture,
        chosen,
        fn_output_signature=tf.TensorSpec((*examples.pictures.image_size, 3), tf.float32),
        parallel_iterations=_PARALLEL_PICTURES,
    )
    with tf.init_scope():  # captured tensors: constants of the graph may not exceed two gigabytes
        targets, weights = tf.constant(examples.targets), tf.constant(examples.weights)
    return pictures, tf.gather(targets, chosen), tf.gather(weights, chosen)
