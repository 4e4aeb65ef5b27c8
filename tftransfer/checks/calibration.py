"""Calibration: whether a probability of 90 % is right nine times in ten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from tftransfer.checks import drawing, intervals
from tftransfer.report import CALIBRATION, Check, Findings, Number, Picture, Table
from tftransfer.tasks import Task

BINS = 15
_SIMULATIONS = 1000
_ENOUGH_FOR_LOSSES = 100  # below this a rare confident mistake, which dominates the mean, may be missing


@dataclass(frozen=True)
class Chance:
    """What a perfectly calibrated model with the same confidences would show.

    Args:
        expected: The mean of its expected calibration error.
        quantile: The value that 95 % of such models stay below.
    """

    expected: float
    quantile: float


def calibration(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> Findings:
    """Compare confidences with how often they were right, and both with what chance alone would show.

    Use it on examples that training has not seen. For a single label the confidence is that of the answer;
    for several labels every pair of example and label counts as one answer, as if labels were independent.

    Args:
        task: What the outputs mean; regression has no calibration and gives empty findings.
        targets: `(n,)` class numbers or `(n, labels)` zeros and ones.
        probabilities: `(n, classes)`, rows that sum to 1 for a single label.

    Returns:
        The expected calibration error (15 bins) beside its value by chance, Brier score, log loss, a diagram,
        a table, and the check `calibration`, passed if chance explains the error.

    Source: Guo et al. 2017, arXiv:1706.04599; chance: Broecker and Smith 2007, doi:10.1175/WAF993.1.
    """
    if task.kind == "regression" or not len(targets) or not np.isfinite(probabilities).all():
        return Findings()
    confidence, right = confidences(task, targets, probabilities)
    error, chance = calibration_error(confidence, right), by_chance(confidence)
    metrics = {
        "expected_calibration_error": Number(error, method="none: compare with chance"),
        "expected_calibration_error_by_chance": Number(chance.expected),
        "brier_score": intervals.mean(brier_scores(task, targets, probabilities), _ENOUGH_FOR_LOSSES),
        "log_loss": intervals.mean(log_losses(task, targets, probabilities), _ENOUGH_FOR_LOSSES),
    }
    return Findings(
        metrics,
        tables=(_table(confidence, right),),
        pictures=(_diagram(confidence, right, error, chance),),
        checks=(_check(error, chance, len(confidence)),),
    )


def confidences(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each answer's probability and whether it came true, both `(answers,)`."""
    if task.kind == "multi_label":
        return probabilities.ravel().astype(float), targets.ravel() > 0.5
    return probabilities.max(axis=-1).astype(float), probabilities.argmax(axis=-1) == targets


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean gap between confidence and share right.

    Args:
        confidence: `(n,)` in [0, 1].
        right: `(n,)` booleans.
        bins: Equal bins of [0, 1]. Defaults to 15.

    Example:
        >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
        0.4
    """
    numbers = _bin_numbers(confidence, bins)
    gaps = np.bincount(numbers, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def by_chance(confidence: np.ndarray, bins: int = BINS) -> Chance:
    """Simulate the calibration error of a model whose confidences are exactly right.

    It is far from zero on a small test split: about 0.067 at n = 100.
    """
    random = np.random.default_rng(0)
    errors = [
        calibration_error(confidence, random.random(len(confidence)) < confidence, bins) for _ in range(_SIMULATIONS)
    ]
    return Chance(float(np.mean(errors)), float(np.quantile(errors, intervals.CONFIDENCE)))


def log_losses(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return each example's log loss, `(n,)`; their mean is the task's `log_loss`."""
    smallest = np.finfo(np.float32).eps
    if task.kind == "multi_label":
        clipped = np.clip(probabilities, smallest, 1 - smallest)
        return -np.where(targets > 0.5, np.log(clipped), np.log(1 - clipped)).mean(axis=-1)
    return -np.log(np.clip(probabilities[np.arange(len(targets)), targets], smallest, 1.0))


def brier_scores(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return each example's Brier score `(n,)`: squared errors summed over classes, or averaged over labels.

    Source: Brier 1950; between 0 and 2 for a single label, between 0 and 1 for several.
    """
    if task.kind == "multi_label":
        return ((probabilities - targets) ** 2).mean(axis=-1)
    given = probabilities.astype(np.float64)
    chosen = given[np.arange(len(targets)), targets]
    return (given**2).sum(axis=-1) + 1 - 2 * chosen  # the squared distance to the target's row of the unit matrix


def _bin_numbers(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip((confidence * bins).astype(int), 0, bins - 1)


def _check(error: float, chance: Chance, answers: int) -> Check:
    numbers = {
        "expected_calibration_error": error,
        "expected_by_chance": chance.expected,
        "chance_95_percent_quantile": chance.quantile,
        "answers": answers,
        "bins": BINS,
    }
    return Check("calibration", error <= chance.quantile, numbers)


@dataclass(frozen=True)
class _Bin:
    """The answers whose confidences lie in one of the equal bins."""

    number: int
    confidence: float
    share: Number
    count: int


def _bins(confidence: np.ndarray, right: np.ndarray) -> list[_Bin]:
    """Describe each bin that holds an answer."""
    numbers = _bin_numbers(confidence, BINS)
    return [_bin(int(number), confidence[numbers == number], right[numbers == number]) for number in np.unique(numbers)]


def _bin(number: int, confidence: np.ndarray, right: np.ndarray) -> _Bin:
    return _Bin(number, float(confidence.mean()), intervals.proportion(int(right.sum()), len(right)), len(right))


def _table(confidence: np.ndarray, right: np.ndarray) -> Table:
    rows = tuple((_edges(one.number), one.confidence, one.share, one.count) for one in _bins(confidence, right))
    columns = ("confidence between", "mean confidence", "share right", "answers")
    return Table("Confidence and share right", columns, rows, section=CALIBRATION, percent=columns[1:3])


def _edges(number: int) -> str:
    return f"{100 * number / BINS:.0f}–{100 * (number + 1) / BINS:.0f} %"


def _diagram(confidence: np.ndarray, right: np.ndarray, error: float, chance: Chance) -> Picture:
    bins = _bins(confidence, right)
    drawn = drawing.figure(height=4.6)
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    _draw_shares(upper, bins)
    drawing.style(lower, x="confidence", y="answers")
    lower.bar(
        [(one.number + 0.5) / BINS for one in bins],
        [one.count for one in bins],
        0.9 / BINS,
        color=drawing.BLUE,
    )
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    summary = (
        f"Expected calibration error {100 * error:.1f} %; a perfectly calibrated model would show "
        f"{100 * chance.expected:.1f} % on as many answers, and stay below {100 * chance.quantile:.1f} % "
        "19 times in 20."
    )
    caption = f"{summary} Points below the line: more confident than right. Bars are 95 % intervals."
    return Picture("Calibration curve", drawing.png(drawn), caption, CALIBRATION, f"Reliability diagram. {summary}")


def _draw_shares(axes: Axes, bins: list[_Bin]) -> None:
    confidences = [one.confidence for one in bins]
    low, share, high = np.array([(one.share.low, one.share.value, one.share.high) for one in bins]).T
    drawing.style(axes, y="share right").plot([0, 1], [0, 1], color=drawing.GRAY, linestyle="--", linewidth=1)
    bars = (share - low, high - share)
    axes.errorbar(confidences, share, bars, color=drawing.BLUE, marker="o", markersize=5, capsize=3, linewidth=1.2)
    axes.annotate("perfect", (0.04, 0.09), fontsize=drawing.FONT - 1, color=drawing.GRAY)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
