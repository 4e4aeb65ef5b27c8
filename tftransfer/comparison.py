"""Strategies side by side: the same data, the same budget, several seeds, one table."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.model_selection import KFold, StratifiedKFold

from tftransfer import advice, report_html, training
from tftransfer.checks import drawing, forgetting, performance
from tftransfer.data import Data, Examples
from tftransfer.errors import InputError, check
from tftransfer.report import RESULT, Number, Picture, Table
from tftransfer.tasks import Task


@dataclass(frozen=True)
class Trial:
    """One strategy with one seed on one split of the data.

    Args:
        strategy: As the command line writes it.
        seed: Of everything.
        fold: Number of the held-out fold; -1 if the test split was measured.
        metric: The task's first metric on what was held out.
        seconds: What training took, advice included.
        parameters: How many numbers trained in the phase that trained most.
        source_before, source_after: Accuracy on the old task, None if it is not known.
    """

    strategy: str
    seed: int
    fold: int
    metric: float
    seconds: float
    parameters: int
    source_before: float | None = None
    source_after: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells trials apart."""
        return self.strategy, self.seed, self.fold


_METRICS = {"single_label": "accuracy", "multi_label": "macro_f1", "regression": "mean_absolute_error"}


def metric_of(task: Task) -> str:
    """Name the metric that a task is compared by.

    Example:
        >>> from tftransfer.tasks import SingleLabel
        >>> metric_of(SingleLabel(("cat", "dog")))
        'accuracy'
    """
    return _METRICS[task.kind]


def split_list(text: str) -> tuple[str, ...]:
    """Divide a comma list of strategies, whose own options have commas too.

    Raises:
        InputError: If an entry is given twice, or one is no strategy.

    Example:
        >>> split_list("full:layer_decay=0.9,mixup=0.2,linear_probe")
        ('full:layer_decay=0.9,mixup=0.2', 'linear_probe')
    """
    found = tuple(part for part in re.split(r",(?=\w+(?:[:,]|$))", text) if part)
    check(bool(found) and len(set(found)) == len(found), "strategy", "a comma list of different strategies", text)
    for part in found:
        advice.chooser(part)  # refuses what is not known
    return found


def folds(data: Data, count: int, seed: int = 0) -> Iterator[Data]:
    """Divide the training split for cross-validation: each fold in turn takes the place of the test split.

    The test split itself appears in none; validation stays what it is.

    Args:
        data: What is to be divided.
        count: How many folds, from 2.
        seed: Decides which example goes where.
    """
    targets = data.train.targets
    single = targets.ndim == 1
    smallest = int(np.bincount(targets)[np.unique(targets)].min()) if single else len(targets)
    check(2 <= count <= smallest, "folds", f"a whole number from 2 to {smallest}, the smallest class", count)
    kind = StratifiedKFold if single else KFold
    for inside, outside in kind(count, shuffle=True, random_state=seed).split(
        np.zeros(len(targets)), targets if single else None
    ):
        yield dataclasses.replace(data, train=_subset(data.train, inside), test=_subset(data.train, outside))


def _subset(examples: Examples, numbers: np.ndarray) -> Examples:
    held, load = tf.constant(numbers, tf.int64), examples.pictures.load
    pictures = dataclasses.replace(
        examples.pictures,
        names=tuple(examples.names[number] for number in numbers),
        load=lambda index: load(tf.gather(held, index)),
    )
    return Examples(pictures, examples.targets[numbers], examples.weights[numbers])


def run_trial(
    strategy: str,
    build: Callable[[], keras.Model],
    task: Task,
    data: Data,
    *,
    seed: int,
    fold: int = -1,
    epochs: int | None = None,
    batch_size: int = 32,
    max_steps: int | None = None,
    source: Data | None = None,
) -> Trial:
    """Train a fresh network by one strategy and measure it on the data's test part.

    Args:
        strategy: As the command line writes it.
        build: Makes the network.
        task, data: What to learn; `data.test` is measured.
        seed: Of everything.
        fold: Kept in the trial. Defaults to -1.
        epochs, batch_size, max_steps: The budget, as for `fine_tune`.
        source: Data of the old task, to measure forgetting. Defaults to None.
    """
    keras.utils.set_random_seed(seed)
    model = build()
    old = forgetting.source_probe(model, source) if source else None
    before = forgetting.source_accuracy(model, old) if old else None
    began = time.monotonic()
    chosen = advice.chooser(strategy, epochs, None, seed, batch_size)(model, task, data)
    history = training.fine_tune(
        model, task, data, chosen.strategy, seed=seed, batch_size=batch_size, max_steps=max_steps, source=old
    )
    seconds = time.monotonic() - began
    given = training.predict(model, task, data.test)
    metrics = performance.performance(task, data.test, given, train_targets=data.train.targets).metrics
    return Trial(
        strategy,
        seed,
        fold,
        float(metrics[metric_of(task)].value or 0.0),
        seconds,
        max(sum(row.trainable for row in record.audit) for record in history.phases),
        before.old_head if before else None,
        forgetting.source_accuracy(model, old).old_head if old else None,
    )


def table(trials: Sequence[Trial], metric: str) -> Table:
    """Put the trials of each strategy together, the best first: means, and the range over seeds and folds."""
    rows = [
        _row(strategy, [trial for trial in trials if trial.strategy == strategy]) for strategy in _strategies(trials)
    ]
    rows.sort(key=lambda row: row[1].value, reverse=metric != "mean_absolute_error")
    forgets = any(trial.source_after is not None for trial in trials)
    columns: tuple[str, ...] = ("strategy", metric, "trials", "seconds", "parameters trained")
    percent: tuple[str, ...] = (metric,) if metric in ("accuracy", "macro_f1") else ()
    if forgets:
        columns += ("old task before", "old task after")
        percent += columns[-2:]
    note = "Mean over the trials; in brackets the smallest and largest."
    return Table(
        "Strategies compared",
        columns,
        tuple(row[: len(columns)] for row in rows),
        note,
        section=RESULT,
        percent=percent,
    )


def _strategies(trials: Iterable[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.strategy for trial in trials))


def _row(strategy: str, trials: Sequence[Trial]) -> tuple[Any, ...]:
    return (
        strategy,
        _spread([trial.metric for trial in trials]),
        len(trials),
        round(float(np.mean([trial.seconds for trial in trials])), 1),
        max(trial.parameters for trial in trials),
        _spread([trial.source_before for trial in trials if trial.source_before is not None]),
        _spread([trial.source_after for trial in trials if trial.source_after is not None]),
    )


def _spread(values: Sequence[float]) -> Number:
    if not values:
        return Number(None)
    return Number(float(np.mean(values)), min(values), max(values), "range")


def picture(compared: Table) -> Picture:
    """Draw the strategies' means and ranges, the best on top."""
    rows = list(reversed(compared.rows))
    metric = compared.columns[1]
    drawn = drawing.figure(height=0.6 + 0.3 * len(rows))
    axes = drawing.style(drawn.subplots(), metric)
    for place, row in enumerate(rows):
        number = row[1]
        axes.plot([number.low, number.high], [place, place], color=drawing.BLUE, linewidth=2, solid_capstyle="round")
        axes.plot(number.value, place, "o", color=drawing.BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [drawing.text(str(row[0]), 32) for row in rows])
    caption = f"Dots are means of {metric}, lines reach from the smallest to the largest trial."
    return Picture("Strategies compared", drawing.png(drawn), caption, RESULT)


def markdown(compared: Table) -> str:
    """Write a table of the comparison as Markdown."""

    def cell(value: Any, column: str) -> str:
        if not isinstance(value, Number):
            return str(value)
        parts = [report_html.number(part, column in compared.percent) for part in (value.value, value.low, value.high)]
        return "-" if value.value is None else f"{parts[0]} ({parts[1]} to {parts[2]})"

    lines = [" | ".join(compared.columns), " | ".join("---" for _ in compared.columns)]
    lines += [
        " | ".join(cell(value, column) for value, column in zip(row, compared.columns, strict=True))
        for row in compared.rows
    ]
    body = "\n".join(f"| {line} |" for line in lines)
    return f"# {compared.title}\n\n{body}\n\n{compared.note}\n"


def read(path: Path) -> tuple[Trial, ...]:
    """Return the trials that a comparison has written so far; none if it has not begun."""
    if not path.is_file():
        return ()
    return tuple(Trial(**trial) for trial in json.loads(path.read_text(encoding="utf-8"))["trials"])


def to_json(trials: Sequence[Trial], metric: str, **about: Any) -> dict[str, Any]:
    """Return what `comparison.json` holds: every trial, and a row per strategy."""
    compared = table(trials, metric)
    rows = [
        {
            column: dataclasses.asdict(value) if isinstance(value, Number) else value
            for column, value in zip(compared.columns, row, strict=True)
        }
        for row in compared.rows
    ]
    return {**about, "metric": metric, "strategies": rows, "trials": [dataclasses.asdict(trial) for trial in trials]}


def seeds(text: str) -> tuple[int, ...]:
    """Read a comma list of seeds.

    Raises:
        InputError: If one is no whole number from 0, or comes twice.

    Example:
        >>> seeds("0,1,2")
        (0, 1, 2)
    """
    parts = text.split(",")
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f"`seeds` must be a comma list of different whole numbers from 0. Received: seeds={text!r}")
    return tuple(map(int, parts))
