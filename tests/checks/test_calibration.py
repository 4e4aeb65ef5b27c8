"""Calibration: known answers by hand and against scikit-learn, and the value by chance."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from tftransfer.checks import calibration as module
from tftransfer.checks.calibration import by_chance, calibration, calibration_error
from tftransfer.report import Findings
from tftransfer.tasks import MultiLabel, Regression, SingleLabel

TASK = SingleLabel(("cat", "dog", "cow"))


def calibrated(examples, seed=0, power=1.0):
    """Targets drawn from the probabilities, which `power` then sharpens."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet([0.7, 0.7, 0.7], examples)
    targets = np.array([random.choice(3, p=row) for row in probabilities], np.int32)
    sharpened = probabilities**power
    return targets, sharpened / sharpened.sum(axis=1, keepdims=True)


def test_calibration_error_by_hand():
    # Two bins: 0.9 and 0.95 with one of two right, gap 0.425; 0.4 with one of one right, gap 0.6.
    error = calibration_error(np.array([0.9, 0.95, 0.4]), np.array([True, False, True]), bins=2)
    assert error == pytest.approx((2 * 0.425 + 0.6) / 3)


def test_a_confidence_of_one_falls_into_the_last_bin():
    assert calibration_error(np.array([1.0, 0.99]), np.array([True, True])) == pytest.approx(0.005)


def test_bins_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    confidence = random.random(500)
    right = random.random(500) < confidence**2
    rows = module._bins(confidence, right)
    shares, means = calibration_curve(right, confidence, n_bins=15)
    assert [row.confidence for row in rows] == pytest.approx(list(means))
    assert [row.share.value for row in rows] == pytest.approx(list(shares))


def test_chance_explains_the_error_of_a_small_split():
    # The field notes: a perfectly calibrated model shows about 0.067 at n = 100.
    random = np.random.default_rng(1)
    assert by_chance(random.uniform(0.4, 1.0, 100)).expected == pytest.approx(0.08, abs=0.025)
    assert by_chance(random.uniform(0.4, 1.0, 100_00)).expected < 0.012


def test_chance_of_a_single_answer_by_hand():
    # One answer at 0.9: the error is 0.1 nine times in ten and 0.9 else, 0.18 on average.
    chance = by_chance(np.array([0.9]))
    assert chance.expected == pytest.approx(0.18, abs=0.03)
    assert chance.quantile == pytest.approx(0.9)


def test_a_calibrated_model_passes_nineteen_times_in_twenty(monkeypatch):
    monkeypatch.setattr(module, "_SIMULATIONS", 200)
    passed = []
    for seed in range(120):
        targets, probabilities = calibrated(100, seed)
        confidence, right = module.confidences(TASK, targets, probabilities)
        passed.append(calibration_error(confidence, right) <= by_chance(confidence).quantile)
    assert 0.88 <= np.mean(passed) <= 0.995


@pytest.mark.parametrize("power", [4.0, 0.3])
def test_an_overconfident_and_a_timid_model_fail(power):
    (check,) = calibration(TASK, *calibrated(400, power=power)).checks
    assert check.passed is False
    assert check.metrics["expected_calibration_error"] > check.metrics["chance_95_percent_quantile"]


def test_metrics_equal_scikit_learn_and_the_task():
    targets, probabilities = calibrated(150)
    found = calibration(TASK, targets, probabilities).metrics
    expected = sklearn_metrics.brier_score_loss(targets, probabilities, scale_by_half=False)
    assert found["brier_score"].value == pytest.approx(expected)
    assert found["log_loss"].value == pytest.approx(TASK.measure(targets, probabilities)["log_loss"])
    assert found["log_loss"].low < found["log_loss"].value < found["log_loss"].high


def test_several_labels():
    random = np.random.default_rng(0)
    task = MultiLabel(("red", "round"))
    probabilities = random.random((200, 2)).astype(np.float32)
    targets = (random.random((200, 2)) < probabilities).astype(np.float32)
    found = calibration(task, targets, probabilities)
    expected = sklearn_metrics.brier_score_loss(targets.ravel(), probabilities.ravel())
    assert found.metrics["brier_score"].value == pytest.approx(expected, rel=1e-5)
    assert found.metrics["log_loss"].value == pytest.approx(task.measure(targets, probabilities)["log_loss"], rel=1e-5)
    assert found.checks[0].passed is True
    assert found.checks[0].metrics["answers"] == 400


def test_the_table_counts_every_answer():
    (table,) = calibration(TASK, *calibrated(90)).tables
    assert sum(row[-1] for row in table.rows) == 90


def test_the_picture_is_the_same_twice_and_the_report_keeps_it(kept_by_a_report):
    targets, probabilities = calibrated(60)
    found = calibration(TASK, targets, probabilities)
    assert found == calibration(TASK, targets, probabilities)
    assert found.pictures[0].png.startswith(b"\x89PNG")
    assert kept_by_a_report(found)


def test_nothing_to_say():
    assert calibration(Regression(), np.ones((3, 1)), np.ones((3, 1))) == Findings()
    assert calibration(TASK, np.zeros(0, np.int32), np.zeros((0, 3))) == Findings()
    assert calibration(TASK, np.zeros(2, np.int32), np.full((2, 3), np.nan)) == Findings()
