"""Room for decoded pictures: an array in memory, or a file of the same rows where they do not fit into it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tftransfer.data import shared
from tftransfer.shelf import is_memory

_SPARE = 2**30  # bytes that stay free on the disk


class InMemory:
    """Pictures of one size as an array."""

    def __init__(self, count: int, image_size: tuple[int, int]) -> None:
        self._array = shared.empty((count, *image_size, 3), np.uint8)

    def put(self, number: int, picture: np.ndarray) -> None:
        """Store one picture; several threads may."""
        self._array[number] = picture

    def read(self, numbers: tf.Tensor) -> tf.Tensor:
        """Return the pictures with the given numbers, a scalar or `(n,)`, also inside a graph."""
        return tf.gather(self._tensor, numbers)

    @cached_property
    def _tensor(self) -> tf.Tensor:
        return shared.tensor(self._array)  # not a copy: one for each split would be several times the budget


class Rows:
    """Bytes of one length each in a file without a name, which is gone when the process ends, however it ends.

    Nobody else can damage or remove it. It is read and not mapped, so that a process does not seem to grow by what the
    system keeps of the file.

    Args:
        count: How many rows.
        size: Bytes of each.
        folder: Where the file lies. Defaults to the system's folder for such files.

    Raises:
        OSError: If there is no room, or the folder cannot be written.
    """

    def __init__(self, count: int, size: int, folder: Path | None = None) -> None:
        self._size = size
        self._file = tempfile.TemporaryFile(dir=folder, prefix="tftransfer-")  # noqa: SIM115, as long as this object
        weakref.finalize(self, self._file.close)
        if hasattr(os, "posix_fallocate"):  # so that a full disk is found now
            os.posix_fallocate(self._file.fileno(), 0, max(count * size, 1))

    def put(self, number: int, row: Any) -> None:
        """Store one row, anything with a buffer; several threads may."""
        os.pwrite(self._file.fileno(), row, number * self._size)

    def read(self, numbers: tf.Tensor) -> tf.Tensor:
        """Return the rows with the given numbers, a scalar or `(n,)`, as uint8 `(..., size)`, also inside a graph."""
        alive = weakref.ref(self)  # TensorFlow keeps what it calls until the process ends

        def rows(numbers: Any) -> np.ndarray:
            return alive()._read(numbers)  # type: ignore[union-attr]

        numbers = tf.convert_to_tensor(numbers)
        found = tf.numpy_function(rows, [numbers], tf.uint8, stateful=False)
        return tf.ensure_shape(found, (*numbers.shape, self._size))

    def _read(self, numbers: Any) -> np.ndarray:
        numbers = np.asarray(numbers)
        found = np.empty((numbers.size, self._size), np.uint8)
        for row, number in zip(found, numbers.ravel(), strict=True):
            if os.preadv(self._file.fileno(), [row.data], int(number) * self._size) != self._size:
                raise OSError("a temporary file of pictures or features is shorter than it was")
        return found.reshape(*numbers.shape, self._size)


class InFile:
    """Pictures of one size in `Rows`."""

    def __init__(self, count: int, image_size: tuple[int, int], folder: Path | None) -> None:
        self._shape = (*image_size, 3)
        self._rows = Rows(count, math.prod(self._shape), folder)

    def put(self, number: int, picture: np.ndarray) -> None:
        """Store one picture; several threads may."""
        self._rows.put(number, np.ascontiguousarray(picture).data)

    def read(self, numbers: tf.Tensor) -> tf.Tensor:
        """Return the pictures with the given numbers, a scalar or `(n,)`, also inside a graph."""
        found = self._rows.read(numbers)
        return tf.reshape(found, (*(-1 if side is None else side for side in found.shape[:-1]), *self._shape))


def room(count: int, image_size: tuple[int, int], memory: int, folder: Path | None = None) -> InMemory | InFile | None:
    """Return where pictures can be kept: in memory if they fit, else on the disk if it has the room.

    Args:
        count: How many.
        image_size: `(height, width)`.
        memory: Bytes that they may take.
        folder: Where a file may lie. Defaults to the system's folder for such files.

    Returns:
        None if there is no room.
    """
    size = count * image_size[0] * image_size[1] * 3
    if size <= memory:
        return InMemory(count, image_size)
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        place = folder or Path(tempfile.gettempdir())
        if not is_memory(place) and shutil.disk_usage(place).free >= size + _SPARE:
            return InFile(count, image_size, folder)
    except OSError:  # then they are decoded again and again
        pass
    return None
