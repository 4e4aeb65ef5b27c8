"""A folder of computed tensors that outlives a run: one file per item, checked when read, bounded in size.

Who needs an item for longer copies it: any process may remove it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tftransfer.errors import InputError

LIMIT = 20 * 2**30
"""Bytes that a shelf may take on the disk, unless it is given another limit."""

OWN = "tftransfer-cache"
"""The folder inside a `cache_dir` that is ours: what else lies there is never counted or removed."""

_MAGIC = b"tftransfer item\n"
_HEADER = len(_MAGIC) + 24  # length and CRC-32 of what follows, in digits
_BLOCK = 4096  # bytes of which a disk gives a file whole ones
_IN_MEMORY = ("tmpfs", "ramfs")  # file systems that are no disk
_TEMPORARY = "tftransfer-features-"
_NEW = 60.0  # seconds for which a temporary folder may be waiting for its lock
_SPARE = 2**28  # bytes that stay free on the disk
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Item:
    """A file, its bytes on the disk, and when it was used last."""

    path: Path
    size: int
    used: float


@dataclass
class Shelf:
    """Items in `FOLDER/KEY/NAME`: the key says how they were computed, the name from what.

    Items are written beside their place and renamed, so that several processes can share a folder and a process that
    is killed leaves whole items only. Nothing is synced to the disk: what a power cut tears is found by its checksum
    and computed again. A shelf that cannot be written says so once and keeps nothing more.

    Args:
        folder: Made when the first item is written; nothing else may lie in it.
        limit: Bytes over all keys, above 0; the items used longest ago are removed first. Defaults to `LIMIT`.

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
        with contextlib.suppress(OSError):
            os.utime(path)  # it is used now
        if (payload := _checked(contents)) is not None:
            return payload
        self.note(f"{path} is damaged: computed again")
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
            return self._fails(error)
        return True

    def make_room(self, count: int, size: int, needs: Collection[Path] = (), beside: int = 0) -> bool:
        """Remove the items that were used longest ago until new ones fit; returns whether they do.

        Where they would not fit all the same, nothing is removed.

        Args:
            count, size: How many will come, and bytes of each.
            needs: Items that stay. Default to none.
            beside: Bytes that something else will take on the same disk. Defaults to 0.
        """
        if not count + beside:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return self._fails(error)
        needed, items = count * _on_disk(size + _HEADER), self._items()
        over = needed + beside + _SPARE - self._free()
        if count:
            over = max(over, sum(item.size for item in items) + needed - self.limit)
        kept = set(needs)
        spare = [item for item in sorted(items, key=lambda item: item.used) if item.path not in kept]
        for item in spare if sum(item.size for item in spare) >= over else ():
            if over <= 0:
                break
            with contextlib.suppress(OSError):
                item.path.unlink()
                over -= item.size
        if over > 0:
            self.note(f"{self.folder} has no room for {needed / 2**20:,.0f} MB within its limit: nothing is kept")
        return over <= 0

    def _items(self) -> list[_Item]:
        """Return all that lies here; what a process that ended has left half-written is removed."""
        found = []
        for path in _files(self.folder):
            if path.name.startswith("."):
                if not _lives(path.name.rpartition(".")[2]):
                    with contextlib.suppress(OSError):
                        path.unlink()
                continue
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append(_Item(path, _on_disk(about.st_size), about.st_mtime))
        return found

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return 0

    def _fails(self, error: OSError) -> bool:
        """Keep nothing more, and say so once."""
        self._writes = False
        self.note(f"{self.folder} cannot be written ({error.strerror or error}): what is computed is not kept")
        return False

    def note(self, text: str) -> None:
        """Remember what a report should say, once."""
        if text not in self.notes:
            self.notes.append(text)


def shelf_at(folder: PathLike | None, limit: int = LIMIT) -> Shelf | None:
    """Return the shelf in a folder of the user's, where it takes a folder of its own; None for none.

    Raises:
        InputError: If the path is something else than a folder.
    """
    if folder is None:
        return None
    path = Path(folder)
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"`cache_dir` must be a folder. Received: {path}, which is a file")
    return Shelf(path / OWN, limit)


def is_memory(folder: Path) -> bool:
    """Whether what lies in a folder takes memory, and not room on a disk."""
    whole = folder.resolve()
    inside = [part for part in psutil.disk_partitions(all=True) if whole.is_relative_to(Path(part.mountpoint))]
    innermost = max(inside, key=lambda part: len(part.mountpoint), default=None)
    return innermost is not None and innermost.fstype in _IN_MEMORY


@contextlib.contextmanager
def folder_or_temporary(folder: PathLike | None, *, needed: bool) -> Iterator[PathLike | None]:
    """Give a folder, and where there is none but one is needed, a temporary one that is removed at the end.

    A folder that takes memory is none. Temporary ones that processes which were killed have left are removed before.

    Example:
        >>> with folder_or_temporary("kept", needed=True) as folder:
        ...     folder
        'kept'
    """
    place = _temporary_place() if needed and folder is None else None
    if place is None:
        yield folder
        return
    _remove_abandoned(Path(place))
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=place, ignore_cleanup_errors=True) as temporary:
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks, and there nobody removes it
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
        finally:
            os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove temporary folders that no process holds."""
    for left in place.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another user's, or held
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(descriptor).st_mtime > _NEW:
                    shutil.rmtree(left)
            finally:
                os.close(descriptor)


def _temporary_place() -> str | None:
    """Return the system's folder for temporary files that lies on a disk."""
    places = (tempfile.gettempdir(), "/var/tmp")
    return next((place for place in places if os.path.isdir(place) and not is_memory(Path(place))), None)


def _header(payload: bytes) -> bytes:
    return _MAGIC + f"{len(payload):>13} {zlib.crc32(payload):010d}".encode()


def _checked(contents: bytes) -> bytes | None:
    """Return the payload of a file, None if anything about it is not as it was written."""
    payload = contents[_HEADER:]
    return payload if contents[:_HEADER] == _header(payload) else None


def _files(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for root, _, names in os.walk(folder):
            yield from (Path(root) / name for name in names)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _lives(process: str) -> bool:
    """Whether a process of this machine, by its number in digits, is running."""
    return process.isdecimal() and psutil.pid_exists(int(process))
