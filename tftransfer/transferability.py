"""How well features suit a task before anything is trained on them: scores that take seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

from tftransfer.errors import check

_STEPS = 100  # of LogME's fixed point, which needs about ten
_TOLERANCE = 1e-4  # of its ratio of precisions
_BLOCK = 1024  # examples whose likenesses are held at once
_MANY = 2**24  # numbers from which several threads pay
_C = 0.01  # inverse strength of the probe's penalty, on standardised features


def threads_for(features: np.ndarray) -> threadpool_limits:
    """Return the context in which linear algebra takes one thread if the features are few.

    Threads would wait for each other longer than they compute: five times as long beside those of TensorFlow.

    Example:
        >>> with threads_for(np.ones((10, 10))):
        ...     int(np.ones((10, 10)).sum())
        100
    """
    return threadpool_limits(1 if features.size < _MANY else None)


def logme(features: np.ndarray, targets: np.ndarray) -> float:
    """Return the log evidence per example of a Bayesian linear model on the features, the mean over its outputs.

    You, Liu, Wang and Long (2021), "LogME: Practical Assessment of Pre-trained Models for Transfer Learning". Larger
    is better; only differences on the same targets mean something.

    Args:
        features: `(n, d)` numbers.
        targets: `(n,)` whole numbers from 0, classes; or `(n, k)` numbers, one column per label or value.

    Raises:
        InputError: If the two do not fit.

    Example:
        >>> features = np.array([[0.0], [0.1], [1.0], [1.1]])
        >>> bool(logme(features, np.array([0, 0, 1, 1])) > logme(features, np.array([0, 1, 0, 1])))
        True
    """
    features, columns = _checked(features, targets)
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    held = values > values.max(initial=0.0) * 1e-6  # the rest is rounding
    left, squares = left[:, held], values[held] ** 2
    return float(np.mean([_evidence(left, squares, column, features.shape) for column in columns.T]))


def _evidence(left: np.ndarray, squares: np.ndarray, column: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the largest log evidence per example of one output, over the precisions of its weights and its noise."""
    count, size = shape
    along = (left.T @ column) ** 2
    across = max(float(column @ column - along.sum()), 0.0)  # what no weights explain
    prior, noise, ratio = 1.0, 1.0, 1.0
    for _ in range(_STEPS):
        shrunk = squares / (squares + ratio)
        residual = float(np.sum(along * (1 - shrunk) ** 2)) + across + 1e-12
        weights = float(np.sum(along * shrunk**2 / squares)) + 1e-12
        prior = float(shrunk.sum()) / weights
        noise = (count - float(shrunk.sum())) / residual
        before, ratio = ratio, prior / noise
        if abs(ratio - before) <= _TOLERANCE * before:
            break
    determinant = float(np.sum(np.log(prior + noise * squares))) + (size - len(squares)) * math.log(prior)
    fit = noise * residual + prior * weights
    evidence = size * math.log(prior) + count * math.log(noise / (2 * math.pi)) - determinant - fit
    return evidence / (2 * count)


def h_score(features: np.ndarray, targets: np.ndarray) -> float:
    """Return how much of the features' variance lies between classes: the trace of the total covariance's inverse
    times the covariance of the class means.

    Bao et al. (2019), "An Information-Theoretic Approach to Transferability in Task Transfer Learning", with the
    shrunk covariance of Ibrahim, Ponomareva and Mazumder (2021): with fewer examples than features the plain one has no
    inverse worth the name. From 0 to the number of classes less one; larger is better.

    Args:
        features, targets: As for `logme`, but classes only.
    """
    features, columns = _checked(features, targets)
    centred = features - features.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    shares = columns.mean(axis=0)
    means = (columns.T @ centred) / np.maximum(columns.sum(axis=0), 1)[:, None] * np.sqrt(shares)[:, None]
    return float((1 - shrinkage) * np.trace(means @ np.linalg.solve(covariance, means.T)))


def leep(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean log probability of the targets, predicted from what another classifier says, up to 0.

    Nguyen, Hassner, Seeger and Archambeau (2020), "LEEP: A New Measure to Evaluate Transferability".

    Args:
        probabilities: `(n, z)`, each row what a classifier gives over its own labels.
        targets: `(n,)` whole numbers from 0, or `(n, k)` zeros and ones.

    Example:
        >>> leep(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]))
        0.0
    """
    probabilities, columns = _checked(probabilities, targets)
    joint = columns.T @ probabilities
    conditional = joint / np.maximum(joint.sum(axis=0), 1e-12)
    expected = np.sum(columns * (probabilities @ conditional.T), axis=1)
    return float(np.mean(np.log(np.maximum(expected, 1e-12))))


def n_leep(features: np.ndarray, targets: np.ndarray, seed: int = 0) -> float:
    """Return LEEP where a mixture of Gaussians on the features stands for the other classifier.

    Li, Jia, Sang, Zhu, Green, Wang and Gong (2021), "Ranking Neural Checkpoints".

    Args:
        features, targets: As for `h_score`.
        seed: Of the mixture's start. Defaults to 0.
    """
    features, columns = _checked(features, targets)
    few = min(*features.shape, 64)
    parts = min(columns.shape[1] * 2, max(len(features) // 10, 1))
    with threads_for(features):
        reduced = PCA(few, svd_solver="randomized", random_state=seed).fit_transform(features)
        floor = 1e-3 * reduced.var() + 1e-12
        mixture = GaussianMixture(parts, covariance_type="diag", reg_covar=floor, random_state=seed).fit(reduced)
        return leep(mixture.predict_proba(reduced), targets)


def neighbours(features: np.ndarray, targets: np.ndarray, count: int = 5) -> float:
    """Return the accuracy of a vote among each example's nearest others by cosine, in [0, 1].

    Args:
        features: `(n, d)` numbers.
        targets: `(n,)` whole numbers from 0.
        count: How many vote; ties go to the nearer ones. Defaults to 5.
    """
    features, columns = _checked(features, targets)
    directions = normalize(features - features.mean(axis=0))
    correct, count = 0, min(count, len(features) - 1)
    nearness = 1 + 1e-3 * np.linspace(1, 0, count)  # decides ties only
    for start in range(0, len(directions), _BLOCK):
        block = slice(start, start + _BLOCK)
        likeness = directions[block] @ directions.T
        own = np.arange(len(likeness))
        likeness[own, start + own] = -np.inf
        nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
        votes = np.einsum("nck,c->nk", columns[nearest], nearness)
        correct += int(np.sum(votes.argmax(axis=1) == columns[block].argmax(axis=1)))
    return correct / len(features)


def probe(features: np.ndarray, targets: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Return what a linear model predicts for each example when it has not seen it, from cross-validation.

    Args:
        features: `(n, d)` numbers.
        targets: `(n,)` whole numbers from 0, classes; or `(n, k)` numbers, one column per label or value.
        folds: How many, see `divided`. Defaults to 5.
        seed: Decides the folds. Defaults to 0.

    Returns:
        `(n, classes)` probabilities, 0 of a class that a fold has not seen, or `(n, k)` numbers.
    """
    return probe_on((features,), targets, folds, seed)[0]


def probe_on(
    several: Sequence[np.ndarray], targets: np.ndarray, folds: int = 5, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Return what `probe`'s models, trained on the first features, predict for each example from the first and others.

    Args:
        several: `(n, d)` numbers each, of the same examples in the same order, such as of their mirror images.
        targets, folds, seed: As for `probe`.
    """
    features, columns = _checked(several[0], targets)
    single, answers = np.ndim(targets) == 1, np.asarray(targets) if np.ndim(targets) == 1 else columns
    found = [np.zeros(columns.shape) for _ in several]
    for inside, outside in divided(answers, folds, seed):
        model = _fitted(features[inside], answers[inside])
        for predicted, own in zip(found, several, strict=True):
            if single:
                predicted[np.ix_(outside, model.classes_)] = model.predict_proba(own[outside])
            else:
                predicted[outside] = model.predict(own[outside]).reshape(len(outside), -1)
    return tuple(found)


def divided(targets: np.ndarray, count: int = 5, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide examples for cross-validation: for each fold the numbers of those inside training, and of those outside.

    Classes are shared out evenly. One with a single example is learned by all folds but the one that holds it out.

    Args:
        targets: `(n,)` whole numbers from 0, classes, at least 2 examples; or `(n, k)`.
        count: How many folds, from 2; fewer where a class has fewer examples, but for those with one. Defaults to 5.
        seed: Decides which example goes where. Defaults to 0.

    Example:
        >>> [len(outside) for _, outside in divided(np.array([0, 0, 0, 1, 1, 1, 2]), 3)]
        [3, 2, 2]
    """
    if targets.ndim > 1:
        return list(KFold(min(count, len(targets)), shuffle=True, random_state=seed).split(targets))
    sizes = np.bincount(targets)
    strata = np.where(sizes[targets] > 1, targets, sizes.argmax())  # single ones go with the largest class
    count = min(count, int(np.unique(strata, return_counts=True)[1].min()))
    return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(strata, strata))


def _fitted(features: np.ndarray, answers: np.ndarray) -> Pipeline:
    """Fit a linear model; where there is one class, that is always the answer."""
    if answers.ndim > 1:
        model = Ridge(features.shape[1])
    elif len(np.unique(answers)) > 1:
        model = LogisticRegression(C=_C, max_iter=200)
    else:
        model = DummyClassifier()
    with threads_for(features):
        return make_pipeline(StandardScaler(), model).fit(features, answers)


def _checked(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 matrices, classes as one column of zeros and ones each."""
    features, targets = np.asarray(features, np.float64), np.asarray(targets)
    fits = features.ndim == 2 and len(features) == len(targets) > 1
    check(fits, "features", f"numbers (n, d) for the {len(targets)} targets, at least 2", features.shape)
    check(bool(np.isfinite(features).all()), "features", "finite numbers", "others")
    if targets.ndim == 2:
        return features, targets.astype(np.float64)
    return features, np.eye(int(targets.max()) + 1)[targets]
