"""Folders that are either whole or not there: written beside their place, sealed, and moved there by one rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tftransfer import tensor_files
from tftransfer.errors import InputError
from tftransfer.weights import digest

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
DAMAGED = "damaged-"
_HIDDEN = "."


_LOST = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # other errors say nothing about what is on the disk


class DamageError(Exception):
    """Say which file of a folder is not the one that was written."""


def write(target: Path, build: Callable[[Path], None]) -> None:
    """Write a folder's files through to the disk, with a list of them, and move it to its place.

    It takes the place of an older folder there. Whatever fails, nothing half-written bears the name, and what bore it
    still does.

    Args:
        target: Its place; the folder around it exists.
        build: Writes the files, through to the disk, into the empty folder that it is given.

    Raises:
        OSError: If that cannot be done.
    """
    scratch = target.with_name(f"{_HIDDEN}{target.name}")
    remove(scratch)
    try:
        scratch.mkdir()
        build(scratch)
        _seal(scratch)
        _replace(scratch, target)
        tensor_files.sync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _replace(scratch: Path, target: Path) -> None:
    older = _hide(target) if target.exists() else None
    try:
        os.rename(scratch, target)
    except BaseException:
        if older:
            os.rename(older, target)
        raise
    if older:
        shutil.rmtree(older, ignore_errors=True)


def check(folder: Path) -> None:
    """Compare a folder with the list of its files.

    Raises:
        DamageError: If a file differs, is missing, or is on no list.
        InputError: If the folder cannot be read, which may be another time.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
        sealed = (folder / SEAL).read_text(encoding="ascii")
        if sealed != digest(folder / MANIFEST):
            raise DamageError(f"{MANIFEST} is not the one that {SEAL} was written for")
        listed: dict[str, Any] = json.loads(content)["files"]
        found = {path.name for path in folder.iterdir()} - {MANIFEST, SEAL}
        for name in sorted(found ^ listed.keys()):
            raise DamageError(f"{name} is missing" if name in listed else f"{name} is not in {MANIFEST}")
        for name, known in listed.items():
            if (folder / name).stat().st_size != known["bytes"] or digest(folder / name) != known["sha256"]:
                raise DamageError(f"{name} is not the file that was written")
    except OSError as error:
        if error.errno not in _LOST:
            raise InputError(f"{folder} cannot be read: {error.strerror}") from None
        raise DamageError(f"it cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"it cannot be read ({error})") from None


def set_aside(folder: Path) -> Path:
    """Give a damaged folder another name, so that nobody takes it for a whole one and somebody may look at it."""
    target = folder.with_name(f"{DAMAGED}{folder.name}")
    remove(target)
    os.rename(folder, target)
    return target


def remove(folder: Path) -> None:
    """Remove a folder if it is there, out of sight first: half of one must never bear its name.

    Raises:
        OSError: If it cannot be put out of sight; what is left there of its files is for `sweep`.
    """
    if folder.exists():
        shutil.rmtree(folder if folder.name.startswith(_HIDDEN) else _hide(folder), ignore_errors=True)


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f"{_HIDDEN}old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    return hidden


def sweep(parent: Path) -> None:
    """Remove what a process that was interrupted has left half-written or half-removed."""
    for left in parent.glob(f"{_HIDDEN}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def _seal(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="ascii")
    (folder / SEAL).write_text(digest(folder / MANIFEST), encoding="ascii")
    for name in (MANIFEST, SEAL):
        tensor_files.sync(folder / name)
    tensor_files.sync(folder)
