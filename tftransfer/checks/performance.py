"""Performance on the test split: metrics with intervals, class by class, and the mistakes to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from sklearn import metrics as sklearn_metrics

from tftransfer.checks import intervals
from tftransfer.checks.calibration import log_losses
from tftransfer.checks.charts import confusion_picture, learning_curves, predicted_against_true
from tftransfer.checks.mistakes import confident_mistakes, label_mistakes, largest_errors, show
from tftransfer.data.examples import Examples
from tftransfer.report import CLASSES, CONFUSION, LABELS, NUMBERS, Check, Findings, Number, Table
from tftransfer.tasks import Task

__all__ = ["learning_curves", "metrics_of", "performance", "truth_and_given"]

_CLASSES_IN_TABLE = 15  # of a confusion matrix; and beyond it the table of classes begins with the worst
_CLASSES_IN_PICTURE = 300  # of a confusion matrix: beyond it a cell is smaller than a pixel
_ENOUGH_FOR_LOSSES = 100
_RATE_COLUMNS = ("recall", "precision", "F1", "average precision")


def performance(
    task: Task,
    examples: Examples,
    probabilities: np.ndarray,
    *,
    train_targets: np.ndarray | None = None,
    max_mistakes: int = 12,
) -> Findings:
    """Measure a model on examples that neither training nor any choice has seen.

    Args:
        task: What the outputs mean.
        examples: The test split; the pictures of the worst mistakes are read from it.
        probabilities: `(n, outputs)` from `predict`, in the order of the examples.
        train_targets: The targets of the training split, for counts per class. Defaults to None: not shown.
        max_mistakes: How many mistakes are shown, from 0. Defaults to 12.

    Returns:
        The task's metrics with 95 % intervals, tables, pictures and the check `finite_outputs`.
    """
    finite = np.isfinite(probabilities).all(axis=-1)
    check = Check("finite_outputs", bool(finite.all()), {"examples": len(finite), "not_finite": int((~finite).sum())})
    if not len(examples):
        return Findings()
    if not finite.all():
        names = task.measure(examples.targets, np.zeros_like(probabilities))
        return Findings({name: Number(None, method="none: outputs not finite") for name in names}, checks=(check,))
    if task.kind == "regression":
        return _regression(task, examples, probabilities, max_mistakes) + Findings(checks=(check,))
    describe = _single_label if task.kind == "single_label" else _multi_label
    return describe(task, examples, probabilities, train_targets, max_mistakes) + Findings(checks=(check,))


def metrics_of(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> dict[str, Number]:
    """Return the task's metrics with 95 % intervals, and nothing else.

    Args:
        task: What the outputs mean.
        targets: Of the examples, from 1.
        probabilities: `(n, outputs)`, finite.
    """
    if task.kind == "regression":
        return _regression_metrics(task, targets, probabilities)
    return _classification_metrics(task, targets, probabilities, *truth_and_given(task, targets, probabilities))


def truth_and_given(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is true and what the model says, `(n, classes)` zeros and ones each."""
    if task.kind == "single_label":
        predicted = probabilities.argmax(axis=-1)
        return _one_hot(targets, task.num_outputs), _one_hot(predicted, task.num_outputs)
    return (targets > 0.5).astype(np.float32), (probabilities >= _threshold(task)).astype(np.float32)


def _single_label(
    task: Task,
    examples: Examples,
    probabilities: np.ndarray,
    train_targets: np.ndarray | None,
    max_mistakes: int,
) -> Findings:
    targets, predicted = examples.targets, probabilities.argmax(axis=-1)
    matrix = sklearn_metrics.confusion_matrix(targets, predicted, labels=range(task.num_outputs))
    metrics = metrics_of(task, targets, probabilities)
    in_train = None if train_targets is None else np.bincount(train_targets, minlength=task.num_outputs)
    classes = _class_table(task.labels, matrix, in_train)
    small = len(task.labels) <= _CLASSES_IN_TABLE
    tables = (classes, _confusion_table(task.labels, matrix)) if small else (classes,)
    pictures = (confusion_picture(matrix, task.labels),) if len(task.labels) <= _CLASSES_IN_PICTURE else ()
    wrong = confident_mistakes(task, targets, probabilities)[:max_mistakes]
    return Findings(metrics, tables, pictures) + show(examples, wrong, "The most confident mistakes")


def _one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Return `(n, count)` zeros and ones, without a square matrix of all classes."""
    hot = np.zeros((len(classes), count), np.float32)
    hot[np.arange(len(classes)), classes] = 1
    return hot


def _classification_metrics(
    task: Task, targets: np.ndarray, probabilities: np.ndarray, truth: np.ndarray, given: np.ndarray
) -> dict[str, Number]:
    """Give each number of `task.measure` its interval; `truth` and `given` are `(n, classes)` of 0 and 1."""
    right = int((truth == given).all(axis=-1).sum())
    counts = truth.sum(axis=0)
    statistics = _macro_statistics(truth, given)
    measured: dict[str, Number] = {}
    for name, value in task.measure(targets, probabilities).items():
        if name == "accuracy":
            measured[name] = intervals.proportion(right, len(truth))
        elif name == "log_loss":
            measured[name] = intervals.mean(log_losses(task, targets, probabilities), _ENOUGH_FOR_LOSSES)
        elif name in statistics and value is not None:
            measured[name] = intervals.average_of_rates(value, statistics[name], len(truth), counts)
        elif name == "mean_average_precision" and value is not None:
            average = _weighted_average_precision(truth, probabilities)
            measured[name] = intervals.average_of_rates(value, average, len(truth), counts)
        else:
            measured[name] = Number(value)
    return measured


def _macro_statistics(truth: np.ndarray, given: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """Return macro recall, precision and F1 as functions of how often each example counts."""
    both, either = truth * given, truth + given
    twice = 2 * both

    def share(weights: np.ndarray, parts: np.ndarray, whole: np.ndarray) -> float:
        weights = weights.astype(np.float32)
        return float(np.mean((weights @ parts) / np.maximum(weights @ whole, 1e-9)))

    return {
        "macro_recall": lambda weights: share(weights, both, truth),
        "macro_precision": lambda weights: share(weights, both, given),
        "macro_f1": lambda weights: share(weights, twice, either),
    }


def _weighted_average_precision(truth: np.ndarray, probabilities: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return the mean average precision as a function of how often each example counts."""
    order = np.argsort(-probabilities, axis=0, kind="stable")
    sorted_truth = np.take_along_axis(truth, order, axis=0)

    def average(weights: np.ndarray) -> float:
        counts = weights[order]
        found = np.cumsum(counts * sorted_truth, axis=0)
        precision = found / np.maximum(np.cumsum(counts, axis=0), 1)
        return float(np.mean((precision * counts * sorted_truth).sum(axis=0) / np.maximum(found[-1], 1)))

    return average


def _class_table(labels: tuple[str, ...], matrix: np.ndarray, in_train: np.ndarray | None) -> Table:
    true, given = matrix.sum(axis=1), matrix.sum(axis=0)
    columns = {
        **_rates(np.diag(matrix), true, given),
        "most often taken for": [_taken_for(labels, row, number) for number, row in enumerate(matrix)],
        "test examples": true,
    }
    note = "Recall: how many of this class are found. Precision: how many of those called it are it."
    return _table("Each class", ("class", labels), columns, in_train, note, CLASSES)


def _label_table(
    labels: tuple[str, ...],
    truth: np.ndarray,
    given: np.ndarray,
    probabilities: np.ndarray,
    in_train: np.ndarray | None,
) -> Table:
    columns = {
        **_rates((truth * given).sum(axis=0), truth.sum(axis=0), given.sum(axis=0)),
        "average precision": [_average_precision(truth[:, i], probabilities[:, i]) for i in range(len(labels))],
        "test examples": truth.sum(axis=0).astype(int),
    }
    note = (
        "Recall: how many of those with this label are found. Precision: how many of those given it have it. "
        "Accuracy counts an example as right if all its labels are."
    )
    return _table("Each label", ("label", labels), columns, in_train, note, LABELS)


def _rates(found: np.ndarray, true: np.ndarray, given: np.ndarray) -> dict[str, list]:
    """Return recall, precision and F1 of each class from how often it is found, true and given."""
    return {
        "recall": [intervals.proportion(int(a), int(b)) for a, b in zip(found, true, strict=True)],
        "precision": [intervals.proportion(int(a), int(b)) for a, b in zip(found, given, strict=True)],
        "F1": list(2 * found / np.maximum(true + given, 1)),
    }


def _taken_for(labels: tuple[str, ...], row: np.ndarray, number: int) -> str:
    others = np.where(np.arange(len(row)) == number, 0, row)
    worst = int(others.argmax())
    return f"{labels[worst]} ({others[worst]})" if others[worst] else "–"


def _average_precision(truth: np.ndarray, scores: np.ndarray) -> float | None:
    return float(sklearn_metrics.average_precision_score(truth, scores)) if truth.any() else None


def _table(
    title: str,
    names: tuple[str, tuple[str, ...]],
    columns: dict[str, Iterable],
    in_train: np.ndarray | None,
    note: str,
    section: str,
) -> Table:
    """Put columns beside the names of classes; with many classes the worst come first."""
    if in_train is not None:
        columns = {**columns, "training examples": in_train}
    rows = list(zip(names[1], *columns.values(), strict=True))
    if len(rows) > _CLASSES_IN_TABLE:
        place = 1 + list(columns).index("F1")
        rows, note = sorted(rows, key=lambda row: row[place]), f"{note} The worst come first."
    return Table(title, (names[0], *columns), tuple(rows), note, section, _RATE_COLUMNS)


def _confusion_table(labels: tuple[str, ...], matrix: np.ndarray) -> Table:
    rows = tuple((label, *map(int, counts)) for label, counts in zip(labels, matrix, strict=True))
    note = "Rows are the true classes, columns what the model says."
    return Table("Confusion matrix in numbers", ("true \\ predicted", *labels), rows, note, CONFUSION)


def _multi_label(
    task: Task,
    examples: Examples,
    probabilities: np.ndarray,
    train_targets: np.ndarray | None,
    max_mistakes: int,
) -> Findings:
    truth, given = truth_and_given(task, examples.targets, probabilities)
    metrics = _classification_metrics(task, examples.targets, probabilities, truth, given)
    in_train = None if train_targets is None else (train_targets > 0.5).sum(axis=0)
    table = _label_table(task.labels, truth, given, probabilities, in_train)
    wrong = label_mistakes(task, truth, given, probabilities)[:max_mistakes]
    return Findings(metrics, (table,)) + show(examples, wrong, "The most confident mistakes")


def _threshold(task: Task) -> float:
    return float(getattr(task, "threshold", 0.5))


def _regression(task: Task, examples: Examples, predicted: np.ndarray, max_mistakes: int) -> Findings:
    targets = examples.targets
    metrics = _regression_metrics(task, targets, predicted)
    columns = ("number", "mean absolute error", "root mean squared error", "test mean", "test deviation")
    rows = tuple(_number_row(name, targets[:, i], predicted[:, i]) for i, name in enumerate(task.labels))
    table = Table("Each number", columns, rows, "In the units of the data.", NUMBERS)
    findings = Findings(metrics, (table,), (predicted_against_true(task, targets, predicted),))
    return findings + show(examples, largest_errors(targets, predicted)[:max_mistakes], "The largest errors")


def _regression_metrics(task: Task, targets: np.ndarray, predicted: np.ndarray) -> dict[str, Number]:
    squares = ((predicted - targets).astype(float) ** 2).sum(axis=1)
    spread = ((targets - targets.mean(axis=0)).astype(float) ** 2).sum(axis=1)
    known = {
        "mean_absolute_error": intervals.mean(np.abs(predicted - targets).astype(float).mean(axis=1)),
        "root_mean_squared_error": _root(intervals.mean(squares / task.num_outputs, at_least=30)),
        "r_squared": intervals.transformed(intervals.ratio(squares, spread), lambda unexplained: 1 - unexplained),
    }
    return {name: known.get(name, Number(value)) for name, value in task.measure(targets, predicted).items()}


def _root(number: Number) -> Number:
    return intervals.transformed(number, math.sqrt)


def _number_row(name: str, true: np.ndarray, predicted: np.ndarray) -> tuple:
    errors = np.abs(predicted - true).astype(float)
    root = _root(intervals.mean(errors**2, at_least=30))
    return name, intervals.mean(errors), root, float(true.mean()), float(true.std())
