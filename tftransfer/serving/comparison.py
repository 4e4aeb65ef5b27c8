"""Compare the answers of two loaders, or of two batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tftransfer.report import Check

Answers = Mapping[str, np.ndarray]
TOLERANCE = 1e-5
# What is chosen from the probabilities, and jumps where two of them change places.
_CHOSEN = ("label", "labels", "scores")
_PROBABILITIES = ("probability", "probabilities", "scores")


@dataclass(frozen=True)
class Difference:
    """How far two sets of answers are apart.

    Args:
        maximum: The largest difference of two probabilities, or of two numbers against the largest of their kind;
            infinite where one of them is not finite.
        texts: How many texts differ.
        ties: How many examples have such close probabilities that their labels could not be compared.
        problem: Why the answers cannot be compared at all. Defaults to none.
    """

    maximum: float = 0.0
    texts: int = 0
    ties: int = 0
    problem: str = ""

    @property
    def small(self) -> bool:
        """Whether the answers count as equal."""
        return self.maximum <= TOLERANCE and not self.texts and not self.problem

    def to_check(self, name: str, **metrics: float | str) -> Check:
        """Report the difference under a name."""
        found: dict[str, float | int | str] = {
            "maximum difference": self.maximum,
            "different texts": self.texts,
        }
        if self.ties:
            found["ties"] = self.ties
        if self.problem:
            found["problem"] = self.problem
        return Check(name, self.small, {**found, **metrics})


def largest(differences: Iterable[Difference]) -> Difference:
    """Return the worst of several differences, with their texts and ties added up."""
    listed = list(differences)
    return Difference(
        max((item.maximum for item in listed), default=0.0),
        sum(item.texts for item in listed),
        sum(item.ties for item in listed),
        next((item.problem for item in listed if item.problem), ""),
    )


def difference(expected: Answers, received: Answers, threshold: float | None = None) -> Difference:
    """Compare two sets of answers to the same pictures.

    Labels must be equal, except where rounding decides: in an example whose probabilities are not the same
    bit for bit, and so close to each other (or to the threshold) that the permitted difference may swap them.

    Args:
        expected: Arrays by name, all with the batch as first axis.
        received: Likewise.
        threshold: The probability from which a multi-label task gives a label. Defaults to none.
    """
    problem = _mismatch(expected, received)
    if problem:
        return Difference(math.inf, problem=problem)
    ties = _ties(expected, received, threshold)
    maximum, texts = 0.0, 0
    for name, one in expected.items():
        other = received[name]
        if name in _CHOSEN:
            one, other = one[~ties], other[~ties]
        if one.dtype == object:
            texts += int((one != other).sum())
        else:
            maximum = max(maximum, _largest_number(name, one, other))
    return Difference(maximum, texts, int(ties.sum()))


def identical(expected: Answers, received: Answers) -> bool:
    """Tell whether two sets of answers are the same bit for bit."""
    return not _mismatch(expected, received) and all(
        one.tolist() == received[name].tolist() if one.dtype == object else one.tobytes() == received[name].tobytes()
        for name, one in expected.items()
    )


def _mismatch(expected: Answers, received: Answers) -> str:
    if sorted(expected) != sorted(received):
        return f"outputs {sorted(expected)} against {sorted(received)}"
    for name, one in expected.items():
        other = received[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"`{name}` is {one.dtype}{list(one.shape)} against {other.dtype}{list(other.shape)}"
    return ""


def _largest_number(name: str, expected: np.ndarray, received: np.ndarray) -> float:
    if not (np.isfinite(expected).all() and np.isfinite(received).all()):
        return math.inf
    one, other = expected.astype(np.float64), received.astype(np.float64)
    # Probabilities are compared as they are; numbers in units of their own against the largest of their kind.
    unit = np.maximum(1, np.abs(one)) if name in _PROBABILITIES else np.abs(one).max(initial=0.0) or 1.0
    return float((np.abs(one - other) / unit).max(initial=0.0))


def _ties(expected: Answers, received: Answers, threshold: float | None) -> np.ndarray:
    if "probabilities" not in expected:
        return np.zeros(len(next(iter(expected.values()))), bool)
    probabilities = expected["probabilities"]
    ranks = -np.sort(-probabilities, axis=1)
    close = ranks[:, :-1] - ranks[:, 1:] <= 2 * TOLERANCE
    tied = close[:, :1].any(axis=1)
    if threshold is not None:
        tied |= (close & (ranks[:, 1:] >= threshold - TOLERANCE)).any(axis=1)
        tied |= (np.abs(probabilities - threshold) <= TOLERANCE).any(axis=1)
    return tied & (probabilities != received["probabilities"]).any(axis=1)
