"""What the frozen part of a network gives for each example and view: computed once, kept in memory or in files."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import keras
import numpy as np
import psutil
import tensorflow as tf

from tftransfer import __version__
from tftransfer.data import Examples, order, shared
from tftransfer.data.augment import Augmentation
from tftransfer.data.room import Rows
from tftransfer.shelf import Shelf

MEMORY_SHARE = 0.25
"""Share of the available memory that the features which a run keeps may take together."""

BATCH = 32  # of examples that are computed at once


class Below(Protocol):
    """A frozen part: `constants.Constants`."""

    outputs: tuple[tf.TensorSpec, ...]

    def __call__(self, batch: tf.Tensor) -> list[tf.Tensor]:
        """Compute the outputs for a batch of pictures."""
        ...

    def after(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Compute the outputs from what the parts below it gave."""
        ...


@dataclass(frozen=True)
class Room:
    """Where features may be kept.

    Args:
        memory: Bytes.
        shelf: Files that outlive the run; None for memory alone.
    """

    memory: int
    shelf: Shelf | None = None


@dataclass(frozen=True)
class Kept:
    """Features that are at hand.

    Args:
        read: From numbers of examples and the epoch to the tensors, inside a graph.
        computed: How many of them were computed, and not found in files.
        size: Bytes of all.
        in_memory: Whether they are held in memory.
    """

    read: Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]
    computed: int
    size: int
    in_memory: bool

    def __str__(self) -> str:
        place = "in memory" if self.in_memory else "in files"
        return f"kept {place}, {self.size / 2**20:,.1f} MB, {self.computed} computed"


def room(shelf: Shelf | None = None, held: Iterable[Kept] = ()) -> Room:
    """Return what room there is now: a share of the memory that is available but for what is held, and some files.

    Args:
        shelf: The files. Defaults to none.
        held: What is kept already, each once or more. Defaults to nothing.
    """
    taken = sum({id(kept.read): kept.size for kept in held if kept.in_memory}.values())
    return Room(int((psutil.virtual_memory().available + taken) * MEMORY_SHARE) - taken, shelf)


def digest_of(frozen: keras.Model, chunk: int = BATCH) -> str:
    """Return the SHA-256 over a network's layers and weights, how it is run, and the versions that run it.

    Layers' names are replaced by their order, as Keras numbers layers anew in each session; what trains makes no
    difference. The code of layers and functions that are not Keras' own is part of it, but not what that calls.

    Returns:
        "" for a network with a layer that Keras cannot describe.
    """
    text = described(frozen)
    if not text:
        return ""
    versions = f"{__version__} {tf.__version__} {keras.__version__}"
    digest = hashlib.sha256(f"{versions} {chunk} {text}".encode())
    for variable in frozen.weights:  # and not the states of random layers, which are off
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def described(network: keras.Model) -> str:
    """Describe a network's layers, numbered as they come, and the code of those that are not Keras' own.

    Returns:
        "" for a network with a layer that Keras cannot describe.
    """
    try:
        found = json.loads(network.to_json())
    except (NotImplementedError, TypeError, ValueError):
        return ""
    for ends in ("input_layers", "output_layers"):  # a single tensor may be in a list of one or not
        found["config"][ends] = keras.tree.flatten(found["config"][ends])
    return json.dumps([_renamed(found, {}), _own_code(network)], sort_keys=True)


def _own_code(network: keras.Model) -> list[str]:
    """Return the code of a network's classes and functions that neither Keras nor TensorFlow defines."""
    operations = {id(one): one for one in (*network._flatten_layers(), *network.operations)}.values()
    kinds = {kind for one in operations for kind in type(one).__mro__}
    defined = [value for kind in kinds for value in vars(kind).values() if _is_own(kind.__module__)]
    held = [value for one in operations for value in vars(one).values()]
    functions = {inspect.unwrap(one) for one in (*defined, *held) if isinstance(one, types.FunctionType)}
    own = {one for one in functions if _is_own(one.__module__ or "")}
    return sorted(f"{one.__qualname__} {_code(one.__code__)}" for one in own)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] not in ("keras", "tensorflow", "tftransfer", "builtins", "functools")


def _code(code: types.CodeType) -> str:
    """Describe what a function does, wherever its text stands."""
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {[_constant(one) for one in code.co_consts]}"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)  # whose order means nothing


_HISTORIES = ("keras_history", "input_layers", "output_layers")  # where layers are named beside their own `name`


def _renamed(described: Any, numbers: dict[str, str], named: bool = True) -> Any:
    """Return a description with layers numbered as they come, and without what trains.

    Args:
        described: Of a network, or a part of that.
        numbers: Names that have come; it is added to.
        named: Whether its `name` is a layer's, and not one that means something. Defaults to True.
    """
    if isinstance(described, list):
        return [_renamed(value, numbers) for value in described]
    if not isinstance(described, dict):
        return described
    named = "DTypePolicy" not in described.get("class_name", "") if "class_name" in described else named
    found = {}
    for key, value in described.items():
        if key in _HISTORIES:
            found[key] = keras.tree.map_structure(lambda part: numbers.get(part, part), value)
        elif key == "name" and named:
            found[key] = numbers.setdefault(value, f"#{len(numbers)}")
        elif key != "trainable":
            found[key] = _renamed(value, numbers, named)
    return found


def keep(
    below: Below,
    examples: Examples,
    augmentation: Augmentation,
    *,
    views: int,
    seed: int,
    room: Room,
    key: str = "",
    lower: Kept | None = None,
) -> Kept | None:
    """Compute what a frozen part gives for every view of every example, or find it in files.

    Args:
        below: The frozen part.
        examples: One split.
        augmentation: Makes the views.
        views: How many of each example, from 1.
        seed: Of the augmentation.
        room: Where they may lie.
        key: Digest of the frozen part; needed for files.
        lower: What the parts below it gave for the same views, if that is kept. Defaults to None.

    Returns:
        None if there is no room.
    """
    rows = tuple(_Row(tuple(output.shape), output.dtype) for output in below.outputs)
    shelf = room.shelf if examples.pictures.digests and key else None
    work = _Work(below, examples, augmentation, views, seed, rows, shelf, key, lower)
    in_memory = work.size <= room.memory
    on_shelf = shelf is not None and work.fits(shelf, 0 if in_memory else work.size)
    if in_memory:
        return (work if on_shelf else dataclasses.replace(work, shelf=None)).in_memory()
    return work.in_files(shelf) if on_shelf and shelf else None


@dataclass(frozen=True)
class _Row:
    """One example's part of one tensor."""

    shape: tuple[int, ...]
    dtype: tf.DType

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    def decoded(self, payloads: tf.Tensor) -> tf.Tensor:
        """Return `(n, size)` bytes as `(n, *shape)` of the type."""
        if self.dtype == tf.bool:
            return tf.reshape(tf.cast(payloads, tf.bool), (-1, *self.shape))
        width = (self.dtype.size,) if self.dtype.size > 1 else ()
        return tf.bitcast(tf.reshape(payloads, (-1, *self.shape, *width)), self.dtype)


@dataclass(frozen=True)
class _Work:
    """Everything that one split's features are computed from; places count view after view."""

    below: Below
    examples: Examples
    augmentation: Augmentation
    views: int
    seed: int
    rows: tuple[_Row, ...]
    shelf: Shelf | None
    key: str
    lower: Kept | None

    @property
    def places(self) -> int:
        """How many examples, times their views."""
        return len(self.examples) * self.views

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.places * self._width

    def fits(self, shelf: Shelf, beside: int) -> bool:
        """Whether a shelf has the room for those that do not lie on it yet, and its disk for some bytes beside them."""
        there = [path for name in self.names if os.path.exists(path := shelf.path(self.key, name))]
        return shelf.make_room(self.places - len(there), self._width, there, beside)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each example's view is called in files."""
        how = "" if self.augmentation == Augmentation() else f"{self.augmentation} {self.seed}"
        kinds = f"{self.examples.pictures.image_size} {' '.join(row.dtype.name for row in self.rows)}"
        return tuple(
            hashlib.sha256(f"{digest} {kinds} {how and f'{how} {view}'}".encode()).hexdigest()
            for view in range(self.views)
            for digest in self.examples.pictures.digests
        )

    def in_memory(self) -> Kept:
        """Hold all of it as one array per tensor."""
        count, missing = len(self.examples), []
        arrays = [shared.empty((self.places, *row.shape), row.dtype.as_numpy_dtype) for row in self.rows]
        for place in range(self.places):
            if (payload := self._payload(place)) is None:
                missing.append(place)
                continue
            for array, row, part in zip(arrays, self.rows, self._parts(payload), strict=True):
                array[place] = np.frombuffer(part, row.dtype.as_numpy_dtype).reshape(row.shape)
        for places, tensors in self._computed(missing):
            for array, tensor in zip(arrays, tensors, strict=True):
                array[places] = tensor
            self._write(places, tensors)
        held = [shared.tensor(array) for array in arrays]

        def read(chosen: tf.Tensor, view: tf.Tensor) -> list[tf.Tensor]:
            return [tf.gather(tensor, chosen + view % self.views * count) for tensor in held]

        return Kept(read, len(missing), self.size, in_memory=True)

    def in_files(self, shelf: Shelf) -> Kept | None:
        """Hold all of it in a file of this process, whatever happens to those on the shelf."""
        try:
            return self._in_file(Rows(self.places, self._width, shelf.folder))
        except OSError as error:
            shelf.note(f"{shelf.folder} has no room for what training reads: {error.strerror or error}")
            return None

    def _in_file(self, file: Rows) -> Kept:
        count, views, kinds, missing = len(self.examples), self.views, self.rows, []
        for place in range(self.places):
            if (payload := self._payload(place)) is None:
                missing.append(place)
            else:
                file.put(place, payload)
        for places, tensors in self._computed(missing):
            for place, payload in self._write(places, tensors):
                file.put(place, payload)

        def read(chosen: tf.Tensor, view: tf.Tensor) -> list[tf.Tensor]:
            payloads = file.read(chosen + view % views * count)
            parts = tf.split(payloads, [row.size for row in kinds], axis=-1)
            return [row.decoded(part) for row, part in zip(kinds, parts, strict=True)]

        return Kept(read, len(missing), self.size, in_memory=False)

    def _payload(self, place: int) -> bytes | None:
        """Return what a file on the shelf holds of an example's view."""
        payload = self.shelf.get(self.key, self.names[place]) if self.shelf else None
        return payload if payload is not None and len(payload) == self._width else None

    @property
    def _width(self) -> int:
        return sum(row.size for row in self.rows)

    def _parts(self, payload: bytes) -> Iterator[bytes]:
        start = 0
        for row in self.rows:
            yield payload[start : start + row.size]
            start += row.size

    def _computed(self, places: Sequence[int]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Compute some places, batch by batch."""
        count = len(self.examples)
        for view in range(self.views):
            own = np.array([place - view * count for place in places if place // count == view], np.int64)
            if not len(own):
                continue
            given = self._from_below(self.lower, own, view) if self.lower else self._from_pictures(own, view)
            for chosen, tensors in given:
                yield chosen + view * count, [tensor.numpy() for tensor in tensors]

    def _from_below(self, lower: Kept, numbers: np.ndarray, view: int) -> Iterator[tuple[np.ndarray, list[tf.Tensor]]]:
        """Compute some examples of one view from what is kept of the parts below."""
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            yield chosen, self.below.after(lower.read(tf.constant(chosen), tf.constant(view, tf.int64)))

    def _from_pictures(self, numbers: np.ndarray, view: int) -> Iterator[tuple[np.ndarray, list[tf.Tensor]]]:
        """Compute some examples of one view from their pictures."""
        for chosen, inputs in self._pictures(numbers, view):
            yield chosen, self.below(inputs)

    def _pictures(self, numbers: np.ndarray, view: int) -> Iterator[tuple[np.ndarray, tf.Tensor]]:
        """Read one view of some examples, batch by batch; where they must be decoded, a batch ahead."""
        pictures = order.pictures(self.examples, self.augmentation, seed=self.seed, views=self.views)
        if self.examples.pictures.at_once and self.augmentation == Augmentation():
            for start in range(0, len(numbers), BATCH):
                chosen = numbers[start : start + BATCH]
                yield chosen, pictures(tf.constant(chosen), tf.constant(view, tf.int64))
            return

        def read(chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return chosen, pictures(chosen, tf.constant(view, tf.int64))

        batches = tf.data.Dataset.from_tensor_slices(numbers).batch(BATCH)
        for chosen, inputs in batches.map(tf.autograph.experimental.do_not_convert(read)).prefetch(2):
            yield chosen.numpy(), inputs

    def _write(self, places: np.ndarray, tensors: list[np.ndarray]) -> list[tuple[int, bytes]]:
        """Put computed rows on the shelf, if there is one, and return them."""
        if self.shelf is None:
            return []
        rows = [(int(place), b"".join(tensor[row].tobytes() for tensor in tensors)) for row, place in enumerate(places)]
        for place, payload in rows:
            self.shelf.put(self.key, self.names[place], payload)
        return rows
