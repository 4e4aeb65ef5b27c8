"""Which labels are most likely wrong, from features that were computed before anything was trained on the labels.

A network that has been tuned has learned its wrong labels; a linear model on a pretrained network's features that has
not seen an example contradicts them.

Source: Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels",
arXiv:1911.00068.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from tftransfer.checks.gallery import gallery
from tftransfer.data.examples import Examples
from tftransfer.errors import check
from tftransfer.report import DATA, Check, Findings, Table
from tftransfer.tasks import Task
from tftransfer.transferability import threads_for

_C = 1.0  # inverse strength of the penalty, on features of mean squared length 1
_SMALLEST = 1e-9  # probability
_LISTED, _DRAWN = 50, 9  # suspects in the report


@dataclass(frozen=True)
class Suspect:
    """An example, what its label says, and what is likelier.

    Args:
        index: Its place among the examples.
        given, likelier: Class numbers.
        probability: Of the likelier class, by models that have not seen the example.
        doubt: Logarithm of how many times likelier that class is than the given one; below 0 the label holds.
    """

    index: int
    given: int
    likelier: int
    probability: float
    doubt: float


def out_of_fold(
    features: np.ndarray, targets: np.ndarray, *, folds: int = 5, repeats: int = 3, seed: int = 0
) -> np.ndarray:
    """Return class probabilities of each example by logistic regressions that have not seen it.

    The cost grows with the examples, the features, the classes and `folds` times `repeats`.

    Args:
        features: `(n, d)` numbers, or `(views, n, d)`, of which the mean is taken.
        targets: `(n,)` class numbers.
        folds: How many, from 2; fewer where a class has fewer examples. Defaults to 5.
        repeats: How often the folds are drawn anew; probabilities are averaged. Defaults to 3.
        seed: Decides the folds. Defaults to 0.

    Returns:
        `(n, classes)`; a class without examples has probability 0.

    Raises:
        InputError: If features and targets do not fit, or a class has one example only.

    Example:
        >>> features = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
        >>> out_of_fold(features, np.array([0, 0, 0, 1, 1, 1])).argmax(axis=1).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets)
    features = features.mean(axis=0) if features.ndim == 3 else features
    check(targets.ndim == 1, "targets", "class numbers (n,): one class for each example", targets.shape)
    fits = features.ndim == 2 and len(features) == len(targets) > 0 and bool(np.isfinite(features).all())
    check(fits, "features", f"finite numbers (n, d) for the {len(targets)} targets", features.shape)
    check(repeats >= 1, "repeats", "a whole number from 1", repeats)
    counts = np.bincount(targets)
    smallest = int(counts[counts > 0].min())
    check(folds >= 2, "folds", "a whole number from 2", folds)
    check(smallest >= 2, "targets", "two examples of each class: the label of a single one can't be doubted", smallest)
    check(int((counts > 0).sum()) >= 2, "targets", "at least two classes", "one")
    centred = features - features.mean(axis=0)
    scaled = centred / (np.sqrt(np.square(centred).sum(axis=1).mean()) or 1.0)
    found = np.zeros((len(targets), len(counts)))
    for repeat in range(repeats):
        parts = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=np.random.RandomState([seed, repeat]))
        for inside, outside in parts.split(scaled, targets):
            with threads_for(scaled):
                model = LogisticRegression(C=_C, max_iter=300).fit(scaled[inside], targets[inside])
            found[np.ix_(outside, model.classes_)] += model.predict_proba(scaled[outside]) / repeats
    return found


def suspects(probabilities: np.ndarray, targets: np.ndarray) -> tuple[Suspect, ...]:
    """Rank all examples, those whose labels are most likely wrong first.

    Args:
        probabilities: `(n, classes)`, from `out_of_fold`.
        targets: `(n,)` class numbers.

    Example:
        >>> ranked = suspects(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
        >>> ranked[0].index, ranked[0].likelier, round(ranked[0].doubt, 2)
        (1, 0, 1.39)
    """
    rows = np.arange(len(targets))
    logs = np.log(np.maximum(probabilities, _SMALLEST))
    own = logs[rows, targets]
    others = logs.copy()
    others[rows, targets] = -np.inf
    likelier = others.argmax(axis=1)
    doubts = others[rows, likelier] - own
    return tuple(
        Suspect(int(i), int(targets[i]), int(likelier[i]), float(probabilities[i, likelier[i]]), float(doubts[i]))
        for i in np.argsort(-doubts, kind="stable")
    )


def estimated_count(probabilities: np.ndarray, targets: np.ndarray) -> int:
    """Estimate how many labels are wrong, by the confident joint: of the examples that are as sure of a class as those
    that are labelled so are on average, how many are labelled otherwise.

    Args:
        probabilities, targets: As for `suspects`.

    Example:
        >>> sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.95, 0.05]])
        >>> estimated_count(sure, np.array([0, 0, 1, 1, 1]))
        1
    """
    classes = np.unique(targets)
    thresholds = np.array([probabilities[targets == one, one].mean() for one in classes])
    above = np.where(probabilities[:, classes] >= thresholds, probabilities[:, classes], -1.0)
    sure = above.max(axis=1) >= 0
    confident = classes[above.argmax(axis=1)]
    wrong = 0.0
    for one in classes:
        own = (targets == one) & sure
        share = float(np.mean(confident[own] != one)) if own.any() else 0.0
        wrong += share * float(np.sum(targets == one))
    return round(wrong)


def labels(task: Task, examples: Examples, features: np.ndarray, *, seed: int = 0) -> Findings:
    """Report the training labels that are most likely wrong, with their pictures.

    Args:
        task: One class for each example.
        examples: The split whose labels are looked at.
        features: `(n, d)` or `(views, n, d)`, from a network that has not been trained on these labels.
        seed: Of the folds. Defaults to 0.

    Returns:
        The estimated number of wrong labels, a table of the most suspicious and a picture of the first of them.
    """
    probabilities = out_of_fold(features, examples.targets, seed=seed)
    count = estimated_count(probabilities, examples.targets)
    doubtful = [one for one in suspects(probabilities, examples.targets) if one.doubt > 0][:_LISTED]
    checks = (Check("labels", None, {"looked_at": len(examples), "estimated_wrong": count, "listed": len(doubtful)}),)
    if not doubtful:
        return Findings(checks=checks)
    rows = tuple(
        (examples.names[s.index], task.labels[s.given], task.labels[s.likelier], s.probability) for s in doubtful
    )
    note = (
        f"About {count} of {len(examples)} training labels may be wrong. Listed are those that models which have not "
        "seen the example contradict, the most doubtful first: look at them before you trust or change them."
    )
    columns = ("file", "label", "likelier", "probability")
    table = Table("Labels to look at", columns, rows, note, DATA, ("probability",))
    first = doubtful[:_DRAWN]
    told = "; ".join(f"{task.labels[s.given]}, likelier {task.labels[s.likelier]}" for s in first)
    entries = [(s.index, (f"label: {task.labels[s.given]}", f"likelier: {task.labels[s.likelier]}")) for s in first]
    caption = "The most doubtful labels of the training split."
    drawn = gallery(examples, entries, "Labels to look at", caption, DATA, told)
    return Findings(tables=(table,), pictures=(drawn,), checks=checks)
