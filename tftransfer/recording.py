"""Write down where a phase is, while it trains, and put it back."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tftransfer import distribution, tensor_files, trainable
from tftransfer.callbacks import KeepBest, Logs
from tftransfer.checkpoints import Progress
from tftransfer.errors import InputError
from tftransfer.interruption import Signals
from tftransfer.optimizers import renamed
from tftransfer.tensor_files import Kinds, from_json, to_json
from tftransfer.trainee import Trainee

SHARE = 0.02
"""Of a run's time that checkpoints within phases may take."""

_Variable: TypeAlias = keras.Variable | tf.Variable


@dataclass(frozen=True)
class Spent:
    """How many seconds a phase has taken, over all processes that trained it.

    Args:
        total: All in all.
        extract: Of them, for computing or finding what the frozen part gives.
        save: Of them, for checkpoints within the phase.
    """

    total: float = 0.0
    extract: float = 0.0
    save: float = 0.0


def spent_before(progress: Progress | None) -> Spent:
    """Return what a phase had taken where it goes on."""
    return Spent(**progress.told["spent"]) if progress else Spent()


@dataclass(frozen=True)
class Subject:
    """Everything that changes while a phase trains.

    Args:
        trainee: The part that trains.
        model: The whole network.
        keep: The best weights so far.
        callbacks: The user's own.
        start: The weights that the phase began with, where its average needs them. Defaults to none.
        noted: What the callbacks held when training began.
    """

    trainee: Trainee
    model: keras.Model
    keep: KeepBest
    callbacks: tuple[keras.callbacks.Callback, ...]
    start: Sequence[np.ndarray] = ()
    noted: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = field(default_factory=list)

    def _variables(self) -> dict[str, Sequence[_Variable]]:
        return {
            "variable": self.trainee.variables,
            "optimizer": self.trainee.optimizer.variables,
            "metric": self.trainee.metrics_variables,
            "generator": trainable.generators(self.model),
            "counter": list(self.trainee.counters().values()),
        }

    def read(self) -> tuple[Kinds, dict[str, Any]]:
        """Return it as tensors by kind and name, and JSON."""
        best, numbers, kept = self.keep.state()
        moments = renamed(kept.get("moments", {}), trainable.places(self.model))
        slots, ages = tensor_files.pack(moments)
        plain = [self._changed(number) for number in range(len(self.callbacks))]
        kinds = {
            **{kind: _arrays(variables) for kind, variables in self._variables().items()},
            "best": tensor_files.numbered(best),
            "start": tensor_files.numbered(self.start),
            "best_generator": tensor_files.numbered(kept.get("generators", ())),
            **slots,
            **{f"callback{number}": arrays for number, (_, arrays) in enumerate(plain)},
        }
        told = {
            "stops": bool(self.trainee.stop_training),
            "best": {name: to_json(value) for name, value in numbers.items()},
            "ages": ages,
            "remembers": sorted(kept),
            "callbacks": [
                [type(callback).__name__, values] for callback, (values, _) in zip(self.callbacks, plain, strict=True)
            ],
            "logs": {name: list(map(to_json, values)) for name, values in self.trainee.history.history.items()},
        }
        return kinds, told

    def note_callbacks(self) -> None:
        """Note what the user's callbacks hold as training begins: what is still the same later is not written down."""
        self.noted[:] = [_state_of(callback) for callback in self.callbacks]

    def _changed(self, number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        values, arrays = _state_of(self.callbacks[number])
        before, old = self.noted[number]
        same = {
            name for name, value in values.items() if name in before and _are_same(value, arrays, before[name], old)
        }
        kept = {name: value for name, value in values.items() if name not in same}
        return kept, {name: array for name, array in arrays.items() if name.rpartition(".")[0] in kept}

    def put_back(self, progress: Progress) -> None:
        """Set all of it but metrics and callbacks, which the beginning of training and of an epoch reset.

        Raises:
            InputError: If it is of another network.
        """
        kinds, told = progress.kinds, progress.told
        for kind in ("variable", "optimizer", "generator", "counter"):
            _assign(kind, self._variables()[kind], kinds.get(kind, {}))
        paths = {place: path for path, place in trainable.places(self.model).items()}
        kept: dict[str, Any] = {"moments": renamed(tensor_files.unpack(kinds, told["ages"]), paths)}
        if "generators" in told["remembers"]:
            kept["generators"] = tensor_files.in_order(kinds.get("best_generator", {}))
        numbers = {name: from_json(value) for name, value in told["best"].items()}
        self.keep.put_back(list(tensor_files.in_order(kinds["best"])), numbers, kept)

    def put_back_metrics(self, progress: Progress) -> None:
        """Set the metrics of the epoch that was running."""
        _assign("metric", self._variables()["metric"], progress.kinds.get("metric", {}))

    def put_back_callbacks(self, progress: Progress) -> None:
        """Set what the user's callbacks had found out, and what is known of the epochs before."""
        told = progress.told
        self.trainee.history.history = {name: list(map(from_json, values)) for name, values in told["logs"].items()}
        for number, (callback, (name, values)) in enumerate(zip(self.callbacks, told["callbacks"], strict=False)):
            if name == type(callback).__name__:
                _set_state(callback, values, progress.kinds.get(f"callback{number}", {}))


def _are_same(value: Any, arrays: Mapping[str, np.ndarray], other: Any, others: Mapping[str, np.ndarray]) -> bool:
    """Whether two packed values are the same, arrays included."""
    if isinstance(value, dict) and isinstance(other, dict) and "array" in value and "array" in other:
        return np.array_equal(arrays[value["array"]], others[other["array"]])
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        return all(_are_same(value[key], arrays, other[key], others) for key in value)
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        return all(_are_same(one, arrays, two, others) for one, two in zip(value, other, strict=True))
    return type(value) is type(other) and value == other


def _arrays(variables: Sequence[_Variable]) -> dict[str, np.ndarray]:
    """Return the values of variables on each device; one where all have the same."""
    found = {}
    for number, variable in enumerate(variables):
        values = [part.numpy() for part in distribution.parts(variable)]
        same = all(value.tobytes() == values[0].tobytes() for value in values)
        found.update({f"{number}.{device}": value for device, value in enumerate(values[:1] if same else values)})
    return found


def _assign(kind: str, variables: Sequence[_Variable], arrays: Mapping[str, np.ndarray]) -> None:
    if len({name.partition(".")[0] for name in arrays}) != len(variables):
        raise InputError(
            f"`output` holds progress of another network: {len(variables)} variables ({kind}) are expected"
        )
    for number, variable in enumerate(variables):
        for device, part in enumerate(distribution.parts(variable)):
            value = arrays.get(f"{number}.{device}", arrays[f"{number}.0"])
            if value.shape != tuple(part.shape):
                raise InputError(f"`output` holds progress of another network: it differs in {part.name}")
            part.assign(value)


def _state_of(callback: keras.callbacks.Callback) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a callback holds in numbers, texts and arrays, alone or in lists, tuples and dicts; not the rest."""
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(callback).items():
        own: dict[str, np.ndarray] = {}
        with contextlib.suppress(TypeError):
            values[name] = _packed(value, name, own)
            arrays.update(own)
    return values, arrays


def _packed(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value as JSON, its arrays apart.

    Raises:
        TypeError: If it holds anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) or (isinstance(value, np.number) and np.isrealobj(value)):
        return to_json(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        place = f"{name}.{len(arrays)}"
        arrays[place] = value
        return {"array": place}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_packed(one, name, arrays) for one in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _packed(one, name, arrays) for key, one in value.items()}}
    raise TypeError(f"{type(value).__name__} is not written down")


def _unpacked(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "array":
        return arrays[held]
    if kind == "dict":
        return {key: _unpacked(one, arrays) for key, one in held.items()}
    if kind == "float":
        return from_json(value)
    parts = [_unpacked(one, arrays) for one in held]
    return tuple(parts) if kind == "tuple" else parts


def _set_state(callback: keras.callbacks.Callback, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    if hasattr(callback, "_set_monitor_op"):  # stock callbacks turn `min_delta` round when they settle on a direction
        callback._set_monitor_op()
    for name, value in values.items():
        setattr(callback, name, _unpacked(value, arrays))


class Recorder(keras.callbacks.Callback):
    """Writes a phase down every so often, and ends it when its time is over or a signal has come.

    The last of all callbacks: what the others did with a step is written down with it.

    Args:
        subject: What changes.
        write: Writes a `Progress`; None for nowhere.
        phase: The phase's number.
        per_epoch: Steps of an epoch.
        epochs: The numbers that Keras gives the phase's epochs.
        began_with: Where the phase goes on. Defaults to its beginning.
        every: Seconds between two times, more where writing takes more than `SHARE` of them; 0 for every step.
            Defaults to 60.
        deadline: Of the monotonic clock. Defaults to none.
        signals: Ask whether the process is to end. Defaults to nobody.
        decided: JSON that is written down too: what was decided when the phase began. Defaults to nothing.
        began: When this process began with the phase, by the monotonic clock. Defaults to now.
        extracted: What it took for what the frozen part gives, in seconds. Defaults to 0.
    """

    def __init__(
        self,
        subject: Subject,
        write: Callable[[Progress], None] | None,
        phase: int,
        per_epoch: int,
        epochs: range,
        *,
        began_with: Progress | None = None,
        every: float = 60.0,
        deadline: float = math.inf,
        signals: Signals | None = None,
        decided: Mapping[str, Any] | None = None,
        began: float | None = None,
        extracted: float = 0.0,
    ) -> None:
        super().__init__()
        self.set_model(subject.trainee)
        self.out_of_time = False
        before = spent_before(began_with)
        self._began = (time.monotonic() if began is None else began) - before.total
        self._extracted = before.extract + extracted
        self._saving = before.save
        self._subject = subject
        self._write = write
        self._phase = phase
        self._per_epoch = per_epoch
        self.epochs = epochs
        self._progress = began_with
        self._every = every
        self._deadline = deadline
        self._signals = signals
        self._decided = dict(decided or {})
        self.epoch, self.place = (began_with.epoch, began_with.place) if began_with else (0, 0)
        self._next = time.monotonic() + every

    def on_train_begin(self, logs: Logs = None) -> None:
        self._subject.note_callbacks()
        if self._progress:
            self._subject.put_back_callbacks(self._progress)
            self.model.stop_training = self._progress.told["stops"]

    @property
    def spent(self) -> Spent:
        """How many seconds the phase has taken so far."""
        return Spent(time.monotonic() - self._began, self._extracted, self._saving)

    @property
    def left(self) -> range:
        """The epochs that are not finished."""
        return range(self.epochs.start + self.epoch, self.epochs.stop)

    @property
    def steps(self) -> int:
        """How many steps of the phase are done."""
        return self.epoch * self._per_epoch + self.place

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.epoch = epoch - self.epochs.start
        if self._progress:
            self._subject.put_back_metrics(self._progress)
            self._progress = None
        else:
            self.place = 0

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        now, self.place = time.monotonic(), batch + 1
        signalled = self._signals is not None and self._signals.came is not None
        self.out_of_time = now >= self._deadline and self.steps < len(self.epochs) * self._per_epoch
        if self._write and (signalled or self.out_of_time or now >= self._next):
            self._record(self._write)
        if signalled and self._signals:
            self._signals.release()
        if self.out_of_time:
            self.model.stop_training = True

    def _record(self, write: Callable[[Progress], None]) -> None:
        began = time.monotonic()
        kinds, told = self._subject.read()
        told = {**told, **self._decided, "spent": vars(self.spent)}
        write(Progress(self._phase, self.epoch, self.place, self.steps, kinds, told))
        took = time.monotonic() - began
        self._saving += took
        self._next = began + took + (max(self._every, took / SHARE) if self._every else 0)
