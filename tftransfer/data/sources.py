"""Where examples come from: what each kind of source lists, before anything is decoded."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from tftransfer.data import arrays, demo, splits, streams, tables
from tftransfer.data.listing import Arrays, Files, Listing, Refuse, at_once, some
from tftransfer.errors import InputError

NOT_PICTURES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml"}
"""Extensions of files that may lie beside pictures and are no examples."""

_TFRECORD = re.compile(r"\.(tfrecords?|tfrec)(-\d+-of-\d+)?(\.gz)?$", re.IGNORECASE)
_BYSTANDERS = {"thumbs.db", "desktop.ini"}


def listed(source: Any, memory_budget: int, refuse: Refuse = at_once) -> Listing:
    """List the examples of a source.

    Args:
        source: `"demo"`, `"tfds:NAME"`, the path of a folder or table, NumPy arrays, or a `tf.data.Dataset`; see
            `load`.
        memory_budget: How many bytes a copy of a stream may take.
        refuse: Takes a fault that does not hide the rest, such as that of a table's line. Defaults to raising it.

    Returns:
        The listing; its names and labels are valid text.

    Raises:
        InputError: If the source is none of these or holds no examples.
    """
    return _listed(source, memory_budget, refuse).in_valid_text()


def _listed(source: Any, memory_budget: int, refuse: Refuse) -> Listing:
    if isinstance(source, tf.data.Dataset):
        return streams.listed({"train": source}, memory_budget)
    if isinstance(source, tuple):
        return arrays.listed({"train": source})
    if isinstance(source, Mapping) and source:
        is_stream = any(isinstance(value, tf.data.Dataset) for value in source.values())
        return streams.listed(source, memory_budget) if is_stream else arrays.listed(source)
    if isinstance(source, (str, Path)):
        return _named(str(source), memory_budget, refuse)
    raise InputError(
        '`source` must be "demo", "tfds:NAME", the path of a folder or table, NumPy arrays '
        "(pictures, labels), a "
        f"tf.data.Dataset, or a dict of such per split. Received: source of type {type(source).__name__}"
    )


def _named(source: str, memory_budget: int, refuse: Refuse) -> Listing:
    if source == "demo":
        return _demo()
    if source.startswith("tfds:"):
        return streams.listed_tfds(source.removeprefix("tfds:"), memory_budget)
    path = path_of(source)
    try:
        # Path's own is_dir and is_file fail on names that are too long.
        if os.path.isdir(path):
            return folder(path, refuse)
        if os.path.isfile(path):
            _refuse_tfrecord(path)
            return tables.listed(path, refuse)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    looks_like_demo = difflib.SequenceMatcher(None, source.lower(), "demo").ratio() >= 0.7
    hint = " Did you mean 'demo'?" if looks_like_demo else ""
    raise InputError(
        f"no such folder or table: {source}.{hint} Expected demo, tfds:NAME, a folder "
        f"DIR/[SPLIT/]CLASS/file, or a "
        f"table (.csv, .tsv, .jsonl). Received: data={source!r}"
    )


def _refuse_tfrecord(path: Path) -> None:
    if _TFRECORD.search(path.name):
        raise InputError(
            f"{path} is a TFRecord file, and nothing in it says which fields are picture and label: give tfds:NAME if "
            "TensorFlow Datasets wrote it, write its pictures to class folders DIR/[SPLIT/]CLASS/file, or hand a "
            "tf.data.Dataset of (picture, label) pairs to tftransfer.data.load"
        )


def path_of(source: str) -> Path:
    """Return the path of a folder or table, of which one in a home folder may begin with `~`."""
    return Path(os.path.expanduser(source))  # Path's own expanduser fails on users that are not there


def _demo() -> Listing:
    pictures, numbers, is_test = demo.digits()
    return Listing(
        name="demo",
        names=tuple(f"digit {number}" for number in range(len(pictures))),
        labels=tuple(map(str, numbers)),
        given=tuple("test" if test else "train" for test in is_test),
        reader=Arrays(pictures),
        notes=("the test split of the demo is the same for every seed",),
    )


# --- folders ------------------------------------------------------------------------------------------------


def folder(path: Path, refuse: Refuse = at_once) -> Listing:
    """List `DIR/[SPLIT/]CLASS/file`; it is split-first only if all sub-folders of `DIR` are split names.

    Args:
        path: `DIR`.
        refuse: Takes the fault of a class folder that holds no picture. Defaults to raising it.

    Raises:
        InputError: If there is no class folder, or a class folder holds no file that could be a picture.
    """
    inside = list(_visible_folders(path))
    if not inside:
        raise InputError(_why_no_classes(path))
    split_first = all(splits.canonical(child.name) for child in inside)
    roots = [(splits.canonical(child.name) or "", child) for child in inside] if split_first else [("train", path)]
    rows: list[tuple[Path, str, str]] = []
    notes: list[str] = []
    for split, root in roots:
        class_folders = list(_visible_folders(root))
        if not class_folders:
            raise InputError(_why_no_classes(root))
        notes += _stray_pictures(root)
        for class_folder in class_folders:
            rows += [(file, class_folder.name.strip(), split) for file in _files(class_folder, notes, refuse)]
    if not rows:
        raise InputError(f"folder {path} holds no pictures: expected DIR/[SPLIT/]CLASS/file, one folder per class")
    files, labels, given = zip(*rows, strict=True)
    return Listing(
        name=path.resolve().name,
        names=tuple(file.relative_to(path).as_posix() for file in files),
        labels=labels,
        given=given,
        reader=Files(tuple(map(str, files))),
        classes=tables.read_classes(path),
        notes=tuple(notes),
        what=str(path),
    )


def _visible_folders(path: Path) -> Iterator[Path]:
    """Give the sub-folders in order of their names; only fixed depths are listed, so a loop of links ends."""
    for child in sorted(path.iterdir()):
        if not _is_hidden(child) and child.is_dir():
            yield child


def _files(class_folder: Path, notes: list[str], refuse: Refuse) -> list[Path]:
    children = [child for child in sorted(class_folder.iterdir()) if not _is_hidden(child)]
    folders = [child for child in children if child.is_dir()]
    if folders:
        told = f"{class_folder.name}: {len(folders)} folders inside a class folder were not read"
        notes.append(f"{told}: {some([child.name for child in folders])}")
    files = [child for child in children if child not in set(folders) and _may_be_picture(child)]
    if not files:
        refuse(
            InputError(
                f"class folder {class_folder} holds no pictures: add some, or remove the folder. Expected "
                "DIR/[SPLIT/]CLASS/file"
            )
        )
    return files


def _may_be_picture(file: Path) -> bool:
    return file.suffix.lower() not in NOT_PICTURES and file.name.lower() not in _BYSTANDERS


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _stray_pictures(root: Path) -> list[str]:
    stray = [c.name for c in sorted(root.iterdir()) if not _is_hidden(c) and not c.is_dir() and _may_be_picture(c)]
    told = f"{root.name}: {len(stray)} files beside the class folders were not read: {some(stray)}"
    return [told] if stray else []


def _why_no_classes(path: Path) -> str:
    expected = "expected DIR/[SPLIT/]CLASS/file, one folder per class"
    for child in sorted(path.iterdir()):
        _refuse_tfrecord(child)
    if not any(not _is_hidden(child) for child in path.iterdir()):
        return f"folder {path} is empty: {expected}"
    return f"folder {path} holds no class folders: {expected}, or name a table (.csv, .tsv, .jsonl)"
