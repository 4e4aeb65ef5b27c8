"""What a source says about its examples before they are decoded, and how their pictures are reached."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tftransfer.data import audit
from tftransfer.data.examples import Quarantined
from tftransfer.data.images import decode_picture, decode_with_size, resize_picture
from tftransfer.errors import InputError

Refuse = Callable[[InputError], None]
"""What becomes of a fault in a source that does not hide the rest of it."""


def at_once(error: InputError) -> None:
    """Raise a fault, as all but an audit do."""
    raise error


class Reader(Protocol):
    """Random access to pictures as they are stored: from Python with `read`, from a graph with `fetch`."""

    def read(self, number: int) -> Any:
        """Return a picture as it is stored; raises OSError if that is not possible."""
        ...

    def why_unusable(self, stored: Any) -> str | None:
        """Return why a stored picture must not be decoded, or None."""
        ...

    def fetch(self, number: tf.Tensor) -> tf.Tensor:
        """Return a picture as it is stored, inside a graph."""
        ...

    def form(self, stored: Any) -> str | None:
        """Return what `decode` may be told of a stored picture, for a smaller graph."""
        ...

    def decode(self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None) -> tf.Tensor:
        """Turn a stored picture into uint8 `(height, width, 3)`, inside a graph."""
        ...

    def decode_with_size(
        self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Decode a picture, and return its `(height, width)` before that too."""
        ...

    def signature(self) -> tf.TensorSpec:
        """Describe what `fetch` returns."""
        ...

    def subset(self, numbers: Sequence[int]) -> Reader:
        """Return a reader of some of the pictures."""
        ...


class _EncodedReader:
    """What files and encoded pictures in memory share."""

    def why_unusable(self, stored: Any) -> str | None:
        return audit.why_not_a_picture(stored)  # the decoder itself checks the header

    def form(self, stored: Any) -> str | None:
        return audit.form(stored)

    def decode(self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None) -> tf.Tensor:
        return decode_picture(stored, image_size, form)

    def decode_with_size(
        self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return decode_with_size(stored, image_size, form)

    def signature(self) -> tf.TensorSpec:
        return tf.TensorSpec((), tf.string)


def _outside_graphs(values: Any) -> tf.Tensor:
    """Return a tensor that graphs refer to instead of holding it: a graph may not exceed 2 GiB."""
    with tf.init_scope():
        return tf.constant(values)


@dataclass(frozen=True)
class Files(_EncodedReader):
    """Pictures in files, in the order of `paths`."""

    paths: tuple[str, ...]

    def read(self, number: int) -> bytes:
        path = self.paths[number]
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        with open(path, "rb") as file:
            return file.read()

    def fetch(self, number: tf.Tensor) -> tf.Tensor:
        return tf.io.read_file(tf.gather(self._stored, number))

    @cached_property
    def _stored(self) -> tf.Tensor:
        return _outside_graphs([os.fsencode(path) for path in self.paths])  # a name need not be UTF-8

    def subset(self, numbers: Sequence[int]) -> Reader:
        return Files(tuple(self.paths[number] for number in numbers))


@dataclass(frozen=True)
class Encoded(_EncodedReader):
    """Encoded pictures in memory."""

    contents: tuple[bytes, ...]

    def read(self, number: int) -> bytes:
        return self.contents[number]

    def fetch(self, number: tf.Tensor) -> tf.Tensor:
        return tf.gather(self._stored, number)

    @cached_property
    def _stored(self) -> tf.Tensor:
        # TensorFlow copies a tensor of up to 128 elements into the graph, however long its strings are.
        return _outside_graphs([*self.contents, *[b""] * 128])

    def subset(self, numbers: Sequence[int]) -> Reader:
        return Encoded(tuple(self.contents[number] for number in numbers))


@dataclass(frozen=True)
class Arrays:
    """Decoded pictures in memory, uint8 `(n, height, width, 3)`."""

    pictures: np.ndarray

    def read(self, number: int) -> np.ndarray:
        return self.pictures[number]

    def why_unusable(self, stored: Any) -> str | None:
        return None

    def fetch(self, number: tf.Tensor) -> tf.Tensor:
        return tf.gather(self._stored, number)

    @cached_property
    def _stored(self) -> tf.Tensor:
        return _outside_graphs(self.pictures)

    def form(self, stored: Any) -> str | None:
        return None

    def decode(self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None) -> tf.Tensor:
        return resize_picture(stored, image_size)

    def decode_with_size(
        self, stored: tf.Tensor, image_size: tuple[int, int], form: str | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return self.decode(stored, image_size), tf.shape(stored, tf.int64)[:2]

    def signature(self) -> tf.TensorSpec:
        return tf.TensorSpec(self.pictures.shape[1:], tf.uint8)

    def subset(self, numbers: Sequence[int]) -> Reader:
        return Arrays(self.pictures[np.asarray(numbers)])


@dataclass(frozen=True)
class Listing:
    """The examples of a source.

    Args:
        name: What the report calls the source.
        names: One name per example.
        labels: One text per example, as it stands in the source.
        given: The split of each example; `"train"` for all where the source does not say.
        reader: Reaches the pictures, by the example's number.
        classes: The classes in the order that the source states; empty to sort their names.
        several: Whether a label may name several classes, separated by `|`.
        notes: What the user should know.
        what: The source in error messages; defaults to `name`.
        where: Says where an example stands, for error messages; defaults to its name.
        columns: Further cells of a table, by column one text per example. Defaults to none.
        lost: What the source should hold and cannot give, such as damaged records. Defaults to nothing.
    """

    name: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    given: tuple[str, ...]
    reader: Reader
    classes: tuple[str, ...] = ()
    several: bool = False
    notes: tuple[str, ...] = ()
    what: str = ""
    where: Callable[[int], str] | None = None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lost: tuple[Quarantined, ...] = ()

    def place(self, number: int) -> str:
        """Say where an example stands."""
        return self.where(number) if self.where else f"{self.what or self.name}, {self.names[number]}"

    def in_valid_text(self) -> Listing:
        """Return the listing with names and labels that can be written as UTF-8, whatever the file system holds."""
        return replace(
            self,
            name=as_text(self.name),
            names=tuple(map(as_text, self.names)),
            labels=tuple(map(as_text, self.labels)),
            classes=tuple(map(as_text, self.classes)),
            notes=tuple(map(as_text, self.notes)),
            what=as_text(self.what),
            columns={as_text(name): tuple(map(as_text, cells)) for name, cells in self.columns.items()},
        )


def as_text(name: str) -> str:
    r"""Escape what of a name is no text, such as the bytes of a file name in Latin-1; two names stay two.

    Example:
        >>> as_text(os.fsdecode(bytes([99, 97, 102, 0xE9])))
        'caf\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def some(names: list[str], most: int = 3) -> str:
    """Name the first few of many.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
