"""Which depth groups of a network to tune, measured after a probe: by relative gradient norms, and by short trials."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, trainable, training
from tftransfer.data import Data, order
from tftransfer.strategies import Phase
from tftransfer.tasks import Task

SHARES = (0.5, 0.7, 0.9)  # that are tried beside the given one
_EXAMPLES = 512  # that gradients are measured on, at the most


@dataclass(frozen=True)
class Tried:
    """How a set of groups did in a short trial.

    Args:
        groups: Their names, in the order of the network.
        loss: The lowest on validation.
    """

    groups: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Probed:
    """What was measured after a probe.

    Args:
        norms: For each depth group below the head, the norm of the gradient over that of the weights.
        tried: Sets of groups that were tried, the best first; none unless asked for.
    """

    norms: Mapping[str, float]
    tried: tuple[Tried, ...] = ()


def probe_and_measure(
    model: keras.Model,
    task: Task,
    data: Data,
    probe: Phase,
    *,
    trial: Phase | None = None,
    share: float = 0.8,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Probed:
    """Fit a head, measure how large each depth group's gradient is, and try out the sets that this suggests.

    Args:
        model: From a builder; its weights and `trainable` flags are the same afterwards.
        task: What the outputs mean.
        data: The training split is measured, 512 examples of it at the most; validation measures the trials.
        probe: The phase that fits the head first.
        trial: The phase by which a set of groups is tried; its selector is replaced. Defaults to None: no trials.
        share: Of the sum of norms, held by one of the sets that are tried, see `largest`. Defaults to 0.8.
        seed, batch_size, max_steps, cache_dir: As for `fine_tune`.
    """
    train = partial(
        training.fine_tune,
        model,
        task,
        data,
        seed=seed,
        batch_size=batch_size,
        max_steps=max_steps,
        cache_dir=cache_dir,
    )
    with trainable.as_it_was(model):
        train((probe,))
        norms = _relative_norms(model, task, data, batch_size, seed)
        if trial is None:
            return Probed(norms)
        tried = []
        for groups in dict.fromkeys(largest(norms, one) for one in sorted({share, *SHARES})):
            phase = replace(trial, selector=f"groups:{'+'.join(groups)}")
            with trainable.as_it_was(model):
                history = train((phase,))
            tried.append(Tried(groups, min(history["val_loss"])))
    return Probed(norms, tuple(sorted(tried, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf)))


def largest(norms: Mapping[str, float], share: float) -> tuple[str, ...]:
    """Return the fewest names that hold a share of the sum, in the order of the network.

    Example:
        >>> largest({"stem": 1.0, "middle": 5.0, "top": 4.0}, 0.8)
        ('middle', 'top')
    """
    total, held, chosen = sum(norms.values()), 0.0, set()
    for name in sorted(norms, key=lambda name: -norms[name]):
        chosen.add(name)
        held += norms[name]
        if held >= share * total:
            break
    return tuple(name for name in norms if name in chosen)


def _relative_norms(model: keras.Model, task: Task, data: Data, batch_size: int, seed: int) -> dict[str, float]:
    trainable.set_trainable(model, "all")
    gradients = _gradients(model, task, data, batch_size, seed)
    norms = {}
    for group in trainable.all_groups(model)[:-1]:
        variables = [v for name in group.layers for v in model.get_layer(name).weights if v.path in gradients]
        weights = _norm([v.numpy() for v in variables])
        norms[group.name] = _norm([gradients[v.path] for v in variables]) / weights if weights else 0.0
    return norms


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def _gradients(model: keras.Model, task: Task, data: Data, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Return the mean gradient of the loss in inference mode: of kernels and the like, not of offsets."""
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    loss = task.loss(builders.outputs_are_logits(model), data.train.targets)

    @tf.function
    def gradient(pictures: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = loss(targets, model(pictures, training=False), sample_weight=weights)
        return [tf.convert_to_tensor(part) for part in tape.gradient(value, [v.value for v in variables])]

    steps = min(order.steps_per_epoch(len(data.train), batch_size), max(_EXAMPLES // batch_size, 1))
    sums = [np.zeros(v.shape, np.float32) for v in variables]
    batches = order.batches(data.train, batch_size, seed=seed, phase=0, steps=steps)
    traced = gradient.get_concrete_function(*batches.element_spec)
    for batch in batches:
        for total, part in zip(sums, traced(*batch), strict=True):
            total += part.numpy() / steps
    return {v.path: total for v, total in zip(variables, sums, strict=True)}
