"""Traps of stock Keras around freezing and BatchNorm: each is stepped into, so that we notice when Keras changes.

Beside each stands a test that ours does not step into it. Those of optimizers and LoRA: `test_rates_and_adapters.py`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import backbones, builders, constants, prefix, strategies, tasks, trainable, training
from tftransfer.data import Data
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def _data() -> tuple[np.ndarray, np.ndarray]:
    pictures = np.random.default_rng(7).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    return pictures, np.arange(16) % 3


def _compile(model: keras.Model, optimizer: str | keras.optimizers.Optimizer = "sgd") -> None:
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def _values(model: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: variable.numpy() for variable in model.variables}


def _moved(before: dict[str, np.ndarray], model: keras.Model) -> set[str]:
    return {path for path, value in _values(model).items() if not np.array_equal(before[path], value)}


def _statistics(paths: set[str]) -> set[str]:
    return {path for path in paths if "moving_" in path}


@pytest.fixture
def as_the_guide_has_it(small_network):
    """The official guide's way: a base inside a model, called with `training=False`."""
    base = small_network()
    inputs = keras.Input((32, 32, 3))
    return keras.Model(inputs, base(inputs, training=False))


# "`base(x, training=False)` does not hold during `fit`", and what comes of it: "the moving statistics ran away"


def test_training_false_does_not_hold_in_fit(as_the_guide_has_it):
    """keras#20285: the outer `training=True` is passed to every operation of the graph."""
    before = _values(as_the_guide_has_it)
    _compile(as_the_guide_has_it)
    as_the_guide_has_it.fit(*_data(), verbose=0)
    assert len(_statistics(_moved(before, as_the_guide_has_it))) == 6


def test_dropout_drops_in_fit_in_a_base_that_is_called_for_inference(small_network):
    """Nothing can move at a rate of zero, and yet each epoch has another loss."""
    base = small_network(dropout=0.5)
    base.trainable = False
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, keras.layers.Dense(3)(base(inputs, training=False)))
    _compile(model, keras.optimizers.SGD(0.0))
    before = _values(model)
    losses = model.fit(*_data(), epochs=3, verbose=0).history["loss"]
    assert all("seed_generator" in path for path in _moved(before, model))
    assert len({round(loss, 3) for loss in losses}) == 3


def test_unfreezing_with_training_false_lets_statistics_run_away_and_answers_with_them(as_the_guide_has_it):
    """At a rate of zero nothing else moves: what inference answers has changed by the statistics alone."""
    pictures, targets = _data()
    values, answers = _values(as_the_guide_has_it), as_the_guide_has_it(pictures).numpy()
    _compile(as_the_guide_has_it, keras.optimizers.SGD(0.0))
    as_the_guide_has_it.fit(pictures / 255, targets, epochs=50, verbose=0)  # of another brightness than the statistics
    moved = _moved(values, as_the_guide_has_it)
    assert moved == _statistics(moved) != set()
    changed = as_the_guide_has_it(pictures).numpy() - answers
    assert np.linalg.norm(changed) > 0.1 * np.linalg.norm(answers)


def test_statistics_stay_in_ours_also_in_the_guides_network(as_the_guide_has_it, small_task, small_data):
    before = _values(as_the_guide_has_it)
    training.fine_tune(as_the_guide_has_it, small_task, small_data, (Phase("all", "all", 3, 0.01),), batch_size=8)
    moved = _moved(before, as_the_guide_has_it)
    assert moved == {path for path in before if "moving_" not in path}


def test_set_trainable_holds_statistics_in_stock_fit_too(small_network):
    model = small_network()
    trainable.set_trainable(model, "all")
    before = _values(model)
    _compile(model)
    model.fit(*_data(), verbose=0)
    assert _moved(before, model) == {path for path in before if "moving_" not in path}


# "Changing `trainable` after `compile` is silently ignored by `fit` (both ways), also from inside a callback"


class _Flip(keras.callbacks.Callback):
    """Unfreeze (or freeze) everything after the first epoch, as many recipes on the net do."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        self.trains = trains

    def on_epoch_end(self, epoch, logs=None):
        _set_all(self.model, self.trains)


def _set_all(model: keras.Model, trains: bool) -> None:
    for layer in model.layers:
        layer.trainable = trains


def test_opening_a_model_that_is_open_reaches_no_layer(small_network):
    """Keras 3 returns early where an attribute has the value already, also from a setter that reaches further."""
    model = small_network()
    model.get_layer("conv_1").trainable = False
    model.trainable = True
    assert not model.get_layer("conv_1").trainable


def test_set_trainable_opens_layers_that_were_closed_one_by_one(as_the_guide_has_it):
    base = as_the_guide_has_it.layers[1]
    base.trainable = False
    trainable.set_trainable(as_the_guide_has_it, "all")
    assert base.trainable
    assert base.get_layer("conv_1").kernel.trainable


@pytest.mark.parametrize("inside", [False, True], ids=["between two fits", "in a callback"])
@pytest.mark.parametrize("trains", [True, False], ids=["unfreezing", "freezing"])
def test_trainable_after_compile_is_ignored(small_network, trains, inside):
    model = small_network()
    trainable.set_trainable(model, "head" if trains else "all")
    _compile(model)
    model.fit(*_data(), verbose=0)
    before = _values(model)
    if inside:
        model.fit(*_data(), epochs=2, callbacks=[_Flip(trains)], verbose=0)
    else:
        _set_all(model, trains)
        model.fit(*_data(), verbose=0)
    assert ("conv_1/kernel" in _moved(before, model)) is not trains


class _Record(keras.callbacks.Callback):
    """Write down what each epoch moves."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[set[str]] = []

    def on_epoch_begin(self, epoch, logs=None):
        self.before = _values(self.model)

    def on_epoch_end(self, epoch, logs=None):
        self.moved.append(_moved(self.before, self.model))


@pytest.mark.parametrize(
    "selectors",
    [
        pytest.param(("head", "all"), id="unfreezing"),
        pytest.param(("all", "head"), id="freezing", marks=pytest.mark.slow),
    ],
)
def test_each_phase_of_ours_trains_what_it_says(small_network, small_task, small_data, selectors):
    """Within one call: each phase is compiled anew."""
    model, record = small_network(), _Record()
    trains = {
        "head": {"logits/kernel", "logits/bias"},
        "all": {path for path in _values(model) if "moving_" not in path},
    }
    phases = tuple(Phase(selector, selector, 1, 0.01) for selector in selectors)
    training.fine_tune(model, small_task, small_data, phases, batch_size=8, callbacks=[record])
    assert record.moved == [trains[selector] for selector in selectors]


MOMENTS = [
    pytest.param(way == "unfreezing", moment, id=f"{way}-{moment}", marks=() if shown else pytest.mark.slow)
    for way, moment, shown in (
        ("unfreezing", "on_train_begin", True),
        ("unfreezing", "on_epoch_begin", False),
        ("unfreezing", "on_epoch_end", False),
        ("freezing", "on_train_begin", False),
        ("freezing", "on_epoch_begin", False),
        ("freezing", "on_epoch_end", True),
    )
]


@pytest.mark.parametrize(("trains", "moment"), MOMENTS)
def test_ours_refuses_a_callback_that_changes_what_trains(small_network, small_task, small_data, trains, moment):
    model = small_network()
    flip = keras.callbacks.LambdaCallback(**{moment: lambda *given: _set_all(model, trains)})
    phases = (Phase("one", "head" if trains else "all", 2, 0.01),)
    with pytest.raises(InputError, match="further phase"):
        training.fine_tune(model, small_task, small_data, phases, batch_size=8, callbacks=[flip])


# "MobileNets have BatchNorm momentum 0.999: moving statistics are still a fifth initial values"


def _gap(network: keras.Model) -> float:
    """Let BatchNorm's statistics follow 1,500 steps, and return how far inference is from training, relative."""
    inputs, x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype(np.float32), None
    norm = next(layer for layer in network._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization))
    first = keras.Model(network.input, norm.output)
    step = tf.function(lambda x: first(x, training=True))
    for _ in range(1500):
        x = step(inputs)
    return float(np.linalg.norm(first(inputs, training=False) - x) / np.linalg.norm(x))


def test_mobilenets_of_keras_infer_badly_after_a_thousand_steps_from_nothing():
    """At momentum 0.999 a fifth of each statistic is still its first value then."""
    stock = keras.applications.MobileNetV2(alpha=0.35, include_top=False, weights=None, input_shape=(32, 32, 3))
    assert stock.get_layer("bn_Conv1").momentum == pytest.approx(0.999)
    assert _gap(stock) > 0.2


def test_ours_from_random_weights_infers_as_it_trains():
    ours = backbones.build("MobileNetV2-0.35", (32, 32), None)
    assert _gap(ours) < 0.05


@pytest.mark.slow
def test_ours_from_random_weights_learns_within_a_hundred_steps(make_examples):
    """Where 1 is left of the first variances, the network answers the same whatever it sees."""
    keras.utils.set_random_seed(0)
    model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)
    generator = np.random.default_rng(0)
    targets = np.arange(48, dtype=np.int32) % 3
    pictures = generator.integers(0, 120, (48, 32, 32, 3), np.uint8)
    pictures[np.arange(48), :, :, targets] += 100
    some = make_examples(pictures, targets)
    data = Data("colours", ("red", "green", "blue"), some, some, some)
    strategy = strategies.parse("full:augmentation=none,train_batch_norm=true", epochs=15, learning_rate=3e-3)
    history = training.fine_tune(model, tasks.SingleLabel(data.labels), data, strategy, batch_size=8)
    assert max(history["val_accuracy"]) > 0.9


def test_ours_with_weights_keeps_the_momentum_they_were_made_with(tmp_path):
    stock = keras.applications.MobileNetV2(alpha=0.35, include_top=False, weights=None, input_shape=(32, 32, 3))
    stock.save_weights(tmp_path / "some.weights.h5")
    ours = backbones.build("MobileNetV2-0.35", (32, 32), tmp_path / "some.weights.h5")
    assert ours.get_layer("bn_Conv1").momentum == pytest.approx(0.999)


# "Under MirroredStrategy BatchNorm statistics are replica 0's": see `test_two_devices.py`.
# "`bn.trainable = False` with `bn.gamma.trainable = True` works, but is lost on load, and slots are then skipped"


def test_gamma_can_train_while_statistics_stay(small_network):
    model = small_network()
    trainable.set_trainable(model, "norm")
    before = _values(model)
    _compile(model, keras.optimizers.SGD(0.1))
    model.fit(*_data(), verbose=0)
    moved = _moved(before, model)
    assert "norm_1/gamma" in moved
    assert not _statistics(moved)


def _with_gamma_trained(small_network) -> keras.Model:
    model = small_network()
    trainable.set_trainable(model, "norm")
    _compile(model, "adam")
    model.fit(*_data(), verbose=0)
    return model


def test_gamma_that_trains_in_a_frozen_layer_and_its_slots_are_lost_on_load(small_network, tmp_path):
    model = _with_gamma_trained(small_network)
    assert len(model.optimizer.variables) == 2 + 2 * 8  # two moments of the head and of gamma and beta of three norms
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.get_layer("norm_1").gamma.trainable
    assert not np.any(loaded.optimizer.variables[2].numpy())  # what is left of the slots begins from nothing


@pytest.mark.slow
def test_ours_trains_gamma_on_after_a_stop(small_network, small_task, small_data, tmp_path):
    """The second phase of a stopped call goes on with the same selector and the same moments."""
    phases = (Phase("one", "norm", 2, 0.01), Phase("two", "norm", 1, 0.01, carry_moments=True))
    start = small_network().get_weights()

    def tuned(stop_at: int | None = None, **options) -> keras.Model:
        model = small_network()
        model.set_weights(start)
        stop = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: _stop(epoch == stop_at))
        training.fine_tune(model, small_task, small_data, phases, batch_size=8, callbacks=[stop], **options)
        return model

    straight = tuned()
    with pytest.raises(KeyboardInterrupt):
        tuned(stop_at=2, output=tmp_path)
    resumed = tuned(output=tmp_path)
    assert not _moved(_values(straight), resumed)
    assert "norm_1/gamma" in _moved(_values(small_network()), resumed)


@pytest.mark.parametrize("name", ["norm_only", pytest.param("head_and_norm", marks=pytest.mark.slow)])
def test_ours_trains_gamma_on_after_a_load(small_network, small_task, small_data, tmp_path, name):
    """The file has lost what trains; each phase says it again, so that the loaded network learns as the other does."""
    strategy = strategies.parse(name, epochs=2, learning_rate=0.02)
    model = small_network()
    training.fine_tune(model, small_task, small_data, strategy, batch_size=8)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.get_layer("norm_1").gamma.trainable
    before, record = _values(loaded), _Record()
    assert "norm_1/gamma" in _moved(_values(small_network()), loaded)
    training.fine_tune(model, small_task, small_data, strategy[-1:], batch_size=8)
    training.fine_tune(loaded, small_task, small_data, strategy[-1:], batch_size=8, callbacks=[record])
    assert "norm_1/gamma" in record.moved[-1]
    assert not _statistics(_moved(before, loaded))
    assert not _moved(_values(model), loaded)


def _stop(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


# "Stochastic depth stays active inside `fit` in a 'frozen' EfficientNet (nine layers in B0)"


@pytest.fixture(scope="module")
def efficientnet(estimate_batch_norm):
    keras.utils.set_random_seed(0)  # the seed of each test is set after what a module shares
    network = backbones.build("EfficientNetB0", (32, 32), None)
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(network.output)
    model = keras.Model(network.input, keras.layers.Dense(3, name="logits")(pooled), name=network.name)
    return estimate_batch_norm(model)


def _drops(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dropout)]


@pytest.mark.slow
def test_stochastic_depth_stays_active_in_fit_in_a_frozen_efficientnet(estimate_batch_norm):
    """Nothing can move at a rate of zero, and yet each epoch has another loss."""
    stock = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
    estimate_batch_norm(stock).trainable = False
    assert len(_drops(stock)) == 9
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, keras.layers.Dense(3)(stock(inputs)))
    _compile(model, keras.optimizers.SGD(0.0))
    before = _values(model)
    losses = model.fit(*_data(), epochs=3, verbose=0).history["loss"]
    assert all("seed_generator" in path for path in _moved(before, model))
    assert len({round(loss, 2) for loss in losses}) == 3


@pytest.mark.slow
def test_a_frozen_efficientnet_of_ours_is_calm_in_training(efficientnet, small_task, small_data):
    phase = Phase("probe", "head", 3, 1e-12, schedule="constant", warmup=0)
    losses = training.fine_tune(efficientnet, small_task, small_data, (phase,), batch_size=24)["loss"]
    pictures = tf.stack([small_data.train.pictures.load(number) for number in range(len(small_data.train))])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    calm = float(loss(small_data.train.targets, efficientnet(pictures, training=False)))
    assert losses == pytest.approx([calm] * 3, rel=1e-2)


@pytest.mark.parametrize(("selector", "active"), [("last:2", 1), ("all", 9)])
def test_the_networks_own_stochastic_depth_is_active_above_the_cut_of_ours_alone(efficientnet, selector, active):
    """Where a phase has a `stochastic_depth` of its own, that takes its place: see `test_trainee.py`."""
    trainable.set_trainable(efficientnet, selector)
    parts = prefix.cut(efficientnet)
    assert len(_drops(parts.trained)) == active
    if parts.frozen is None:
        return
    assert len(_drops(parts.frozen)) == 9 - active
    pictures = tf.constant(_data()[0])
    below = constants.as_constant_function(parts.frozen)(pictures)
    for tensor, calm in zip(below, _listed(parts.frozen(pictures)), strict=True):
        assert np.linalg.norm(tensor - calm) <= 1e-2 * np.linalg.norm(calm)
    above = below if len(below) > 1 else below[0]
    one, two = (parts.trained(above, training=True).numpy() for _ in range(2))
    assert np.linalg.norm(one - two) > 0.1 * np.linalg.norm(one)


def _listed(outputs):
    return outputs if isinstance(outputs, list) else [outputs]
