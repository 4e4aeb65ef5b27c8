import keras
import numpy as np
import pytest
import scipy.stats

from tftransfer import tasks
from tftransfer.metrics import LossError

LOGITS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
TARGETS = np.arange(40) % 3


def _measured(loss: keras.losses.Loss, targets: np.ndarray, outputs: np.ndarray, weights=None, batch: int = 7) -> float:
    metric = LossError(loss)
    for start in range(0, len(targets), batch):
        part = slice(start, start + batch)
        metric.update_state(targets[part], outputs[part], None if weights is None else weights[part])
    return float(metric.result())


def test_equals_the_standard_error_of_the_losses():
    losses = -np.log(scipy.special.softmax(LOGITS, axis=1)[np.arange(40), TARGETS])
    loss = tasks.SingleLabel(("a", "b", "c")).loss(from_logits=True)
    assert _measured(loss, TARGETS, LOGITS) == pytest.approx(scipy.stats.sem(losses, ddof=0), rel=1e-4)


def test_several_numbers_per_example_are_one_loss():
    truth, given = np.zeros((40, 3), np.float32), LOGITS
    expected = scipy.stats.sem(np.square(given).mean(axis=1), ddof=0)
    assert _measured(keras.losses.MeanSquaredError(), truth, given) == pytest.approx(expected, rel=1e-4)


def test_weights_count_as_repetitions_in_the_mean_and_lose_in_number():
    truth, given = np.zeros((3, 1), np.float32), np.array([[1.0], [2.0], [4.0]], np.float32)
    weights = np.array([2.0, 1.0, 1.0], np.float32)
    mean = np.average([1, 2, 4], weights=weights)
    variance = np.average((np.array([1, 2, 4]) - mean) ** 2, weights=weights)
    effective = weights.sum() ** 2 / np.square(weights).sum()
    loss = keras.losses.MeanAbsoluteError()
    assert _measured(loss, truth, given, weights, batch=2) == pytest.approx(np.sqrt(variance / effective), rel=1e-5)


def test_without_examples_and_without_spread_it_is_zero():
    metric = LossError(keras.losses.MeanAbsoluteError())
    assert float(metric.result()) == 0
    metric.update_state(np.zeros((5, 1)), np.ones((5, 1)))
    assert float(metric.result()) == pytest.approx(0, abs=1e-6)
    metric.update_state(np.zeros((5, 1)), 3 * np.ones((5, 1)))
    assert float(metric.result()) > 0
    metric.reset_state()
    assert float(metric.result()) == 0
