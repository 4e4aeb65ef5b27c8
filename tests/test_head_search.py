"""Heads side by side against heads that Keras trains one by one."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import head_search, schedules, tasks
from tftransfer.errors import InputError
from tftransfer.optimizers import LayerwiseAdamW
from tftransfer.strategies import Phase

TASK = tasks.SingleLabel(("a", "b", "c"))
PHASE = Phase("probe", "head", 4)


def _problem(count=60, size=8, separation=1.5, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.arange(count, dtype=np.int32) % 3
    features = generator.normal(size=(count, size)) + separation * np.eye(3, size)[targets]
    return features.astype(np.float32), targets


def _weights(count=60):
    return np.ones(count, np.float32)


@pytest.mark.parametrize(("views", "average"), [(1, False), (2, False), (2, True)])
def test_each_head_is_the_one_that_keras_trains(views, average):
    one, targets = _problem()
    features = np.stack([one, one[:, ::-1]])[:views]
    phase = dataclasses.replace(PHASE, augmentation="light", views=views, average_views=average)
    (tried,) = head_search.search(
        features if views > 1 else one, targets, _weights(), TASK, phase, rates=(0.03,), decays=(0.5,), batch_size=60
    )
    held_out, losses = head_search._folds(targets, 5, 0), np.zeros(60)
    for outside in held_out.astype(bool):
        layer = keras.layers.Dense(3)
        layer.build((None, 8))
        limit = np.sqrt(6 / (8 + 3))
        layer.kernel.assign(tf.random.stateless_uniform((8, 3), (0, 0), -limit, limit))
        phase = dataclasses.replace(phase, learning_rate=0.03)
        optimizer = LayerwiseAdamW(schedules.learning_rate(phase, 4), weight_decay=0.5, multipliers={})
        optimizer.build(layer.trainable_variables)
        loss = TASK.loss(True, targets)
        for epoch in range(4):
            shown = features if average else features[epoch % views][None]
            with tf.GradientTape() as tape:
                values = [loss(targets[~outside], layer(view[~outside])) for view in shown]
                value = sum(values) / len(values)
            optimizer.apply_gradients(
                zip(tape.gradient(value, layer.trainable_weights), layer.trainable_weights, strict=True)
            )
        losses[outside] = np.mean([loss.call(targets[outside], layer(view[outside])) for view in features], axis=0)
    assert tried.loss == pytest.approx(losses.mean(), rel=1e-4)
    assert tried.error == pytest.approx(losses.std() / np.sqrt(60), rel=1e-4)


def test_numbers_are_searched_in_any_unit():
    features, _ = _problem()
    targets = (features[:, :2] @ np.array([[1.0, 0.5], [0.2, 1.0]])).astype(np.float32)
    options = {"rates": (1e-3, 0.03), "decays": (0.1,), "seed": 1}

    def search(unit, offset):
        given = (targets * unit + offset).astype(np.float32)
        units = (given.std(axis=0).tolist(), given.mean(axis=0).tolist())
        task = tasks.Regression(("x", "y"))
        return head_search.search(features, given, _weights(), task, PHASE, units=units, **options)

    one, thousand = search(1.0, 0.0), search(1000.0, 1e4)
    assert [found.learning_rate for found in one] == [found.learning_rate for found in thousand]
    for own, other in zip(one, thousand, strict=True):
        assert own.loss == pytest.approx(other.loss, rel=0.01)


def test_what_helps_is_found():
    features, targets = _problem(count=30, size=200, separation=1.0)
    best, *_, worst = head_search.search(
        features, targets, _weights(30), TASK, Phase("probe", "head", 30), rates=(1e-2,), decays=(0.0, 30.0, 90.0)
    )
    assert best.weight_decay > worst.weight_decay == 0.0
    assert best.loss < worst.loss


def test_the_same_seed_gives_the_same_bits_in_one_part_or_several(monkeypatch):
    features, targets = _problem()
    found = []
    for at_once in (2**24, 1, 2**24):
        monkeypatch.setattr(head_search, "_AT_ONCE", at_once)
        found.append(head_search.search(features, targets, _weights(), TASK, PHASE, dropout=0.2))
    assert found[0] == found[2]
    for one, other in zip(found[0], found[1], strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-4)


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_other_tasks_are_searched_too(kind):
    features, targets = _problem()
    task = {"multi_label": tasks.MultiLabel, "regression": tasks.Regression}[kind](("a", "b", "c"))
    tried = head_search.search(features, np.eye(3, dtype=np.float32)[targets], _weights(), task, PHASE)
    assert len(tried) == len(head_search.RATES) * len(head_search.DECAYS)
    assert np.isfinite([one.loss for one in tried]).all()


def test_examples_without_weight_do_not_count():
    features, targets = _problem()
    task, weights = tasks.MultiLabel(("a", "b", "c")), _weights()
    weights[:15] = 0
    targets = np.eye(3, dtype=np.float32)[targets]
    other = np.concatenate([1 - targets[:15], targets[15:]])
    one, two = (head_search.search(features, some, weights, task, PHASE, rates=(0.03,)) for some in (targets, other))
    assert one == two
    assert one != head_search.search(features, other, _weights(), task, PHASE, rates=(0.03,))


def test_a_class_of_one_example_takes_part():
    features, targets = _problem()
    targets = np.where(np.arange(60) == 7, 2, targets % 2).astype(np.int32)
    tried = head_search.search(features, targets, _weights(), TASK, PHASE, rates=(0.03,))
    assert np.isfinite([one.loss for one in tried]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": np.full((60, 8), np.nan)}, "features"),
        ({"features": np.zeros((59, 8))}, "features"),
        ({"dropout": 1.0}, "dropout"),
        ({"folds": 1}, "folds"),
    ],
)
def test_bad_input_is_refused(change, said):
    features, targets = _problem()
    given = {"features": features, "targets": targets, "weights": _weights(), **change}
    with pytest.raises(InputError, match=f"`{said}`"):
        head_search.search(task=TASK, phase=PHASE, **given)
