"""Strategies side by side: the same data, the same budget, several seeds, one table."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from tftransfer import advice, bundles, inference, report_html, training
from tftransfer.averages import WiseFt
from tftransfer.checks import drawing, forgetting, performance
from tftransfer.data import Data
from tftransfer.errors import InputError, check
from tftransfer.penalties import Source
from tftransfer.report import RESULT, Number, Picture, Table
from tftransfer.shelf import folder_or_temporary
from tftransfer.tasks import Task
from tftransfer.versions import differences

JSON, MARKDOWN, PICTURE = "comparison.json", "comparison.md", "comparison.png"


@dataclass(frozen=True)
class Trial:
    """One strategy with one seed on one split of the data.

    Args:
        strategy: As the command line writes it.
        seed: Of everything.
        fold: Number of the held-out fold; -1 if the test split was measured.
        metric: The task's metric on what was held out; None where it is undefined.
        seconds: What training took, advice included.
        parameters: How many numbers trained in the phase that trained most.
        source_before, source_after: Accuracy on the old task, None if it is not known.
        reasons: Why a strategy that asks the data chose what it did. Defaults to none.
    """

    strategy: str
    seed: int
    fold: int
    metric: float | None
    seconds: float
    parameters: int
    source_before: float | None = None
    source_after: float | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", tuple(self.reasons))  # JSON has lists

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells trials apart."""
        return self.strategy, self.seed, self.fold

    def line(self, metric: str) -> str:
        """Say how it went.

        Example:
            >>> Trial("full", 0, 1, 0.9, 12.3, 100).line("accuracy")
            'full seed 0 fold 1: accuracy 0.9000, 12 s'
        """
        part = f" fold {self.fold}" if self.fold >= 0 else ""
        value = "undefined" if self.metric is None else f"{self.metric:.4f}"
        return f"{self.strategy} seed {self.seed}{part}: {metric} {value}, {self.seconds:.0f} s"


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
        advice.Choice(part)  # refuses what is not known
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
        yield dataclasses.replace(data, train=data.train.subset(inside), test=data.train.subset(outside))


def check_validation_is_free(choices: Sequence[advice.Choice]) -> None:
    """Refuse strategies that cannot train on the validation split too, because they need it when training ends.

    Raises:
        InputError: If there is one.
    """
    for choice in choices:
        weighs = any(isinstance(phase.average, WiseFt) for phase in choice.planned)
        check(not weighs, "train_on_validation", "left out for a strategy that weighs by that split", choice.text)


def run_trial(
    choice: advice.Choice,
    build: Callable[[], keras.Model],
    task: Task,
    data: Data,
    *,
    seed: int,
    fold: int = -1,
    batch_size: int = 32,
    max_steps: int | None = None,
    source: Source | None = None,
    train_on_validation: bool = False,
    cache: str = "auto",
    cache_dir: Path | None = None,
) -> Trial:
    """Train a fresh network by one strategy and measure it on the data's test part.

    Args:
        choice: The strategy, with its budget of epochs.
        build: Makes the network, the same pretrained one each time.
        task, data: What to learn; `data.test` is measured.
        seed: Of everything.
        fold: Kept in the trial. Defaults to -1.
        batch_size, max_steps, cache, cache_dir: As for `fine_tune`.
        source: The old task, from `source_probe` on the network before tuning. Defaults to None.
        train_on_validation: Whether that split trains too, after a strategy that asks the data has chosen with it.
            Defaults to False.
    """
    keras.utils.set_random_seed(seed)
    model = build()
    began = time.monotonic()
    with folder_or_temporary(cache_dir, needed=choice.asks_the_data and cache != "off") as folder:
        run: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "max_steps": max_steps, "cache_dir": folder}
        chosen = choice(model, task, data, **run)
        if train_on_validation:
            data = dataclasses.replace(data, train=data.train.joined(data.validation))
        history = training.fine_tune(model, task, data, chosen.strategy, **run, source=source, cache=cache)
    seconds = time.monotonic() - began
    given = inference.predict(model, task, data.test)
    metrics = performance.performance(task, data.test, given, train_targets=data.train.targets).metrics
    return Trial(
        choice.text,
        seed,
        fold,
        metrics[task.main_metric].value,
        seconds,
        max(sum(row.trainable for row in record.audit) for record in history.phases),
        source.before if source else None,
        forgetting.source_accuracy(model, source) if source else None,
        chosen.reasons,
    )


def table(trials: Sequence[Trial], metric: str, note: str = "") -> Table:
    """Put the trials of each strategy together, the best first: means, and ranges over seeds.

    Folds of one seed are averaged first; with a single seed the range is that over its folds.

    Args:
        trials: At least one.
        metric: What `Trial.metric` is.
        note: What was compared, said below the table.
    """
    rows = [
        _row(strategy, [trial for trial in trials if trial.strategy == strategy])
        for strategy in dict.fromkeys(trial.strategy for trial in trials)
    ]
    sign = 1 if metric == "mean_absolute_error" else -1
    rows.sort(key=lambda row: math.inf if row[1].value is None else sign * row[1].value)
    columns: tuple[str, ...] = ("strategy", metric, "trials", "seconds", "parameters trained")
    percent: tuple[str, ...] = (metric,) if metric in ("accuracy", "macro_f1") else ()
    if any(trial.source_after is not None for trial in trials):
        columns += ("old task before", "old task after")
        percent += columns[-2:]
    over = "seeds" if len({trial.seed for trial in trials}) > 1 else "folds"
    undefined = sum(trial.metric is None for trial in trials)
    notes = [f"Means, with the smallest and largest over {over}."] if len(trials) > len(rows) else []
    notes += [f"{undefined} trials gave no finite answers."] if undefined else []
    notes += _about_choosing([row[0] for row in rows if advice.asks_the_data(row[0])])
    return Table(
        "Strategies compared",
        columns,
        tuple(row[: len(columns)] for row in rows),
        " ".join([*notes, note]).strip(),
        section=RESULT,
        percent=percent,
    )


def _about_choosing(names: Sequence[str]) -> list[str]:
    """Say that strategies which ask the data do more than the epochs of their phases."""
    if not names:
        return []
    *first, last = names
    take, their = (f"{', '.join(first)} and {last} take", "their") if first else (f"{last} takes", "its")
    return [f"What {take} to choose, beside those epochs, is in {their} seconds."]


def _row(strategy: str, trials: Sequence[Trial]) -> tuple[Any, ...]:
    return (
        strategy,
        _spread([(trial.seed, trial.metric) for trial in trials]),
        len(trials),
        round(float(np.mean([trial.seconds for trial in trials])), 1),
        max(trial.parameters for trial in trials),
        _spread([(trial.seed, trial.source_before) for trial in trials]),
        _spread([(trial.seed, trial.source_after) for trial in trials]),
    )


def _spread(values: Sequence[tuple[int, float | None]]) -> Number:
    """Return the mean, and the range over seeds or, with one seed, over what was measured with it."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if value is None:
            return Number(None)
        by_seed.setdefault(seed, []).append(value)
    per_seed = list(by_seed.values())
    several = [float(np.mean(part)) for part in per_seed] if len(per_seed) > 1 else per_seed[0]
    if min(several) == max(several):
        return Number(several[0])
    return Number(float(np.mean(several)), min(several), max(several), "range")


def picture(compared: Table) -> Picture:
    """Draw the strategies' means and ranges, the best on top."""
    rows = list(reversed(compared.rows))
    metric = compared.columns[1]
    drawn = drawing.figure(height=0.6 + 0.3 * len(rows))
    axes = drawing.style(drawn.subplots(), metric)
    for place, row in enumerate(rows):
        number = row[1]
        if number.value is None:
            continue
        if number.low is not None:
            span = [number.low, number.high]
            axes.plot(span, [place, place], color=drawing.BLUE, linewidth=2, solid_capstyle="round")
        axes.plot(number.value, place, "o", color=drawing.BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [drawing.text(str(row[0]), 32) for row in rows])
    caption = f"Dots are means of {metric}, lines reach from the smallest to the largest trial."
    return Picture("Strategies compared", drawing.png(drawn), caption, RESULT)


def markdown(compared: Table) -> str:
    """Write a table of the comparison as Markdown."""

    def cell(value: Any, column: str) -> str:
        if not isinstance(value, Number):
            return str(value).replace("|", "\\|")
        parts = [report_html.number(part, column in compared.percent) for part in (value.value, value.low, value.high)]
        return parts[0] if value.low is None else f"{parts[0]} ({parts[1]} to {parts[2]})"

    lines = [" | ".join(compared.columns), " | ".join("---" for _ in compared.columns)]
    lines += [
        " | ".join(cell(value, column) for value, column in zip(row, compared.columns, strict=True))
        for row in compared.rows
    ]
    body = "\n".join(f"| {line} |" for line in lines)
    return f"# {compared.title}\n\n{body}\n\n{compared.note}\n"


def note(about: Mapping[str, Any]) -> str:
    """Say in one line what was compared, and how far the table may be trusted.

    Args:
        about: What `comparison.json` says beside the trials: the network, the budget and the data.
    """
    epochs = f"{about['epochs']} epochs" if about["epochs"] else "each strategy's own epochs"
    joined = ", the validation split among them" if about["train_on_validation"] else ""
    said = (
        f"{about['backbone']} ({about['weights']}) at {'x'.join(map(str, about['image_size']))} pixels on "
        f"{about['data']}, {epochs} of {about['train']} examples{joined} in batches of {about['batch_size']}."
    )
    if about["folds"]:
        return f"{said} Measured on {about['folds']} folds of the training split; the test split was not looked at."
    return (
        f"{said} Measured on the test split of {about['test']}: to choose by this table and then quote the best row "
        "is too hopeful; choose with --folds."
    )


def begin(folder: Path, about: Mapping[str, Any]) -> tuple[Trial, ...]:
    """Return the trials that an earlier call of the same comparison has written down.

    Raises:
        InputError: If the data, the network or the versions of packages changed since then, or the file is damaged.
    """
    path = folder / JSON
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["about"]
        changed = [name for name, value in about.items() if before[name] != value]
        others = differences(before["versions"], about["versions"]) if "versions" in changed else ""
        trials = tuple(Trial(**trial) for trial in found["trials"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no comparison ({error!r}): choose a new folder") from None
    if changed:
        told = f"{', '.join(changed)}{others and f' ({others})'}"
        raise InputError(f"`out` {folder} holds a comparison that differs in {told}: choose a new folder")
    return trials


def write(folder: Path, trials: Sequence[Trial], metric: str, about: Mapping[str, Any]) -> Table:
    """Write what is known so far: every trial and the table as JSON, the table as Markdown, and a picture of it."""
    compared = table(trials, metric, note(about))
    rows = [
        {
            column: dataclasses.asdict(value) if isinstance(value, Number) else value
            for column, value in zip(compared.columns, row, strict=True)
        }
        for row in compared.rows
    ]
    content = {"about": dict(about), "metric": metric, "strategies": rows, "trials": list(map(vars, trials))}
    bundles.write_json(folder / JSON, content)
    bundles.write_text(folder / MARKDOWN, markdown(compared))
    (folder / PICTURE).write_bytes(picture(compared).png)
    return compared
