"""Traps of stock Keras around optimizers, rates per layer and LoRA, and beside each that ours does not step into it."""

import keras
import numpy as np
import pytest

from tftransfer import trainable, training
from tftransfer.adapters import Adapter, Lora
from tftransfer.optimizers import LayerwiseAdamW
from tftransfer.strategies import Phase


def _fit(model: keras.Model, **options) -> dict[str, list[float]]:
    pictures = np.random.default_rng(7).uniform(0, 255, (16, 32, 32, 3)).astype(np.float32)
    return model.fit(pictures, np.arange(16) % 3, verbose=0, **options).history


def _compile(model: keras.Model, optimizer: str | keras.optimizers.Optimizer = "sgd") -> None:
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


# "Re-using an optimizer after more variables became trainable raises; a fresh one forgets its moments"


def test_an_optimizer_does_not_take_more_variables(small_network):
    model = small_network()
    optimizer = keras.optimizers.Adam()
    trainable.set_trainable(model, "head")
    _compile(model, optimizer)
    _fit(model)
    trainable.set_trainable(model, "all")
    _compile(model, optimizer)
    with pytest.raises((ValueError, KeyError), match="nknown variable"):
        _fit(model)


def test_a_fresh_optimizer_forgets_its_moments(small_network):
    model = small_network()
    _compile(model, keras.optimizers.Adam())
    _fit(model)
    assert any(np.any(slot.numpy()) for slot in model.optimizer.variables[2:])
    _compile(model, keras.optimizers.Adam())
    model.optimizer.build(model.trainable_variables)
    assert not any(np.any(slot.numpy()) for slot in model.optimizer.variables[2:])


def _slots(optimizer: LayerwiseAdamW) -> dict[str, list[np.ndarray]]:
    """Read both moments of each variable from Keras' own lists."""
    kept = zip(optimizer._trainable_variables, optimizer._momentums, optimizer._velocities, strict=True)
    return {variable.path: [slot.numpy() for slot in slots] for variable, *slots in kept}


@pytest.mark.parametrize("carry", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_phase_of_ours_begins_with_the_moments_of_the_one_before(
    small_network, small_task, small_data, monkeypatch, carry
):
    """Those of variables that trained before are taken over by path; those of new ones begin from nothing."""
    begun = []  # of each phase: its optimizer, the moments it began with and their ages
    ended = {}
    real = LayerwiseAdamW.start_from

    def seen(self, variables, moments):
        if begun:
            ended.update(_slots(begun[0][0]))
        real(self, variables, moments)
        begun.append((self, _slots(self), dict(zip(_slots(self), self._ages, strict=True))))

    monkeypatch.setattr(LayerwiseAdamW, "start_from", seen)
    phases = (
        Phase("one", "head", 2, 0.01, schedule="constant", warmup=0),
        Phase("two", "all", 1, 0.01, schedule="constant", warmup=0, carry_moments=carry),
    )
    history = training.fine_tune(small_network(), small_task, small_data, phases, batch_size=8)
    assert history.phases[0].best_epoch == 2  # the moments that are kept are those of the phase's end
    assert set(ended) == {"logits/kernel", "logits/bias"}
    _, slots, ages = begun[1]
    for path, pair in slots.items():
        kept = carry and path in ended
        assert ages[path] == (6 if kept else 0)
        for number, slot in enumerate(pair):
            np.testing.assert_array_equal(slot, ended[path][number] if kept else np.zeros_like(slot))
            assert bool(np.any(slot)) == kept


# "Scaling gradients does nothing under Adam" and "an AdamW that scales the rate still decays at the global rate"


def _one_step(optimizer: keras.optimizers.Optimizer, gradient: float) -> float:
    """Return how far one step moves a variable of ones."""
    variable = keras.Variable(np.ones((2, 2), np.float32), name="low")
    optimizer.apply([keras.ops.ones((2, 2)) * gradient], [variable])
    return float(1 - variable.numpy()[0, 0])


def test_scaling_gradients_does_nothing_under_adam():
    whole, scaled = (_one_step(keras.optimizers.Adam(0.01), gradient) for gradient in (1.0, 0.1))
    assert scaled / whole == pytest.approx(1.0, rel=1e-3)


def test_a_rate_scaled_in_the_step_leaves_adamws_decay_at_the_global_rate():
    class Scaled(keras.optimizers.AdamW):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * 0.1)

    assert _one_step(Scaled(0.01, weight_decay=0.1), 0.0) == pytest.approx(0.01 * 0.1, rel=1e-3)


@pytest.mark.parametrize("gradient", [1.0, 0.0], ids=["step", "decay alone"])
def test_a_multiplier_of_ours_reaches_step_and_decay(gradient):
    moved = [_one_step(LayerwiseAdamW(0.01, 0.1, {"low": factor}), gradient) for factor in (1.0, 0.1)]
    assert moved[1] / moved[0] == pytest.approx(0.1, rel=1e-3)


# "`keras.optimizers.MultiOptimizer` trains, but a file saved with it does not load and `.learning_rate` raises"


def _two_layers(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="low"), keras.layers.Dense(2, name="high")])
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    return model


def test_multi_optimizer_does_not_survive_a_load(tmp_path):
    rates = keras.optimizers.OptimizerMap(keras.optimizers.Adam(1e-3))
    rates["high/.*"] = keras.optimizers.Adam(1e-2)
    model = _two_layers(keras.optimizers.MultiOptimizer(rates))
    with pytest.raises(AttributeError, match="cannot be accessed on a MultiOptimizer"):
        _ = model.optimizer.learning_rate
    model.save(tmp_path / "model.keras")
    with (
        pytest.warns(UserWarning, match="Skipping variable loading for optimizer"),
        pytest.raises(ValueError, match="could not be loaded"),
    ):
        keras.saving.load_model(tmp_path / "model.keras")


def test_rates_per_layer_of_ours_survive_a_load(tmp_path):
    """Also where the paths of variables do not: a Sequential model's name stands before them, but not after a load."""
    model = _two_layers(LayerwiseAdamW(1e-2, 0.0, {"low/kernel": 0.0, "low/bias": 0.0}))
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(1e-2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, two in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    before = loaded.layers[0].kernel.numpy()
    for trained in (model, loaded):
        trained.fit(np.ones((4, 2)), np.zeros((4, 2)), verbose=0)
    for one, two in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    np.testing.assert_array_equal(loaded.layers[0].kernel.numpy(), before)


# "LoRA: a load sets both factors to zero, where the gradient is zero too: training is dead"


def _with_keras_lora() -> keras.Model:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu", name="low")])
    model.add(keras.layers.Dense(3, name="logits"))
    for layer in model.layers:
        layer.enable_lora(2)
    return model


def _learn(model: keras.Model, epochs: int) -> list[float]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 8)).astype(np.float32)
    y = (x[:, :3]).argmax(axis=1)
    _compile(model, keras.optimizers.Adam(0.05))
    return model.fit(x, y, epochs=epochs, verbose=0, shuffle=False).history["loss"]


def test_keras_lora_is_dead_after_a_load(tmp_path):
    model = _with_keras_lora()
    before = _learn(model, 5)
    assert before[-1] < 0.9 * before[0]
    model.save_weights(tmp_path / "tuned.weights.h5")
    again = _with_keras_lora()
    again.load_weights(tmp_path / "tuned.weights.h5")
    assert not any(np.any(layer.lora_kernel_a) or np.any(layer.lora_kernel_b) for layer in again.layers)
    kernels = [layer._kernel.numpy() for layer in again.layers]
    _learn(again, 5)
    assert not any(np.any(layer.lora_kernel_a) or np.any(layer.lora_kernel_b) for layer in again.layers)
    for layer, kernel in zip(again.layers, kernels, strict=True):
        np.testing.assert_array_equal(layer._kernel.numpy(), kernel)  # biases alone go on


@pytest.mark.slow
def test_ours_learns_on_from_its_file(small_network, small_task, small_data, tmp_path):
    start, tuned = small_network(), small_network()
    tuned.set_weights(start.get_weights())
    phases = (Phase("LoRA", "head", 2, 0.02, adapter=Lora(2)),)
    first = training.fine_tune(tuned, small_task, small_data, phases, batch_size=8)
    first.adapter.save(tmp_path / "one.safetensors")
    loaded = Adapter.load(tmp_path / "one.safetensors")
    for pair, kept in zip(loaded.attach(start).arrays(), first.adapter.factors, strict=True):
        assert all(np.any(factor) for factor in pair)
        assert all(np.array_equal(factor, value) for factor, value in zip(pair, kept, strict=True))
    second = training.fine_tune(start, small_task, small_data, phases, batch_size=8, adapter=loaded)
    assert second["loss"][-1] < first["loss"][0]
    for (a, b), (a_before, b_before) in zip(second.adapter.factors, loaded.factors, strict=True):
        assert not np.array_equal(a, a_before)
        assert not np.array_equal(b, b_before)


# "Freezing a layer before `enable_lora` leaves nothing trainable; toggling `trainable` unfreezes the base kernel"


def _dense() -> keras.layers.Dense:
    layer = keras.layers.Dense(4)
    layer.build((None, 4))
    return layer


def test_keras_lora_on_a_frozen_layer_trains_nothing():
    layer = _dense()
    layer.trainable = False
    layer.enable_lora(2)
    assert layer.trainable_variables == []


def test_toggling_a_layer_with_keras_lora_unfreezes_its_kernel():
    layer = _dense()
    layer.enable_lora(2)
    assert not layer._kernel.trainable
    layer.trainable = False
    layer.trainable = True
    assert layer._kernel.trainable


@pytest.mark.parametrize(
    "toggled",
    [pytest.param(False, id="frozen before"), pytest.param(True, id="toggled", marks=pytest.mark.slow)],
)
def test_factors_of_ours_train_and_the_base_does_not(small_network, small_task, small_data, monkeypatch, toggled):
    """Until it is merged, whatever was frozen or toggled before: the base's kernels are bit for bit what they were."""
    model = small_network()
    for layer in model.layers:
        layer.trainable = False
        if toggled:
            layer.trainable = True
    base = {path: value for path, value in _values(model).items() if not path.startswith("logits")}
    unmerged = []
    real = training._finish_adapter
    monkeypatch.setattr(training, "_finish_adapter", lambda *given: (unmerged.append(_values(model)), real(*given))[1])
    phases = (Phase("LoRA", "head", 1, 0.02, adapter=Lora(2)),)
    history = training.fine_tune(model, small_task, small_data, phases, batch_size=8)
    assert all(np.array_equal(unmerged[0][path], value) for path, value in base.items())
    assert all(np.any(b) for _, b in history.adapter.factors)
    assert not np.array_equal(model.get_layer("conv_1").kernel.numpy(), base["conv_1/kernel"])  # merged at the end


def _values(model: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: variable.numpy() for variable in model.variables}
