import numpy as np
import pytest

from tftransfer import rate_test, trainable, training
from tftransfer.data import order
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def test_the_range_test_finds_a_rate_that_learns(small_network, small_task, small_data):
    model = small_network()
    before = model.get_weights()
    found = rate_test.find_learning_rate(model, small_task, small_data, steps=60, batch_size=8)
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
    watch = rate_test._BatchLosses(count=10, batch_size=4)
    watch.set_model(type("Model", (), {"stop_training": False})())
    watch.on_epoch_begin(0)
    for batch, seen in enumerate([4, 8, 10]):
        total = [4.0, 4.0 + 12.0, 4.0 + 12.0 + 4.0][batch]
        watch.on_train_batch_end(batch, {"loss": total / seen})
    first, second = 1.0, (0.9 * 0.1 * 1 + 0.1 * 3) / (1 - 0.9**2)
    assert watch.smoothed[:2] == pytest.approx([first, second])


@pytest.mark.slow
def test_the_loss_over_averaged_views_is_undone_too(small_network, small_task, small_data):
    """The last batch of the epoch is smaller; the rates of the first steps are too small to change anything."""
    phase = Phase("probe", "head", augmentation="light", views=2, average_views=True)
    model = small_network()
    found = rate_test.find_learning_rate(model, small_task, small_data, phase, steps=10, high=1e-9, batch_size=10)
    loss, smoothed = small_task.loss(True, small_data.train.targets), 0.0
    batches = order.batches(
        small_data.train, 10, seed=0, phase=0, steps=9, augmentation="light", views=2, average_views=True
    )
    for step, (pictures, targets, _) in enumerate(batches, start=1):
        smoothed = 0.9 * smoothed + 0.1 * float(loss(targets, model(pictures, training=False)))
        assert found.losses[step - 1] == pytest.approx(smoothed / (1 - 0.9**step), rel=1e-3)


def test_a_range_test_that_is_stopped_leaves_the_model_as_it_was(small_network, small_task, small_data, monkeypatch):
    model = small_network()
    trainable.set_trainable(model, "last:1")
    weights, flags = model.get_weights(), _flags(model)

    def stop(self, batch, logs=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(rate_test._BatchLosses, "on_train_batch_end", stop)
    with pytest.raises(KeyboardInterrupt):
        rate_test.find_learning_rate(model, small_task, small_data, batch_size=8)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert _flags(model) == flags


def _flags(model):
    return [part.trainable for part in (*model._flatten_layers(), *model.variables)]


@pytest.mark.parametrize(
    "bad", [{"high": 0.0}, {"high": float("inf")}, {"phase": "full"}, {"steps": 5}, {"batch_size": 0}]
)
def test_bad_range_tests_are_refused(small_network, small_task, small_data, bad):
    with pytest.raises(InputError):
        rate_test.find_learning_rate(small_network(), small_task, small_data, **bad)
