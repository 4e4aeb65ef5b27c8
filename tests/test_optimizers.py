import keras
import numpy as np
import pytest

from tftransfer.errors import InputError
from tftransfer.optimizers import LayerwiseAdamW


def _two_kernels() -> keras.Model:
    inputs = keras.Input((2,))
    x = keras.layers.Dense(2, name="low", kernel_initializer="ones", bias_initializer="ones")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="high", kernel_initializer="ones")(x))


def _moves(optimizer, gradient: float, steps: int = 1) -> dict[str, float]:
    model = _two_kernels()
    before = {variable.path: variable.numpy() for variable in model.trainable_variables}
    for _ in range(steps):
        gradients = [keras.ops.full(variable.shape, gradient) for variable in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
    return {v.path: float(np.abs(v.numpy() - before[v.path]).max()) for v in model.trainable_variables}


@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_multiplier_reaches_step_and_weight_decay(gradient):
    moves = _moves(LayerwiseAdamW(0.01, weight_decay=0.1, multipliers={"low/kernel": 0.25}), gradient)
    assert moves["high/kernel"] > 0
    assert moves["low/kernel"] / moves["high/kernel"] == pytest.approx(0.25, rel=0.01)


def test_without_multipliers_it_is_keras_adamw_on_kernels():
    ours = _moves(LayerwiseAdamW(0.01, weight_decay=0.1), 1.0, steps=3)
    theirs = _moves(keras.optimizers.AdamW(0.01, weight_decay=0.1), 1.0, steps=3)
    assert ours["low/kernel"] == pytest.approx(theirs["low/kernel"], rel=1e-5)


def test_biases_are_not_decayed():
    assert _moves(LayerwiseAdamW(0.01, weight_decay=0.1), 0.0)["low/bias"] == 0


def test_step_follows_a_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.01, 0.0])
    assert _moves(LayerwiseAdamW(schedule, weight_decay=0.0), 1.0, steps=5)["low/kernel"] == pytest.approx(
        0.01, rel=1e-3
    )


def test_survives_saving_and_loading(tmp_path):
    model = _two_kernels()
    model.compile(optimizer=LayerwiseAdamW(0.01, weight_decay=0.1, multipliers={"low/kernel": 0.25}), loss="mse")
    x, y = np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.multipliers == {"low/kernel": 0.25}
    model.fit(x, y, verbose=0)
    loaded.fit(x, y, verbose=0)
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_negative_multipliers_are_refused():
    with pytest.raises(InputError, match="multipliers"):
        LayerwiseAdamW(multipliers={"low/kernel": -1.0})
