"""Running a network over batches as a graph of constants."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import psutil
import tensorflow as tf

from tftransfer import builders, constants, features
from tftransfer.data import Examples, order
from tftransfer.data.augment import named
from tftransfer.errors import InputError
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
        milliseconds: What the graph of constants takes for one picture, without making it or reading the picture; None
            if all were found.
    """

    values: np.ndarray
    computed: int
    milliseconds: float | None


def pooled_features(
    network: keras.Model,
    examples: Examples,
    *,
    augmentation: str = "none",
    views: int = 1,
    seed: int = 0,
    chunk: int = features.BATCH,
    shelf: Shelf | None = None,
) -> Features:
    """Compute what a headless network gives for examples: `Pooled`, used once.

    Args:
        network, chunk: As for `Pooled`.
        examples, augmentation, views, seed, shelf: As for calling it.

    Raises:
        InputError: If there is no room for them in memory.
    """
    return Pooled(network, chunk)(examples, augmentation=augmentation, views=views, seed=seed, shelf=shelf)


class Pooled:
    """What a headless network gives, maps averaged over their places; its graph is made once, and only if needed.

    Args:
        network: From `backbones.build`, or any network from pictures to maps or vectors; its weights must not change.
        chunk: How many go through the network at once, see `chunk_of`: training finds them if it takes as many.
            Defaults to 32.
    """

    def __init__(self, network: keras.Model, chunk: int = features.BATCH) -> None:
        output = network.outputs[0]
        if len(output.shape) == 4:
            network = keras.Model(network.inputs, keras.layers.GlobalAveragePooling2D()(output))
        self._network, self._chunk = network, chunk
        self._below = constants.Constants(network, chunk)

    def __call__(
        self,
        examples: Examples,
        *,
        augmentation: str = "none",
        views: int = 1,
        seed: int = 0,
        shelf: Shelf | None = None,
    ) -> Features:
        """Compute the features of examples.

        Args:
            examples: Pictures with random access.
            augmentation: Makes the views. Defaults to `"none"`.
            views: How many of each example, from 1. Defaults to 1.
            seed: Of the augmentation. Defaults to 0.
            shelf: Where they are kept beyond the run. Defaults to None.

        Raises:
            InputError: If there is no room for them in memory.
        """
        below = _Clocked(self._below)
        key = features.digest_of(self._network, self._chunk) if shelf else ""
        room = features.Room(psutil.virtual_memory().available, shelf)
        kept = features.keep(below, examples, named(augmentation), views=views, seed=seed, room=room, key=key)
        if kept is None:
            count = f"{views} views of {len(examples)} pictures" if views > 1 else f"{len(examples)} pictures"
            raise InputError(
                f"the features of {count} do not fit into memory: take fewer, or a network that gives fewer"
            )
        numbers = tf.range(len(examples), dtype=tf.int64)
        values = np.stack([kept.read(numbers, tf.constant(view, tf.int64))[0] for view in range(views)])
        return Features(values, kept.computed, below.milliseconds)


class _Clocked:
    """Constants with nothing below them whose time per picture is measured, batch by batch, once the graph is made."""

    def __init__(self, constant: constants.Constants) -> None:
        self._constant, self.outputs = constant, constant.outputs
        self._seconds: list[float] = []

    def __call__(self, batch: tf.Tensor) -> list[tf.Tensor]:
        return self.after([batch])

    def after(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        self._constant.make()
        began = time.monotonic()
        found = self._constant.after(inputs)
        _ = [tensor.numpy() for tensor in found]  # a GPU answers before it is done
        self._seconds.append((time.monotonic() - began) / len(inputs[0]))
        return found

    @property
    def milliseconds(self) -> float | None:
        """The median over batches, as the first one also sets up the graph, and the last one may be small."""
        return 1000 * float(np.median(self._seconds)) if self._seconds else None


def chunk_of(batch_size: int, replicas: int = 1) -> int:
    """Return how many examples go through the frozen part at once: what a device gets of a batch, if that is few.

    Args:
        batch_size: Examples per step over all devices.
        replicas: How many devices there are. Defaults to 1.

    Example:
        >>> chunk_of(16), chunk_of(128), chunk_of(32, 2)
        (16, 32, 16)
    """
    return min(math.ceil(batch_size / replicas), features.BATCH)
