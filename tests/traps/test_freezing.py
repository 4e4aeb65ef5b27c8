"""Traps of stock Keras around freezing: each test steps into one, so that we notice when Keras changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import prefix, trainable, training
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def _data() -> tuple[np.ndarray, np.ndarray]:
    pictures = np.random.default_rng(0).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    return pictures, np.arange(16) % 3


def _compile(model: keras.Model, optimizer: str | keras.optimizers.Optimizer = "sgd") -> None:
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def test_training_false_does_not_hold_in_fit(small_network):
    """keras#20285: `base(x, training=False)` in a functional model is overridden by `fit`."""
    base = small_network()
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, base(inputs, training=False))
    before = base.get_layer("norm_1").moving_mean.numpy()
    _compile(model)
    model.fit(*_data(), verbose=0)
    assert not np.array_equal(before, base.get_layer("norm_1").moving_mean.numpy())


def test_a_frozen_batch_norm_layer_holds_in_fit(small_network):
    model = small_network()
    trainable.set_trainable(model, "all")
    before = model.get_layer("norm_1").moving_mean.numpy()
    _compile(model)
    model.fit(*_data(), verbose=0)
    np.testing.assert_array_equal(before, model.get_layer("norm_1").moving_mean.numpy())


def test_trainable_after_compile_is_ignored(small_network):
    model = small_network()
    _compile(model)
    model.fit(*_data(), verbose=0)
    model.trainable = False
    before = model.get_layer("logits").kernel.numpy()
    model.fit(*_data(), verbose=0)
    assert not np.array_equal(before, model.get_layer("logits").kernel.numpy())


def test_fine_tune_compiles_once_per_phase(small_network, small_task, small_data):
    model = small_network()
    training.fine_tune(model, small_task, small_data, (Phase("all", "all", 1),), batch_size=8)
    before = model.get_layer("conv_1").kernel.numpy()
    training.fine_tune(model, small_task, small_data, (Phase("probe", "head", 1),), batch_size=8)
    np.testing.assert_array_equal(before, model.get_layer("conv_1").kernel.numpy())


def test_an_optimizer_does_not_take_more_variables(small_network):
    model = small_network()
    optimizer = keras.optimizers.Adam()
    trainable.set_trainable(model, "head")
    _compile(model, optimizer)
    model.fit(*_data(), verbose=0)
    trainable.set_trainable(model, "all")
    _compile(model, optimizer)
    with pytest.raises((ValueError, KeyError)):
        model.fit(*_data(), verbose=0)


def test_scaling_gradients_does_nothing_under_adam():
    moved = []
    for scale in (1.0, 0.1):
        variable = keras.Variable(np.ones(3, np.float32))
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.apply([keras.ops.ones(3) * scale], [variable])
        moved.append(float(1 - variable.numpy()[0]))
    assert moved[1] / moved[0] == pytest.approx(1.0, rel=1e-3)


def test_a_rate_scaled_in_the_step_leaves_adamws_decay_at_the_global_rate():
    class Scaled(keras.optimizers.AdamW):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * 0.1)

    variable = keras.Variable(np.ones((2, 2), np.float32))
    Scaled(0.01, weight_decay=0.1).apply([keras.ops.zeros((2, 2))], [variable])
    assert 1 - variable.numpy()[0, 0] == pytest.approx(0.01 * 0.1, rel=1e-3)


def test_stochastic_depth_stays_active_in_a_frozen_network_in_fit_but_not_below_the_cut():
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.5, name="drop")(inputs)
    x = keras.layers.Dense(4, name="frozen")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    trainable.set_trainable(model, "head")
    ones = np.ones((64, 4), np.float32)
    assert not np.array_equal(model(ones, training=True)[0], model(ones, training=True)[1])
    below = prefix.as_constant_function(prefix.cut(model).frozen)(keras.ops.convert_to_tensor(ones))[0]
    np.testing.assert_array_equal(below[0], below[1])


def test_gamma_can_train_while_statistics_stay(small_network):
    model = small_network()
    trainable.set_trainable(model, "norm")
    norm = model.get_layer("norm_1")
    gamma, mean = norm.gamma.numpy(), norm.moving_mean.numpy()
    _compile(model, keras.optimizers.SGD(0.1))
    model.fit(*_data(), verbose=0)
    assert not np.array_equal(gamma, norm.gamma.numpy())
    np.testing.assert_array_equal(mean, norm.moving_mean.numpy())


def test_mobilenets_batch_norm_is_slow():
    """keras.applications' MobileNets: momentum 0.999, too slow to pretrain from scratch with."""
    model = keras.applications.MobileNetV2(alpha=0.35, include_top=False, weights=None, input_shape=(32, 32, 3))
    assert model.get_layer("bn_Conv1").momentum == pytest.approx(0.999)


def test_unfreezing_with_training_false_lets_statistics_run_away(small_network):
    """The guide's recipe: `training=False` and everything trainable; ours stays where it was."""
    base = small_network()
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, base(inputs, training=False))
    variance = base.get_layer("norm_1").moving_variance.numpy()
    _compile(model)
    pictures, targets = _data()
    model.fit(pictures / 255, targets, epochs=5, verbose=0)  # pictures of another brightness than the statistics
    assert np.abs(base.get_layer("norm_1").moving_variance.numpy() / variance - 1).max() > 0.01


def test_gamma_that_trains_in_a_frozen_layer_is_lost_on_load(small_network, tmp_path):
    model = small_network()
    trainable.set_trainable(model, "norm")
    assert model.get_layer("norm_1").gamma.trainable
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert not loaded.get_layer("norm_1").gamma.trainable
    trainable.set_trainable(loaded, "norm")  # ours: the selector is applied again after a load
    assert loaded.get_layer("norm_1").gamma.trainable


def test_a_model_built_outside_a_strategy_cannot_train_inside_one(small_network, small_task, small_data):
    """Stock Keras fails deep in TensorFlow; ours says so before it begins."""
    model = small_network()
    _compile(model)
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope(), pytest.raises(InputError, match="same `with tft.devices"):
        training.fine_tune(model, small_task, small_data, (Phase("probe", epochs=1),))


def test_multi_optimizer_does_not_survive_a_load(tmp_path):
    """Keras' own way to rates per layer trains, but a file saved with it does not load; `LayerwiseAdamW`'s does."""
    rates = keras.optimizers.OptimizerMap(keras.optimizers.Adam(1e-3))
    rates["high/.*"] = keras.optimizers.Adam(1e-2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="low"), keras.layers.Dense(2, name="high")])
    model.compile(keras.optimizers.MultiOptimizer(rates), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever it is, the file is lost
        _ = model.optimizer.learning_rate
    model.save(tmp_path / "model.keras")
    with pytest.raises(Exception):  # noqa: B017, PT011
        keras.saving.load_model(tmp_path / "model.keras")


def test_a_fresh_optimizer_forgets_its_moments_and_ours_carries_them(small_network, small_task, small_data):
    def second_phase(carry: bool) -> float:
        keras.utils.set_random_seed(0)
        model = small_network()
        phases = (
            Phase("one", "all", 2, 0.01, schedule="constant", warmup=0),
            Phase("two", "all", 1, 0.01, schedule="constant", warmup=0, carry_moments=carry),
        )
        return training.fine_tune(model, small_task, small_data, phases, batch_size=8)["loss"][-1]

    assert second_phase(True) != second_phase(False)
