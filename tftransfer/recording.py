"""Write down where a phase is, while it trains, and put it back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tftransfer import distribution, tensor_files, trainable
from tftransfer.callbacks import KeepBest, Logs
from tftransfer.checkpoints import Progress
from tftransfer.errors import InputError
from tftransfer.interruption import Signals
from tftransfer.optimizers import Moment, renamed
from tftransfer.tensor_files import Kinds
from tftransfer.trainee import Trainee

SHARE = 0.02
"""Of a run's time that checkpoints within phases may take."""

_Variable: TypeAlias = keras.Variable | tf.Variable


@dataclass(frozen=True)
class Subject:
    """Everything that changes while a phase trains.

    Args:
        trainee: The part that trains.
        model: The whole network.
        keep: The best weights so far.
        callbacks: The user's own.
    """

    trainee: Trainee
    model: keras.Model
    keep: KeepBest
    callbacks: tuple[keras.callbacks.Callback, ...]

    def _variables(self) -> dict[str, Sequence[_Variable]]:
        generators = [variable for variable in self.model.variables if trainable.is_generator(variable)]
        return {
            "variable": self.trainee.variables,
            "optimizer": self.trainee.optimizer.variables,
            "metric": self.trainee.metrics_variables,
            "generator": generators,
            "counter": list(self.trainee.counters().values()),
        }

    def read(self) -> tuple[Kinds, dict[str, Any]]:
        """Return it as tensors by kind and name, and JSON."""
        best, numbers, kept = self.keep.state()
        moments = renamed(kept.get("moments", {}), trainable.places(self.model))
        slots, ages = tensor_files.pack(moments)
        plain = [_plain_state(callback) for callback in self.callbacks]
        kinds = {
            **{kind: _arrays(variables) for kind, variables in self._variables().items()},
            "best": tensor_files.numbered(best),
            "best_generator": tensor_files.numbered(kept.get("generators", ())),
            **slots,
            **{f"callback{number}": arrays for number, (_, arrays) in enumerate(plain)},
        }
        told = {
            "best": {name: _to_json(value) for name, value in numbers.items()},
            "ages": ages,
            "remembers": sorted(kept),
            "callbacks": [
                [type(callback).__name__, values] for callback, (values, _) in zip(self.callbacks, plain, strict=True)
            ],
            "logs": {name: list(map(_to_json, values)) for name, values in self._logs().items()},
        }
        return kinds, told

    def _logs(self) -> dict[str, list[float]]:
        return self.trainee.history.history

    def put_back(self, progress: Progress) -> None:
        """Set all of it but metrics and callbacks, which the beginning of training and of an epoch reset.

        Raises:
            InputError: If it is of another network.
        """
        kinds, told = progress.kinds, progress.told
        for kind in ("variable", "optimizer", "generator", "counter"):
            _assign(kind, self._variables()[kind], kinds.get(kind, {}))
        paths = {place: path for path, place in trainable.places(self.model).items()}
        kept: dict[str, Any] = {"moments": renamed(_moments(kinds, told["ages"]), paths)}
        if "generators" in told["remembers"]:
            kept["generators"] = tensor_files.in_order(kinds.get("best_generator", {}))
        numbers = {name: _from_json(value) for name, value in told["best"].items()}
        self.keep.put_back(list(tensor_files.in_order(kinds["best"])), numbers, kept)

    def put_back_metrics(self, progress: Progress) -> None:
        """Set the metrics of the epoch that was running."""
        _assign("metric", self._variables()["metric"], progress.kinds.get("metric", {}))

    def put_back_callbacks(self, progress: Progress) -> None:
        """Set what the user's callbacks had found out, and what is known of the epochs before."""
        told = progress.told
        self.trainee.history.history = {name: list(map(_from_json, values)) for name, values in told["logs"].items()}
        for number, (callback, (name, values)) in enumerate(zip(self.callbacks, told["callbacks"], strict=False)):
            if name == type(callback).__name__:
                _set_plain_state(callback, values, progress.kinds.get(f"callback{number}", {}))


def _moments(kinds: Kinds, ages: Mapping[str, int]) -> dict[str, Moment]:
    return tensor_files.unpack(kinds, ages)


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


def _plain_state(callback: keras.callbacks.Callback) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a callback knows: numbers, texts, and arrays alone or in lists, such as the best weights."""
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(callback).items():
        if isinstance(value, bool | int | float | str | np.number) or value is None:
            values[name] = _to_json(value)
        elif isinstance(value, list) and value and all(isinstance(one, np.ndarray) for one in value):
            values[name] = {"arrays": len(value)}
            arrays.update({f"{name}.{number}": one for number, one in enumerate(value)})
    return values, arrays


def _set_plain_state(
    callback: keras.callbacks.Callback, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and "arrays" in value:
            setattr(callback, name, [arrays[f"{name}.{number}"] for number in range(value["arrays"])])
        else:
            setattr(callback, name, _from_json(value))


def _to_json(value: Any) -> Any:
    """Return a number as JSON has it, which knows neither infinity nor NaN."""
    value = value.item() if isinstance(value, np.number) else value
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


class Recorder(keras.callbacks.Callback):
    """Writes a phase down every so often, and ends it when its time is over or a signal has come.

    The last of all callbacks: what the others did with a step is written down with it.

    Args:
        subject: What changes.
        write: Writes a `Progress`; None for nowhere.
        phase: The phase's number.
        per_epoch: Steps of an epoch.
        first_epoch: The number that Keras gives the phase's first epoch.
        began_with: Where the phase goes on. Defaults to its beginning.
        every: Seconds between two times, more where writing takes more than `SHARE` of them; 0 for every step.
            Defaults to 60.
        deadline: Of the monotonic clock. Defaults to none.
        signals: Ask whether the process is to end. Defaults to nobody.
        decided: JSON that is written down too: what was decided when the phase began. Defaults to nothing.
    """

    def __init__(
        self,
        subject: Subject,
        write: Callable[[Progress], None] | None,
        phase: int,
        per_epoch: int,
        first_epoch: int,
        *,
        began_with: Progress | None = None,
        every: float = 60.0,
        deadline: float = math.inf,
        signals: Signals | None = None,
        decided: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.set_model(subject.trainee)
        self.out_of_time = False
        self.seconds = 0.0
        self._subject = subject
        self._write = write
        self._phase = phase
        self._per_epoch = per_epoch
        self.first_epoch = first_epoch
        self._progress = began_with
        self._every = every
        self._deadline = deadline
        self._signals = signals
        self._decided = dict(decided or {})
        self.epoch, self.place = (began_with.epoch, began_with.place) if began_with else (0, 0)
        self._next = time.monotonic() + every

    def on_train_begin(self, logs: Logs = None) -> None:
        if self._progress:
            self._subject.put_back_callbacks(self._progress)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.epoch = epoch - self.first_epoch
        if self._progress:
            self._subject.put_back_metrics(self._progress)
            self._progress = None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        now = time.monotonic()
        signalled = self._signals is not None and self._signals.came is not None
        self.out_of_time = now >= self._deadline
        if self._write and (signalled or self.out_of_time or now >= self._next):
            self._record(self._write, batch + 1)
        if signalled and self._signals:
            self._signals.release()
        if self.out_of_time:
            self.model.stop_training = True

    def _record(self, write: Callable[[Progress], None], place: int) -> None:
        began = time.monotonic()
        kinds, told = self._subject.read()
        steps = self.epoch * self._per_epoch + place
        write(Progress(self._phase, self.epoch, place, steps, kinds, {**told, **self._decided}))
        took = time.monotonic() - began
        self.seconds += took
        self._next = began + took + (max(self._every, took / SHARE) if self._every else 0)
