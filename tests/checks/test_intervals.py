"""Intervals: known answers, and coverage where it must hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tftransfer.checks import intervals
from tftransfer.report import Number


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_equals_scipy(successes, total):
    successes = min(successes, total)
    expected = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert intervals.wilson(successes / total, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_by_hand():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert intervals.proportion(81, 263).low == pytest.approx(0.2553, abs=5e-5)
    assert intervals.proportion(81, 263).high == pytest.approx(0.3662, abs=5e-5)
    assert intervals.proportion(0, 20).low == 0
    assert intervals.proportion(0, 20).high == pytest.approx(0.1611, abs=5e-5)
    assert intervals.proportion(20, 20).high == 1


def test_a_share_of_nothing_is_undefined():
    assert intervals.proportion(0, 0) == Number(None)


def macro_recall(targets, right, classes):
    one_hot = np.eye(classes)[targets]
    return lambda weights: float(np.mean((weights @ (one_hot * right[:, None])) / np.maximum(weights @ one_hot, 1e-9)))


@pytest.mark.parametrize(
    ("classes", "accuracy", "per_class"), [(2, 0.9, 5), (2, 0.98, 50), (5, 0.6, 10), (10, 0.99, 8)]
)
def test_the_interval_of_an_average_of_rates_covers(classes, accuracy, per_class, monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 60)
    random = np.random.default_rng(0)
    spread = np.linspace(-1, 1, classes) * (1 - accuracy)
    truth, targets = accuracy + spread, np.repeat(np.arange(classes), per_class)
    covered = 0
    for _ in range(120):
        right = (random.random(len(targets)) < truth[targets]).astype(float)
        statistic = macro_recall(targets, right, classes)
        found = intervals.average_of_rates(
            statistic(np.ones(len(targets))), statistic, len(targets), np.bincount(targets)
        )
        covered += found.low <= truth.mean() <= found.high
    assert covered >= 0.91 * 120  # 95 % less two standard errors of 120 trials


def test_an_average_without_a_mistake_is_not_certain():
    targets = np.repeat([0, 1], [90, 10])
    statistic = macro_recall(targets, np.ones(100), 2)
    found = intervals.average_of_rates(1.0, statistic, 100, np.bincount(targets))
    assert found.high == 1
    assert found.low == pytest.approx(intervals.wilson(1.0, 4 / (1 / 90 + 1 / 10))[0])


def test_an_average_with_an_empty_class_has_no_interval():
    found = intervals.average_of_rates(0.5, lambda weights: 0.5, 10, np.array([10, 0]))
    assert found == Number(0.5, method="none: a class has no example")


def test_the_average_of_one_class_is_close_to_wilson():
    right = np.arange(200) < 160
    found = intervals.average_of_rates(0.8, lambda weights: float(weights @ right) / 200, 200, np.array([200]))
    assert (found.low, found.high) == pytest.approx(intervals.wilson(0.8, 200), abs=0.01)


def test_mean_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0] * 5)
    factor = math.exp(stats.t.ppf(0.975, 19) * values.std(ddof=1) / 2.5 / math.sqrt(20))
    found = intervals.mean(values)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 / factor, 2.5 * factor))
    assert found.method == "student_t_log"


@pytest.mark.parametrize("draw", ["exponential", "absolute", "log_loss"])
def test_the_interval_of_a_mean_covers(draw):
    random = np.random.default_rng(0)
    probability = lambda size: np.clip(random.beta(8, 1, size), 1e-6, 1)  # noqa: E731
    draws = {
        "exponential": (lambda: random.exponential(size=100), 1.0),
        "absolute": (lambda: np.abs(random.normal(size=20)), math.sqrt(2 / math.pi)),
        "log_loss": (lambda: -np.log(probability(100)), 1 / 8),
    }
    sample, truth = draws[draw]
    found = [intervals.mean(sample()) for _ in range(400)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.925


def test_the_interval_of_a_ratio_covers():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        true = random.normal(size=100)
        squares, spread = random.normal(scale=0.5, size=100) ** 2, (true - true.mean()) ** 2
        found = intervals.ratio(squares, spread)
        covered += found.low <= 0.25 <= found.high
    assert covered >= 0.92 * 400


def test_intervals_that_do_not_hold_are_not_given():
    assert intervals.mean(np.ones(9)).low is None
    assert intervals.mean(np.zeros(50)) == Number(0.0, method="none: every one is zero")
    assert intervals.mean(np.array([1.0, np.nan] * 20)) == Number(None)
    assert intervals.ratio(np.ones(40), np.zeros(40)) == Number(None)
    assert intervals.mean(np.array([])) == Number(None)


def test_a_falling_function_swaps_the_bounds():
    assert intervals.transformed(Number(0.25, 0.125, 0.5, "t"), lambda x: 1 - x) == Number(0.75, 0.5, 0.875, "t")
    assert intervals.transformed(Number(0.25, method="none"), lambda x: 1 - x) == Number(0.75, method="none")
