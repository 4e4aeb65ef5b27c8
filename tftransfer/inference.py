"""Running a network, or its frozen part, over batches as a graph of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, prefix
from tftransfer.data import Examples, order
from tftransfer.tasks import Task
from tftransfer.trainee import Batch


def predict(model: keras.Model, task: Task, examples: Examples, batch_size: int = 32) -> np.ndarray:
    """Return the task's probabilities (or numbers) for examples, in order, through the graph of constants.

    Args:
        model: A trained model.
        task: What its outputs mean.
        examples: Pictures with random access.
        batch_size: Pictures per batch. Defaults to 32.

    Returns:
        `(n, outputs)` float32.
    """
    infer = prefix.as_constant_function(model)
    from_logits = builders.outputs_are_logits(model)
    batches = order.in_order(examples, batch_size)
    return np.concatenate([task.probabilities(infer(batch[0])[0], from_logits).numpy() for batch in batches])


def through(infer: Callable[[tf.Tensor], list[tf.Tensor]], batches: tf.data.Dataset) -> tf.data.Dataset:
    """Run batches through the frozen part in the input pipeline: outside `fit`, ahead of the training step.

    No Python runs there: a generator's thread would keep an interrupted process from ending. On a machine with GPUs
    the pipeline still runs on the processor.
    """

    def extract(pictures: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> Batch:
        return unpacked(infer(pictures)), targets, weights

    return batches.map(extract, num_parallel_calls=1, deterministic=True).prefetch(tf.data.AUTOTUNE)


def unpacked(tensors: list[Any]) -> Any:
    """Return one tensor as itself, several as a tuple: the way a Keras model takes them."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def even_batch(count: int, batch_size: int, replicas: int) -> int:
    """Return the largest batch size up to `batch_size` whose last batch leaves no device without an example.

    Example:
        >>> even_batch(33, 32, 2)
        31
    """
    sizes = range(min(batch_size, max(count, 1)), 0, -1)
    return next(size for size in sizes if size == 1 or count % size == 0 or count % size >= replicas)
