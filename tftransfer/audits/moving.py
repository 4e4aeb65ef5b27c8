"""Move files that cannot be used out of the data, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tftransfer.data.examples import Seen
from tftransfer.errors import InputError
from tftransfer.weights import digest


@dataclass(frozen=True)
class Moved:
    """What became of a file that cannot be used.

    Args:
        file: Its path inside the data.
        reason: Why it cannot be used.
        stays: Why it was not moved, or None.
    """

    file: str
    reason: str
    stays: str | None = None


def check_outside(folder: Path, data: Path, name: str) -> None:
    """Refuse a folder that lies in the data, where it would be read as a class, or that holds them.

    Args:
        folder: Where something is to be written.
        data: The data's folder.
        name: The argument's name, for the message.

    Raises:
        InputError: If one lies in the other.
    """
    own, other = Path(os.path.realpath(folder)), Path(os.path.realpath(data))
    if own.is_relative_to(other) or other.is_relative_to(own):
        raise InputError(
            f"`{name}` must be a folder apart from the data: inside it would be read as a class. "
            f"Received: {name}={str(folder)!r}, data={str(data)!r}"
        )


def move(seen: Sequence[Seen], files: Sequence[str], data: Path, target: Path) -> list[Moved]:
    """Move what cannot be used to the same path below another folder.

    A file stays where it is if it could not be read, is a link, lies outside the data, or has changed since it was
    read. Nothing is overwritten.

    Args:
        seen: What was seen of each example.
        files: The path of each.
        data: The data's folder.
        target: Where they go.

    Returns:
        One for each file that cannot be used, in their order.

    Raises:
        InputError: If the folders are not apart, something is at the place already (then nothing is moved), or cannot
            be written.
    """
    check_outside(target, data, "quarantine")
    broken = [(one, Path(file)) for one, file in zip(seen, files, strict=False) if one.reason is not None]
    for one, file in broken:
        goal = target / file.relative_to(data)
        if os.path.lexists(goal) and not (goal.is_file() and digest(goal) == one.digest):
            raise InputError(f"`quarantine` {target} has another {file.relative_to(data)} already: nothing was moved")
    return [_moved(one, file, data, target) for one, file in broken]


def _moved(one: Seen, file: Path, data: Path, target: Path) -> Moved:
    stays = _why_it_stays(one, file, data)
    if stays is None:
        goal = target / file.relative_to(data)
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(goal):
                _put(file, goal)
            file.unlink()
        except OSError as error:
            raise InputError(f"{file} cannot be moved to {goal}: {error.strerror}") from None
    return Moved(one.name, one.reason or "", stays)


def _why_it_stays(one: Seen, file: Path, data: Path) -> str | None:
    if not one.digest:
        return "it cannot be read"
    if not stat.S_ISREG(os.lstat(file).st_mode):
        return "it is a link or no regular file"
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(data)):
        return "it lies outside the data"
    return None if digest(file) == one.digest else "it has changed since it was read"


def _put(file: Path, goal: Path) -> None:
    """Give a file a second name, which fails where one is; on another file system, a copy under a name of its own."""
    try:
        os.link(file, goal)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        staged = goal.with_name(f".{goal.name}.staged")
        shutil.copy2(file, staged)
        os.rename(staged, goal)
