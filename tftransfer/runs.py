"""What every recipe does around its training: claim a folder, say what will happen, evaluate, write, publish."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from tftransfer import (
    advice,
    audits,
    bundles,
    distribution,
    inference,
    locks,
    planning,
    prefix,
    serving,
    weights,
)
from tftransfer.checks import calibration, charts, demo, duplicates, forgetting, labels, overfitting, performance
from tftransfer.choices import Network
from tftransfer.console import audit_table, literal_console, print_table
from tftransfer.data import Data
from tftransfer.distribution import Devices
from tftransfer.errors import InputError, check
from tftransfer.history import History
from tftransfer.penalties import Source
from tftransfer.report import Findings, Report
from tftransfer.shelf import PathLike, folder_or_temporary, shelf_at
from tftransfer.tasks import Task
from tftransfer.versions import versions

ADAPTER = "adapter.safetensors"
_DATA_CHECKS = ("labels", "duplicates")
# Options that do not decide a run's result; every other one is part of its configuration.
_NOT_CONFIGURATION = ("out", "quiet", "dry_run", "cache", "cache_dir", "trust", "resume", "time_limit")


@dataclass(frozen=True)
class Run:
    """One call of a recipe.

    Args:
        name: The recipe's name.
        folder: Where the run is written.
        configuration: Everything that decides the result.
        finished: Whether the folder already holds this run, done.
        console: Where progress goes.
        began: When the call began, in seconds of the monotonic clock.
        again: Whether the folder already holds this run, interrupted. Defaults to False.
        decisions: What it had decided from the data by then. Defaults to nothing.
        time_limit: Seconds from its beginning after which training ends. Defaults to None: never.
    """

    name: str
    folder: Path
    configuration: Mapping[str, Any]
    finished: bool
    console: Console
    began: float
    again: bool = False
    decisions: Mapping[str, Any] = field(default_factory=dict)
    time_limit: float | None = None

    @property
    def quiet(self) -> bool:
        """Whether nothing but errors is printed."""
        return self.console.quiet

    @property
    def seconds_left(self) -> float | None:
        """How long training may take from now on; None without a limit."""
        return None if self.time_limit is None else max(self.time_limit - (time.monotonic() - self.began), 0.0)


def prepare(name: str, options: argparse.Namespace) -> Run:
    """Decide on a run's folder and refuse one that holds something else; nothing is written yet.

    A run that was killed when all but its manifest's seal was written is finished by this.

    Args:
        name: The recipe's name.
        options: Its parsed options, with `out` and `quiet`, and `resume` and `time_limit` if it has them.

    Raises:
        InputError: If the folder holds another run or cannot be written.
    """
    given = {key: _plain(value) for key, value in vars(options).items() if key not in _NOT_CONFIGURATION}
    configuration, resume = {"recipe": name, **given}, getattr(options, "resume", False)
    folder = options.out or _folder(name, configuration, resume)
    again = (folder / bundles.MANIFEST).is_file()
    if resume and not again:
        raise InputError(f"`resume`: {folder} holds no run: leave `--resume` out to begin one there")
    finished = bundles.claim(folder, configuration)
    if finished:
        bundles.settle(folder)
    decisions: dict[str, Any] = {}
    if again and not finished:
        with locks.held(folder):
            decisions = bundles.begun_decisions(folder)
    console = literal_console(options.quiet)
    limit = getattr(options, "time_limit", None)
    return Run(name, folder, configuration, finished, console, time.monotonic(), again, decisions, limit)


def _folder(name: str, configuration: Mapping[str, Any], resume: bool) -> Path:
    """Return the folder of the newest run that was begun so and not finished, or a new one."""
    root = Path("saved_models")
    if not resume:
        return bundles.next_folder(root, name)
    found = bundles.newest_unfinished(root, name, configuration)
    if found is None:
        raise InputError(f"`resume`: no unfinished run of these options in {root}: name its folder by `--out`")
    return found


def check_names(text: str, task: Task) -> tuple[str, ...]:
    """Read a comma list of checks of the data.

    Raises:
        InputError: If one is not known, or does not apply to the task.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        check(name in _DATA_CHECKS, "checks", f"a comma list of {', '.join(_DATA_CHECKS)}", text)
        fits = name != "labels" or task.kind == "single_label"
        check(fits, "checks", "without labels where examples have not one class each", text)
    return names


def check_data(
    text: str,
    model: keras.Model,
    task: Task,
    data: Data,
    *,
    seed: int = 0,
    batch_size: int = 32,
    cache_dir: PathLike | None = None,
) -> Findings:
    """Look at the data, also with the features of a pretrained network, before it learns anything of them.

    Args:
        text: A comma list of checks; empty for none.
        model: From a builder, not tuned yet.
        task: What its outputs mean.
        data: All splits for copies, else training alone.
        seed: Of folds and views. Defaults to 0.
        batch_size: Of training, which then finds the features. Defaults to 32.
        cache_dir: Where features are kept. Defaults to None.
    """
    findings = {
        "labels": lambda: labels.labels(
            task, data.train, _features(model, data, seed, batch_size, cache_dir), seed=seed
        ),
        "duplicates": lambda: duplicates.duplicates(data, duplicates.copies(data)),
    }
    found = Findings()
    for name in check_names(text, task):
        found += findings[name]()
    return found


def features_folder(options: argparse.Namespace, choice: advice.Choice) -> AbstractContextManager[PathLike | None]:
    """Give `--cache-dir`, or one for this run where what is measured before training is of use in it."""
    measured = choice.asks_the_data or "labels" in options.checks
    return folder_or_temporary(options.cache_dir, needed=measured and options.cache != "off")


def _features(model: keras.Model, data: Data, seed: int, batch_size: int, cache_dir: PathLike | None) -> np.ndarray:
    """Compute features of the training pictures as they are and of two views, whose mean is a little surer."""
    compute = partial(
        inference.pooled_features,
        prefix.body(model),
        data.train,
        chunk=inference.chunk_of(batch_size, distribution.strategy_of(model).num_replicas_in_sync),
        shelf=shelf_at(cache_dir),
    )
    plain, views = compute(), compute(augmentation="light_no_flip", views=2, seed=seed)
    return np.concatenate([plain.values, views.values])


def without_duplicates(data: Data) -> tuple[Data, Findings]:
    """Remove from training and validation what lies in another split too, and report it.

    Raises:
        InputError: If a class would be lost.
    """
    found = duplicates.copies(data)
    findings = duplicates.duplicates(data, found, removed=True)
    return (duplicates.without_copies(data, found) if found else data), findings


@contextlib.contextmanager
def held(run: Run) -> Iterator[None]:
    """Keep a run's folder, which is made if need be, for this process, from before it begins until it is finished.

    Raises:
        InputError: If another process has it, or has finished this run there meanwhile.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locks.held(run.folder):
            if bundles.claim(run.folder, run.configuration):
                raise InputError(f"`out` {run.folder} was finished by another process in the meantime")
            yield
    finally:
        with contextlib.suppress(OSError):
            run.folder.rmdir()  # where nothing was begun


def begin(run: Run, data: Data, devices: Devices, chosen: advice.Advice) -> None:
    """Say what was found and chosen, make the folder, and note which run it holds.

    From here on the run has passed every check of its input; before, nothing is written.

    Raises:
        InputError: If another run has taken the folder since `prepare`, or what was begun there had other data or
            versions.
    """
    announce(run, data, devices)
    if chosen.table:
        print_table(run.console, chosen.table)
    for reason in chosen.reasons:
        run.console.print(reason)
    inputs = {"data": data.fingerprint, "versions": versions()}
    bundles.begin(run.folder, run.configuration, again=run.again, decisions={"trains": chosen.decision}, inputs=inputs)


def show_finished(run: Run) -> int:
    """Print the report of a run that is already done; returns the exit code that it ended with.

    Raises:
        InputError: If the report is missing or damaged.
    """
    report = bundles.read_report(run.folder)
    run.console.print(f"This run is finished: {run.folder}", soft_wrap=True)
    _print_metrics(run.console, report)
    published = bool(bundles.read_manifest(run.folder).get("current", True))
    if not published:
        again = f"`tftransfer export {run.folder}` tries again"
        run.console.print(f"SavedModel: not published, see the report; {again}", soft_wrap=True)
    return _exit_code(report, published)


def _exit_code(report: Report, published: bool) -> int:
    """Return 1 if the export was not published or the model's outputs are not finite, else 0."""
    finite = all(check.passed for check in report.checks if check.name == "finite_outputs")
    return 0 if published and finite else 1


def show_plan(run: Run, model: keras.Model, data: Data, choice: advice.Choice, devices: Devices) -> int:
    """Print what a run would do: data, devices, and per phase what trains."""
    announce(run, data, devices)
    for phase in choice.planned:
        rows, parts = planning.plan(model, phase)
        share = parts.frozen_share
        title = f"{phase.name}: {phase.epochs} epochs at {phase.learning_rate:g}, {share:.0%} runs as constants"
        print_table(run.console, audit_table(title, rows))
    if choice.asks_the_data:
        run.console.print("Some of this is decided later, from the training examples.")
    run.console.print(f"Nothing was written; the run would go to {run.folder}", soft_wrap=True)
    return 0


def announce(run: Run, data: Data, devices: Devices) -> None:
    """Print what was found."""
    console = run.console
    console.print(f"Devices: {devices.reason}")
    counts = f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test"
    console.print(f"Data: {data.name}, {len(data.labels)} labels, {counts}, {len(data.quarantined)} set aside")
    for item in data.quarantined[:5]:
        console.print(f"  set aside: {item.file}: {item.reason}")
    if len(data.quarantined) > 5:
        console.print(f"  and {len(data.quarantined) - 5} more, all in the report")
    for line in audits.page.lines(audits.of_data(data)):
        console.print(line)


def finish(
    run: Run,
    model: keras.Model,
    task: Task,
    data: Data,
    history: History,
    network: Network,
    devices: Devices,
    chosen: advice.Advice,
    source: Source | None = None,
    found: Findings | None = None,
) -> int:
    """Measure on the test split, publish the SavedModel, write the folder, and print the result.

    Args:
        run: From `prepare`.
        model: The trained model.
        task: What its outputs mean.
        data: The data it was trained on.
        history: What `fine_tune` returned.
        network: The pretrained network that training began with.
        devices: What it was trained on.
        chosen: The strategy and why it was chosen.
        source: The task that the backbone comes from, if forgetting is to be measured. Defaults to None.
        found: What `check_data` found. Defaults to nothing.

    Returns:
        The exit code: 0, or 1 if the export did not pass verification or the model's outputs are not finite.
    """
    findings = _measure(model, task, data, history) + audits.page.findings(audits.of_data(data)) + (found or Findings())
    if network.is_demo and data.name == "demo":
        worth = demo.demo_comparison(data, network.image_size)
        print_table(run.console, worth.tables[0])
        findings += worth
    if chosen.table:
        findings += Findings(tables=(chosen.table,))
    if source:
        findings += forgetting.forgetting(model, source)
    if history.adapter:
        history.adapter.save(run.folder / ADAPTER)
    pictures = samples(data)
    bundles.write_samples(run.folder, pictures)
    version, verification = serving.publish(model, task, run.folder / "serving", pictures, reuse=True)
    findings += Findings(checks=verification.checks)
    report = _report(run, task, data, history, network, findings, (*chosen.reasons, *history.notes))
    provenance = {
        "backbone": network.backbone,
        "weights": weights.describe_weights(network.backbone, network.weights, image_size=network.image_size),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "splits": data.splits,
            "found": data.found,
            "quarantined": len(data.quarantined),
        },
        "current": version and version.name,
        "inputs": {"data": data.fingerprint, "versions": versions()},
        "decisions": {
            "devices": devices.reason,
            "replicas": devices.replicas,
            "precision": devices.precision,
            "weights": network.weights and Path(network.weights).name,
            "image_size": list(network.image_size),
            "trains": chosen.decision,
        },
    }
    bundles.save(run.folder, model, task, report, configuration=run.configuration, provenance=provenance)
    _print_result(run, report, version)
    return _exit_code(report, published=version is not None)


def samples(data: Data, count: int = 8) -> list[bytes]:
    """Return test pictures as PNG files at the model's size: real inputs for verification."""
    import tensorflow as tf

    pictures = data.test.pictures
    chosen = range(0, len(pictures), max(len(pictures) // count, 1))
    return [tf.io.encode_png(pictures.load(tf.constant(i, tf.int64))).numpy() for i in list(chosen)[:count]]


def _measure(model: keras.Model, task: Task, data: Data, history: History) -> Findings:
    predict = inference.predictor(model, task)
    probabilities = predict(data.test)
    phases = [record.to_json() for record in history.phases]
    seen, unseen = ((part.targets, predict(part)) for part in (data.train, data.validation))
    return (
        performance.performance(task, data.test, probabilities, train_targets=data.train.targets)
        + Findings(pictures=(charts.learning_curves(history, phases),))
        + overfitting.overfitting(task, seen, unseen, phases)
        + calibration.calibration(task, data.test.targets, probabilities)
    )


def _report(
    run: Run,
    task: Task,
    data: Data,
    history: History,
    network: Network,
    findings: Findings,
    notes: tuple[str, ...],
) -> Report:
    said = ((one.phase.name, text) for one in history.phases for text in (one.memory, one.faults) if text)
    notes += tuple(f"Phase {name!r}: {text}." for name, text in said)
    audits = tuple(audit_table(f"What trained: {r.phase.name}", r.audit, r.penalty_basis) for r in history.phases)
    return Report(
        task=task.name,
        backbone=network.backbone,
        strategy=[record.to_json() for record in history.phases],
        complete=history.complete,
        data=_describe_data(data, task),
        metrics=findings.metrics,
        seconds={
            "decode": data.seconds,
            "extract": sum(record.extract_seconds for record in history.phases),
            "train": sum(record.seconds - record.extract_seconds for record in history.phases),
            "total": history.seconds_before + time.monotonic() - run.began,
        },
        checks=findings.checks,
        versions=versions(),
        seed=int(run.configuration["seed"]),
        tables=audits + findings.tables,
        pictures=findings.pictures,
        notes=notes,
    )


def _describe_data(data: Data, task: Task) -> dict[str, Any]:
    return {
        "name": data.name,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
        "quarantined": [{"file": item.file, "reason": item.reason} for item in data.quarantined],
        "found": data.found,
        "splits": data.splits,
        "labels": list(data.labels),
        "per_label": {} if task.kind == "regression" else _per_label(data),
    }


def _per_label(data: Data) -> dict[str, list[int]]:
    """Return for each split how many examples have each label."""
    splits = {"train": data.train.targets, "validation": data.validation.targets, "test": data.test.targets}
    count = len(data.labels)
    return {
        name: (np.bincount(own, minlength=count) if own.ndim == 1 else (own > 0.5).sum(axis=0)).tolist()
        for name, own in splits.items()
    }


def _print_result(run: Run, report: Report, version: Path | None) -> None:
    _print_metrics(run.console, report)
    if not report.complete:
        again = f"the same command with `--out {run.folder}` goes on with it"
        run.console.print(f"Training ended at the time limit: {again}", soft_wrap=True)
    failed = [check.name for check in report.checks if check.passed is False]
    if failed:
        run.console.print(f"Not passed: {', '.join(failed)}")
    run.console.print(f"Report: {run.folder / 'report.html'}", soft_wrap=True)
    run.console.print(
        f"SavedModel: {version}, verified" if version else "SavedModel: not published, see the report", soft_wrap=True
    )


def _print_metrics(console: Console, report: Report) -> None:
    console.print(f"{report.task} with {report.backbone}: {report.data['test']} test examples")
    for name, number in report.metrics.items():
        span = f"  [{number.low:.4f}, {number.high:.4f}]" if number.low is not None else ""
        value = "undefined" if number.value is None else f"{number.value:.4f}"
        console.print(f"  {name:<28} {value}{span}", highlight=False)


def _plain(value: Any) -> Any:
    """Return an option as JSON has it; of an absolute path only what others may see, its name and a digest."""
    text = str(value) if isinstance(value, Path) else value
    if isinstance(text, str) and Path(text).is_absolute():
        return f"{Path(text).name} (path {hashlib.sha256(os.fsencode(text)).hexdigest()[:12]})"
    return list(text) if isinstance(text, tuple) else text


def is_hidden_path(text: str) -> bool:
    """Whether a run's configuration has this in the place of an absolute path.

    Example:
        >>> is_hidden_path("flowers (path 0123456789ab)"), is_hidden_path("flowers")
        (True, False)
    """
    return re.search(r" \(path [0-9a-f]{12}\)$", text) is not None
