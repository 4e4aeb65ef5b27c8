"""Running a network over batches as a graph of constants."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, constants, features
from tftransfer.data import Examples, order
from tftransfer.data.augment import named
from tftransfer.shelf import Shelf
from tftransfer.tasks import Task


def predictor(model: keras.Model, task: Task, batch_size: int = 32) -> Callable[[Examples], np.ndarray]:
    """Return the function from examples to the task's probabilities (or numbers), through one graph of constants.

    Args:
        model: A trained model.
        task: What its outputs mean.
        batch_size: Pictures per batch. Defaults to 32.

    Returns:
        From pictures with random access to `(n, outputs)` float32, in their order.
    """
    infer = constants.as_constant_function(model)
    from_logits = builders.outputs_are_logits(model)

    def predict(examples: Examples) -> np.ndarray:
        batches = order.in_order(examples, batch_size)
        return np.concatenate([task.probabilities(infer(batch[0])[0], from_logits).numpy() for batch in batches])

    return predict


def predict(model: keras.Model, task: Task, examples: Examples, batch_size: int = 32) -> np.ndarray:
    """Return the task's probabilities (or numbers) for examples: `predictor`, used once."""
    return predictor(model, task, batch_size)(examples)


@dataclass(frozen=True)
class Features:
    """What a headless network gives for examples.

    Args:
        values: `(views, n, d)` float32.
        computed: How many views of examples were computed, and not found in files.
        seconds: What computing or finding them took.
    """

    values: np.ndarray
    computed: int
    seconds: float


def pooled_features(
    network: keras.Model,
    examples: Examples,
    *,
    augmentation: str = "none",
    views: int = 1,
    seed: int = 0,
    shelf: Shelf | None = None,
) -> Features:
    """Compute what a headless network gives for examples, maps averaged over their places.

    Args:
        network: From `backbones.build`, or any network from pictures to maps or vectors.
        examples: Pictures with random access.
        augmentation: Makes the views. Defaults to `"none"`.
        views: How many of each example, from 1. Defaults to 1.
        seed: Of the augmentation. Defaults to 0.
        shelf: Where they are kept beyond the run. Defaults to None.
    """
    output = network.outputs[0]
    if len(output.shape) == 4:
        network = keras.Model(network.inputs, keras.layers.GlobalAveragePooling2D()(output))
    below = constants.Constants(network, features.BATCH)
    key = features.digest_of(network) if shelf else ""
    everything, began = features.Room(sys.maxsize, shelf), time.monotonic()
    kept = features.keep(below, examples, named(augmentation), views=views, seed=seed, room=everything, key=key)
    assert kept is not None  # there is room for everything
    numbers = tf.range(len(examples), dtype=tf.int64)
    values = np.stack([kept.read(numbers, tf.constant(view, tf.int64))[0] for view in range(views)])
    return Features(values, kept.computed, time.monotonic() - began)


def even_batch(count: int, batch_size: int, replicas: int) -> int:
    """Return the largest batch size up to `batch_size` whose last batch leaves no device without an example.

    Example:
        >>> even_batch(33, 32, 2)
        31
    """
    sizes = range(min(batch_size, max(count, 1)), 0, -1)
    return next(size for size in sizes if size == 1 or count % size == 0 or count % size >= replicas)
