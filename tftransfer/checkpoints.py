"""What a strategy leaves behind after each finished phase, so that a later call goes on with the next one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tftransfer import scanning, tensor_files
from tftransfer.adapters import Adapter, Attached
from tftransfer.data import Data
from tftransfer.errors import InputError
from tftransfer.history import History, PhaseRecord
from tftransfer.optimizers import Moment
from tftransfer.penalties import Source
from tftransfer.strategies import Strategy
from tftransfer.tasks import Task
from tftransfer.trainable import AuditRow, places

FORMAT = "tftransfer phase 1"
FOLDER, FILE = "checkpoints", "phase.safetensors"


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
    """Write what a later call needs to go on after the phases that `history` holds, in one step.

    Args:
        folder: The run's folder.
        call: What is being done.
        model: As the last phase left it; an adapter is not merged.
        history: So far.
        attached: The adapter beside the model, if any.
        base: Digest of its base.
        moments: Of the last phase's optimizer, by place of the variable or name of the factor.
        generators: States of the network's random layers when the weights were kept. Defaults to none.
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
    path = folder / FOLDER / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [_record_to_json(record) for record in history.phases]
    tensor_files.write(
        path, kinds, FORMAT, call=call.to_json(), base=base, ages=ages, history=_no_nan(history), phases=records
    )


def latest(folder: Path, call: Call) -> Kept | None:
    """Read what the last finished phase of the same call left, or None if there is none.

    Raises:
        InputError: If the folder holds phases of another call; says what differs. If the file is damaged.
        ScanError: If a scan finds something in the file.
    """
    path = folder / FOLDER / FILE
    if not path.is_file():
        return None
    try:
        scanning.check(path, kind=".safetensors")
        described, kinds = tensor_files.read(path, FORMAT)
    except InputError as error:
        raise type(error)(f"{error}; remove it to begin again") from None
    before, now = described["call"], call.to_json()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        went_on = ", unless it is half tuned already: then build it anew" if changed == ["base"] else ""
        raise InputError(
            f"`output` {folder} holds phases of another call, which differs in {', '.join(changed)}: "
            f"choose a new folder, or `resume=False` to begin again{went_on}"
        )
    a, b, generators = (tensor_files.in_order(kinds.get(kind, {})) for kind in ("a", "b", "generator"))
    return Kept(
        kinds["weight"],
        tuple(zip(a, b, strict=True)),
        described["base"],
        tensor_files.unpack(kinds, described["ages"]),
        _history(described, call.strategy),
        generators,
    )


def _by_place(model: keras.Model) -> dict[str, keras.Variable]:
    """Return a model's variables by place, see `trainable.places`."""
    variables = {variable.path: variable for variable in model.variables}
    return {place: variables[path] for path, place in places(model).items()}


def _no_nan(history: History) -> dict[str, list[float | None]]:
    """Return the lists with null for what is not a finite number, as JSON has it."""
    return {name: [value if math.isfinite(value) else None for value in values] for name, values in history.items()}


def _record_to_json(record: PhaseRecord) -> dict[str, Any]:
    own = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.name != "phase"}
    return {**own, "audit": [dataclasses.asdict(row) for row in record.audit]}


def _history(described: Mapping[str, Any], strategy: Strategy) -> History:
    history = History()
    for name, values in described["history"].items():
        history[name] = [math.nan if value is None else value for value in values]
    for phase, record in zip(strategy, described["phases"], strict=False):
        audit = tuple(AuditRow(**row) for row in record["audit"])
        history.phases.append(PhaseRecord(**{**record, "phase": phase, "audit": audit}))
    return history
