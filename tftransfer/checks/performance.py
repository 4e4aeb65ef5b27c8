"""Performance on the test split: metrics with intervals, class by class, and the mistakes to look at."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from sklearn import metrics as sklearn_metrics

from tftransfer.checks import intervals
from tftransfer.checks.calibration import log_losses
from tftransfer.checks.charts import (
    Mistake,
    confusion_picture,
    learning_curves,
    mistakes_picture,
    predicted_against_true,
)
from tftransfer.data.examples import Examples
from tftransfer.report import CLASSES, CONFUSION, LABELS, MISTAKES, NUMBERS, Check, Findings, Number, Table
from tftransfer.tasks import Task

__all__ = ["learning_curves", "performance"]

_CLASSES_IN_TABLE = 15  # of a confusion matrix; and beyond it the table of classes begins with the worst
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
        train_targets: The targets of the training split, for its counts per class. Defaults to None: not shown.
        max_mistakes: How many mistakes are shown, from 0. Defaults to 12.

    Returns:
        The task's metrics with 95 % intervals, tables, pictures and the check `finite_outputs`.
    """
    finite = np.isfinite(probabilities).all(axis=-1)
    check = Check(
        "finite_outputs", bool(finite.all()), {"examples": len(finite), "not_finite": int((~finite).sum())}
    )
    if not len(examples):
        return Findings()
    if not finite.all():
        names = task.measure(examples.targets, np.zeros_like(probabilities))
        return Findings(
            {name: Number(None, method="none: outputs not finite") for name in names}, checks=(check,)
        )
    describe = {"single_label": _single_label, "multi_label": _multi_label, "regression": _regression}[
        task.kind
    ]
    return describe(task, examples, probabilities, train_targets, max_mistakes) + Findings(checks=(check,))


def _single_label(
    task: Task,
    examples: Examples,
    probabilities: np.ndarray,
    train_targets: np.ndarray | None,
    max_mistakes: int,
) -> Findings:
    targets, predicted = examples.targets, probabilities.argmax(axis=-1)
    matrix = sklearn_metrics.confusion_matrix(targets, predicted, labels=range(task.num_outputs))
    one_hot = np.eye(task.num_outputs, dtype=np.float32)
    metrics = _classification_metrics(task, targets, probabilities, one_hot[targets], one_hot[predicted])
    in_train = None if train_targets is None else np.bincount(train_targets, minlength=task.num_outputs)
    classes = _class_table(task.labels, matrix, in_train)
    small = len(task.labels) <= _CLASSES_IN_TABLE
    tables = (classes, _confusion_table(task.labels, matrix)) if small else (classes,)
    picture = confusion_picture(matrix, task.labels)
    wrong = _confident_mistakes(task, targets, probabilities)[:max_mistakes]
    return Findings(metrics, tables, (picture,)) + _show(examples, wrong, "The most confident mistakes")


def _classification_metrics(
    task: Task, targets: np.ndarray, probabilities: np.ndarray, truth: np.ndarray, given: np.ndarray
) -> dict[str, Number]:
    """Give each number of `task.measure` its interval; `truth` and `given` are `(n, classes)` zeros and ones."""
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


def _weighted_average_precision(
    truth: np.ndarray, probabilities: np.ndarray
) -> Callable[[np.ndarray], float]:
    """Return the mean average precision as a function of how often each example counts (ties in the order given)."""
    order = np.argsort(-probabilities, axis=0, kind="stable")
    sorted_truth = np.take_along_axis(truth, order, axis=0)

    def average(weights: np.ndarray) -> float:
        counts = weights[order]
        found = np.cumsum(counts * sorted_truth, axis=0)
        precision = found / np.maximum(np.cumsum(counts, axis=0), 1)
        return float(np.mean((precision * counts * sorted_truth).sum(axis=0) / np.maximum(found[-1], 1)))

    return average


def _class_table(labels: tuple[str, ...], matrix: np.ndarray, in_train: np.ndarray | None) -> Table:
    """Describe each class; with many classes the worst come first."""
    columns = ("class", "recall", "precision", "F1", "most often taken for", "test examples")
    rows = [(*_class_row(labels, matrix, number), int(matrix[number].sum())) for number in range(len(labels))]
    note = "Recall: of the examples of this class, how many are found. Precision: of those called it, how many are."
    columns, rows = _with_training_counts(columns, rows, in_train)
    if len(labels) > _CLASSES_IN_TABLE:
        rows, note = sorted(rows, key=lambda row: row[3]), f"{note} The worst come first."
    return Table("Each class", columns, tuple(rows), note, CLASSES, _RATE_COLUMNS)


def _class_row(labels: tuple[str, ...], matrix: np.ndarray, number: int) -> tuple:
    found, true, given = (
        int(count) for count in (matrix[number, number], matrix[number].sum(), matrix[:, number].sum())
    )
    f1 = 2 * found / (true + given) if true + given else 0.0
    others = np.where(np.arange(len(labels)) == number, 0, matrix[number])
    worst = int(others.argmax())
    taken_for = f"{labels[worst]} ({others[worst]})" if others[worst] else "–"
    return (
        labels[number],
        intervals.proportion(found, true),
        intervals.proportion(found, given),
        f1,
        taken_for,
    )


def _with_training_counts(columns: tuple[str, ...], rows: list[tuple], in_train: np.ndarray | None) -> tuple:
    if in_train is None:
        return columns, rows
    return (*columns, "training examples"), [
        (*row, int(count)) for row, count in zip(rows, in_train, strict=True)
    ]


def _confusion_table(labels: tuple[str, ...], matrix: np.ndarray) -> Table:
    rows = tuple((label, *map(int, counts)) for label, counts in zip(labels, matrix, strict=True))
    note = "Rows are the true classes, columns what the model says."
    return Table("Confusion matrix in numbers", ("true \\ predicted", *labels), rows, note, CONFUSION)


def _confident_mistakes(task: Task, targets: np.ndarray, probabilities: np.ndarray) -> list[Mistake]:
    predicted, confidence = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
    wrong = np.flatnonzero(predicted != targets)
    ranked = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return [
        Mistake(
            int(i),
            task.labels[targets[i]],
            task.labels[predicted[i]],
            f"{confidence[i]:.0%}".replace("%", " %"),
        )
        for i in ranked
    ]


def _multi_label(
    task: Task,
    examples: Examples,
    probabilities: np.ndarray,
    train_targets: np.ndarray | None,
    max_mistakes: int,
) -> Findings:
    truth = (examples.targets > 0.5).astype(np.float32)
    given = (probabilities >= _threshold(task)).astype(np.float32)
    metrics = _classification_metrics(task, examples.targets, probabilities, truth, given)
    in_train = None if train_targets is None else (train_targets > 0.5).sum(axis=0)
    table = _label_table(task.labels, truth, given, probabilities, in_train)
    wrong = _label_mistakes(task, truth, given, probabilities)[:max_mistakes]
    return Findings(metrics, (table,)) + _show(examples, wrong, "The most confident mistakes")


def _threshold(task: Task) -> float:
    return float(getattr(task, "threshold", 0.5))


def _label_table(
    labels: tuple[str, ...],
    truth: np.ndarray,
    given: np.ndarray,
    probabilities: np.ndarray,
    in_train: np.ndarray | None,
) -> Table:
    """Describe each label; with many labels the worst come first."""
    columns = ("label", "recall", "precision", "F1", "average precision", "test examples")
    rows = []
    for number, label in enumerate(labels):
        found, true, called = (int(part[:, number].sum()) for part in (truth * given, truth, given))
        f1 = 2 * found / (true + called) if true + called else 0.0
        average = (
            sklearn_metrics.average_precision_score(truth[:, number], probabilities[:, number])
            if true
            else None
        )
        rates = (intervals.proportion(found, true), intervals.proportion(found, called))
        rows.append((label, *rates, f1, average, true))
    columns, rows = _with_training_counts(columns, rows, in_train)
    if len(labels) > _CLASSES_IN_TABLE:
        rows = sorted(rows, key=lambda row: row[3])
    note = (
        "Recall: of the examples with this label, how many are found. Precision: of those given it, how many have it. "
        "Accuracy counts an example as right if all its labels are."
    )
    return Table("Each label", columns, tuple(rows), note, LABELS, _RATE_COLUMNS)


def _label_mistakes(
    task: Task, truth: np.ndarray, given: np.ndarray, probabilities: np.ndarray
) -> list[Mistake]:
    """Rank examples by how far the probability of their worst wrong label is from the truth."""
    gaps = np.where(truth != given, np.abs(probabilities - truth), 0.0).max(axis=1)
    ranked = [int(i) for i in np.argsort(-gaps, kind="stable") if (truth[i] != given[i]).any()]
    return [
        Mistake(i, _names(task, truth[i]), _names(task, given[i]), f"off by {100 * gaps[i]:.0f} points")
        for i in ranked
    ]


def _names(task: Task, row: np.ndarray) -> str:
    return ", ".join(label for label, set_ in zip(task.labels, row, strict=True) if set_) or "none"


def _regression(
    task: Task, examples: Examples, predicted: np.ndarray, train_targets: np.ndarray | None, max_mistakes: int
) -> Findings:
    targets = examples.targets
    metrics = _regression_metrics(task, targets, predicted)
    columns = ("number", "mean absolute error", "root mean squared error", "test mean", "test deviation")
    rows = tuple(_number_row(name, targets[:, i], predicted[:, i]) for i, name in enumerate(task.labels))
    table = Table("Each number", columns, rows, "In the units of the data.", NUMBERS)
    findings = Findings(metrics, (table,), (predicted_against_true(task, targets, predicted),))
    return findings + _show(
        examples, _largest_errors(targets, predicted)[:max_mistakes], "The largest errors"
    )


def _regression_metrics(task: Task, targets: np.ndarray, predicted: np.ndarray) -> dict[str, Number]:
    squares = ((predicted - targets).astype(float) ** 2).sum(axis=1)
    spread = ((targets - targets.mean(axis=0)).astype(float) ** 2).sum(axis=1)
    known = {
        "mean_absolute_error": intervals.mean(np.abs(predicted - targets).astype(float).mean(axis=1)),
        "root_mean_squared_error": _root(intervals.mean(squares / task.num_outputs, at_least=30)),
        "r_squared": intervals.transformed(
            intervals.ratio(squares, spread), lambda unexplained: 1 - unexplained
        ),
    }
    return {name: known.get(name, Number(value)) for name, value in task.measure(targets, predicted).items()}


def _root(number: Number) -> Number:
    return intervals.transformed(number, math.sqrt)


def _number_row(name: str, true: np.ndarray, predicted: np.ndarray) -> tuple:
    errors = np.abs(predicted - true).astype(float)
    root = _root(intervals.mean(errors**2, at_least=30))
    return name, intervals.mean(errors), root, float(true.mean()), float(true.std())


def _largest_errors(targets: np.ndarray, predicted: np.ndarray) -> list[Mistake]:
    """Rank examples by their error in standard deviations of the targets, summed over the numbers."""
    deviation = targets.std(axis=0)
    errors = np.abs(predicted - targets) / np.where(deviation > 0, deviation, 1)
    ranked = np.argsort(-errors.sum(axis=1), kind="stable")
    return [
        Mistake(
            int(i),
            _numbers(targets[i]),
            _numbers(predicted[i]),
            f"off by {_numbers(predicted[i] - targets[i])}",
        )
        for i in ranked
        if errors[i].any()
    ]


def _numbers(row: np.ndarray) -> str:
    return ", ".join(f"{number:.3g}" for number in row)


def _show(examples: Examples, mistakes: list[Mistake], title: str) -> Findings:
    if not mistakes:
        return Findings()
    caption = "Above each picture: what the model says, how sure it is or how far off. Look for wrong labels among them."
    rows = tuple((examples.names[m.index], m.true, m.predicted, m.how_much) for m in mistakes)
    table = Table("Their files", ("file", "true", "predicted", "how sure, how far"), rows, section=MISTAKES)
    return Findings(tables=(table,), pictures=(mistakes_picture(examples, mistakes, title, caption),))
