"""A folder of computed tensors that outlives a run: one file per item, checked when read, bounded in size."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import tensorflow as tf

from tftransfer.errors import InputError

LIMIT = 20 * 2**30
"""Bytes that a shelf may take on the disk, unless its user says otherwise."""

_MAGIC = b"tftransfer item\n"
_HEADER = len(_MAGIC) + 24  # length and CRC-32 of what follows, in digits
_USERS = ".in_use"  # holds an empty file KEY.PROCESS for each key that a process reads
_SPARE = 2**28  # bytes that stay free on the disk
PathLike = str | os.PathLike[str]


@dataclass
class Shelf:
    """Items in `FOLDER/KEY/NAME`: the key says how they were computed, the name from what.

    Items are written beside their place and renamed, so that several processes can share a folder and a process that
    is killed leaves whole items only. Nothing is synced to the disk: what a power cut tears is found by its checksum
    and computed again. A shelf that cannot be written says so once and keeps nothing more.

    Args:
        folder: Made when the first item is written.
        limit: Bytes over all keys, above 0; the keys used longest ago are removed first. Defaults to `LIMIT`.

    Example:
        >>> import tempfile
        >>> shelf = Shelf(Path(tempfile.mkdtemp()))
        >>> shelf.put("network", "picture", b"numbers")
        True
        >>> shelf.get("network", "picture"), shelf.get("network", "other")
        (b'numbers', None)
    """

    folder: Path
    limit: int = LIMIT
    notes: list[str] = field(default_factory=list)
    _writes: bool = True

    def path(self, key: str, name: str) -> Path:
        """Return where an item lies, whether it is there or not."""
        return self.folder / key / name[:2] / name

    def get(self, key: str, name: str) -> bytes | None:
        """Return an item, None if it is not there or damaged; a damaged one is noted and removed."""
        path = self.path(key, name)
        try:
            contents = path.read_bytes()
        except OSError:
            return None
        if (payload := _checked(contents)) is not None:
            return payload
        self._note(f"{path} is damaged: computed again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, name: str, payload: bytes) -> bool:
        """Write an item; returns whether it lies there now."""
        if not self._writes:
            return False
        path = self.path(key, name)
        staged = path.with_name(f".{name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                file.write(_header(payload))
                file.write(payload)
            os.replace(staged, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                staged.unlink()
            self._writes = False
            self._note(f"{self.folder} cannot be written ({error.strerror or error}): what is computed is not kept")
            return False
        return True

    def make_room(self, key: str, needed: int) -> bool:
        """Remove the keys that were used longest ago until so many bytes fit; returns whether they do.

        What a living process of this machine has made room for stays.

        Args:
            key: What is about to be written; it counts as used now.
            needed: Bytes that will come.
        """
        own = self.folder / key
        with contextlib.suppress(OSError):
            own.mkdir(parents=True, exist_ok=True)
            os.utime(own)
            (self.folder / _USERS).mkdir(exist_ok=True)
            (self.folder / _USERS / f"{key}.{os.getpid()}").touch()
        in_use = self._in_use()
        sizes = {part: _size(part) for part in self._keys()}
        for part in sorted(sizes, key=_used):
            if sum(sizes.values()) + needed <= self.limit and needed + _SPARE <= self._free():
                break
            if part.name not in in_use:
                shutil.rmtree(part, ignore_errors=True)
                sizes[part] = 0
        fits = sum(sizes.values()) + needed <= self.limit and needed + _SPARE <= self._free()
        if not fits:
            self._note(f"{self.folder} has no room for {needed / 2**20:,.0f} MB within its limit: nothing is kept")
        return fits

    def _in_use(self) -> set[str]:
        """Return the keys that some process has made room for and may still read; marks of ended ones are removed."""
        keys = set()
        for mark in _files(self.folder / _USERS):
            key, _, process = mark.name.rpartition(".")
            if psutil.pid_exists(int(process)):
                keys.add(key)
            else:
                with contextlib.suppress(OSError):
                    mark.unlink()
        return keys

    def _keys(self) -> list[Path]:
        try:
            return [part for part in self.folder.iterdir() if part.is_dir() and part.name != _USERS]
        except OSError:
            return []

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return 0

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def payload_of(path: tf.Tensor) -> tf.Tensor:
    """Read an item's payload inside a graph, as a scalar string; `Shelf.get` has checked it before."""
    return tf.strings.substr(tf.io.read_file(path), _HEADER, -1)


def shelf_at(folder: PathLike | None, limit: int = LIMIT) -> Shelf | None:
    """Return the shelf in a folder, None for none.

    Raises:
        InputError: If the path is something else than a folder.
    """
    if folder is None:
        return None
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"`cache_dir` must be a folder. Received: {path}, which is a file")
    return Shelf(path, limit)


@contextlib.contextmanager
def folder_or_temporary(folder: PathLike | None, *, needed: bool) -> Iterator[PathLike | None]:
    """Give a folder, and where there is none but one is needed, a temporary one that is removed at the end.

    Example:
        >>> with folder_or_temporary(None, needed=True) as folder:
        ...     found = Path(folder).is_dir()
        >>> found, Path(folder).exists()
        (True, False)
    """
    if folder is not None or not needed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tftransfer", ignore_cleanup_errors=True) as temporary:
        yield temporary


def _header(payload: bytes) -> bytes:
    return _MAGIC + f"{len(payload):>13} {zlib.crc32(payload):010d}".encode()


def _checked(contents: bytes) -> bytes | None:
    """Return the payload of a file, None if anything about it is not as it was written."""
    payload = contents[_HEADER:]
    return payload if contents[:_HEADER] == _header(payload) else None


def _size(folder: Path) -> int:
    return sum(_bytes_of(entry) for entry in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for root, _, names in os.walk(folder):
            yield from (Path(root) / name for name in names)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
