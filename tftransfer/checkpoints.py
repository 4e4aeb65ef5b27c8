"""What a strategy leaves behind after each finished phase, so that a later call goes on with the next one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tftransfer.adapters import Attached
from tftransfer.errors import InputError
from tftransfer.history import History, PhaseRecord
from tftransfer.optimizers import Moment
from tftransfer.strategies import Strategy
from tftransfer.trainable import AuditRow

FORMAT = "tftransfer phase 1"
FOLDER, FILE = "checkpoints", "phase.safetensors"


@dataclass(frozen=True)
class Call:
    """What must be the same for a call of `fine_tune` to go on where another one ended."""

    strategy: Strategy
    seed: int
    batch_size: int
    max_steps: int | None
    data: str

    def to_json(self) -> dict[str, Any]:
        """Return what is written beside the weights."""
        return json.loads(
            json.dumps({**vars(self), "strategy": [phase.to_json() for phase in self.strategy]}, allow_nan=False)
        )


@dataclass(frozen=True)
class Kept:
    """A finished phase, read back.

    Args:
        weights: Every variable of the model by path.
        factors: Of the adapter that is beside the model, by kernel.
        base: Digest of its base.
        moments: Of the optimizer, by variable.
        history: Up to here.
    """

    weights: Mapping[str, np.ndarray]
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    base: str
    moments: Mapping[str, Moment]
    history: History

    def restore(self, model: keras.Model) -> None:
        """Set a model's variables.

        Raises:
            InputError: If the model has others.
        """
        paths = {variable.path: tuple(variable.shape) for variable in _kept(model)}
        differing = [path for path, shape in paths.items() if self.weights.get(path, np.empty(0)).shape != shape]
        if differing or len(paths) != len(self.weights):
            told = ", ".join(differing[:3]) or ", ".join(sorted({*self.weights} - {*paths})[:3])
            raise InputError(f"`output` holds phases of another network (its variables differ at {told})")
        for variable in _kept(model):
            variable.assign(self.weights[variable.path])


def save(
    folder: Path,
    call: Call,
    model: keras.Model,
    history: History,
    attached: Attached | None,
    base: str,
    moments: Mapping[str, Moment],
) -> None:
    """Write what a later call needs to go on after the phases that `history` holds, in one step.

    Args:
        folder: The run's folder.
        call: What is being done.
        model: As the last phase left it; an adapter is not merged.
        history: So far.
        attached: The adapter beside the model, if any.
        base: Digest of its base.
        moments: Of the last phase's optimizer.
    """
    tensors = {f"weight:{variable.path}": variable.numpy() for variable in _kept(model)}
    for name, (a, b) in (attached.arrays() if attached else {}).items():
        tensors |= {f"a:{name}": a, f"b:{name}": b}
    for name, moment in moments.items():
        tensors |= {f"moment{number}:{name}": slot for number, slot in enumerate(moment.slots)}
    described = {
        "format": FORMAT,
        "call": call.to_json(),
        "base": base,
        "ages": {name: moment.age for name, moment in moments.items()},
        "history": dict(history),
        "phases": [_record_to_json(record) for record in history.phases],
    }
    path = folder / FOLDER / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{FILE}.staged")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, staged, {"tftransfer": json.dumps(described)})
    os.replace(staged, path)


def latest(folder: Path, call: Call) -> Kept | None:
    """Read what the last finished phase of the same call left, or None if there is none.

    Raises:
        InputError: If the folder holds phases of another call; says what differs.
    """
    path = folder / FOLDER / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            described = json.loads(file.metadata()["tftransfer"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove it to begin again") from None
    before, now = described["call"], call.to_json()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"`output` {folder} holds phases of another call, which differs in {', '.join(changed)}: "
            "choose a new folder, or `resume=False` to begin again"
        )
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        kind, _, of = name.partition(":")
        kinds.setdefault(kind, {})[of] = value
    slots = [kinds[kind] for kind in sorted(kinds) if kind.startswith("moment")]
    moments = {
        name: Moment(tuple(slot[name] for slot in slots if name in slot), age)
        for name, age in described["ages"].items()
    }
    factors = {name: (a, kinds["b"][name]) for name, a in kinds.get("a", {}).items()}
    return Kept(kinds["weight"], factors, described["base"], moments, _history(described, call.strategy))


def _kept(model: keras.Model) -> list[keras.Variable]:
    """Return a model's variables but for the states of random layers: each phase sets them, and Keras numbers them."""
    return [variable for variable in model.variables if "seed_generator" not in variable.path]


def _record_to_json(record: PhaseRecord) -> dict[str, Any]:
    own = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.name != "phase"}
    return {**own, "audit": [dataclasses.asdict(row) for row in record.audit]}


def _history(described: Mapping[str, Any], strategy: Strategy) -> History:
    history = History()
    history.update(described["history"])
    for phase, record in zip(strategy, described["phases"], strict=False):
        audit = tuple(AuditRow(**row) for row in record["audit"])
        history.phases.append(PhaseRecord(**{**record, "phase": phase, "audit": audit}))
    return history
