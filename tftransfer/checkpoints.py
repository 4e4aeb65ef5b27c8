"""What a run leaves behind after each phase, and within one from time to time, so that a later call goes on from there.

A phase that was interrupted is prepared again from where the one before it ended, as it was the first time; then what
was written down within it takes the place of what changes while it trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tftransfer import scanning, sealed_folders, tensor_files
from tftransfer.adapters import Adapter, Attached
from tftransfer.data import Data
from tftransfer.errors import InputError
from tftransfer.history import History, PhaseRecord
from tftransfer.optimizers import Moment
from tftransfer.penalties import Source
from tftransfer.sealed_folders import DamageError
from tftransfer.strategies import Strategy
from tftransfer.tasks import Task
from tftransfer.tensor_files import Kinds
from tftransfer.trainable import AuditRow, places
from tftransfer.versions import differences, versions

PHASE, STEP = "tftransfer phase 2", "tftransfer step 2"
FOLDER, FILE = "checkpoints", "state.safetensors"
KEPT = 2  # of each kind: where one is damaged, the one before it serves
_NAME = re.compile(r"\d{3}-\d{9}")  # finished phases, and steps of the next one
_SPARE = 2**20  # bytes that a file needs beyond its tensors


@dataclass(frozen=True)
class Call:
    """What must be the same for a call of `fine_tune` to go on where another one ended.

    Args:
        strategy, seed, batch_size, max_steps: Its arguments.
        data: Fingerprint of the examples.
        task: What is learned, in words.
        source: Digest of the old task, empty without one.
        adapter: Digest of the adapter it went on from, empty without one.
        base: Digest of the network below its head before the first step.
        cache_dtype: What the frozen part's outputs are rounded to, and computed in.
        network: Digest of its layers, precision included; see `features.described`.
        replicas: How many devices share a batch.
        versions: Of the packages that decide results. Defaults to those at work.
    """

    strategy: Strategy
    seed: int
    batch_size: int
    max_steps: int | None
    data: str
    task: str
    source: str = ""
    adapter: str = ""
    base: str = ""
    cache_dtype: str = "float32"
    network: str = ""
    replicas: int = 1
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """Return what is written beside the weights."""
        return json.loads(
            json.dumps({**vars(self), "strategy": [phase.to_json() for phase in self.strategy]}, allow_nan=False)
        )


def call_of(
    strategy: Strategy,
    seed: int,
    batch_size: int,
    max_steps: int | None,
    data: Data,
    task: Task,
    source: Source | None,
    adapter: Adapter | None,
    base: str = "",
    cache_dtype: str = "float32",
    network: str = "",
    replicas: int = 1,
) -> Call:
    """Describe a call of `fine_tune`; see `Call`."""
    parts = (
        part
        for split in (data.train, data.validation)
        for part in (split.targets, split.weights, np.array(split.names))
    )
    examples = _digest([np.array(data.fingerprint), *parts])  # splits may have been changed since they were read
    return Call(
        tuple(strategy),
        seed,
        batch_size,
        max_steps,
        examples,
        repr(task),
        _digest([source.kernel, source.bias]) if source else "",
        _digest([*adapter.head, *(part for pair in adapter.factors for part in pair)]) if adapter else "",
        base,
        cache_dtype,
        hashlib.sha256(network.encode()).hexdigest(),
        replicas,
    )


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kept:
    """A finished phase, read back.

    Args:
        weights: Every variable of the model by place, see `trainable.places`.
        factors: A and B of the adapter that is beside the model; empty without one.
        base: Digest of its base.
        moments: Of the optimizer, by place of the variable or name of the factor.
        history: Up to here.
        generators: States of the network's random layers, in order. Defaults to none.
    """

    weights: Mapping[str, np.ndarray]
    factors: tuple[tuple[np.ndarray, np.ndarray], ...]
    base: str
    moments: Mapping[str, Moment]
    history: History
    generators: tuple[np.ndarray, ...] = ()

    def restore(self, model: keras.Model) -> None:
        """Set a model's variables.

        Raises:
            InputError: If the model has others.
        """
        by_place = _by_place(model)
        shapes = {place: tuple(variable.shape) for place, variable in by_place.items()}
        if shapes != {place: value.shape for place, value in self.weights.items()}:
            differing = {*shapes.items()} ^ {(place, value.shape) for place, value in self.weights.items()}
            told = ", ".join(f"{place} {list(shape)}" for place, shape in sorted(differing, key=str)[:3])
            raise InputError(f"`output` holds phases of another network (its variables differ at {told})")
        for place, variable in by_place.items():
            variable.assign(self.weights[place])


@dataclass(frozen=True)
class Progress:
    """Where a phase was when it was written down.

    Args:
        phase: Its number, from 0.
        epoch: How many of its epochs were finished, with their validation.
        place: How many steps of the next one were done.
        steps: How many steps of the phase that makes.
        kinds: Tensors by kind and name.
        told: JSON that goes with them.
    """

    phase: int
    epoch: int
    place: int
    steps: int
    kinds: Kinds
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What a folder holds of a call.

    Args:
        kept: The last finished phase; None before the end of the first.
        progress: Where the phase after it was; None at its beginning.
        notes: What was damaged, and is set aside.
    """

    kept: Kept | None
    progress: Progress | None
    notes: tuple[str, ...]


def save(
    folder: Path,
    call: Call,
    model: keras.Model,
    history: History,
    attached: Attached | None,
    base: str,
    moments: Mapping[str, Moment],
    generators: Sequence[np.ndarray] = (),
) -> None:
    """Write what a later call needs to go on after the phases that `history` holds.

    Args:
        folder: The run's folder.
        call: What is being done.
        model: As the last phase left it; an adapter is not merged.
        history: So far.
        attached: The adapter beside the model, if any.
        base: Digest of its base.
        moments: Of the last phase's optimizer, by place of the variable or name of the factor.
        generators: States of the network's random layers when the weights were kept. Defaults to none.

    Raises:
        OSError: If it cannot be written; what was written before is still there.
    """
    slots, ages = tensor_files.pack(moments)
    factors = attached.arrays() if attached else ()
    kinds = {
        "weight": {place: variable.numpy() for place, variable in _by_place(model).items()},
        "a": tensor_files.numbered(a for a, _ in factors),
        "b": tensor_files.numbered(b for _, b in factors),
        "generator": tensor_files.numbered(generators),
        **slots,
    }
    records = [_record_to_json(record) for record in history.phases]
    described = {"base": base, "ages": ages, "history": _as_json(history), "phases": records}
    _write(folder, len(history.phases), 0, kinds, PHASE, call, described)


def save_progress(folder: Path, call: Call, progress: Progress) -> None:
    """Write down where a phase is.

    Args:
        folder: The run's folder.
        call: What is being done.
        progress: Where it is, after at least one step.

    Raises:
        OSError: If it cannot be written; what was written before is still there.
    """
    described = {name: getattr(progress, name) for name in ("phase", "epoch", "place", "steps", "told")}
    _write(folder, progress.phase, progress.steps, progress.kinds, STEP, call, described)


def _write(
    folder: Path, phase: int, steps: int, kinds: Kinds, format_name: str, call: Call, described: Mapping[str, Any]
) -> None:
    parent = folder / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for kind in kinds.values() for tensor in kind.values()) + _SPARE
    if (free := shutil.disk_usage(parent).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")

    def build(scratch: Path) -> None:
        tensor_files.write(scratch / FILE, kinds, format_name, call=call.to_json(), **described)

    try:
        sealed_folders.write(parent / _name(phase, steps), build)
    finally:  # where the last of all calls fails, what was written is there
        _tidy(parent)


def _tidy(parent: Path) -> None:
    """Keep the newest of each kind: a phase's end, which is where the next one begins, and what is within phases."""
    names = _names(parent)
    ends = [name for name in names if name == _name(int(name[:3]), 0)]
    within = [name for name in names if name not in ends]
    for name in (*ends[:-KEPT], *within[:-KEPT]):
        with contextlib.suppress(OSError):  # the next one tries again
            sealed_folders.remove(parent / name)


def finish(folder: Path) -> None:
    """Remove what nobody needs once all phases are done; the end of the last one stays.

    Raises:
        OSError: If some of it cannot be removed; the rest is.
    """
    parent, failed = folder / FOLDER, []
    for path in (*(parent / name for name in _names(parent)[:-1]), *parent.glob(f"{sealed_folders.DAMAGED}*")):
        try:
            sealed_folders.remove(path)
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _name(phase: int, steps: int) -> str:
    return f"{phase:03d}-{steps:09d}"


def _names(parent: Path) -> list[str]:
    """Return the names of what is kept, oldest first."""
    folders = parent.iterdir() if parent.is_dir() else ()
    return sorted(path.name for path in folders if _NAME.fullmatch(path.name))


def latest(folder: Path, call: Call) -> Found:
    """Read where the same call was when it ended; what is damaged is set aside, and the one before it serves.

    Where nothing can be written, what is damaged stays where it is, and is not read either.

    Raises:
        InputError: If the folder holds another call; says what differs.
        ScanError: If a scan finds something in a file.
    """
    parent = folder / FOLDER
    sealed_folders.sweep(parent)
    damaged = {name: note for name in _names(parent) if (note := _without_damage(parent / name))}
    notes, whole = [*damaged.values()], [name for name in _names(parent) if name not in damaged]
    if notes:
        notes.append("Training goes on from the one before." if whole else "Training begins anew.")
    for name in reversed(whole):
        phase = int(name[:3])
        end = _name(phase, 0)
        if phase and end not in whole:  # what it began with is damaged
            with contextlib.suppress(OSError):
                sealed_folders.remove(parent / name)
            continue
        kept = _kept(*_read(parent / end, PHASE, call), call.strategy) if phase else None
        return Found(kept, None if name == end else _progress(*_read(parent / name, STEP, call)), tuple(notes))
    return Found(None, None, tuple(notes))


def _without_damage(path: Path) -> str:
    """Set one aside that is not what was written; returns what there is to say about it."""
    try:
        sealed_folders.check(path)
    except DamageError as error:
        try:
            done = f"set aside as {sealed_folders.set_aside(path).name}"
        except OSError as why:
            done = f"cannot be set aside ({why.strerror})"
        return f"{path} is damaged ({error}) and {done}."
    return ""


def clear(folder: Path) -> None:
    """Remove all there is of an earlier call, the newest first: where that fails, one can go on from what is left.

    Raises:
        OSError: If it cannot be removed. A later call would take it for its own, so nothing may begin then.
    """
    parent = folder / FOLDER
    sealed_folders.sweep(parent)
    for path in (*(parent / name for name in reversed(_names(parent))), *parent.glob(f"{sealed_folders.DAMAGED}*")):
        sealed_folders.remove(path)


def _read(path: Path, format_name: str, call: Call) -> tuple[dict[str, Any], Kinds]:
    """Read one that is whole, and refuse that of another call."""
    scanning.check(path / FILE, kind=".safetensors")
    described, kinds = tensor_files.read(path / FILE, format_name)
    before, now = described["call"], call.to_json()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        went_on = ", unless it is half tuned already: then build it anew" if changed == ["base"] else ""
        others = differences(before.get("versions", {}), now["versions"])
        raise InputError(
            f"{path.parent.parent} holds phases of another call, which differs in {', '.join(changed)}"
            f"{others and f' ({others})'}: choose a new folder, or begin again there by `resume=False`{went_on}"
        )
    return described, kinds


def _kept(described: Mapping[str, Any], kinds: Kinds, strategy: Strategy) -> Kept:
    a, b, generators = (tensor_files.in_order(kinds.get(kind, {})) for kind in ("a", "b", "generator"))
    return Kept(
        kinds["weight"],
        tuple(zip(a, b, strict=True)),
        described["base"],
        tensor_files.unpack(kinds, described["ages"]),
        _history(described, strategy),
        generators,
    )


def _progress(described: Mapping[str, Any], kinds: Kinds) -> Progress:
    numbers = {name: described[name] for name in ("phase", "epoch", "place", "steps")}
    return Progress(**numbers, kinds=kinds, told=described["told"])


def _by_place(model: keras.Model) -> dict[str, keras.Variable]:
    """Return a model's variables by place, see `trainable.places`."""
    variables = {variable.path: variable for variable in model.variables}
    return {place: variables[path] for path, place in places(model).items()}


def _as_json(history: History) -> dict[str, list[Any]]:
    return {name: list(map(tensor_files.to_json, values)) for name, values in history.items()}


def _record_to_json(record: PhaseRecord) -> dict[str, Any]:
    own = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.name != "phase"}
    return {**own, "audit": [dataclasses.asdict(row) for row in record.audit]}


def _history(described: Mapping[str, Any], strategy: Strategy) -> History:
    history = History()
    for name, values in described["history"].items():
        history[name] = list(map(tensor_files.from_json, values))
    for phase, record in zip(strategy, described["phases"], strict=False):
        audit = tuple(AuditRow(**row) for row in record["audit"])
        history.phases.append(PhaseRecord(**{**record, "phase": phase, "audit": audit}))
    return history
