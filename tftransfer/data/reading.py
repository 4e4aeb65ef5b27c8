"""Read every picture of a source once: its hash, whether it can be used, and its pixels if there is room for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import tensorflow as tf

from tftransfer import __version__
from tftransfer.data import audit, images
from tftransfer.data.examples import Quarantined
from tftransfer.data.listing import Listing, Reader
from tftransfer.data.room import InFile, InMemory, room
from tftransfer.errors import InputError
from tftransfer.shelf import Shelf

_NAMED_IN_NOTE = 5
_OUTCOMES = "pictures"  # the shelf's key for what came of reading a whole source
_LOOKED_AT = 24  # rows and columns that the spread of pixels is taken of
_LITTLE = 8.0  # spread below which all are taken


@dataclass(frozen=True)
class Outcome:
    """What came of reading one picture: its content's hash, why it is unusable, and what else is seen of it."""

    digest: str
    reason: str | None = None
    misnamed: bool = False
    size: tuple[int, int] | None = None
    spread: float | None = None


class _Pixels:
    """All pictures of a source, decoded: by `read_all`, or else when they are first asked for."""

    def __init__(self, listing: Listing, image_size: tuple[int, int], kept_in: InMemory | InFile) -> None:
        self._listing, self._decode, self._room = listing, _decoder(listing.reader, image_size), kept_in
        self.known: list[Outcome] | None = None  # what a run before came to, unless pictures were decoded since

    def read_all(self) -> list[Outcome]:
        """Read, check and decode every picture."""
        return _in_threads(lambda number: _read_one(self._listing, number, self._decode, self._room), self._listing)

    @cached_property
    def ready(self) -> InMemory | InFile:
        """Where the pictures are, all decoded."""
        with tf.init_scope():
            if self.known:
                for number, (now, before) in enumerate(zip(self.read_all(), self.known, strict=True)):
                    if now != before:
                        raise InputError(f"{self._listing.place(number)} has changed since the run began")
        return self._room


@dataclass(frozen=True)
class Read:
    """What came of reading: what is usable, its hashes and, if there is room, the pixels of all."""

    usable: np.ndarray
    hashes: tuple[str, ...]
    pixels: _Pixels | None
    quarantined: tuple[Quarantined, ...]
    notes: tuple[str, ...]
    image_size: tuple[int, int]
    outcomes: tuple[Outcome, ...]


def read_all(listing: Listing, image_size: tuple[int, int], budget: int, shelf: Shelf | None = None) -> Read:
    """Read and check every picture once, and decode it, unless a shelf knows what would come of that."""
    place = room(len(listing.names), image_size, budget, shelf.folder if shelf else None)
    pixels = _Pixels(listing, image_size, place) if place else None
    name = _digest_of_all(listing) if shelf else ""
    outcomes = _remembered(shelf, name) if shelf else None
    if pixels:
        pixels.known = outcomes
    if outcomes is None:
        outcomes = pixels.read_all() if pixels else _checked(listing, image_size)
        if shelf:
            shelf.put(_OUTCOMES, name, json.dumps([dataclasses.astuple(outcome) for outcome in outcomes]).encode())
    usable = np.array([number for number, outcome in enumerate(outcomes) if outcome.reason is None], int)
    quarantined = [Quarantined(listing.names[n], o.reason) for n, o in enumerate(outcomes) if o.reason is not None]
    misnamed = [listing.names[number] for number, outcome in enumerate(outcomes) if outcome.misnamed]
    hashes = tuple(outcomes[number].digest for number in usable)
    notes = (*_misnamed_note(misnamed), *(shelf.notes if shelf else ()))
    return Read(usable, hashes, pixels, tuple(quarantined), notes, image_size, tuple(outcomes))


def _checked(listing: Listing, image_size: tuple[int, int]) -> list[Outcome]:
    """Read and decode every picture, and keep none."""
    decode = _decoder(listing.reader, image_size)
    return _in_threads(lambda number: _read_one(listing, number, decode, None), listing)


def _in_threads(read: Callable[[int], Any], listing: Listing) -> list[Any]:
    """Call a function for each picture's number, in one more thread than there are processors: one is often reading."""
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        return list(pool.map(read, range(len(listing.names))))


def _digest_of_all(listing: Listing) -> str:
    """Hash names and contents of all pictures, and what decodes them."""
    digest = hashlib.sha256(f"{__version__} {tf.__version__} {images.MAX_PIXELS} with sizes".encode())
    for name, own in zip(listing.names, _in_threads(lambda number: _content(listing, number), listing), strict=True):
        digest.update(f"{name}\0{own}\n".encode())
    return digest.hexdigest()


def _content(listing: Listing, number: int) -> str:
    try:
        return _digest(listing.reader.read(number))
    except OSError as error:
        return str(error)


def _remembered(shelf: Shelf, name: str) -> list[Outcome] | None:
    payload = shelf.get(_OUTCOMES, name)
    return None if payload is None else [_from_json(*outcome) for outcome in json.loads(payload)]


def _from_json(
    digest: str, reason: str | None, misnamed: bool, size: list[int] | None, spread: float | None
) -> Outcome:
    return Outcome(digest, reason, misnamed, (size[0], size[1]) if size else None, spread)


def _decoder(reader: Reader, image_size: tuple[int, int]) -> Callable[[Any], tuple[tf.Tensor, tf.Tensor]]:
    """Return a function for several threads, which traces one graph for each format that occurs.

    It gives a picture, and the size that it had before.
    """
    traced: dict[str | None, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]] = {}
    tracing = threading.Lock()

    def decode(stored: Any) -> tuple[tf.Tensor, tf.Tensor]:
        form = reader.form(stored)
        with tracing:
            if form not in traced:
                decoding = partial(reader.decode_with_size, image_size=image_size, form=form)
                function = tf.function(decoding, autograph=False)
                traced[form] = function.get_concrete_function(reader.signature())
        return traced[form](tf.constant(stored))

    return decode


def _spread(picture: np.ndarray) -> float:
    """Return the standard deviation of some hundred pixels, of the channel where it is largest; if small, of all."""
    down, across = (max(side // _LOOKED_AT, 1) for side in picture.shape[:2])
    some = picture[down // 2 :: down, across // 2 :: across].reshape(-1, 3).astype(np.float32)
    # Half of the time of `std`, and as exact as a large spread needs.
    variance = np.einsum("ij,ij->j", some, some) / len(some) - (np.einsum("ij->j", some) / len(some)) ** 2
    spread = math.sqrt(max(float(variance.max()), 0.0))
    return round(spread if spread > _LITTLE else float(picture.std(axis=(0, 1)).max()), 2)


def _read_one(
    listing: Listing, number: int, decode: Callable[[Any], tuple[tf.Tensor, tf.Tensor]], place: InMemory | InFile | None
) -> Outcome:
    """Read, check and decode one picture, and keep it if there is room."""
    try:
        stored: Any = listing.reader.read(number)
    except OSError as error:
        return Outcome("", f"cannot be read: {error.strerror or error}")
    digest = _digest(stored)
    reason = listing.reader.why_unusable(stored)
    if reason is not None:
        return Outcome(digest, reason)
    try:
        decoded, size = decode(stored)
    except tf.errors.OpError as error:
        return Outcome(digest, audit.explain(error, bytes(stored)))
    picture = decoded.numpy()
    if place is not None:
        place.put(number, picture)
    is_file = isinstance(stored, bytes) and "." in listing.names[number]
    misnamed = is_file and audit.has_wrong_extension(listing.names[number], stored)
    height, width = size.numpy().tolist()
    return Outcome(digest, None, misnamed, (height, width), _spread(picture))


def _digest(stored: Any) -> str:
    """Return the SHA-256 of a picture as it is stored; of pixels with their shape, as the same may be a turned one."""
    if isinstance(stored, bytes):
        return hashlib.sha256(stored).hexdigest()
    digest = hashlib.sha256(f"{stored.dtype} {stored.shape}".encode())
    digest.update(np.ascontiguousarray(stored).data)
    return digest.hexdigest()


def _misnamed_note(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - _NAMED_IN_NOTE} more" if len(names) > _NAMED_IN_NOTE else ""
    listed = ", ".join(names[:_NAMED_IN_NOTE])
    return (f"{len(names)} files have the extension of another format and were read by content: {listed}{more}",)


def random_access(reader: Reader, read: Read, numbers: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the function from an example's number to its picture: kept (several at once), or decoded anew."""
    stored = tf.constant(read.usable[numbers], tf.int64)
    pixels = read.pixels
    if pixels is not None:
        return lambda index: pixels.ready.read(tf.gather(stored, index))
    return lambda index: reader.decode(reader.fetch(tf.gather(stored, index)), read.image_size)
