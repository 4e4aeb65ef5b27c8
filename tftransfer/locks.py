"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from tftransfer.errors import InputError

FILE = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # of file systems that have none
_held: dict[tuple[Path, int, int], int] = {}  # by path, process and thread: the descriptor


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; the system lets go of it when the process ends, in whatever way.

    Within it the same thread may hold the folder again. On a file system without locks this goes by the process whose
    name is in the folder, and says so once: one of this machine that has ended is taken to have let go.

    Args:
        folder: It exists.

    Raises:
        InputError: If another process holds it.
        OSError: If that cannot be found out.

    Example:
        >>> import tempfile
        >>> with held(Path(tempfile.gettempdir())):
        ...     pass
    """
    path = folder.resolve() / FILE
    key = path, os.getpid(), threading.get_ident()
    if key in _held:
        yield
        return
    descriptor = _taken(path, folder)
    _held[key] = descriptor
    try:
        yield
    finally:
        del _held[key]
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _taken(path: Path, folder: Path) -> int:
    """Return the descriptor of a lock that is ours; who had it before may remove its file at any moment."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(descriptor)
            lacking = error.errno in _NO_LOCKS
            if not lacking or _lives(owner, path):
                os.close(descriptor)
                if not lacking and error.errno not in _TAKEN:
                    raise
                raise InputError(
                    f"{folder} is in use by another run ({owner}): wait until it has ended, or choose another folder. "
                    f"If it has ended on another machine, remove {path}"
                ) from None
            _tell(folder.resolve(), error.strerror or str(error))
        if _is_still_there(path, descriptor):
            with contextlib.suppress(OSError):  # it says who holds it, which the lock does not need
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "it does not say which"


def _lives(owner: str, path: Path) -> bool:
    """Whether a process that wrote its name into a lock runs, as far as this machine can tell."""
    words = owner.split()
    if len(words) < 4 or not words[1].isdecimal():
        return False
    if words[3] == platform.node() and int(words[1]) == os.getpid():  # containers give the same number again
        return any(one[:2] == (path, os.getpid()) for one in _held)
    return words[3] != platform.node() or psutil.pid_exists(int(words[1]))


@functools.cache
def _tell(folder: Path, reason: str) -> None:
    """Say once of a folder that it cannot be locked."""
    print(
        f"{folder} is on a file system without locks ({reason}): the run goes on, but start no other in this folder "
        "at the same time",
        file=sys.stderr,
        flush=True,
    )
