import keras
import numpy as np
import pytest

from tftransfer import advice, trainable, training
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def test_surgical_takes_the_groups_with_the_largest_gradients(small_network, small_task, small_data):
    model = small_network()
    before = model.get_weights()
    found = advice.surgical(model, small_task, small_data, share=0.5, epochs=4, batch_size=8)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    norms = {row[0]: row[1] for row in found.table.rows}
    chosen = {row[0] for row in found.table.rows if row[2] == "trains"}
    assert min(norms[name] for name in chosen) >= max(norms[name] for name in norms if name not in chosen)
    assert sum(norms[name] for name in chosen) >= 0.5 * sum(norms.values())
    assert found.strategy[1].selector == "groups:" + "+".join(name for name in norms if name in chosen)
    history = training.fine_tune(model, small_task, small_data, found.strategy, batch_size=8, max_steps=1)
    trained = {row.group for row in history.phases[1].audit if row.trainable}
    assert trained == {*chosen, "head"}
    assert any(name in " ".join(found.reasons) for name in chosen)


def test_relative_gradient_norms_are_those_by_hand(small_network, small_task, small_data):
    import tensorflow as tf

    model = small_network()
    probe = Phase("probe", "head", 1, 1e-12, warmup=0)  # leaves the head as it is
    norms = advice.relative_gradient_norms(model, small_task, small_data, probe, batch_size=24)
    pictures = np.stack([small_data.train.pictures.load(i) for i in range(24)]).astype(np.float32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kernel = model.get_layer("conv_2").kernel
    with tf.GradientTape() as tape:
        value = loss(small_data.train.targets, model(pictures))
    expected = np.linalg.norm(tape.gradient(value, kernel.value)) / np.linalg.norm(kernel.numpy())
    assert norms["conv_2"] == pytest.approx(expected, rel=1e-3)


def test_the_test_split_is_not_looked_at(small_network, small_task, small_data):
    import dataclasses

    def never(index):
        raise AssertionError("the test split was read")

    closed = dataclasses.replace(small_data.test, pictures=dataclasses.replace(small_data.test.pictures, load=never))
    data = dataclasses.replace(small_data, test=closed)
    advice.surgical(small_network(), small_task, data, epochs=2, batch_size=8)


def test_the_range_test_finds_a_rate_that_learns(small_network, small_task, small_data):
    model = small_network()
    before = model.get_weights()
    found = advice.find_learning_rate(model, small_task, small_data, steps=60, batch_size=8)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert found.rates[0] == pytest.approx(1e-6)
    assert list(found.rates) == sorted(found.rates)
    assert len(found.rates) == len(found.losses)
    assert 1e-4 < found.suggestion < 0.1
    assert found.picture().png.startswith(b"\x89PNG")
    phase = Phase("tune", "all", 5, found.suggestion, warmup=0)
    losses = training.fine_tune(model, small_task, small_data, (phase,), batch_size=8)["loss"]
    assert losses[-1] < losses[0]


def test_batch_losses_are_undone_from_running_means():
    watch = advice._BatchLosses(count=10, batch_size=4)
    watch.set_model(type("Model", (), {"stop_training": False})())
    watch.on_epoch_begin(0)
    for batch, seen in enumerate([4, 8, 10]):
        total = [4.0, 4.0 + 12.0, 4.0 + 12.0 + 4.0][batch]
        watch.on_train_batch_end(batch, {"loss": total / seen})
    first, second = 1.0, (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9**2)
    assert watch.smoothed[:2] == pytest.approx([first, second])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("surgicl", "Did you mean 'surgical'"),
        ("surgical:share=0", r"in \(0, 1\]"),
        ("surgical:sahre=1", "Did you mean 'share'"),
        ("surgical:seed=1", "has the options"),
    ],
)
def test_bad_advice_is_refused_at_once(text, said):
    with pytest.raises(InputError, match=said):
        advice.Choice(text)


def test_a_range_test_that_is_stopped_leaves_the_model_as_it_was(small_network, small_task, small_data, monkeypatch):
    model = small_network()
    trainable.set_trainable(model, "last:1")
    weights, flags = model.get_weights(), [layer.trainable for layer in model._flatten_layers()]

    def stop(self, batch, logs=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(advice._BatchLosses, "on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        advice.find_learning_rate(model, small_task, small_data, batch_size=8)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [layer.trainable for layer in model._flatten_layers()] == flags


@pytest.mark.parametrize("bad", [{"high": 0.0}, {"high": float("inf")}, {"steps": 5}, {"batch_size": 0}])
def test_bad_range_tests_are_refused(small_network, small_task, small_data, bad):
    with pytest.raises(InputError):
        advice.find_learning_rate(small_network(), small_task, small_data, **bad)


def test_surgical_mixes_examples_after_its_probe():
    assert [phase.mixup for phase in advice.Choice("surgical:mixup=0.2").planned] == [0.0, 0.2]
