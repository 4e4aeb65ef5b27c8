"""A run that is interrupted within a phase ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from tftransfer import InputError, checkpoints, feeding, recording, sealed_folders, training
from tftransfer.adapters import Lora
from tftransfer.averages import Ema, WiseFt
from tftransfer.history import History
from tftransfer.interruption import Signals
from tftransfer.penalties import L2SP
from tftransfer.strategies import Phase

STRATEGIES = {
    "BatchNorm, dropout, augmentation": (
        Phase("probe", "head", 2, 0.05),
        Phase("all", "all", 2, 0.01, augmentation="light", carry_moments=True, train_batch_norm=True),
    ),
    "average": (Phase("all", "all", 2, 0.01, average=Ema(1.0), optimizer="adamw"),),
    "between weights": (Phase("top", "last:1", 3, 0.01, average=WiseFt()),),
    "penalty": (Phase("probe", "head", 1, 0.05), Phase("all", "all", 2, 0.01, penalty=L2SP(0.1))),
    "LoRA": (Phase("probe", "head", 1, 0.05), Phase("LoRA", "head", 2, 0.02, adapter=Lora(2))),
}


@pytest.fixture(autouse=True)
def _two_steps_at_once(monkeypatch):
    """Let no call of a graph take a whole epoch, as it would with so few examples."""
    monkeypatch.setattr(feeding, "_AT_ONCE", 2)


@pytest.fixture
def tuned(small_network, small_task, small_data):
    """Return a function that trains a new small network, and gives it and its history."""

    def run(strategy, **given):
        keras.utils.set_random_seed(5)
        model = small_network(dropout=0.3)
        return model, training.fine_tune(model, small_task, small_data, strategy, **{"batch_size": 4, **given})

    return run


def _same(one, other):
    for first, second in zip(one[0].variables, other[0].variables, strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    assert dict(one[1]) == dict(other[1])
    assert [(r.epochs, r.best_epoch) for r in one[1].phases] == [(r.epochs, r.best_epoch) for r in other[1].phases]


class _Killed(BaseException):
    """What stands for the end of the process."""


def _dying(monkeypatch, after, name="save_progress"):
    """Let the process end right after so many checkpoints."""
    write, count = getattr(checkpoints, name), iter(range(1, 10**6))

    def dies(*given, **named):
        write(*given, **named)
        if next(count) == after:
            raise _Killed

    monkeypatch.setattr(checkpoints, name, dies)


@pytest.mark.parametrize(
    "cache", [pytest.param("auto", id="kept"), pytest.param("off", id="computed", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_going_on_within_an_epoch_equals_never_having_stopped(tuned, tmp_path, monkeypatch, name, cache):
    given = {"strategy": STRATEGIES[name], "cache": cache}
    expected = tuned(**given)
    for after in (1, 2, 1):
        with monkeypatch.context() as patch:
            _dying(patch, after)
            with pytest.raises(_Killed):
                tuned(**given, output=tmp_path, save_every=0)
    _same(tuned(**given, output=tmp_path, save_every=0), expected)


@pytest.mark.parametrize("name", ["between weights", "LoRA"])
def test_a_call_with_nothing_left_to_train_gives_what_training_gave(tuned, tmp_path, name):
    trained = tuned(STRATEGIES[name], output=tmp_path)
    _same(tuned(STRATEGIES[name], output=tmp_path), trained)


def test_seconds_are_those_of_all_processes(tuned, tmp_path, monkeypatch):
    """The clock goes on by an hour before each checkpoint and by ten in what is lost after it."""
    now, moved = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + moved[0])
    record = recording.Recorder._record

    def recorded(self, write):
        moved[0] += 3600
        record(self, write)

    strategy = (Phase("probe", "head", 1, 0.05), Phase("all", "all", 1, 0.01))
    monkeypatch.setattr(recording.Recorder, "_record", recorded)
    for after in (2, 1):
        with monkeypatch.context() as patch:
            _dying(patch, after)
            with pytest.raises(_Killed):
                tuned(strategy, output=tmp_path, save_every=0)
        moved[0] += 36000
    before = 3 * 3600
    _, history = tuned(strategy, output=tmp_path, save_every=1e9)
    assert before <= history.seconds_before < before + 1800
    first, second = history.phases
    assert before <= first.seconds < before + 1800
    assert first.extract_seconds < 1800
    assert first.save_seconds < 1800
    assert second.seconds < 1800
    again = tuned(strategy, output=tmp_path)[1]
    assert again.seconds_before == first.seconds + second.seconds
    assert [one.seconds for one in again.phases] == [first.seconds, second.seconds]


def test_what_callbacks_found_out_is_kept(tuned, tmp_path, monkeypatch):
    class Counting(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.epochs, self.best, self.arrays = 0, float("inf"), [np.zeros(1)]

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1
            self.best = min(self.best, logs["val_loss"])
            self.arrays = [np.full(2, self.epochs)]

    strategy = (Phase("probe", "head", 3, 0.05),)
    whole = Counting()
    tuned(strategy, callbacks=[whole])
    with monkeypatch.context() as patch:
        _dying(patch, 2)
        with pytest.raises(_Killed):
            tuned(strategy, callbacks=[Counting()], output=tmp_path, save_every=0)
    resumed = Counting()
    tuned(strategy, callbacks=[resumed], output=tmp_path)
    assert (resumed.epochs, resumed.best) == (whole.epochs, whole.best)
    np.testing.assert_array_equal(resumed.arrays, whole.arrays)


def test_early_stopping_goes_on_as_it_would_have(tuned, tmp_path, monkeypatch):
    """It turns `min_delta` round when it settles on a direction, once."""

    def stopping():
        return keras.callbacks.EarlyStopping(monitor="val_loss", min_delta=0.5, patience=2)

    strategy = (Phase("probe", "head", 8, 0.01),)
    straight = stopping()
    whole = tuned(strategy, callbacks=[straight])
    assert len(whole[1]["loss"]) < 8
    for after in (4, 3):
        with monkeypatch.context() as patch:
            _dying(patch, after)
            with pytest.raises(_Killed):
                tuned(strategy, callbacks=[stopping()], output=tmp_path, save_every=0)
    resumed = stopping()
    _same(tuned(strategy, callbacks=[resumed], output=tmp_path), whole)
    assert (resumed.best, resumed.wait, resumed.min_delta) == (straight.best, straight.wait, straight.min_delta)


class _Holder(keras.callbacks.Callback):
    def __init__(self, limit=3):
        super().__init__()
        self.limit, self.losses, self.table, self.function = limit, [], {"a": (1, np.arange(3))}, len
        self.texts = np.array(["text"])

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))
        self.table = {"a": (len(self.losses), np.arange(len(self.losses)))}


def test_lists_and_dicts_are_kept_and_arguments_that_are_given_anew_are_those(tuned, tmp_path, monkeypatch):
    strategy = (Phase("probe", "head", 2, 0.05),)
    whole, resumed = _Holder(), _Holder(limit=7)
    tuned(strategy, callbacks=[whole])
    with monkeypatch.context() as patch:
        _dying(patch, 8)
        with pytest.raises(_Killed):
            tuned(strategy, callbacks=[_Holder()], output=tmp_path, save_every=0)
    tuned(strategy, callbacks=[resumed], output=tmp_path)
    assert resumed.losses == whole.losses
    assert resumed.limit == 7
    assert resumed.table["a"][0] == whole.table["a"][0]
    np.testing.assert_array_equal(resumed.table["a"][1], whole.table["a"][1])


def test_several_signals_at_once_are_one_and_a_second_interrupt_acts_at_once():
    heard = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in numbers}
    try:
        with Signals() as signals:
            signals.hold()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
            assert (signals.came, heard) == (signal.SIGTERM, [])
            signal.raise_signal(signal.SIGINT)
            assert heard == []
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heeded_when_the_step_is_written_down(tuned, tmp_path, number):
    class Signal(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                os.kill(os.getpid(), number)

    strategy = (Phase("probe", "head", 2, 0.05),)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tuned(strategy, output=tmp_path, callbacks=[Signal()])
    finally:
        assert signal.signal(number, before) is signal.default_int_handler
    (name,) = (path.name for path in (tmp_path / "checkpoints").iterdir())
    assert name == "000-000000002", "both steps are done"
    _same(tuned(strategy, output=tmp_path), tuned(strategy))


def test_a_time_limit_ends_with_the_best_so_far_and_a_later_call_goes_on(tuned, tmp_path):
    strategy = (Phase("probe", "head", 2, 0.05), Phase("all", "all", 1, 0.01))
    model, history = tuned(strategy, output=tmp_path, time_limit=0)
    assert not history.complete
    assert [len(values) for values in history.values()] == [1] * len(history)
    assert [record.epochs for record in history.phases] == [1]
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)
    _same(tuned(strategy, output=tmp_path), tuned(strategy))


def test_no_phase_begins_after_the_limit(tuned, tmp_path, monkeypatch):
    strategy = (Phase("probe", "head", 1, 0.05), Phase("all", "all", 1, 0.01))
    now, moved = time.monotonic, [0.0]
    monkeypatch.setattr(checkpoints, "save", _then(checkpoints.save, lambda: moved.__setitem__(0, 1e6)))
    monkeypatch.setattr(time, "monotonic", lambda: now() + moved[0])
    _, history = tuned(strategy, output=tmp_path, time_limit=1e5)
    assert ([record.phase.name for record in history.phases], history.complete) == (["probe"], False)
    monkeypatch.undo()
    _same(tuned(strategy, output=tmp_path), tuned(strategy))


def test_a_limit_that_the_last_step_reaches_is_none(tuned, tmp_path):
    strategy = (Phase("probe", "head", 1, 0.05),)
    _, history = tuned(strategy, output=tmp_path, time_limit=0, batch_size=24)
    assert history.complete


def _then(function, afterwards):
    def both(*given, **named):
        function(*given, **named)
        afterwards()

    return both


def test_logs_that_cannot_be_written_end_nothing(tuned, tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    strategy = (Phase("probe", "head", 2, 0.05),)
    monkeypatch.setattr(keras.callbacks.TensorBoard, "on_epoch_end", full)
    monkeypatch.setattr(History, "write_csv", full)
    found = tuned(strategy, output=tmp_path)
    told = capsys.readouterr().err
    assert told.count("logs/ cannot be written (No space left on device): training goes on") == 1
    assert told.count("history.csv cannot be written") == 1
    assert len(found[1].notes) == 2
    monkeypatch.undo()
    _same(found, tuned(strategy))


def test_another_network_or_number_of_devices_is_another_call(tuned, tmp_path, small_network, small_task, small_data):
    strategy = (Phase("probe", "head", 1, 0.05),)
    tuned(strategy, output=tmp_path)
    keras.utils.set_random_seed(5)
    other = small_network(dropout=0.5)
    with pytest.raises(InputError, match="differs in network"):
        training.fine_tune(other, small_task, small_data, strategy, output=tmp_path, batch_size=4)


def test_no_checkpoint_within_a_phase_before_its_time(tuned, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoints, "save_progress", lambda *given, **named: written.append(given))
    tuned((Phase("probe", "head", 2, 0.05),), output=tmp_path)
    assert written == []


def test_checkpoints_that_take_long_come_seldom(tuned, tmp_path, monkeypatch):
    written = []

    def slow(*given, **named):
        written.append(time.monotonic())
        time.sleep(0.2)

    monkeypatch.setattr(checkpoints, "save_progress", slow)
    began = time.monotonic()
    tuned((Phase("all", "all", 3, 0.01),), output=tmp_path, save_every=1e-9)
    assert 1 <= len(written) <= 1 + (time.monotonic() - began) * 0.02 / 0.2 + 1


@pytest.mark.parametrize("name", ["save_progress", "save"])
def test_a_checkpoint_that_cannot_be_written_is_said_once_and_training_goes_on(
    tuned, tmp_path, monkeypatch, capsys, name
):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    strategy = (Phase("probe", "head", 1, 0.05), Phase("all", "all", 1, 0.01))
    monkeypatch.setattr(checkpoints, name, full)
    found = tuned(strategy, output=tmp_path, save_every=0)
    assert capsys.readouterr().err.count("a checkpoint cannot be written (No space left on device)") == 1
    assert any("No space left" in note for note in found[1].notes)
    monkeypatch.undo()
    _same(found, tuned(strategy))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tuned, tmp_path, monkeypatch, capsys):
    strategy = (Phase("probe", "head", 2, 0.05),)
    _dying(monkeypatch, 3)
    with pytest.raises(_Killed):
        tuned(strategy, output=tmp_path, save_every=0)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000-000000004", "000-000000006"]
    file = tmp_path / "checkpoints" / names[-1] / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = tuned(strategy, output=tmp_path)
    assert f"{names[-1]} is damaged (state.safetensors is not the file" in " ".join(capsys.readouterr().err.split())
    assert found[1].notes[1:] == ["Training goes on from the one before."]
    _same(found, tuned(strategy))


def test_where_nothing_can_be_set_aside_or_removed_training_goes_on(tuned, tmp_path, monkeypatch, capsys):
    def read_only(folder):
        raise OSError(30, "Read-only file system")

    strategy = (Phase("probe", "head", 2, 0.05),)
    _dying(monkeypatch, 3)
    with pytest.raises(_Killed):
        tuned(strategy, output=tmp_path, save_every=0)
    monkeypatch.undo()
    file = tmp_path / "checkpoints" / "000-000000006" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(sealed_folders, "_hide", read_only)
    monkeypatch.setattr(sealed_folders, "set_aside", read_only)
    found = tuned(strategy, output=tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert "is damaged (state.safetensors is not the file that was written) and cannot be set aside (Read-only" in told
    assert told.count("older checkpoints cannot be removed (Read-only file system): training goes on") == 1
    assert found[1].notes[1] == "Training goes on from the one before."
    assert "older checkpoints could not be removed" in found[1].notes[2]
    monkeypatch.undo()
    _same(found, tuned(strategy))
    tuned(strategy, output=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["001-000000000"]


def test_other_versions_are_named(tuned, tmp_path, monkeypatch):
    strategy = (Phase("probe", "head", 1, 0.05),)
    tuned(strategy, output=tmp_path)
    for part in (tmp_path / "checkpoints").iterdir():
        assert json.loads((part / "manifest.json").read_text())["files"]["state.safetensors"]["bytes"] > 0
    known = checkpoints.versions()
    monkeypatch.setattr(checkpoints.Call, "to_json", _with_versions(checkpoints.Call.to_json, {**known, "keras": "2"}))
    with pytest.raises(InputError, match=f"differs in versions .keras {known['keras']} there, 2 here"):
        tuned(strategy, output=tmp_path)


def _with_versions(to_json, versions):
    return lambda call: {**to_json(call), "versions": versions}


HOLDS = """
import sys, time
from pathlib import Path
from tftransfer import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_another_process_holds_is_refused(tuned, tmp_path):
    strategy = (Phase("probe", "head", 1, 0.05),)
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"is in use by another run .process {other.pid} on "):
            tuned(strategy, output=tmp_path)
        other.kill()
    assert (tmp_path / ".lock").exists(), "what a killed process leaves holds nobody up"
    tuned(strategy, output=tmp_path, max_steps=1)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("given", [{"time_limit": -1}, {"time_limit": "1h"}, {"save_every": float("nan")}])
def test_times_that_are_none_are_bad_input(tuned, tmp_path, given):
    with pytest.raises(InputError, match=next(iter(given))):
        tuned((Phase("probe", "head", 1, 0.05),), output=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
