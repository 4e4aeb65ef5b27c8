"""The order of examples as a function of (seed, phase, step): any step needs none before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tftransfer.data.augment import Augmentation, augment, geometry, named
from tftransfer.data.examples import Examples
from tftransfer.errors import InputError, check

# How many pictures of one batch are read at the same time.
_PARALLEL_PICTURES = 8
_VIEWS = 2**31  # stands where a phase's number stands in the seeds of views that all phases share

Read = Callable[[tf.Tensor, tf.Tensor], Any]
"""From numbers of examples, `(n,)` int64, and the epoch to what goes into a model."""


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
    views: int = 0,
    average_views: bool = False,
    read: Read | None = None,
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
        views: How many different views of each example there are, one per epoch in turn, the same in every phase and
            run of this seed; 0 for a new one each epoch. Defaults to 0.
        average_views: Whether a batch holds all views of its examples, one view after the other, so that a mean over it
            is one over them too. Defaults to False: the epoch's alone.
        read: Takes the place of reading pictures, such as `features.Kept.read`. Defaults to None.

    Returns:
        A data set of `(pictures, targets, weights)`: pictures float32 `(batch, height, width, 3)` in [0,
        255], or what `read` gives.

    Raises:
        InputError: If there are no examples, the augmentation is not known, or there are no two views to average.
    """
    count = _checked_count(examples, batch_size)
    check(not average_views or views >= 2, "views", "from 2 where they are averaged", views)
    per_epoch = steps_per_epoch(count, batch_size)
    cheap = read is not None
    read = read or pictures(examples, augmentation, seed=seed, phase=phase, views=views)

    def batch(step: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor]:
        chosen, epoch = batch_indices(count, batch_size, seed, phase, step), step // per_epoch
        if not average_views:
            return read(chosen, epoch), *_answers(examples, chosen)
        return _joined(read, chosen, views), *_answers(examples, tf.tile(chosen, [views]))

    return _mapped(tf.data.Dataset.range(start, start + steps), batch, cheap)


def _joined(read: Read, chosen: tf.Tensor, views: int) -> Any:
    """Read all views of the chosen examples, one view after the other."""
    each = [read(chosen, tf.constant(view, tf.int64)) for view in range(views)]
    return tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *each)


def pictures(
    examples: Examples, augmentation: str | Augmentation = "none", *, seed: int = 0, phase: int = 0, views: int = 0
) -> Read:
    """Return the function that reads pictures: from `(n,)` numbers of examples and the view to float32 pictures.

    Args:
        examples, augmentation, seed, phase, views: As in `batches`. With `views` a picture's view depends on its
            content, the seed and the number of the view alone, wherever it stands among the examples.
    """
    policy, keys = named(augmentation), _keys(examples, seed, phase, views)
    return lambda chosen, view: _read(examples, chosen, policy, *keys(chosen, view))


def geometries(
    examples: Examples, augmentation: str | Augmentation = "none", *, seed: int = 0, phase: int = 0, views: int = 0
) -> Read:
    """Return the function that says where `pictures` takes each pixel from, so that boxes and masks can follow.

    Args:
        examples, augmentation, seed, phase, views: As for `pictures`.

    Returns:
        From `(n,)` int64 numbers of examples and the view to `(n, 8)` float32, one transform each as
        `augment.geometry` describes it.
    """
    policy, keys = named(augmentation), _keys(examples, seed, phase, views)
    row = tf.TensorSpec((8,), tf.float32)

    def read(chosen: tf.Tensor, view: tf.Tensor) -> tf.Tensor:
        key, own = keys(chosen, view)

        def transform(number: tf.Tensor) -> tf.Tensor:
            return geometry(policy, _seed(key, number), examples.pictures.image_size)

        return tf.map_fn(transform, own, fn_output_signature=row)

    return read


def _keys(
    examples: Examples, seed: int, phase: int, views: int
) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return the function from `(n,)` numbers of examples and the view to what decides how they are augmented.

    That is the view's key, and a number for each example.
    """
    if not views:
        return lambda chosen, view: (_epoch_key(seed, phase, view), chosen)
    with tf.init_scope():
        contents = tf.constant(examples.pictures.contents, tf.int64)
    return lambda chosen, view: (_epoch_key(seed, _VIEWS, view % views), tf.gather(contents, chosen))


def _seed(key: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
    """Return the seed of one example's augmentation."""
    return tf.random.experimental.stateless_fold_in(key, own)


def in_order(examples: Examples, batch_size: int, read: Read | None = None) -> tf.data.Dataset:
    """Return each example once, in order and as it is, for evaluation.

    Args:
        examples: Any split.
        batch_size: Examples per batch, from 1; the last batch may be smaller.
        read: As in `batches`. Defaults to None.

    Returns:
        A data set of `(pictures, targets, weights)` as `batches` gives.

    Raises:
        InputError: If there are no examples.
    """
    count = _checked_count(examples, batch_size)
    cheap = read is not None
    read = read or pictures(examples)

    def batch(step: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor]:
        chosen = tf.range(step * batch_size, tf.minimum((step + 1) * batch_size, count), dtype=tf.int64)
        return read(chosen, tf.zeros((), tf.int64)), *_answers(examples, chosen)

    return _mapped(tf.data.Dataset.range(steps_per_epoch(count, batch_size)), batch, cheap)


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


def _mapped(steps: tf.data.Dataset, batch: object, cheap: bool) -> tf.data.Dataset:
    batch = tf.autograph.experimental.do_not_convert(batch)  # nothing to convert, and to look for it takes its time
    if not cheap:
        return steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()  # to plan how it is read would take longer than to read it
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return steps.map(batch).prefetch(2).with_options(options)


def _read(examples: Examples, chosen: tf.Tensor, policy: Augmentation, key: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
    """Read the chosen examples; an example's augmentation depends on the key and its own number alone."""
    if examples.pictures.at_once and policy == Augmentation():
        return tf.cast(examples.pictures.load(chosen), tf.float32)

    def picture(given: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        index, number = given
        return augment(examples.pictures.load(index), policy, _seed(key, number))

    return tf.map_fn(
        picture,
        (chosen, own),
        fn_output_signature=tf.TensorSpec((*examples.pictures.image_size, 3), tf.float32),
        parallel_iterations=_PARALLEL_PICTURES,
    )


def _answers(examples: Examples, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the chosen examples' targets and weights."""
    with tf.init_scope():  # captured tensors: constants of the graph may not exceed two gigabytes
        targets, weights = tf.constant(examples.targets), tf.constant(examples.weights)
    return tf.gather(targets, chosen), tf.gather(weights, chosen)
