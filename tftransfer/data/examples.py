"""What the rest of the toolkit sees of a data set: pictures with random access, and their targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Pictures:
    """Pictures that can be read in any order, inside a TensorFlow graph.

    Args:
        names: One name per picture: the file relative to the source, or such as `"train[12]"`.
        load: Takes a scalar int64 tensor, the picture's index, and returns uint8 `(height, width, 3)`.
        image_size: `(height, width)` of what `load` returns.
        digests: SHA-256 of each picture as it was read, in hexadecimal. Defaults to none: what is computed from the
            pictures is then not kept beyond the run.
        at_once: Whether `load` takes `(n,)` indices as well and returns `(n, height, width, 3)`: pictures that are
            kept decoded. Defaults to False.
        checked: Whether it is known that all pixels are finite, without a look at them. Defaults to False.
    """

    names: tuple[str, ...]
    load: Callable[[tf.Tensor], tf.Tensor]
    image_size: tuple[int, int]
    digests: tuple[str, ...] = ()
    at_once: bool = False
    checked: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def contents(self) -> np.ndarray:
        """One int64 per picture that depends on its content alone, or on its place where that is not known."""
        if not self.digests:
            return np.arange(len(self), dtype=np.int64)
        return np.array([int(digest[:15], 16) for digest in self.digests], np.int64)


@dataclass(frozen=True)
class Examples:
    """One split of a data set.

    Args:
        pictures: The inputs.
        targets: `(n,)` int32 class numbers, `(n, classes)` float32 zeros and ones, or `(n, outputs)` float32.
        weights: `(n,)` float32, the weight of each example in the loss.
    """

    pictures: Pictures
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the pictures, in order."""
        return self.pictures.names

    def subset(self, numbers: np.ndarray) -> Examples:
        """Return those with the given numbers, in their order."""
        pictures = self.pictures
        held = tf.constant(numbers, tf.int64)
        chosen = replace(
            pictures,
            names=tuple(pictures.names[number] for number in numbers),
            load=lambda index: pictures.load(tf.gather(held, index)),
            digests=tuple(pictures.digests[number] for number in numbers) if pictures.digests else (),
        )
        return Examples(chosen, self.targets[numbers], self.weights[numbers])

    def joined(self, others: Examples) -> Examples:
        """Return these, and others of the same image size after them."""
        first, second, count = self.pictures, others.pictures, len(self)

        def load(index: tf.Tensor) -> tf.Tensor:
            here = index < count
            at, beyond = tf.minimum(index, count - 1), tf.maximum(index - count, 0)
            if index.shape.rank == 0:
                return tf.cond(here, lambda: first.load(at), lambda: second.load(beyond))
            return tf.where(here[:, None, None, None], first.load(at), second.load(beyond))

        known = first.digests and second.digests
        both = Pictures(
            first.names + second.names,
            load,
            first.image_size,
            first.digests + second.digests if known else (),
            at_once=first.at_once and second.at_once,
            checked=first.checked and second.checked,
        )
        targets = np.concatenate([self.targets, others.targets])
        return Examples(both, targets, np.concatenate([self.weights, others.weights]))


@dataclass(frozen=True)
class Quarantined:
    """A file that was found but cannot be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one example when it was read.

    Args:
        name: Its name.
        label: Its label, as it stands in the source.
        split: The one that it is in; for what is set aside, that of the source.
        digest: SHA-256 of its content; empty if that cannot be read.
        reason: Why it was set aside. Defaults to None: it is used.
        misnamed: Whether its extension is that of another format. Defaults to False.
        size: `(height, width)` in pixels, before it was resized. Defaults to None: not known.
        spread: Standard deviation of its pixels in [0, 255], of the channel where that is largest. Defaults to None.
        cells: Names and texts of a table's further columns. Defaults to none.
    """

    name: str
    label: str
    split: str
    digest: str = ""
    reason: str | None = None
    misnamed: bool = False
    size: tuple[int, int] | None = None
    spread: float | None = None
    cells: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Data:
    """A data set that is ready for training: three splits at the model's image size.

    Args:
        name: What the report calls it.
        labels: The names of the classes (or of the numbers, for regression), in the order of the outputs.
        train, validation, test: The splits.
        quarantined: Files that were set aside; used + quarantined = found.
        found: How many examples the source lists.
        splits: How each split came to be, for the manifest.
        fingerprint: SHA-256 over names, contents, targets and splits.
        seconds: What reading and decoding took.
        seen: What was seen of each example that was found. Defaults to nothing.
        kind: Of its task. Defaults to `"single_label"`.
    """

    name: str
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    quarantined: tuple[Quarantined, ...] = ()
    found: int = 0
    splits: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    seconds: float = 0.0
    seen: tuple[Seen, ...] = ()
    kind: str = "single_label"
