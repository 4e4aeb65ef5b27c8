import io
import math
import os
import signal
import sys
import threading

import keras
import numpy as np
import pytest
from rich.console import Console

from tftransfer import training
from tftransfer.callbacks import (
    HeedStop,
    KeepBest,
    LearningRateLog,
    ProgressBar,
    SwapAverages,
    callback_list,
    hears_of_batches,
    looks_at_batches,
)
from tftransfer.strategies import Phase

_HIDE_CURSOR, _SHOW_CURSOR, _ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


@pytest.fixture
def line():
    """A compiled network of one weight, which stands for what was learned."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(inputs))
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    return model


def test_averages_come_and_go_without_rounding():
    """Keras' own adds and subtracts, after which the weights are not quite those that training left."""
    inputs = keras.Input((7,))
    model = keras.Model(inputs, keras.layers.Dense(5)(inputs))
    model.compile(optimizer=keras.optimizers.AdamW(0.1, use_ema=True, ema_momentum=0.9), loss="mse")
    model.fit(np.ones((4, 7), np.float32), np.arange(20, dtype=np.float32).reshape(4, 5), epochs=3, verbose=0)
    generator = np.random.default_rng(0)
    weights, averages = ([generator.normal(size=w.shape).astype(np.float32) for w in model.weights] for _ in range(2))
    for kept, value in zip(model.optimizer._model_variables_moving_average, averages, strict=True):
        kept.assign(value)
    for swap, exact in ((SwapAverages(), True), (keras.callbacks.SwapEMAWeights(swap_on_epoch=True), False)):
        model.set_weights(weights)
        swap.set_model(model)
        swap.set_params({"epochs": 9})
        swap.on_train_begin()
        swap.on_test_begin()
        for value, average in zip(model.get_weights(), averages, strict=True):
            np.testing.assert_allclose(value, average, rtol=0 if exact else 1e-4)
        swap.on_test_end()
        same = all(map(np.array_equal, model.get_weights(), weights))
        assert same is exact


def _weight(model: keras.Model) -> float:
    return float(model.get_weights()[0][0, 0])


def _epochs(keep: KeepBest, losses: list[float], error: float = 0.0) -> None:
    """Pretend to train: after epoch n the weight is n."""
    for number, loss in enumerate(losses, start=1):
        keep.model.set_weights([np.full((1, 1), number, np.float32)])
        keep.on_epoch_end(number - 1, {"val_loss": loss, "val_loss_error": error})


@pytest.mark.parametrize(
    ("losses", "error", "kept"),
    [
        ([0.9, 0.5, 0.7], 0.0, 2),
        ([0.5, 0.5], 0.0, 2),  # the later of equals
        ([1.1, 2.0], 0.0, 0),  # what training began with counts
        ([math.nan, 0.9, math.inf], 0.0, 2),
        ([0.5, 0.59, 0.61], 0.1, 2),  # within one standard error of the lowest
        ([0.5, 0.59, 0.2, 0.31], 0.1, 3),  # of the lowest of all, not of an earlier one
        ([0.5, 0.7], math.nan, 1),
        ([1.05, 1.2], 0.1, 1),
    ],
)
def test_the_best_weights_come_back(line, losses, error, kept):
    keep = KeepBest(line)
    keep.consider(0, 1.0, error)
    _epochs(keep, losses, error)
    keep.on_train_end()
    assert (keep.kept_epoch, _weight(line)) == (kept, kept)


def test_numbers_that_are_none_never_win(line):
    keep = KeepBest(line)
    keep.consider(0, math.nan)
    _epochs(keep, [math.nan, 3.0, math.nan])
    keep.on_train_end()
    assert _weight(line) == 2


@pytest.mark.parametrize(("patience", "stops"), [(0, False), (3, False), (2, True)])
def test_patience_counts_epochs_without_a_lower_loss(line, patience, stops):
    keep = KeepBest(line, patience)
    keep.consider(0, 1.0)
    line.stop_training = False
    _epochs(keep, [0.5, 0.6, 0.7])
    assert line.stop_training is stops


def test_the_rate_is_in_the_logs(line):
    logs = {}
    callback = LearningRateLog()
    callback.set_model(line)
    callback.on_epoch_end(0, logs)
    assert logs["learning_rate"] == pytest.approx(0.1)


def test_progress_leaves_one_line_per_epoch(line):
    out = io.StringIO()
    progress = ProgressBar("probe", 2, Console(file=out, width=200))
    data = np.ones((4, 1), np.float32)
    line.fit(data, data, epochs=2, validation_data=(data, data), callbacks=[progress], verbose=0)
    lines = out.getvalue().splitlines()
    assert [text.split("  ")[0] for text in lines] == ["probe: epoch 1 of 2", "probe: epoch 2 of 2"]
    first = [part.split()[0] for part in lines[0].split("  ")[1:-1]]
    assert first == ["loss", "val_loss"]


def test_a_bar_that_is_closed_leaves_nothing_behind(line):
    out, streams, threads = io.StringIO(), (sys.stdout, sys.stderr), threading.enumerate()
    bar = ProgressBar("[probe]", 1, Console(file=out, width=80, force_terminal=True))
    bar.set_params({"steps": 4})
    bar.on_epoch_begin(0)
    bar.on_train_batch_end(1)
    bar.close()
    written = out.getvalue()
    assert "[probe]: epoch 1 of 1" in written
    assert written.rindex(_SHOW_CURSOR) > written.rindex(_HIDE_CURSOR)
    assert written.endswith(_ERASE_LINE)
    assert (sys.stdout, sys.stderr) == streams
    for thread in set(threading.enumerate()).difference(threads):
        thread.join(5)
        assert not thread.is_alive()
    bar.close()
    bar.on_train_batch_end(2)
    assert out.getvalue() == written


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finds_the_bar_closed(small_network, small_task, small_data, monkeypatch, tmp_path, output, number):
    """What it does may be to end the process."""

    class Signal(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            assert sys.stdout is not stdout
            os.kill(os.getpid(), number)

    def ends(number, frame):
        seen.append(sys.stdout is stdout and out.getvalue().endswith(_ERASE_LINE))
        raise KeyboardInterrupt

    out, stdout, seen = io.StringIO(), sys.stdout, []
    monkeypatch.setattr(training, "literal_console", lambda *_, **__: Console(file=out, force_terminal=True))
    before, phase = signal.signal(number, ends), Phase("probe", "head", 1)
    given = {"callbacks": [Signal()], "quiet": False, "output": tmp_path if output else None}
    try:
        with pytest.raises(KeyboardInterrupt):
            training.fine_tune(small_network(), small_task, small_data, (phase,), batch_size=8, **given)
        assert signal.getsignal(number) is ends
    finally:
        signal.signal(number, before)
    assert seen == [True]


def test_an_error_finds_the_bar_closed(small_network, small_task, small_data, monkeypatch):
    def fails(batch, logs):
        raise RuntimeError("a callback failed")

    out, stdout = io.StringIO(), sys.stdout
    monkeypatch.setattr(training, "literal_console", lambda *_, **__: Console(file=out, force_terminal=True))
    failing = [keras.callbacks.LambdaCallback(on_train_batch_end=fails)]
    with pytest.raises(RuntimeError, match="a callback failed"):
        training.fine_tune(small_network(), small_task, small_data, (Phase("probe"),), callbacks=failing, quiet=False)
    assert sys.stdout is stdout
    assert out.getvalue().endswith(_ERASE_LINE)


def test_users_callbacks_see_the_whole_model_and_ours_the_part_that_trains(line):
    whole = keras.Model(line.input, line.output)
    ours, theirs = keras.callbacks.Callback(), keras.callbacks.Callback()
    callback_list([ours], [theirs], line, whole, {"epochs": 3, "steps": 2})
    assert ours.model is line
    assert theirs.model is whole
    assert theirs.params["epochs"] == 3


def test_a_stop_on_the_whole_model_is_heeded_within_an_epoch(line):
    whole = keras.Model(line.input, line.output)
    heed = HeedStop(whole)
    heed.set_model(line)
    line.stop_training = False
    heed.on_train_batch_end(0)
    assert not line.stop_training
    whole.stop_training = True
    heed.on_train_batch_end(1)
    assert line.stop_training


class _OfTests(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        pass


@pytest.mark.parametrize(
    ("callback", "hears", "looks"),
    [
        (keras.callbacks.EarlyStopping(), False, False),
        (keras.callbacks.LambdaCallback(on_epoch_end=print), False, False),
        (keras.callbacks.LambdaCallback(on_train_batch_end=print), True, True),
        (keras.callbacks.TerminateOnNaN(), True, False),
        (keras.callbacks.ModelCheckpoint("best.keras"), False, False),
        (keras.callbacks.ModelCheckpoint("best.keras", save_freq=10), True, True),
        (keras.callbacks.BackupAndRestore("backup"), False, False),
        (_OfTests(), True, True),
    ],
)
def test_who_hears_of_batches_and_looks_at_the_model_is_known(callback, hears, looks):
    assert hears_of_batches([callback]) == hears
    assert looks_at_batches([callback]) == looks
    assert hears_of_batches([keras.callbacks.EarlyStopping(), callback]) == hears
    assert not hears_of_batches([])
