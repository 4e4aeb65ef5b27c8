"""A run's folder: which run it holds, what is written into it, and how it is read back."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras

from tftransfer import integrity, locks, model_card, scanning, soundness, tasks, tensor_files
from tftransfer.errors import InputError
from tftransfer.integrity import MANIFEST, SEAL, digests
from tftransfer.report import Report, Table
from tftransfer.versions import differences, versions

MODEL = "model.keras"
SAMPLES = "samples"
REPORT, HTML = "report.json", "report.html"
CARD = "MODEL_CARD.md"
_GROWING = ("checkpoints", "logs", "history.csv")
_PROBE = ".probe"
_PATTERN_CHARACTERS = frozenset("[]*?\\")


@dataclass(frozen=True)
class Bundle:
    """A finished run, read back: the model, what its outputs mean, and the manifest."""

    folder: Path
    model: keras.Model
    task: tasks.Task
    manifest: dict[str, Any]

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the model's input."""
        height, width = self.model.input_shape[1:3]
        return height, width


def claim(folder: Path, configuration: Mapping[str, Any]) -> bool:
    """Tell whether a folder already holds the finished run of a configuration, and refuse it if it holds another.

    Nothing is written.

    Args:
        folder: The run's folder; it need not exist.
        configuration: Everything that decides the run's result.

    Returns:
        True if this very run is finished there; False if it can begin (or begin again after an interruption).

    Raises:
        InputError: If the folder holds another run or other files, or cannot be written, or TensorFlow could not
            read its path.
    """
    _check_path(folder)
    _check_writable(folder)
    of_begun = (locks.FILE, _PROBE, _staged(folder / MANIFEST).name)  # what is there before the manifest is
    if not folder.exists() or all(path.name in of_begun for path in folder.iterdir()):
        return False
    if not (folder / MANIFEST).is_file():
        raise InputError(f"`out` {folder} is not empty and holds no run: choose a new folder")
    manifest = read_manifest(folder)
    before, now = manifest.get("configuration", {}), json.loads(json.dumps(configuration))
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        told = ", ".join(f"{name} {before.get(name)!r} there, {now.get(name)!r} here" for name in changed)
        raise InputError(f"`out` {folder} holds another run ({told}): choose a new folder")
    return bool(manifest.get("complete"))


def begin(
    folder: Path,
    configuration: Mapping[str, Any],
    *,
    again: bool = False,
    decisions: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Make a run's folder and note in its manifest which run it holds; of several at the same time one succeeds.

    Args:
        folder: The run's folder; it need not exist.
        configuration: Everything that decides the run's result.
        again: Whether the folder held this run, interrupted, when it was claimed. Defaults to False.
        decisions: What was decided from the data; `begun_decisions` reads it when the run goes on. Defaults to none.
        inputs: What the result also depends on, such as the data's fingerprint. Defaults to none.

    Raises:
        InputError: If another run began there, or this one was finished, since the folder was claimed; or if this one
            was begun with other inputs.
    """
    taken = f"`out` {folder} was taken by another run in the meantime: choose a new folder"
    if claim(folder, configuration):
        raise InputError(taken)
    if again and (folder / MANIFEST).is_file():
        _check_inputs(folder, inputs or {})
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder):
        if (folder / MANIFEST).is_file():
            raise InputError(taken)
        begun = {"configuration": configuration, "decisions": decisions or {}, "inputs": inputs or {}}
        write_json(folder / MANIFEST, {"complete": False, **{name: dict(part) for name, part in begun.items()}})


def _check_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was begun with other data or versions."""
    before = read_manifest(folder).get("inputs", {})
    changed = [name for name in inputs if name in before and before[name] != inputs[name]]
    if changed:
        told = ", ".join(f"{name} {_difference(before[name], inputs[name])}" for name in changed)
        raise InputError(f"`out` {folder} was begun with other {told}: choose a new folder to begin again")


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return "than there are now"
    return f"({differences(before, now)})"


def newest_unfinished(root: Path, name: str, configuration: Mapping[str, Any]) -> Path | None:
    """Return the newest `root/NAME-NNN` that holds the unfinished run of a configuration; None if there is none."""
    wanted = json.loads(json.dumps(configuration))
    for _, folder in sorted(_numbered(root, name), reverse=True):
        with contextlib.suppress(InputError):
            manifest = read_manifest(folder)
            if not manifest.get("complete") and manifest.get("configuration") == wanted:
                return folder
    return None


def begun_decisions(folder: Path) -> dict[str, Any]:
    """Return what a run that was interrupted had decided from the data; empty if the folder holds none."""
    if not (folder / MANIFEST).is_file():
        return {}
    return dict(read_manifest(folder).get("decisions", {}))


def next_folder(root: Path, name: str) -> Path:
    """Return `root/NAME-NNN` with the next free number."""
    return root / f"{name}-{max((number for number, _ in _numbered(root, name)), default=0) + 1:03d}"


def _numbered(root: Path, name: str) -> list[tuple[int, Path]]:
    """Return the numbers and folders of all `root/NAME-NNN`."""
    named = [(path.name.removeprefix(f"{name}-"), path) for path in root.glob(f"{name}-*")]
    return [(int(number), path) for number, path in named if number.isdecimal()]


def save(
    folder: Path,
    model: keras.Model,
    task: tasks.Task,
    report: Report,
    *,
    configuration: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write model, report, card and manifest into a run's folder; the manifest last.

    Args:
        folder: The run's folder, with `history.csv`, `logs/` and `serving/` already in it.
        model: The trained model; saved uncompiled.
        task: What its outputs mean.
        report: What was measured.
        configuration: Everything that decided the result.
        provenance: Decisions, data fingerprint and the weights that went in.

    Raises:
        InputError: If a weight of the model is not finite; nothing is written then.
    """
    soundness.check_weights(model)
    save_model(model, folder / MODEL)
    told = report.to_json()
    write_json(folder / REPORT, told)
    write_text(folder / HTML, report.to_html())
    content = {
        "task": tasks.to_json(task),
        "labels": list(task.labels),
        "image_size": list(model.input_shape[1:3]),
        "strategy": report.strategy,
        "seed": report.seed,
        "metrics": told["metrics"],
        "intervals": told["intervals"],
        **provenance,
    }
    known = {"configuration": configuration, **content, "versions": versions(), "files": digests(folder, MODEL)}
    write_text(folder / CARD, model_card.render(report, known))
    finish(folder, configuration, complete=report.complete, **content)


def finish(folder: Path, configuration: Mapping[str, Any], *, complete: bool = True, **content: Any) -> None:
    """Write the manifest of a run that is done, sealed, with the digest of every file in its folder.

    Args:
        folder: The run's folder, with all other files in it.
        configuration: Everything that decided the result.
        complete: Whether the run came to its end. Defaults to True.
        content: Whatever else the manifest is to say.
    """
    manifest = {"complete": complete, "configuration": dict(configuration), **content}
    tensor_files.sync_tree(folder)
    files = digests(folder)
    if not complete:  # what goes on being written is not vouched for
        files = {name: known for name, known in files.items() if not _is_below(name, _GROWING)}
    _write_manifest(folder, {**manifest, "versions": versions(), "files": files})


def write_samples(folder: Path, samples: Sequence[bytes]) -> None:
    """Keep a few pictures in a run's folder: later exports are verified on them."""
    (folder / SAMPLES).mkdir(exist_ok=True)
    for number, picture in enumerate(samples):
        (folder / SAMPLES / f"{number}.png").write_bytes(picture)


def read_samples(folder: Path) -> list[bytes]:
    """Return the pictures that a run has kept and nobody has changed; none for a run of an older version."""
    manifest = read_manifest(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / SAMPLES).glob("*.png"))
    return [(folder / name).read_bytes() for name in names if integrity.is_as_listed(folder, manifest, name)]


def refresh(folder: Path, *written: str) -> None:
    """Bring a run's manifest up to date after a command wrote into its folder.

    Only what was written is hashed again: a file that somebody changed still differs from the manifest afterwards.
    Versions of the SavedModel that are gone leave the manifest, and the newest that is in it becomes `current`.

    Args:
        folder: The run's folder.
        written: Files or folders inside it, such as `"serving/2"`.
    """
    with _locked(folder):
        manifest = read_manifest(folder)
        kept = {
            name: known
            for name, known in manifest.get("files", {}).items()
            if not integrity.is_of_removed_version(folder, name) and not _is_below(name, written)
        }
        files = dict(sorted({**kept, **digests(folder, *written)}.items()))
        published = [version for version in map(integrity.version_of, files) if version]
        _write_manifest(folder, {**manifest, "current": max(published, key=int, default=None), "files": files})


def _is_below(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in parts)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process brings this run's manifest up to date."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put_in_report(folder: Path, table: Table) -> None:
    """Put a table into the report of a finished run, in the place of one with its title; the rest stays as it is.

    `refresh` must follow: the files are no longer those of the manifest.

    Raises:
        InputError: If there is no report, or it is damaged.
    """
    report = read_report(folder)
    others = tuple(one for one in report.tables if one.title != table.title)
    report = replace(report, tables=(*others, table))
    write_json(folder / REPORT, report.to_json())
    write_text(folder / HTML, report.to_html())


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    # Whoever is interrupted between the steps leaves a manifest without a seal, never one with a wrong seal, and beside
    # it what `settle` goes on with.
    _stage(folder / MANIFEST, _json(manifest))
    _stage(folder / SEAL, integrity.seal_of(_staged(folder / MANIFEST)))
    (folder / SEAL).unlink(missing_ok=True)
    _put_in_place(folder / MANIFEST)
    _put_in_place(folder / SEAL)


def settle(folder: Path) -> None:
    """Seal the manifest of a finished run where the process that wrote it was killed in between, and tidy up after it.

    A manifest whose seal somebody has removed stays without one. A folder that is in use is left alone.
    """
    manifest, seal = folder / MANIFEST, folder / SEAL
    with contextlib.suppress(InputError), locks.held(folder), _locked(folder):
        if _staged(seal).is_file() and not seal.is_file():
            said = _staged(seal).read_text(encoding="utf-8")
            if _staged(manifest).is_file() and said == integrity.seal_of(_staged(manifest)):
                _put_in_place(manifest)
            if said == integrity.seal_of(manifest):
                _put_in_place(seal)
        for path in (manifest, seal):
            _staged(path).unlink(missing_ok=True)


def load(folder: str | os.PathLike[str], *, trust: bool = False) -> Bundle:
    """Read a finished run back.

    Args:
        folder: The run's folder.
        trust: Load its model without a scan. Defaults to False.

    Raises:
        InputError: If the folder holds no finished run, or a file differs from the manifest.
        ScanError: If a scan finds something in the model.
    """
    path = Path(folder)
    manifest = finished_manifest(path)
    if not integrity.is_as_listed(path, manifest, MODEL):
        raise InputError(f"{path / MODEL} is not the file that the manifest names (other SHA-256, or missing)")
    return Bundle(path, load_model(path / MODEL, trust=trust), task_of(path, manifest), manifest)


def finished_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished run; its files may have changed.

    Raises:
        InputError: If the folder holds no finished run.
    """
    manifest = read_manifest(folder)
    if not manifest.get("complete") and MODEL not in manifest.get("files", {}):
        raise InputError(f"the run in {folder} is not finished: run its recipe again with `--out {folder}`")
    return manifest


def task_of(folder: Path, manifest: Mapping[str, Any]) -> tasks.Task:
    """Return the task that a run's manifest describes.

    Raises:
        InputError: If it describes none that this version knows.
    """
    try:
        return tasks.from_json(manifest["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} describes no task: {error}") from None


def load_model(path: str | os.PathLike[str], *, trust: bool = False) -> keras.Model:
    """Load a `.keras` file with the toolkit's few classes registered.

    Builders use built-in layers only, so `keras.saving.load_model` in a process without tftransfer does the same.

    Args:
        path: The file.
        trust: Load it without a scan: layers and functions of your own are on no list. Defaults to False.

    Raises:
        InputError: If the file is missing or is no Keras model.
        ScanError: If a scan finds something in it.
    """
    from tftransfer import optimizers, schedules  # noqa: F401  register their classes

    scanning.check(path, trust=trust)
    if not trust and os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"{path} is no Keras model but a folder: give its .keras file")
    try:
        return keras.saving.load_model(path, compile=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be loaded as a Keras model: {reason}") from None


def save_model(model: keras.Model, path: Path) -> None:
    """Save a model beside the target and move it there in one step, so that no good file is lost to a bad one."""
    staged = path.with_name(f".{path.stem}.staged{path.suffix}")
    model.save(staged)
    os.replace(staged, path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run's manifest, and compare it with `manifest.sha256` if that is there.

    Raises:
        InputError: If there is none, it was changed since it was written, or it is no manifest.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a run's folder: it has no {MANIFEST}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    _check_seal(folder)
    if not _is_manifest(manifest):
        raise InputError(f"{path} is no manifest of a run: it must be a JSON object")
    return manifest


def _is_manifest(content: Any) -> bool:
    parts = ("configuration", "files")
    return isinstance(content, dict) and all(isinstance(content.get(name, {}), dict) for name in parts)


def _check_seal(folder: Path) -> None:
    """Refuse a manifest that is not the one `manifest.sha256` was written for; without that file any is taken."""
    if (folder / SEAL).is_file() and not integrity.check_seal(folder).passed:
        raise InputError(
            f"{folder / MANIFEST} was changed after the run wrote it (other SHA-256 than in {SEAL}): "
            f"put it back, or remove {SEAL} to take it as it is"
        )


def read_report(folder: Path) -> Report:
    """Read a finished run's report.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    path = folder / REPORT
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no report of a run: {error}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step: a reader sees the old file or the new one."""
    write_text(path, _json(content))


def write_text(path: Path, text: str) -> None:
    """Write text in one step: a reader sees the old file or the new one.

    Names of files that are not UTF-8 hold characters that UTF-8 lacks; they are written as `\\udcXX`, which is what
    JSON reads.
    """
    _stage(path, text)
    _put_in_place(path)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.staged")


def _stage(path: Path, text: str) -> None:
    _staged(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    tensor_files.sync(_staged(path))


def _put_in_place(path: Path) -> None:
    os.replace(_staged(path), path)
    tensor_files.sync(path.parent)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _check_path(folder: Path) -> None:
    """Refuse a path under which TensorFlow could not load a SavedModel: it reads paths as patterns, in UTF-8."""
    path = folder.absolute().as_posix()
    if _PATTERN_CHARACTERS.intersection(path):
        raise InputError(
            f"`out` must be a path without any of {' '.join(sorted(_PATTERN_CHARACTERS))}, which TensorFlow takes for "
            f"a pattern: it could not load the exported model. Received: out={path}"
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"`out` must be a path in UTF-8. Received: out={path!r}") from None


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, without leaving anything behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"`out` {folder} cannot be a folder: {existing} is a file")
    try:
        with contextlib.suppress(FileExistsError):  # another process tries too, or was killed when it did
            (existing / _PROBE).mkdir()
        with contextlib.suppress(FileNotFoundError):
            (existing / _PROBE).rmdir()
    except OSError as error:
        raise InputError(f"`out` {folder} cannot be written: {error.strerror}") from None
