"""Publish a SavedModel: written beside its place, verified, then moved there with one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import keras
import psutil

from tftransfer import errors, scanning, soundness, tensor_files
from tftransfer.errors import InputError
from tftransfer.serving import origin, warm_up
from tftransfer.serving.export import export_savedmodel
from tftransfer.serving.origin import Origin
from tftransfer.serving.verification import Verification, made_up_pictures, prove
from tftransfer.tasks import Task

KEPT_VERSIONS = 5
_HIDDEN = ".new-"  # no server takes it for a version
_CLOCK_STEP = 1.0  # seconds: the start of a process is known to a hundredth, and the system's clock is corrected
_SECONDS_LEFT = 24 * 60 * 60  # after which another machine's process is taken to have ended


def publish(
    model: keras.Model,
    task: Task,
    serving_dir: str | os.PathLike[str],
    samples: Sequence[bytes] = (),
    *,
    from_logits: bool | None = None,
    repeats: int = 50,
    optimise: bool = True,
    top_k: int = 0,
    keep: int = KEPT_VERSIONS,
    warm_up_sizes: Sequence[int] = warm_up.BATCH_SIZES,
    reuse: bool = False,
) -> tuple[Path | None, Verification]:
    """Export a network, verify the SavedModel and publish it as the next version.

    Args:
        model: The trained network.
        task: What its outputs mean.
        serving_dir: The folder that a model server watches. It is made if need be.
        samples: Encoded pictures to verify with. Defaults to none: pictures are made up.
        from_logits: Whether the network gives logits. Defaults to what its last layer says.
        repeats: How often the same request is sent to each signature. Defaults to 50.
        optimise, top_k: As for `export_savedmodel`. Default to True and 0.
        keep: How many versions stay, the newest ones. Defaults to 5.
        warm_up_sizes: Batch sizes of the requests that a model server answers before any other, see `warm_up.write`;
            none for no such file. Defaults to 1 and 8.
        reuse: Whether the newest version is verified again, and none is added, if it is this very network's, exported
            with the same options from the same samples. Defaults to False.

    Returns:
        The version's folder, or None if it did not pass and was not published; and what was checked.

    Raises:
        InputError: If the network does not suit the task, one of its weights is not finite, or the folder cannot be
            written.
    """
    soundness.check_weights(model)
    options = {"logits": from_logits, "optimise": optimise, "top_k": top_k, "warm_up": list(warm_up_sizes)}
    source, kept = origin.source_of(model, task, samples, **options), ""

    def build(directory: Path, constant: bool) -> None:
        nonlocal kept
        kept += export_savedmodel(model, task, directory, from_logits=from_logits, optimise=constant, top_k=top_k)
        if warm_up_sizes:
            warm_up.write(directory, samples or made_up_pictures(), warm_up_sizes)
        origin.write(directory, Origin(source, kept))

    def check(directory: Path) -> Verification:
        found = prove(directory, samples, model, task, from_logits, repeats)
        return found.with_check("graph of constants", None, {"reason": kept}) if kept else found

    if reuse and (newest := _newest_from(source, Path(serving_dir))):
        version, kept = newest
        if (found := check(version)).passed:
            return version, found
        kept = ""
    published, found = publish_directory(partial(build, constant=optimise), serving_dir, check, keep)
    if published is None and optimise and not kept:
        kept = f"with constants {'; '.join(found.failed)} failed, so variables are kept"
        again = publish_directory(partial(build, constant=False), serving_dir, check, keep)
        return again if again[0] else (None, found)
    return published, found


def _newest_from(source: str, parent: Path) -> tuple[Path, str] | None:
    """Return the newest version and why its variables were kept, if it is whole and was exported from this."""
    newest = newest_version(parent)
    was = origin.read(newest) if newest and source else None
    if newest is None or was is None or was.source != source:
        return None
    _tidy(parent)
    try:
        scanning.check(newest)  # another process has written it
    except InputError:
        return None
    return newest, was.kept


def publish_directory(
    build: Callable[[Path], object],
    serving_dir: str | os.PathLike[str],
    check: Callable[[Path], Verification],
    keep: int = KEPT_VERSIONS,
) -> tuple[Path | None, Verification]:
    """Build a version beside its place, check it, and move it there if it passes.

    A model server loads a version as soon as its folder appears, so it appears complete, by one rename. What
    fails, in whatever way, is removed, and so is what a process that was killed has left. Several processes may
    publish at the same time; each gets a number of its own.

    Args:
        build: Writes the version into the empty folder that it is given.
        serving_dir: The folder of versions.
        check: Judges the folder that was built.
        keep: How many versions stay, the newest ones. Defaults to 5.

    Returns:
        The version's folder, or None if it did not pass; and the judgement.

    Raises:
        InputError: If the folder cannot be written, or `keep` is no number from 1.
    """
    errors.check(isinstance(keep, int) and keep >= 1, "keep", "a whole number from 1", keep)
    parent = Path(serving_dir)
    with _scratch_folder(parent) as scratch:
        build(scratch)
        verification = check(scratch)
        if not verification.passed:
            return None, verification
        tensor_files.sync_tree(scratch)
        target = _in_place(scratch, parent)
        for folder in (parent, parent.parent):
            tensor_files.sync(folder)
        for number in versions(parent)[:-keep]:
            _remove(parent / str(number))
        return target, verification


def publish_folder(
    build: Callable[[Path], object], target: Path, check: Callable[[Path], Verification]
) -> tuple[Path | None, Verification]:
    """Build a folder beside its place, check it, and put it there, instead of an older one, if it passes.

    Args:
        build: Writes into the empty folder that it is given.
        target: The folder's place.
        check: Judges the folder that was built.

    Returns:
        `target`, or None if what was built did not pass and is gone; and the judgement.

    Raises:
        InputError: If the folder cannot be written.
    """
    with _scratch_folder(target.parent) as scratch:
        build(scratch)
        verification = check(scratch)
        if not verification.passed:
            return None, verification
        tensor_files.sync_tree(scratch)
        if target.exists():
            _remove(target, scratch)
        else:
            os.rename(scratch, target)
        tensor_files.sync(target.parent)
        return target, verification


def versions(serving_dir: str | os.PathLike[str]) -> list[int]:
    """Return the numbers of the versions in a folder, lowest first."""
    parent = Path(serving_dir)
    folders = parent.iterdir() if parent.is_dir() else ()
    return sorted(int(item.name) for item in folders if item.name.isdecimal() and item.is_dir())


def newest_version(serving_dir: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the newest version, the one a model server serves; None if there is none."""
    numbers = versions(serving_dir)
    return Path(serving_dir) / str(numbers[-1]) if numbers else None


def next_version(serving_dir: str | os.PathLike[str]) -> Path:
    """Return the folder that the next version will have; the first is 1."""
    return Path(serving_dir) / str(max(versions(serving_dir), default=0) + 1)


def _in_place(scratch: Path, parent: Path) -> Path:
    """Give a version the next number that is free, also if another process takes one meanwhile."""
    while True:
        target = next_version(parent)
        try:
            os.rename(scratch, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return target


def _remove(folder: Path, successor: Path | None = None) -> None:
    """Remove a folder, out of sight first: half of one must never bear its name. Then its successor may."""
    hidden = folder.with_name(_hidden_name())
    try:
        os.rename(folder, hidden)
    except OSError:  # another user's, or another process was faster
        if successor:
            raise
        return
    if successor:
        os.rename(successor, folder)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden_name() -> str:
    """Return a name that no server takes for a version, and that says which process it belongs to."""
    return f"{_HIDDEN}{platform.node() or 'here'}-{os.getpid()}-{secrets.token_hex(8)}"


def _tidy(parent: Path) -> None:
    """Remove what processes of this machine that have ended left, and whatever is older than a day."""
    for left in parent.glob(f"{_HIDDEN}*"):
        node, _, process = left.name.removeprefix(_HIDDEN).rpartition("-")[0].rpartition("-")
        here = node == (platform.node() or "here") and process.isdecimal()
        with contextlib.suppress(OSError):
            made = left.stat().st_mtime
            if (here and _ended(int(process), made)) or time.time() - made > _SECONDS_LEFT:
                shutil.rmtree(left)


def _ended(process: int, made: float) -> bool:
    """Whether the process that made something then has ended; another one may have its number, in containers mostly."""
    try:
        return psutil.Process(process).create_time() > made + _CLOCK_STEP
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a hidden folder inside `parent`: on the same file system, and not a number, so no server loads it.

    Whatever is still there at the end is removed, and so is every folder made for it that stayed empty.
    """
    scratch = parent / _hidden_name()
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        # Not `tempfile`: its folders can be read by their owner only, and a server may run as somebody else.
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{parent} cannot be written: {error.strerror}") from None
        _tidy(parent)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
