"""Gradients of a batch, added up over parts of it that are computed one after the other: less of it is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

Part = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[list[Any], tf.Tensor, tf.Tensor]]
"""From numbers of examples, number of the part and its share in the batch to gradients, loss and outputs."""


def added_up(
    part: Part, count: tf.Tensor, parts: int, variables: Sequence[keras.Variable]
) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
    """Compute a batch in parts, in a loop of the graph: what a part took is free before the next one begins.

    Args:
        part: Computes a part; loss and gradients are scaled by its share.
        count: Of examples in the batch, a scalar from 1; the last batch of an epoch may have fewer.
        parts: Into how many it is divided, as evenly as it goes; fewer where it has not as many examples.
        variables: What the gradients are of.

    Returns:
        The sum of gradients (None where no part gives one), the sum of losses, and outputs `(count, outputs)` in order.
    """
    size = -(-count // parts)
    number = -(-count // size)
    connected: list[bool] = []
    shape = tf.TensorShape(None)

    def one(index: tf.Tensor, sums: list[tf.Tensor], loss: tf.Tensor, kept: tf.TensorArray) -> tuple[Any, ...]:
        chosen = tf.range(index * size, tf.minimum((index + 1) * size, count))
        share = tf.cast(tf.shape(chosen)[0], tf.float32) / tf.cast(count, tf.float32)
        gradients, own, outputs = part(chosen, index, share)
        nonlocal shape
        shape = (None, *outputs.shape[1:])
        connected[:] = [gradient is not None for gradient in gradients]
        sums = [
            total if gradient is None else total + tf.ensure_shape(tf.cast(gradient, total.dtype), total.shape)
            for total, gradient in zip(sums, gradients, strict=True)
        ]
        return index + 1, sums, loss + tf.cast(own, tf.float32), kept.write(index, tf.cast(outputs, tf.float32))

    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    kept = tf.TensorArray(tf.float32, number, infer_shape=False)
    _, sums, loss, kept = tf.while_loop(
        lambda index, *_: index < number,
        one,
        (tf.constant(0), zeros, tf.constant(0.0), kept),
        parallel_iterations=1,
    )
    found = [total if holds else None for total, holds in zip(sums, connected, strict=True)]
    return found, loss, tf.ensure_shape(kept.concat(), shape)
