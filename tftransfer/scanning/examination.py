"""Scan a file or a folder, and refuse to load what a scan finds something in."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tftransfer.errors import InputError, ScanError
from tftransfer.scanning.arrays import REFUSED, safetensors_problems
from tftransfer.scanning.configs import FOREIGN, UNSAFE
from tftransfer.scanning.files import files_below
from tftransfer.scanning.finding import Advised, Damage, Finding, Problem, Problems, printable
from tftransfer.scanning.keras_files import (
    CONFIG,
    archive_file_problems,
    config_file_problems,
    hdf5_file_problems,
    is_unpacked,
    npz_file_problems,
    sharded_problems,
    unpacked_problems,
)
from tftransfer.scanning.savedmodel import is_savedmodel, savedmodel_problems

MOST_FINDINGS = 50
"""Of one file; the rest is counted."""

_TRUST = "if you trust its source, `trust` it (`--trust`), which leaves out the scan"

_LONGEST = 500  # characters of a place or problem, which may come from the file

SCANNED_FOR = (
    "operations and classes that are not on the lists; paths, links and data kept elsewhere; code; impossible sizes"
)

_BY_SUFFIX: dict[str, Callable[[Path], Problems]] = {
    ".h5": hdf5_file_problems,
    ".hdf5": hdf5_file_problems,
    ".keras": archive_file_problems,
    ".npz": npz_file_problems,
    ".safetensors": safetensors_problems,
    ".weights.json": sharded_problems,
}
_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
_BY_CONTENT = {_HDF5: (".h5", ".hdf5"), _ZIP: (".keras", ".npz")}


def scan(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    """Judge a model's files without loading them.

    Use it on files that others made, before TensorFlow or Keras read them. The structure is read by this toolkit, by
    protobuf, by NumPy's header reader and by the HDF5 library; no tensor is read, no link followed, nothing run.

    Args:
        path: A SavedModel's folder, a `.keras`, `.h5`, `.npz` or `.safetensors` file, the table of sharded weights
            (`.weights.json`), or a folder with such things in it, as a run's.

    Returns:
        The reasons not to load it, in the order in which they were found; empty if nothing was found. That is no
        proof: what the lists allow can still take all memory or all time.

    Raises:
        InputError: If there is no such file or folder.

    Example:
        >>> from tftransfer.weights import demo_weights_path
        >>> scan(demo_weights_path())
        ()
    """
    return tuple(finding for _, findings in examine(path) for finding in findings)


def check(
    path: str | os.PathLike[str], *, trust: bool = False, kind: str | None = None, weights_only: bool = False
) -> None:
    """Refuse a file in which a scan finds something; every function that loads a user's file begins with this.

    Args:
        path: As `scan` takes it.
        trust: Load it all the same, without a scan; a line on standard error says so. Defaults to False.
        kind: Suffix of the kind of file as which it is read, such as `".safetensors"`, whatever its name is. Defaults
            to None: its own suffix.
        weights_only: Whether only the weights in it are read, so that trusting it is enough even where Keras would
            refuse to build the network. Defaults to False.

    Raises:
        ScanError: If anything is found; says whether trusting the file would help.
        InputError: If there is no such file or folder, or it is damaged or of an unknown kind.
    """
    if trust:
        print(f"warning: {printable(str(path))} is loaded without a scan: code in it can run", file=sys.stderr)
        return
    findings = scan(path) if kind is None else _findings_as(Path(path), kind)
    dangers = [finding for finding in findings if not finding.damaged]
    if dangers:
        more = f" (and {len(dangers) - 1} more: `tftransfer scan {path}`)" if len(dangers) > 1 else ""
        raise ScanError(f"{dangers[0]}{more}. It was not loaded; {_TRUST if weights_only else _advice(dangers)}")
    if findings:
        raise InputError(f"{replace(findings[0], file=f'{path} cannot be loaded')}")


def _advice(findings: Sequence[Finding]) -> str:
    """Say what helps for all of several findings."""
    return next((advice for advice in (UNSAFE, FOREIGN, REFUSED) if advice in {f.advice for f in findings}), _TRUST)


def _findings_as(path: Path, kind: str) -> tuple[Finding, ...]:
    if not os.path.lexists(path):
        raise InputError(f"there is no file {path}")
    return _findings(path, _file_problems(path, kind))


def examine(path: str | os.PathLike[str]) -> Iterator[tuple[Path, tuple[Finding, ...]]]:
    """Yield each model of a file or folder with what is found in it.

    Args:
        path: As `scan` takes it.

    Raises:
        InputError: If there is no such file or folder.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise InputError(f"there is no file or folder {path}")
    if not path.is_dir():
        yield path, _findings(path, _file_problems(path))
        return
    try:
        models = _models_in(path)
    except OSError as error:
        models = {path: iter([_unreadable(error)])}
    for model, problems in (models or {path: iter([("", Damage("holds no model of a kind that is known"))])}).items():
        yield model, _findings(model, problems)


def _models_in(folder: Path) -> dict[Path, Problems]:
    """Return the models in a folder, in order, each with what judges it."""
    if is_savedmodel(folder) and os.path.lexists(folder / CONFIG):
        return {folder: iter([(CONFIG, "lies in a SavedModel: Keras would load another network than TensorFlow")])}
    if is_savedmodel(folder):
        return {folder: savedmodel_problems(folder)}
    if is_unpacked(folder):
        return {folder: unpacked_problems(folder)}
    files = sorted(files_below(folder))
    inner = {file.parent for file in files if is_savedmodel(file.parent) or is_unpacked(file.parent)}
    models: dict[Path, Problems] = {}
    for file in files:
        holder = next((place for place in reversed(file.parents) if place in inner), None)
        if holder and holder not in models:
            models |= _models_in(holder)
        elif not holder and file.is_symlink() and (_judge_of(file) or file.is_dir()):
            models[file] = iter([("", "is a link to elsewhere")])
        elif not holder and _judge_of(file):
            models[file] = _file_problems(file)
    return models


def _judge_of(file: Path) -> Callable[[Path], Problems] | None:
    """Return what judges a file of this name; Keras builds what `config.json` describes before it looks for weights."""
    name = file.name.lower()
    if name == CONFIG:
        return config_file_problems
    return next((judge for suffix, judge in _BY_SUFFIX.items() if name.endswith(suffix)), None)


def _file_problems(file: Path, kind: str | None = None) -> Problems:
    """Judge a file as what its name says, or as another kind."""
    judge = _BY_SUFFIX[kind] if kind else _judge_of(file)
    if judge is None:
        yield "", Damage(f"unknown kind of file: none of {', '.join(_BY_SUFFIX)} and no folder of a SavedModel")
    elif not file.is_file():
        yield "", Damage("is no ordinary file")
    elif problem := _kind_problem(file, kind or file.name.lower()):
        yield "", problem
    else:
        yield from judge(file)


def _kind_problem(file: Path, name: str) -> str | None:
    """Compare a file's first bytes with its name: some readers go by the one, some by the other."""
    with file.open("rb") as opened:
        head = opened.read(8)
    for magic, suffixes in _BY_CONTENT.items():
        if head.startswith(magic) != name.endswith(suffixes):
            kind = f"begins like {suffixes[0]}" if head.startswith(magic) else f"does not begin like {suffixes[0]}"
            return Damage(f"{kind}: damaged, cut short or of another kind than its name says")
    if not head.startswith(_ZIP) and zipfile.is_zipfile(file):
        return "is a ZIP archive at its end and something else at its beginning"
    return None


def _findings(model: Path, problems: Problems) -> tuple[Finding, ...]:
    """Collect what is found in one model; a file that cannot be read to its end is a finding too."""
    found: list[Problem] = []
    more = 0
    try:
        for problem in problems:
            found += [problem] if len(found) < MOST_FINDINGS else []
            more += len(found) == MOST_FINDINGS
    # Damage shows in many ways in the readers of four formats; none may end a scan without a finding.
    except Exception as error:
        found.append(_unreadable(error))
    if more > 1:
        found.append(("", f"and {more - 1} more findings"))
    return tuple(
        Finding(
            str(model),
            where[:_LONGEST],
            problem[:_LONGEST],
            isinstance(problem, Damage),
            problem.advice if isinstance(problem, Advised) else "",
        )
        for where, problem in found
    )


def _unreadable(error: Exception) -> Problem:
    said = " ".join(str(error).split())[:200]
    return "", Damage(f"damaged, cut short or of another kind: {type(error).__name__} {said}".rstrip())
