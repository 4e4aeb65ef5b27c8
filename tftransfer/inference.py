"""Running a network over batches as a graph of constants."""

from __future__ import annotations

import keras
import numpy as np

from tftransfer import builders, prefix
from tftransfer.data import Examples, order
from tftransfer.tasks import Task


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


def even_batch(count: int, batch_size: int, replicas: int) -> int:
    """Return the largest batch size up to `batch_size` whose last batch leaves no device without an example.

    Example:
        >>> even_batch(33, 32, 2)
        31
    """
    sizes = range(min(batch_size, max(count, 1)), 0, -1)
    return next(size for size in sizes if size == 1 or count % size == 0 or count % size >= replicas)
