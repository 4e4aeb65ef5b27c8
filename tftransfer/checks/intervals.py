"""95 % intervals that hold at the sizes of real test splits.

The percentile bootstrap covers 26-66 % where it should cover 95 % at n = 10, and gives a classifier without a
mistake an interval of width zero. So: Wilson for proportions, Wilson at an effective sample size for averages
of rates, and Student's t on the logarithm for means and ratios of losses and errors. Where none of them holds
there is no interval, and `method` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from tftransfer.report import Number

CONFIDENCE = 0.95
_RESAMPLES = 200


def wilson(rate: float, total: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion.

    Args:
        rate: The share that was seen, in [0, 1].
        total: Out of how many, above 0; a fraction where it is an effective number.

    Returns:
        `(low, high)`, both in [0, 1] and around `rate`.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> [round(bound, 3) for bound in wilson(0.8, 10)]
        [0.49, 0.943]
    """
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    centre = (rate + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return float(np.clip(centre - half, 0, rate)), float(np.clip(centre + half, rate, 1))


def proportion(successes: int, total: int) -> Number:
    """Return a share with Wilson's interval; undefined out of nothing.

    Args:
        successes: How many, from 0 to `total`.
        total: Out of how many.

    Example:
        >>> proportion(0, 0).value is None
        True
    """
    if not total:
        return Number(None)
    return Number(successes / total, *wilson(successes / total, total), "wilson")


def average_of_rates(
    value: float, statistic: Callable[[np.ndarray], float], num_examples: int, counts: np.ndarray
) -> Number:
    """Return an average over classes of rates (macro recall, F1, average precision) with its interval.

    Wilson's interval at the number of plain trials that would vary as much: n = p (1 - p) / variance, as for
    complex surveys, with the variance from a bootstrap. That sees no variance where there is no mistake, so n
    is never more than if all classes shared one rate.

    Args:
        value: The average, in [0, 1].
        statistic: Takes how often each example counts, `(num_examples,)`, and returns the average.
        num_examples: Examples in the test split.
        counts: `(classes,)` how many examples each class has.

    Source: Korn and Graubard 1998, "Confidence Intervals for Proportions With Small Expected Number of
    Positive Counts Estimated From Survey Data".
    """
    if not counts.all():
        return Number(value, method="none: a class has no example")
    at_most = len(counts) ** 2 / float((1 / counts).sum())
    variance = _bootstrap_variance(statistic, num_examples)
    spread = value * (1 - value)
    effective = min(spread / variance, at_most) if variance * at_most > 1e-9 and spread > 0 else at_most
    return Number(value, *wilson(value, effective), "wilson_effective_n")


def _bootstrap_variance(statistic: Callable[[np.ndarray], float], num_examples: int) -> float:
    random = np.random.default_rng(0)
    draws = (random.integers(0, num_examples, num_examples) for _ in range(_RESAMPLES))
    return float(np.var([statistic(np.bincount(draw, minlength=num_examples)) for draw in draws], ddof=1))


def mean(values: np.ndarray, at_least: int = 10) -> Number:
    """Return the mean of losses or errors with Student's interval on the logarithmic scale.

    The logarithm keeps the interval above zero and covers better than the plain scale for skewed losses.

    Args:
        values: `(n,)` numbers from 0.
        at_least: With fewer values there is no interval: a rare large one may be missing. Defaults to 10.

    Example:
        >>> mean(np.ones(5))
        Number(value=1.0, low=None, high=None, method='none: fewer than 10 examples')
    """
    return ratio(values, np.ones(len(values)), at_least)


def ratio(numerators: np.ndarray, denominators: np.ndarray, at_least: int = 30) -> Number:
    """Return sum / sum of two quantities of the same examples, with Student's interval of its logarithm.

    Args:
        numerators, denominators: `(n,)` numbers from 0.
        at_least: With fewer examples there is no interval. Defaults to 30.
    """
    if not len(numerators) or not denominators.sum() or not np.isfinite(numerators).all():
        return Number(None)
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < at_least:
        return Number(value, method=f"none: fewer than {at_least} examples")
    if not value:
        return Number(value, method="none: every one is zero")
    influence = numerators / numerators.mean() - denominators / denominators.mean()
    error = float(influence.std(ddof=1)) / math.sqrt(len(influence))
    factor = math.exp(stats.t.ppf((1 + CONFIDENCE) / 2, len(influence) - 1) * error)
    return Number(value, value / factor, value * factor, "student_t_log")


def transformed(number: Number, function: Callable[[float], float]) -> Number:
    """Carry a number and its interval through a monotone function.

    Args:
        number: Its bounds are swapped where the function falls.
        function: For instance `math.sqrt`, from a mean squared error to its root.

    Example:
        >>> transformed(Number(4.0, 1.0, 9.0, "t"), math.sqrt)
        Number(value=2.0, low=1.0, high=3.0, method='t')
    """
    value = None if number.value is None else function(number.value)
    if number.low is None or number.high is None:
        return Number(value, method=number.method)
    low, high = sorted((function(number.low), function(number.high)))
    return Number(value, low, high, number.method)
