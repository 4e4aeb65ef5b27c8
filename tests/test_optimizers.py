import keras
import numpy as np
import pytest

from tftransfer.errors import InputError
from tftransfer.optimizers import LayerwiseAdamW, LayerwiseSGD, Moment


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


@pytest.mark.parametrize("optimizer", [LayerwiseAdamW, LayerwiseSGD])
@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_multiplier_reaches_step_and_weight_decay(optimizer, gradient):
    moves = _moves(optimizer(0.01, weight_decay=0.1, multipliers={"low/kernel": 0.25}), gradient)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("optimizer", [LayerwiseAdamW, LayerwiseSGD])
def test_moments_carried_over_continue_as_if_nothing_had_happened(optimizer):
    """Three steps and two more by a second optimizer equal five by one."""

    def gradients(model, step):
        return [keras.ops.full(v.shape, np.cos(step + n)) for n, v in enumerate(model.trainable_variables)]

    straight, divided = _two_kernels(), _two_kernels()
    divided.set_weights(straight.get_weights())
    one, first, second = (optimizer(0.01, weight_decay=0.1) for _ in range(3))
    for step in range(5):
        one.apply(gradients(straight, step), straight.trainable_variables)
    for step in range(3):
        first.apply(gradients(divided, step), divided.trainable_variables)
    second.start_from(divided.trainable_variables, first.moments())
    for step in range(3, 5):
        second.apply(gradients(divided, step), divided.trainable_variables)
    for ours, theirs in zip(straight.get_weights(), divided.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert {moment.age for moment in second.moments().values()} == {5}


def test_without_multipliers_it_is_keras_sgd_on_kernels():
    ours = _moves(LayerwiseSGD(0.01), 1.0, steps=3)
    theirs = _moves(keras.optimizers.SGD(0.01, momentum=0.9), 1.0, steps=3)
    assert ours["low/kernel"] == pytest.approx(theirs["low/kernel"], rel=1e-5)


def test_nesterov_is_keras_own():
    ours = _moves(LayerwiseSGD(0.01, nesterov=True), 1.0, steps=3)
    theirs = _moves(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), 1.0, steps=3)
    assert ours["low/kernel"] == pytest.approx(theirs["low/kernel"], rel=1e-5)


def test_momentum_is_carried_to_another_rate_in_that_rates_units():
    """After many equal gradients the average is ten of them; a hundredth of the rate moves a hundredth as far."""
    model = _two_kernels()
    first, second = LayerwiseSGD(1e-2), LayerwiseSGD(1e-4)
    gradients = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    for _ in range(200):
        first.apply(gradients, model.trainable_variables)
    second.start_from(model.trainable_variables, first.moments())
    before = model.get_weights()[0]
    second.apply(gradients, model.trainable_variables)
    np.testing.assert_allclose(before - model.get_weights()[0], 1e-4 * 10, rtol=1e-2)


def test_moments_that_are_not_finite_are_not_carried():
    model = _two_kernels()
    ruined = {v.path: Moment((np.full(v.shape, np.nan, np.float32),) * 2, 5) for v in model.trainable_variables}
    optimizer = LayerwiseAdamW(0.01)
    optimizer.start_from(model.trainable_variables, ruined)
    assert all(np.isfinite(moment.slots[0]).all() for moment in optimizer.moments().values())


def test_variables_can_be_excluded_from_weight_decay():
    model = _two_kernels()
    optimizer = LayerwiseAdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay([model.get_layer("low").kernel])
    before = model.get_weights()
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    np.testing.assert_array_equal(model.get_layer("low").kernel, before[0])
    assert not np.array_equal(model.get_layer("high").kernel, before[2])


def test_amsgrad_is_refused():
    with pytest.raises(InputError, match="amsgrad"):
        LayerwiseAdamW(amsgrad=True)


def test_a_fresh_optimizer_would_not_continue():
    """The test above can fail: without the moments the steps are others."""
    model, other = _two_kernels(), _two_kernels()
    other.set_weights(model.get_weights())
    one, first = LayerwiseAdamW(0.01), LayerwiseAdamW(0.01)
    for step in range(4):
        one.apply([keras.ops.full(v.shape, np.cos(step)) for v in model.trainable_variables], model.trainable_variables)
        optimizer = first if step < 3 else LayerwiseAdamW(0.01)
        optimizer.apply(
            [keras.ops.full(v.shape, np.cos(step)) for v in other.trainable_variables], other.trainable_variables
        )
    assert np.abs(model.get_weights()[0] - other.get_weights()[0]).max() > 1e-3


def test_a_variable_that_was_not_there_begins_afresh():
    model = _two_kernels()
    first = LayerwiseAdamW(0.01, weight_decay=0.0)
    low = [v for v in model.trainable_variables if v.path.startswith("low")]
    for _ in range(5):
        first.apply([keras.ops.ones(v.shape) for v in low], low)
    second = LayerwiseAdamW(0.01, weight_decay=0.0)
    second.start_from(model.trainable_variables, first.moments())
    before = {v.path: v.numpy() for v in model.trainable_variables}
    second.apply([keras.ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    for variable in model.trainable_variables:  # a constant gradient moves each by one full step, whatever its age
        np.testing.assert_allclose(before[variable.path] - variable.numpy(), 0.01, rtol=1e-3)
