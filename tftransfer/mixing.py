"""Mixup, cutmix and stochastic depth: what makes training harder in the step itself, never in what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tftransfer.depth import nodes_in_order

Batch = tuple[Any, tf.Tensor, tf.Tensor]


def mix(batch: Batch, key: tf.Tensor, mixup: float, cutmix: float) -> tuple[Any, tf.Tensor, tf.Tensor]:
    """Mix each example of a batch with another one.

    Mixup blends whole inputs; cutmix puts a rectangle of one into the other. Where both are asked for, a coin decides
    in each step. Below a cut in the network it is the features that are mixed (manifold mixup).

    Args:
        batch: Inputs (a tensor or several), targets, weights.
        key: `(2,)` int64, decides partners, shares and rectangles.
        mixup, cutmix: Parameter of the symmetric Beta distribution of the share; 0 for off.

    Returns:
        `(inputs, partners, share)`: mixed inputs, `(batch,)` numbers of the partners, and the scalar share in (0, 1]
        that an example keeps of itself.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; Verma et al. 2019,
    arXiv:1806.05236.
    """
    inputs, targets, _ = batch
    partners = partners_of(tf.shape(targets)[0], key)
    mixed, share = join(inputs, rows(inputs, partners), key, mixup, cutmix)
    return mixed, partners, share


def partners_of(count: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Return `(count,)` numbers of examples, each example's partner.

    Args:
        count: Of examples in the batch.
        key: As for `mix`.
    """
    return tf.argsort(tf.random.stateless_uniform((count,), _fold(key, 0)))


def rows(inputs: Any, numbers: tf.Tensor) -> Any:
    """Return some rows of a tensor, or of each of several."""
    return tf.nest.map_structure(lambda x: tf.gather(x, numbers), inputs)


def join(inputs: Any, others: Any, key: tf.Tensor, mixup: float, cutmix: float) -> tuple[Any, tf.Tensor]:
    """Mix some examples of a batch with their partners, all of them in the way that the batch's key decides.

    Args:
        inputs: A tensor or several.
        others: The partners' inputs, in the same order.
        key, mixup, cutmix: As for `mix`.

    Returns:
        Mixed inputs, and the share that an example keeps of itself.
    """
    if not cutmix:
        return _blend(inputs, others, _share(mixup, key))
    if not mixup:
        return _paste(inputs, others, _share(cutmix, key), key)
    heads = tf.random.stateless_uniform((), _fold(key, 1)) < 0.5
    return tf.cond(
        heads,
        lambda: _blend(inputs, others, _share(mixup, key)),
        lambda: _paste(inputs, others, _share(cutmix, key), key),
    )


def _share(alpha: float, key: tf.Tensor) -> tf.Tensor:
    """Draw from Beta(alpha, alpha)."""
    first, second = (tf.random.stateless_gamma((), _fold(key, number), alpha) for number in (2, 3))
    return first / tf.maximum(first + second, 1e-20)


def _blend(inputs: Any, others: Any, share: tf.Tensor) -> tuple[Any, tf.Tensor]:
    def blended(x: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        own = tf.cast(share, x.dtype)
        return own * x + (1 - own) * other

    return tf.nest.map_structure(blended, inputs, others), share


def _paste(inputs: Any, others: Any, share: tf.Tensor, key: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Put a rectangle of the partner at one relative place into every input; the share is what the grid leaves."""
    centre = tf.random.stateless_uniform((2,), _fold(key, 4))
    half = tf.sqrt(1 - share) / 2
    low, high = tf.clip_by_value(centre - half, 0, 1), tf.clip_by_value(centre + half, 0, 1)

    def pasted(x: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        return tf.where(_inside(x, low, high), other, x)

    left = 1 - tf.reduce_mean(tf.cast(_inside(tf.nest.flatten(inputs)[0], low, high), tf.float32))
    return tf.nest.map_structure(pasted, inputs, others), left


def _inside(x: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """Return `(1, rows, columns, 1)` booleans."""
    rows, columns = (
        (tf.range(side, dtype=tf.float32) + 0.5) / tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(x)[1:3])
    )
    in_rows = (rows >= low[0]) & (rows < high[0])
    in_columns = (columns >= low[1]) & (columns < high[1])
    return (in_rows[:, None] & in_columns[None, :])[None, :, :, None]


def _fold(key: tf.Tensor, number: int) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(key, number)


def residual_branches(network: keras.Model) -> dict[int, int]:
    """Find the additions that join a branch to its own input; they are layers or, in ConvNeXt, plain operations.

    Args:
        network: A functional model.

    Returns:
        From the id of each such operation to the place of the branch among its two inputs.
    """
    behind: dict[int, frozenset[int]] = {}  # of each tensor: the operations with weights that it comes from
    branches = {}
    for node in nodes_in_order(network):
        before = [behind.get(id(tensor), frozenset()) for tensor in node.input_tensors]
        if type(node.operation).__name__ == "Add" and len(before) == 2 and before[0] != before[1]:
            first, second = before
            if first < second or second < first:
                branches[id(node.operation)] = int(first < second)
        own = frozenset({id(node.operation)}) if getattr(node.operation, "weights", ()) else frozenset()
        behind.update((id(tensor), own.union(*before)) for tensor in node.outputs)
    return branches


def drop_branch(branch: int, rate: float, key: tf.Tensor) -> Callable[..., tf.Tensor]:
    """Return an addition that leaves out the branch for some examples and makes up for it in the others.

    Args:
        branch: Place of the branch among the inputs of the addition.
        rate: Share of examples without the branch, in [0, 1).
        key: `(2,)` int64.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def joined(*tensors: Any) -> tf.Tensor:
        both = tf.nest.flatten(tensors)
        x = both[branch]
        shape = tf.concat([tf.shape(x)[:1], tf.ones(len(x.shape) - 1, tf.int32)], axis=0)
        keeps = tf.random.stateless_uniform(shape, key) >= rate
        both[branch] = tf.where(keeps, x / (1 - rate), tf.zeros_like(x))
        return both[0] + both[1]

    return joined
