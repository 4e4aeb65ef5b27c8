"""From a source to data that is ready for training: list, read once, set aside, divide, fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from tftransfer import tasks
from tftransfer.data import sources, splits
from tftransfer.data.examples import Data, Examples, Pictures, Quarantined, Seen
from tftransfer.data.listing import Files, Listing
from tftransfer.data.reading import Read, random_access, read_all
from tftransfer.errors import InputError
from tftransfer.shelf import shelf_at
from tftransfer.tasks import Task
from tftransfer.tasks.multi_label import split_labels

MEMORY_SHARE = 0.25
"""Share of the available memory that decoded pictures may take, unless `memory_budget` says otherwise."""


def load(
    source: Any,
    *,
    image_size: tuple[int, int],
    task_kind: str = "auto",
    seed: int = 0,
    label_smoothing: float = 0.0,
    balance: bool = False,
    memory_budget: int | None = None,
    limit: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Data, Task]:
    """Read a data set and find out what its labels mean.

    Every picture is read and decoded once; what cannot be used is set aside with its reason. The decoded pictures
    stay in memory where they fit `memory_budget`, else in a file (in `cache_dir`, or the system's folder for such
    files) that vanishes with the process; without room on the disk they are decoded again when they are asked for.

    Args:
        source: One of

            - `"demo"`: scikit-learn's handwritten digits;
            - `"tfds:NAME"` or `"tfds:NAME/CONFIG"`: a data set of TensorFlow Datasets;
            - a folder `DIR/[SPLIT/]CLASS/file`;
            - a table (`.csv`, `.tsv`, `.jsonl`) with the columns `image`,
              `label` and optionally `split`;
            - `(pictures, labels)`, or a dict of such per split: pictures `(n, height, width, 1 or 3)` or
              `(n, height, width)`, uint8 or float in [0, 255];
            - a `tf.data.Dataset` of single `(picture, label)` pairs, or a dict of such per split.
        image_size: `(height, width)` of the decoded pictures, in pixels.
        task_kind: `"single_label"`, `"multi_label"`, `"regression"`, or `"auto"`: several labels where the
        labels of
            a table hold `|` or are lists, else one. Defaults to `"auto"`.
        seed: Decides what is split off where the source has no test or validation split. Defaults to 0.
        label_smoothing: For the task, in [0, 1). Defaults to 0.0.
        balance: Whether rare labels weigh more in the loss. Defaults to False.
        memory_budget: Bytes for decoded pictures, or for the copy of a stream. Defaults to a quarter of the
        memory
            that is available.
        limit: Use at most about this many examples, for a quick try. Defaults to all.
        cache_dir: A folder that remembers which pictures can be decoded: where none has changed, a later run decodes
            them when they are first asked for, which is never if what is computed from them is kept there too.
            Defaults to None.

    Returns:
        The data and the task.

    Raises:
        InputError: If the source is not there or not as described; the message says where and what to do.

    Example:
        >>> data, task = load("demo", image_size=(8, 8))
        >>> len(data.train), len(data.validation), len(data.test), task.labels[:3]
        (1295, 142, 360, ('0', '1', '2'))
    """
    began = time.monotonic()
    _check_image_size(image_size)
    budget = int(psutil.virtual_memory().available * MEMORY_SHARE) if memory_budget is None else memory_budget
    listing = sources.listed(source, budget)
    task = _task(listing, task_kind, label_smoothing, balance)
    _check_splits(listing, task)
    listing = _limited(listing, task, limit, seed) if limit else listing
    read = read_all(listing, image_size, budget, shelf_at(cache_dir))
    return _divided(listing, task, read, seed, began, checked=not limit), task


@dataclass(frozen=True)
class Unseen:
    """Data that a finished model is measured on.

    Args:
        examples: What can be used.
        split: `"test"` if the source has such a split, else `"all"`.
        quarantined: What was set aside.
    """

    examples: Examples
    split: str
    quarantined: tuple[Quarantined, ...]


def load_for(task: Task, source: Any, *, image_size: tuple[int, int], memory_budget: int | None = None) -> Unseen:
    """Read data for a task that exists, for evaluation: the test split if the source has one, else all of it.

    Args:
        task: What the labels mean; a label that it does not know is refused.
        source: As for `load`.
        image_size: `(height, width)` of the decoded pictures, in pixels.
        memory_budget: As for `load`.

    Raises:
        InputError: As for `load`, and if no picture can be used.
    """
    budget = int(psutil.virtual_memory().available * MEMORY_SHARE) if memory_budget is None else memory_budget
    listing = sources.listed(source, budget)
    chosen = [number for number, split in enumerate(listing.given) if split == "test"]
    listing = _subset(listing, chosen) if chosen else listing
    targets = _encoded(listing, task)
    read = read_all(listing, image_size, budget)
    if not len(read.usable):
        raise InputError(f"no picture of {listing.what or listing.name} can be used: {read.quarantined[0].reason}")
    examples = _examples(listing, task, read, targets[read.usable], np.arange(len(read.usable)))
    return Unseen(examples, "test" if chosen else "all", read.quarantined)


@dataclass(frozen=True)
class Inspection:
    """A source as far as it can be read, whether or not it can be trained on.

    Args:
        name: What reports call it.
        kind: `"single_label"`, `"multi_label"` or `"regression"`.
        seen: What was seen of each example that was found.
        pictures: Those that can be used; their targets say nothing.
        places: `(n,)`, for each of those its place in `seen`.
        files: The path of each of `seen` that is a file; empty where examples are none.
        faults: What is wrong with the source itself, such as with a line of a table.
        refused: Why it cannot be trained on as it is, or None.
        notes: What was left out.
    """

    name: str
    kind: str
    seen: tuple[Seen, ...]
    pictures: Examples
    places: np.ndarray
    files: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    refused: str | None = None
    notes: tuple[str, ...] = ()


def inspect(
    source: Any,
    *,
    image_size: tuple[int, int],
    task_kind: str = "auto",
    seed: int = 0,
    memory_budget: int | None = None,
) -> Inspection:
    """Read a data set as `load` does, and go on where that would stop.

    Args:
        source, image_size, task_kind, seed, memory_budget: As for `load`.

    Raises:
        InputError: If the source is not there, or nothing of it can be listed.

    Example:
        >>> inspection = inspect("demo", image_size=(8, 8))
        >>> len(inspection.seen), inspection.seen[0].size, inspection.faults
        (1797, (8, 8), ())
    """
    began = time.monotonic()
    _check_image_size(image_size)
    budget = int(psutil.virtual_memory().available * MEMORY_SHARE) if memory_budget is None else memory_budget
    faults: list[InputError] = []
    listing = sources.listed(source, budget, faults.append)
    kind = _kind(listing, task_kind)
    listing = _with_sound_labels(listing, kind, faults)
    read = read_all(listing, image_size, budget)
    seen, refused = _seen(listing, read, {}), None
    try:
        task = _task(listing, kind, 0.0, False)
        seen = _divided(listing, task, read, seed, began, checked=True).seen
    except InputError as error:
        refused = str(error)
    return Inspection(
        name=listing.name,
        kind=kind,
        seen=seen,
        pictures=_unlabelled(listing, read),
        places=read.usable,
        files=listing.reader.paths if isinstance(listing.reader, Files) else (),
        faults=tuple(map(str, faults)),
        refused=refused,
        notes=listing.notes,
    )


def _with_sound_labels(listing: Listing, kind: str, faults: list[InputError]) -> Listing:
    """Leave out examples whose label says nothing, such as an empty one."""
    sound = []
    for number, label in enumerate(listing.labels):
        try:
            if kind == "single_label" and not label:
                raise _empty_label(listing, number)
            if kind == "regression":
                tasks.Regression(_values(listing)).encode([label])
            sound.append(number)
        except InputError as error:
            place = listing.place(number)
            faults.append(error if str(error).startswith(place) else InputError(f"{place}: {error}"))
    if not sound:
        raise InputError(f"{listing.what or listing.name} has no example with a label. {faults[-1]}")
    return listing if len(sound) == len(listing.names) else _subset(listing, sound)


def _unlabelled(listing: Listing, read: Read) -> Examples:
    every = np.arange(len(read.usable))
    names = tuple(listing.names[number] for number in read.usable)
    load = random_access(listing.reader, read, every)
    pictures = Pictures(names, load, read.image_size, read.hashes, at_once=read.pixels is not None, checked=True)
    return Examples(pictures, np.zeros(len(every), np.int32), np.ones(len(every), np.float32))


# --- labels -------------------------------------------------------------------------------------------------


def _task(listing: Listing, kind: str, label_smoothing: float, balance: bool) -> Task:
    kind = _kind(listing, kind)
    if kind == "regression":
        if label_smoothing or balance:
            raise InputError("`label_smoothing` and `balance` are for classes; regression has none: leave them out")
        return tasks.Regression(_values(listing))
    _check_not_empty(listing, kind)
    labels = _classes(listing, kind)
    if len(labels) < 2 and kind == "single_label":
        raise InputError(
            f"{listing.what or listing.name} holds one class only ({labels[0]!r}): at least two are needed"
        )
    make = tasks.MultiLabel if kind == "multi_label" else tasks.SingleLabel
    return make(labels, label_smoothing=label_smoothing, balance=balance)


def _kind(listing: Listing, kind: str) -> str:
    if kind not in ("auto", *tasks.kinds()):
        raise InputError(f"`task_kind` must be auto, {', '.join(tasks.kinds())}. Received: task_kind={kind!r}")
    if kind != "auto":
        return kind
    return "multi_label" if listing.several else "single_label"


def _values(listing: Listing) -> tuple[str, ...]:
    """Return the names of a regression's numbers."""
    count = listing.labels[0].count("|") + 1
    return ("value",) if count == 1 else tuple(f"value_{i + 1}" for i in range(count))


def _check_not_empty(listing: Listing, kind: str) -> None:
    for number, label in enumerate(listing.labels):
        if not label and kind == "single_label":
            raise _empty_label(listing, number)


def _empty_label(listing: Listing, number: int) -> InputError:
    return InputError(f"{listing.place(number)}: the label is empty. Expected the name of a class")


def _classes(listing: Listing, kind: str) -> tuple[str, ...]:
    """Return the classes in the order that the source states, else sorted; every label must be among them."""
    given = {name for label in listing.labels for name in (split_labels(label) if kind == "multi_label" else [label])}
    unknown, unused = sorted(given - set(listing.classes)), sorted(set(listing.classes) - given)
    if listing.classes and unknown:
        raise InputError(f"classes.txt of {listing.what} lacks classes that occur: {', '.join(map(repr, unknown))}")
    if listing.classes and unused and listing.what:
        raise InputError(
            f"classes.txt of {listing.what} names classes without a picture: "
            f"{', '.join(map(repr, unused))}. Add pictures or remove the names"
        )
    return listing.classes or tuple(sorted(given))


def _encoded(listing: Listing, task: Task) -> np.ndarray:
    """Encode all labels; if that fails, say at which example."""
    try:
        return task.encode(list(listing.labels))
    except InputError:
        for number, label in enumerate(listing.labels):
            try:
                task.encode([label])
            except InputError as error:
                raise InputError(f"{listing.place(number)}: {error}") from None
        raise


# --- dividing -----------------------------------------------------------------------------------------------


def _check_splits(listing: Listing, task: Task, usable: np.ndarray | None = None) -> None:
    """Refuse sources that cannot be divided so that every split has every class."""
    numbers = range(len(listing.names)) if usable is None else usable
    given = [listing.given[number] for number in numbers]
    what = listing.what or listing.name
    if "train" not in given:
        raise InputError(f"{what} has no usable training examples. Received: splits {sorted(set(listing.given))}")
    if task.kind == "single_label":
        splits.check_classes(given, [listing.labels[number] for number in numbers], what)
    elif given.count("train") < splits.needed_per_class(given):
        raise InputError(
            f"{what} needs at least {splits.needed_per_class(given)} usable training pictures, for the splits that "
            f"are missing. Received: {given.count('train')}"
        )


def _check_given_splits(listing: Listing, read: Read) -> None:
    """Refuse a split whose pictures are all unusable, instead of taking another one from train."""
    for split in sorted(set(listing.given) - {listing.given[number] for number in read.usable}):
        names = {name for name, given in zip(listing.names, listing.given, strict=True) if given == split}
        first = next(item for item in read.quarantined if item.file in names)
        raise InputError(
            f"{split} of {listing.what or listing.name}: no picture can be used ({len(names)} were found); the first "
            f"is {first.file}: {first.reason}. Mend or replace them"
        )


def _check_none_empty(parts: dict[str, np.ndarray], what: str) -> None:
    empty = [name for name, numbers in parts.items() if not len(numbers)]
    if empty:
        counts = ", ".join(f"{name} {len(numbers)}" for name, numbers in parts.items())
        raise InputError(f"{' and '.join(empty)} of {what} would be empty: take more examples. Received: {counts}")


def _subset(listing: Listing, numbers: Sequence[int]) -> Listing:
    """Return the listing of some of its examples."""

    def some(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[number] for number in numbers)

    place = listing.place
    return dataclasses.replace(
        listing,
        names=some(listing.names),
        labels=some(listing.labels),
        given=some(listing.given),
        reader=listing.reader.subset(numbers),
        where=lambda number: place(numbers[number]),
        columns={name: some(cells) for name, cells in listing.columns.items()},
    )


def _limited(listing: Listing, task: Task, limit: int, seed: int) -> Listing:
    """Divide first, then keep some of each split, class by class in turn."""
    if len(listing.names) <= limit:
        return listing
    strata = splits.strata_of(_encoded(listing, task), task.kind)
    parts, _ = splits.complete(listing.given, strata, seed, every=task.kind == "single_label")
    chosen: list[int] = []
    given = list(listing.given)
    for name, share in (("test", 0.25), ("validation", 0.25), ("train", 0.5)):
        chosen += [int(number) for number in _in_turn(parts[name], strata, int(limit * share))]
        for number in parts[name]:
            given[number] = name
    note = f"limited to {len(chosen)} of {len(listing.names)} examples"
    whole = dataclasses.replace(listing, given=tuple(given), notes=(*listing.notes, note))
    return _subset(whole, sorted(chosen))


def _in_turn(numbers: np.ndarray, strata: np.ndarray, count: int) -> np.ndarray:
    """Take `count` of the numbers, one of each stratum after the other."""
    seen: dict[Any, int] = {}
    turns = []
    for number in numbers:
        turns.append(seen.get(strata[number], 0))
        seen[strata[number]] = turns[-1] + 1
    return numbers[np.argsort(turns, kind="stable")[:count]]


def _divided(listing: Listing, task: Task, read: Read, seed: int, began: float, checked: bool) -> Data:
    _check_given_splits(listing, read)
    if checked:
        _check_splits(listing, task, read.usable)
    targets = _encoded(listing, task)[read.usable]
    given = [listing.given[number] for number in read.usable]
    strata = splits.strata_of(targets, task.kind)
    if task.kind == "multi_label":
        _check_learned(task, targets, given, listing.what or listing.name)
    parts, origin = splits.complete(given, strata, seed, every=task.kind == "single_label")
    _check_none_empty(parts, listing.what or listing.name)
    examples = {name: _examples(listing, task, read, targets, numbers) for name, numbers in parts.items()}
    return Data(
        name=listing.name,
        labels=task.labels,
        **examples,
        quarantined=(*listing.lost, *read.quarantined),
        found=len(listing.names) + len(listing.lost),
        splits={**origin, "notes": [*listing.notes, *read.notes]},
        fingerprint=_fingerprint(task, examples, parts, read.hashes),
        seconds=time.monotonic() - began,
        seen=_seen(listing, read, parts),
        kind=task.kind,
    )


def _seen(listing: Listing, read: Read, parts: dict[str, np.ndarray]) -> tuple[Seen, ...]:
    """Say what was seen of every example; those that `parts` do not hold are in the split that the source says."""
    of = list(listing.given)
    for split, numbers in parts.items():
        for number in read.usable[numbers]:
            of[number] = split
    cells = [tuple(zip(listing.columns, row, strict=True)) for row in zip(*listing.columns.values(), strict=True)]
    seen = [
        Seen(name, label, split, **dataclasses.asdict(outcome), cells=cells[number] if cells else ())
        for number, (name, label, split, outcome) in enumerate(
            zip(listing.names, listing.labels, of, read.outcomes, strict=True)
        )
    ]
    return (*seen, *(Seen(item.file, "", "", reason=item.reason) for item in listing.lost))


def _check_learned(task: Task, targets: np.ndarray, given: Sequence[str], what: str) -> None:
    """Refuse labels that a given validation or test split has and the training examples lack."""
    learned = targets[[split == "train" for split in given]].any(axis=0)
    for name in ("validation", "test"):
        lacking = targets[[split == name for split in given]].any(axis=0) & ~learned
        if lacking.any():
            label = task.labels[int(np.argmax(lacking))]
            raise InputError(f"{what}: the {name} split has the label {label!r}, which no training example has")


def _examples(listing: Listing, task: Task, read: Read, targets: np.ndarray, numbers: np.ndarray) -> Examples:
    """Return the split of the usable examples that are numbered `numbers`."""
    own = targets[numbers]
    names = tuple(listing.names[read.usable[number]] for number in numbers)
    digests = tuple(read.hashes[number] for number in numbers)
    load = random_access(listing.reader, read, numbers)
    pictures = Pictures(names, load, read.image_size, digests, at_once=read.pixels is not None, checked=True)
    return Examples(pictures, own, task.example_weights(own).astype(np.float32))


def _fingerprint(task: Task, examples: dict[str, Examples], parts: dict[str, np.ndarray], hashes: Sequence[str]) -> str:
    """Hash the labels and, per split, every example's name, content and target."""
    digest = hashlib.sha256(repr(task.labels).encode())
    for split, own in examples.items():
        digest.update(f"\n{split}\n".encode())
        for name, number in zip(own.names, parts[split], strict=True):
            digest.update(f"{name}\0{hashes[number]}\n".encode())
        digest.update(np.ascontiguousarray(own.targets).tobytes())
    return digest.hexdigest()


def _check_image_size(image_size: tuple[int, int]) -> None:
    is_pair = isinstance(image_size, (tuple, list)) and len(image_size) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in image_size):
        raise InputError(
            f"`image_size` must be (height, width) in pixels, above 0. Received: image_size={image_size!r}"
        )
