"""Judge Keras' own files: `.keras` archives, the same unpacked, HDF5 files and sharded weights."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from tftransfer.scanning.archives import Archive, archive_problems, is_plain
from tftransfer.scanning.arrays import npz_problems
from tftransfer.scanning.configs import LARGEST_CONFIG, config_text_problems
from tftransfer.scanning.files import code_problem, files_below
from tftransfer.scanning.finding import Damage, Problems, described
from tftransfer.scanning.hdf5 import hdf5_problems

CONFIG, METADATA = "config.json", "metadata.json"
WEIGHTS = ("model.weights.h5", "model.weights.npz")
LARGEST_METADATA = 2**20

LARGEST_UNPACKED = 2**30
"""Bytes of weights that are packed: they are unpacked into memory to be judged. Keras packs none."""

_SHARD = re.compile(r"model(\.weights\.json|_\d{5}\.weights\.h5)")


def archive_file_problems(path: Path) -> Problems:
    """Yield what is wrong with a `.keras` file."""
    with path.open("rb") as file:
        try:
            archive = Archive(file)
        except zipfile.BadZipFile:
            yield "", Damage("is no .keras archive: damaged, cut short or of another kind")
            return
        problems = list(archive_problems(archive))
        yield from problems
        names = {member.filename for member in archive.members}
        if not names.intersection((CONFIG, *WEIGHTS)):
            yield "", Damage(f"lacks {CONFIG} and weights: damaged, cut short or of another kind")
            return
        for name in sorted(names):
            if not _is_usual(name):
                yield name, "is not among the files that Keras writes"
        if CONFIG not in names or not names.intersection(WEIGHTS):
            yield "", Damage(f"lacks {CONFIG} or weights")
        if not problems:  # the members of a crafted archive are not even read
            for member in archive.members:
                yield from described(_member_problems(archive, member), member.filename)


def _is_usual(name: str) -> bool:
    return name in (CONFIG, METADATA, *WEIGHTS) or name.startswith("assets/") or bool(_SHARD.fullmatch(name))


def _member_problems(archive: Archive, member: zipfile.ZipInfo) -> Problems:
    name, size = member.filename, member.file_size
    if name == CONFIG:
        yield from config_text_problems(archive.read(name, LARGEST_CONFIG + 1), modules_needed=True)
    elif name == METADATA and size > LARGEST_METADATA:
        yield "", f"{size} bytes: more than {LARGEST_METADATA}"
    elif not name.endswith((".h5", ".npz")):
        return
    elif size > LARGEST_UNPACKED and member.compress_type != zipfile.ZIP_STORED:
        yield "", f"{size} packed bytes: more than {LARGEST_UNPACKED}"
    else:
        with archive.open(name, LARGEST_UNPACKED) as opened:
            yield from hdf5_problems(opened, size) if name.endswith(".h5") else npz_problems(opened)


def is_unpacked(folder: Path) -> bool:
    """Tell whether a folder holds a `.keras` file's content, which Keras loads too."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def unpacked_problems(folder: Path) -> Problems:
    """Yield what is wrong with a `.keras` file's content in a folder."""
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or not file.is_file():
            yield name, "is a link or no ordinary file"
            continue
        with file.open("rb") as opened:
            problem = code_problem(name, opened.read(8))
        if problem:
            yield name, problem
    yield from described(config_file_problems(folder / CONFIG), CONFIG)
    for name in WEIGHTS:
        if (folder / name).is_file():
            problems = hdf5_file_problems if name.endswith(".h5") else npz_file_problems
            yield from described(problems(folder / name), name)


def config_file_problems(path: Path) -> Problems:
    """Yield what is wrong with the description of a network in a file of its own."""
    with path.open("rb") as opened:
        yield from config_text_problems(opened.read(LARGEST_CONFIG + 1), modules_needed=True)


def hdf5_file_problems(path: Path) -> Problems:
    """Yield what is wrong with an HDF5 file: weights, or a whole model of Keras 1 and 2."""
    yield from hdf5_problems(path, path.stat().st_size)


def npz_file_problems(path: Path) -> Problems:
    """Yield what is wrong with an `.npz` file of arrays."""
    with path.open("rb") as file:
        yield from npz_problems(file)


def sharded_problems(path: Path) -> Problems:
    """Yield what is wrong with the table of sharded weights and with the files it names."""
    with path.open("rb") as opened:
        text = opened.read(LARGEST_CONFIG + 1)
    try:
        places = json.loads(text)["weight_map"].values() if len(text) <= LARGEST_CONFIG else ()
        names = {name for place in places for name in (place if isinstance(place, list) else [place])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield "", Damage("is no table of sharded weights")
        return
    if not names:
        yield "", "names no file of weights, or is too long"
    for name in sorted(map(str, names)):
        if not is_plain(name) or "/" in name or (path.parent / name).is_symlink():
            yield name, "is not the name of a file beside it"
        elif not (path.parent / name).is_file():
            yield name, "is not there"
        else:
            yield from described(hdf5_file_problems(path.parent / name), name)
