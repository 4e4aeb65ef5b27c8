"""How much do features help when labels are few? A linear probe on several features, over the same draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from tftransfer.errors import InputError

_INVERSE_REGULARISATION = 10.0


@dataclass(frozen=True)
class ProbeRow:
    """One line of the comparison.

    Args:
        features: The name of the features.
        per_class: Labelled training examples per class in each draw.
        mean, low, high: Test accuracy in [0, 1] over the draws: mean, smallest and largest.
        accuracies: Test accuracy of each draw.
    """

    features: str
    per_class: int
    mean: float
    low: float
    high: float
    accuracies: tuple[float, ...]


def compare_probe(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    test_features: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    per_class: Sequence[int] = (1, 5, 10),
    draws: int = 5,
    seed: int = 0,
) -> list[ProbeRow]:
    """Compare features by logistic regression on a few labelled examples per class.

    Use it to see whether a backbone earns its place against random weights and raw pixels. The protocol is
    the same for all features: in each draw they are centred on the drawn examples and divided by *one*
    number, so that those have mean squared length 1, then fitted with an L2 penalty of 1/C, C = 10. On the
    raw pixels of scikit-learn's digits that is the best C within half a point (of 0.1, 1, 10, 100, 1000),
    and better than to standardise each feature, which blows up pixels that hardly vary. All see the same
    draws.

    Args:
        features: Training features by name, each `(n, ...)`; flattened to `(n, width)`.
        labels: `(n,)` class numbers of the training examples.
        test_features: Test features of the same names and widths.
        test_labels: `(m,)` class numbers.
        per_class: How many examples to draw of each class, from 1. Defaults to 1, 5 and 10.
        draws: Number of draws, from 1. Defaults to 5.
        seed: From 0; draw `d` of `k` examples depends on `(seed + d, k)` only. Defaults to 0.

    Returns:
        One row per name and number per class, numbers in the outer loop.

    Raises:
        InputError: If names or lengths disagree, or a class has fewer examples than are to be drawn.

    Example:
        >>> pixels = np.repeat(np.eye(2), 5, axis=0)
        >>> labels = np.repeat([0, 1], 5)
        >>> compare_probe({"eye": pixels}, labels, {"eye": pixels}, labels, per_class=(2,), draws=1)[0].mean
        1.0
    """
    labels, test_labels = np.asarray(labels), np.asarray(test_labels)
    _check(features, labels, test_features, test_labels, per_class, draws)
    rows = []
    for count in per_class:
        chosen = [draw_per_class(labels, count, seed + draw) for draw in range(draws)]
        for name, train in features.items():
            accuracies = tuple(
                _accuracy(train[some], labels[some], test_features[name], test_labels) for some in chosen
            )
            mean = float(np.mean(accuracies))
            rows.append(ProbeRow(name, count, mean, min(accuracies), max(accuracies), accuracies))
    return rows


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw the indices of `count` examples of each class, without replacement."""
    rng = np.random.default_rng([seed, count])
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)])


def _accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Fit on one draw and score on the whole test split."""
    train = np.reshape(train, (len(train), -1)).astype(np.float64)
    test = np.reshape(test, (len(test), -1)).astype(np.float64)
    probe, centre, length = fitted(train, labels)
    return float(probe.score((test - centre) / length, test_labels))


def fitted(features: np.ndarray, labels: np.ndarray) -> tuple[LogisticRegression, np.ndarray, float]:
    """Fit a linear probe; returns it with what features are centred on and divided by first.

    Args:
        features: `(n, width)`.
        labels: `(n,)` class numbers.
    """
    centre = features.mean(axis=0)
    length = float(np.sqrt(np.square(features - centre).sum(axis=1).mean())) or 1.0
    probe = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=2000)
    return probe.fit((features - centre) / length, labels), centre, length


def _check(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    test_features: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    per_class: Sequence[int],
    draws: int,
) -> None:
    if set(features) != set(test_features):
        raise InputError(
            "`features` and `test_features` must have the same names. "
            f"Received: features={sorted(features)}, test_features={sorted(test_features)}"
        )
    for argument, arrays, targets in (
        ("features", features, labels),
        ("test_features", test_features, test_labels),
    ):
        for name, array in arrays.items():
            if len(array) != len(targets):
                raise InputError(
                    f"`{argument}[{name!r}]` must have one row per label, {len(targets)}. Received: {len(array)} rows"
                )
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    if draws < 1 or not 1 <= min(per_class) <= max(per_class) <= smallest:
        raise InputError(
            "`draws` must be at least 1 and `per_class` between 1 and the size of the smallest class, "
            f"{smallest}. Received: draws={draws}, per_class={tuple(per_class)}"
        )
