"""Numbers that no training could survive, or nobody could use: found before the first step and before a save."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tftransfer.data import Examples
from tftransfer.errors import InputError
from tftransfer.tasks import Task

_NAMED = 3  # examples that are named
_AT_ONCE = 64  # pictures that are looked at together


def named(names: Sequence[str]) -> str:
    """Name the first few of several.

    Example:
        >>> named("abcde")
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def check_examples(task: Task, examples: Examples, split: str) -> None:
    """Refuse examples whose targets, weights or pixels no loss could be computed from.

    Pixels are looked at where they are not whole numbers, which are always finite. Those that `data.load` gives are not
    even read: a run that finds all features in files never decodes its pictures.

    Args:
        task: What the targets mean.
        examples: One split.
        split: What it is called.

    Raises:
        InputError: If there are as many targets or weights as examples; if a class number is not one of the task's, a
            number is not finite, a target of several classes lies outside [0, 1], or a weight is negative or not
            finite. It names the first examples.
    """
    count, outputs, targets = len(examples), task.num_outputs, np.asarray(examples.targets)
    for name, values in (("targets", targets), ("weights", np.asarray(examples.weights))):
        if len(values) != count:
            raise InputError(f"the {split} split has {count} examples, but {len(values)} {name}: give one for each")
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        bad = (targets < 0) | (targets >= outputs)
        expected = f"a class number from 0 to {outputs - 1}, as the task has {outputs} classes"
    else:
        bad, expected = ~_finite_rows(targets), "a finite number"
    _refuse(bad, examples, split, "label" if targets.ndim == 1 else "target", targets, expected)
    if task.kind == "multi_label":
        _refuse(~_rows((targets >= 0) & (targets <= 1)), examples, split, "target", targets, "numbers from 0 to 1")
    weights = np.asarray(examples.weights)
    bad_weights = ~np.isfinite(weights) | (weights < 0)
    _refuse(bad_weights, examples, split, "weight", weights, "a finite number from 0")
    _check_pixels(examples, split)


def check_weights(model: keras.Model, what: str = "model") -> None:
    """Refuse a model with a weight that is not finite.

    Args:
        model: Any Keras model.
        what: What it is called. Defaults to `"model"`.

    Raises:
        InputError: If there is one; it names the variable.
    """
    for variable in model.variables:
        values = np.asarray(keras.ops.convert_to_numpy(variable))
        if np.issubdtype(values.dtype, np.integer) or values.dtype.kind in "bOSU":
            continue
        bad = int(np.size(values) - np.isfinite(values.astype(np.float32)).sum())
        if bad:
            raise InputError(
                f"`{what}` has weights that are not finite: {bad} of {np.size(values)} numbers of {variable.path!r}; "
                "load weights that are, or train it anew at a lower rate"
            )


def check_outputs(answer: Callable[[tf.Tensor], tf.Tensor], batches: tf.data.Dataset, names: Sequence[str]) -> None:
    """Refuse a network that does not give finite numbers for some examples, which nothing could be compared on.

    Args:
        answer: From a batch of inputs to outputs, `(batch, outputs)`.
        batches: Of `(inputs, targets, weights)`, in the order of the names.
        names: Of the examples.

    Raises:
        InputError: If there are such examples; it names the first ones.
    """
    finite = [_finite_rows(np.asarray(answer(inputs))) for inputs, _, _ in batches]
    bad = np.flatnonzero(~np.concatenate(finite)).tolist()
    if bad:
        raise InputError(
            f"the network's outputs are not finite for {len(bad)} of {len(names)} validation examples: "
            f"{named([names[number] for number in bad])}. Look at those, or at the network's weights and precision"
        )


def _check_pixels(examples: Examples, split: str) -> None:
    pictures = examples.pictures
    if not len(pictures) or pictures.checked or tf.as_dtype(_load(examples, [0]).dtype).is_integer:
        return
    bad = np.zeros(len(pictures), bool)
    for start in range(0, len(pictures), _AT_ONCE):
        numbers = list(range(start, min(start + _AT_ONCE, len(pictures))))
        bad[start : start + _AT_ONCE] = ~_finite_rows(_load(examples, numbers))
    if bad.any():
        names = named([examples.names[number] for number in np.flatnonzero(bad)])
        raise InputError(
            f"{bad.sum()} of {len(bad)} pictures of the {split} split have pixels that are not finite: {names}. Leave "
            "them out, or put a number there"
        )


def _load(examples: Examples, numbers: Sequence[int]) -> np.ndarray:
    if examples.pictures.at_once:
        return np.asarray(examples.pictures.load(tf.constant(numbers, tf.int64)))
    return np.stack([np.asarray(examples.pictures.load(tf.constant(number, tf.int64))) for number in numbers])


def _refuse(bad: np.ndarray, examples: Examples, split: str, what: str, values: np.ndarray, expected: str) -> None:
    """Name the first examples that are marked, if there are any."""
    numbers = np.flatnonzero(bad)
    if len(numbers):
        first = [f"{examples.names[number]} has {values[number].tolist()}" for number in numbers]
        raise InputError(
            f"each {what} must be {expected}; in the {split} split {len(numbers)} of {len(bad)} are not: {named(first)}"
        )


def _finite_rows(values: np.ndarray) -> np.ndarray:
    return _rows(np.isfinite(values.astype(np.float32)))


def _rows(holds: np.ndarray) -> np.ndarray:
    """Return `(n,)` booleans, whether something holds for all of a row."""
    return np.asarray(holds.reshape(len(holds), -1).all(axis=1))
