import csv
import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest

from tftransfer import builders, feeding, heads, inference, schedules, strategies, tasks, training
from tftransfer.averages import Ema
from tftransfer.data import Data
from tftransfer.errors import InputError
from tftransfer.penalties import L2SP
from tftransfer.strategies import Phase
from tftransfer.trainee import Trainee


def _statistics(model: keras.Model) -> list[np.ndarray]:
    return [weight.numpy() for weight in model.weights if "moving" in weight.path]


def _weights(model: keras.Model) -> list[np.ndarray]:
    return [weight.numpy() for weight in model.weights if "seed_generator" not in weight.path]


def test_head_only_training_leaves_the_rest_bit_equal(small_network, small_task, small_data):
    model = small_network(dropout=0.3)
    before = {weight.path: weight.numpy() for weight in model.weights}
    training.fine_tune(model, small_task, small_data, (Phase("probe", "head", 2, 0.05),), batch_size=8)
    changed = {path for path, value in before.items() if not np.array_equal(value, _value(model, path))}
    assert {path for path in changed if "seed_generator" not in path} == {"logits/kernel", "logits/bias"}


def _value(model: keras.Model, path: str) -> np.ndarray:
    return next(weight.numpy() for weight in model.weights if weight.path == path)


@pytest.mark.parametrize(
    "selector", [*(pytest.param(selector, marks=pytest.mark.slow) for selector in ("head", "last:1", "norm")), "all"]
)
def test_batch_norm_statistics_are_bit_equal_after_training(small_network, small_task, small_data, selector):
    model = small_network()
    before = _statistics(model)
    training.fine_tune(model, small_task, small_data, (Phase("phase", selector, 2, 0.01),), batch_size=8)
    for old, new in zip(before, _statistics(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"mixup": 0.3}, id="mixup"),
        pytest.param({"average": Ema(0.5)}, id="average", marks=pytest.mark.slow),
    ],
)
def test_steps_at_once_are_the_steps_one_by_one(small_network, small_task, small_data, monkeypatch, extra):
    """A callback that hears of each batch makes them come one by one."""
    at_once, batches = [], []
    run_at_once = Trainee.run_at_once
    monkeypatch.setattr(Trainee, "run_at_once", lambda self, steps: (at_once.append(steps), run_at_once(self, steps)))
    hears = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    phase, ended, histories = Phase("top", "last:1", 4, 0.01, **extra), [], []
    start = small_network(dropout=0.3).get_weights()
    for callbacks in ((), (hears,)):
        model = small_network(dropout=0.3)
        model.set_weights(start)
        given = {"batch_size": 5, "callbacks": callbacks}  # five steps an epoch, the last one smaller
        histories.append(dict(training.fine_tune(model, small_task, small_data, (phase,), **given)))
        ended.append(_weights(model))
    assert at_once == [5]
    assert batches == [*range(5)] * 4
    assert histories[0] == histories[1]
    for one, other in zip(*ended, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("per_epoch", "at_once"), [(1, 1), (15, 15), (64, 64), (67, 1), (128, 64), (150, 50)])
def test_steps_at_once_divide_an_epoch(per_epoch, at_once):
    assert feeding.Steps(0, 0, per_epoch, 3, 0, 32, 1).at_once == at_once


def test_batch_norm_statistics_move_if_asked(small_network, small_task, small_data):
    model = small_network()
    before = _statistics(model)
    phase = Phase("phase", "all", 1, 0.01, train_batch_norm=True)
    training.fine_tune(model, small_task, small_data, (phase,), batch_size=8)
    assert not any(np.array_equal(old, new) for old, new in zip(before, _statistics(model), strict=True))


def test_history_holds_one_list_per_metric_over_all_phases(small_network, small_task, small_data, tmp_path):
    strategy = strategies.freeze_then_unfreeze(epochs=5)
    history = training.fine_tune(small_network(), small_task, small_data, strategy, output=tmp_path)
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"} <= set(history)
    assert {len(values) for values in history.values()} == {5}
    assert [record.epochs for record in history.phases] == [2, 3]
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["phase"] for row in rows] == ["probe", "probe", "fine-tune", "fine-tune", "fine-tune"]
    assert list((tmp_path / "logs").rglob("events.*"))


@pytest.mark.slow
def test_overfits_a_batch(small_network, small_task, small_data):
    model = small_network()
    phase = Phase("all", "all", 40, 0.02, warmup=0)
    history = training.fine_tune(model, small_task, small_data, (phase,), batch_size=24)
    assert history["loss"][-1] < 0.1 * history["loss"][0]


@pytest.mark.slow
def test_a_frozen_network_cannot_overfit_in_the_same_way(small_network, small_task, small_data):
    """The test above can fail: with a learning rate near zero the loss stays."""
    phase = Phase("all", "all", 5, 1e-9, warmup=0)
    history = training.fine_tune(small_network(), small_task, small_data, (phase,), batch_size=24)
    assert history["loss"][-1] > 0.9 * history["loss"][0]


def test_the_same_seed_gives_the_same_bits(small_network, small_task, small_data):
    def trained(seed: int) -> list[np.ndarray]:
        keras.utils.set_random_seed(7)
        model = small_network(dropout=0.5)
        strategy = (Phase("probe", "head", 1, 0.01), Phase("all", "all", 1, 0.01, augmentation="strong"))
        training.fine_tune(model, small_task, small_data, strategy, batch_size=8, seed=seed)
        return _weights(model)

    first, second, other = trained(1), trained(1), trained(2)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_no_phase_ends_worse_on_validation_than_it_began(small_network, small_task, small_data):
    model = small_network()
    good = (Phase("probe", "head", 20, 0.05),)
    training.fine_tune(model, small_task, small_data, good, batch_size=8)
    before = _validation_loss(model, small_data)
    ruinous = Phase("ruin", "all", 2, 5.0, warmup=0)
    history = training.fine_tune(model, small_task, small_data, (ruinous,), batch_size=8)
    assert history.phases[0].best_epoch == 0
    assert min(history["val_loss"]) > before
    assert _validation_loss(model, small_data) == pytest.approx(before)


def _validation_loss(model: keras.Model, data) -> float:
    pictures = np.stack([data.validation.pictures.load(i) for i in range(len(data.validation))])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return float(loss(data.validation.targets, model(pictures.astype(np.float32))))


def test_averaged_weights_are_the_moving_average_by_hand(small_network, small_task, small_data):
    steps = []

    class Collect(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(_value(self.model, "logits/kernel"))

    model = small_network()
    phase = Phase("probe", "head", 2, 0.05, average=Ema(1.5))
    history = training.fine_tune(model, small_task, small_data, (phase,), callbacks=[Collect()], batch_size=8)
    assert history.phases[0].best_epoch == 2
    assert len(steps) == 6  # three an epoch
    average = steps[0]
    for weights in steps[1:]:
        average = average + (1 - np.exp(-1 / 4.5)) * (weights - average)
    np.testing.assert_allclose(_value(model, "logits/kernel"), average, atol=1e-6)
    assert np.abs(average - steps[-1]).max() > 1e-3
    assert history["val_loss"][-1] == pytest.approx(_validation_loss(model, small_data), rel=1e-5)


def test_patience_ends_a_phase_early(small_network, small_task, small_data):
    phase = Phase("ruin", "all", 30, 5.0, warmup=0, patience=2)
    history = training.fine_tune(small_network(), small_task, small_data, (phase,), batch_size=8)
    assert len(history["loss"]) < 30


def test_the_model_stays_plain_and_uncompiled(small_network, small_task, small_data):
    model = small_network()
    training.fine_tune(model, small_task, small_data, (Phase("all", "all", 1),), batch_size=8)
    assert not model.compiled
    assert type(model).__module__.startswith("keras.")


def test_users_callbacks_see_the_whole_model_and_can_stop(small_network, small_task, small_data):
    seen = []

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model)
            self.model.stop_training = True

    model = small_network()
    history = training.fine_tune(
        model, small_task, small_data, (Phase("probe", "head", 5),), callbacks=[Stop()], batch_size=8
    )
    assert len(history["loss"]) == 1
    assert len(seen) == 1
    assert seen[0] is model


def test_logits_and_probabilities_train_alike(small_network, small_task, small_data):
    logits = small_network()
    softmax = keras.layers.Softmax(name="head_softmax")(logits.output)
    probabilities = keras.models.clone_model(keras.Model(logits.input, softmax))
    probabilities.set_weights(logits.get_weights())
    phase = (Phase("all", "all", 1, 0.01),)
    losses = [
        training.fine_tune(model, small_task, small_data, phase, batch_size=8)["loss"][0]
        for model in (logits, probabilities)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_predict_is_the_models_softmax_in_order(small_network, small_task, small_data):
    model = small_network()
    ours = inference.predict(model, small_task, small_data.test, batch_size=5)
    pictures = np.stack([small_data.test.pictures.load(i) for i in range(len(small_data.test))])
    theirs = keras.ops.softmax(model(pictures.astype(np.float32)))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_learning_rate_rises_then_falls_to_zero():
    rate = schedules.learning_rate(Phase("phase", learning_rate=0.1, warmup=0.25), steps=8)
    values = [float(rate(step)) for step in range(9)]
    assert values[0] == 0
    assert max(values) == pytest.approx(values[2]) == pytest.approx(0.1)
    assert values[8] == pytest.approx(0, abs=1e-8)
    constant = schedules.learning_rate(Phase("phase", learning_rate=0.1, warmup=0, schedule="constant"), steps=8)
    assert {round(float(constant(step)), 6) for step in range(9)} == {0.1}


def test_a_model_with_other_outputs_is_refused(small_network, small_task, small_data):
    with pytest.raises(InputError, match="num_classes=3"):
        training.fine_tune(small_network(num_classes=4), small_task, small_data, (Phase("probe"),))


@pytest.mark.parametrize(
    "penalty",
    [pytest.param(None, id="plain", marks=pytest.mark.slow), pytest.param(L2SP(0.1), id="with a penalty")],
)
def test_the_heads_own_l2_shrinks_its_kernel(small_network, small_task, small_data, penalty):
    """Also beside a penalty of the phase, which runs another network than the one that is compiled."""
    body = small_network()
    model = keras.Model(body.input, heads.Dense(3, dropout=0.0, l2=1.0)(body.get_layer("relu_3").output))
    kernel = model.get_layer("logits").kernel
    before = np.linalg.norm(kernel)
    phase = Phase("tune", "all", 5, 0.05, warmup=0, weight_decay=0.0, penalty=penalty)
    training.fine_tune(model, small_task, small_data, (phase,), batch_size=8)
    assert np.linalg.norm(kernel) < 0.5 * before


@pytest.mark.parametrize("strategy", ["full", ("full",), Phase("probe"), None, (), strategies.full])
def test_what_is_no_strategy_is_refused(small_network, small_task, small_data, strategy):
    with pytest.raises(InputError, match="`strategy` must be a tuple of Phases, .*`strategies.parse`.*Received"):
        training.fine_tune(small_network(), small_task, small_data, strategy)


def test_bad_batch_sizes_are_refused(small_network, small_task, small_data):
    with pytest.raises(InputError, match="batch_size"):
        training.fine_tune(small_network(), small_task, small_data, (Phase("probe"),), batch_size=0)


_INTERRUPTED = """
import sys
from tftransfer import cli
cli.import_tensorflow()
import keras
import tftransfer as tft

class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt

data, task = tft.data.load("demo", image_size=(32, 32), limit=64)
model = tft.builders.image_classifier("MobileNet-0.25", 10, image_size=32, weights=None)
probe = tft.strategies.linear_probe()
sys.exit(cli.guarded(lambda: tft.fine_tune(model, task, data, probe, callbacks=[Interrupt()], batch_size=4)))
"""


def test_an_interrupted_process_ends():
    """A Python generator as input would keep it from ending: its thread waits for an interpreter that shuts down."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 75, done.stderr


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_groups_step_at_the_rates_that_layer_decay_asks_for(small_network, small_task, small_data, optimizer):
    """In the first step, weight decay included: against that of the same phase without `layer_decay`."""

    def steps(layer_decay):
        keras.utils.set_random_seed(0)
        model = small_network()
        before = {weight.path: weight.numpy() for weight in model.weights}
        phase = Phase(
            "all", "all", 1, 1e-2, layer_decay, schedule="constant", warmup=0, weight_decay=0.5, optimizer=optimizer
        )
        training.fine_tune(model, small_task, small_data, (phase,), batch_size=24, max_steps=1)
        kernels = ("logits/kernel", "conv_3/kernel", "conv_2/kernel", "conv_1/kernel")
        return np.array([np.linalg.norm(_value(model, path) - before[path]) for path in kernels])

    depth = steps(0.5) / steps(1.0)  # each normalisation layer is a group of its own
    assert depth == pytest.approx([1, 0.25, 0.25**2, 0.25**3], rel=0.01)


def test_example_weights_decide_what_is_learned(small_network, small_task, small_data):
    """Two examples alike but for their labels: the heavier one wins."""
    pictures = small_data.train.pictures
    twice = dataclasses.replace(
        pictures,
        names=pictures.names[:2],
        load=lambda index: pictures.load(index * 0),
    )

    def answer(weights: list[float]) -> int:
        keras.utils.set_random_seed(0)
        model = small_network()
        train = dataclasses.replace(
            small_data.train, pictures=twice, targets=np.array([0, 1], np.int32), weights=np.array(weights, np.float32)
        )
        data = dataclasses.replace(small_data, train=train, validation=train)
        training.fine_tune(model, small_task, data, (Phase("probe", "head", 30, 0.1, warmup=0),), batch_size=2)
        return int(inference.predict(model, small_task, train).argmax(axis=-1)[0])

    assert answer([5.0, 1.0]) == 0
    assert answer([1.0, 5.0]) == 1


def test_a_sequential_model_is_trained_in_place(small_network, small_task, small_data):
    layers = keras.layers
    model = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3)])
    before = model.get_weights()
    training.fine_tune(model, small_task, small_data, (Phase("probe", "all", 1, 0.01),), batch_size=8)
    assert not np.array_equal(before[0], model.get_weights()[0])


def test_a_subclassed_model_is_refused(small_task, small_data):
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(InputError, match="functional model"):
        training.fine_tune(Own(), small_task, small_data, (Phase("probe"),))


@pytest.mark.parametrize(
    "callback", [keras.callbacks.ReduceLROnPlateau(), keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)]
)
def test_callbacks_that_set_the_rate_are_refused(small_network, small_task, small_data, callback):
    with pytest.raises(InputError, match=f"{type(callback).__name__}.*schedule"):
        training.fine_tune(small_network(), small_task, small_data, (Phase("probe"),), callbacks=[callback])


@pytest.mark.slow
def test_a_metric_that_is_logged_now_and_then_is_undefined_elsewhere(small_network, small_task, small_data, tmp_path):
    class Sometimes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                logs["sometimes"] = 1.0

    strategy = (Phase("one", "head", 2), Phase("two", "head", 1))
    history = training.fine_tune(
        small_network(), small_task, small_data, strategy, callbacks=[Sometimes()], output=tmp_path
    )
    assert {len(values) for values in history.values()} == {3}
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("unit", [*(pytest.param(unit, marks=pytest.mark.slow) for unit in (1e-6, 1.0)), 1e10])
def test_numbers_are_learned_in_any_unit(small_network, make_examples, unit):
    generator = np.random.default_rng(0)
    brightness = generator.uniform(0, 200, (48, 1)).astype(np.float32)
    pictures = np.broadcast_to(brightness[:, :, None, None], (48, 32, 32, 3)).astype(np.uint8)
    targets = (brightness * unit).astype(np.float32)
    train, rest = make_examples(pictures[:32], targets[:32]), make_examples(pictures[32:], targets[32:])
    data = Data("brightness", ("value",), train, rest, rest, found=48)
    task = tasks.Regression()
    model = builders.in_units_of(small_network(num_classes=1), train.targets)
    training.fine_tune(model, task, data, (Phase("all", "all", 20, 0.02),), batch_size=8)
    assert task.measure(rest.targets, inference.predict(model, task, rest))["r_squared"] > 0.8
