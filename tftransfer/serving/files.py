"""Publish files for other runtimes: written beside their place, compared with Keras, measured, then moved there."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tftransfer import soundness
from tftransfer.checks import intervals, performance
from tftransfer.data.examples import Examples
from tftransfer.data.order import in_order
from tftransfer.errors import check
from tftransfer.report import Check, Number, Table
from tftransfer.report_html import is_rate
from tftransfer.serving import loaders, portable, structure
from tftransfer.serving.export import answers_of, image_size
from tftransfer.serving.publication import newest_version, publish_folder
from tftransfer.serving.tflite_files import Answer, median_milliseconds
from tftransfer.serving.verification import Verification, made_up_pictures
from tftransfer.tasks import Task
from tftransfer.weights import digest

MOST_DIFFERENT = 1e-4
"""What the numbers of a float32 file may differ by, relative to the largest one."""

MOST_LOST = 0.01
"""What a quantized file may lose on the test split: a point of accuracy, or a hundredth of the numbers' deviation."""

LEAST_SAME = 0.8
"""How many test pictures a quantized file must give the same labels as the network, where it has labels."""

_WITHOUT_TEST = 0.05  # what float16 may differ by where there is no test split to judge it on
_BATCH = 32
_ALONE = 3  # pictures that are answered one by one too


@dataclass(frozen=True)
class Runtime:
    """What runs a network's files on other devices.

    Args:
        name: What people call it.
        folder: The folder of a run that its files are in.
        files: The name of the file for each kind of quantization.
        write: Writes the files of the given kinds into a folder, from a network, its task, pictures to calibrate int8
            with, and the SHA-256 of the network's own file.
        open: Loads a file and returns the function that answers with it, on so many threads.
        require: Raises `InputError` where something is not installed.
    """

    name: str
    folder: str
    files: Mapping[str, str]
    write: Callable[[keras.Model, Task, Path, Sequence[str], Sequence[np.ndarray], str], None]
    open: Callable[[Path, int], Answer]
    require: Callable[[], None]


@dataclass(frozen=True)
class Evidence:
    """What files are judged on.

    Args:
        test: The test split; None where the data cannot be read again.
        samples: Encoded pictures that take its place. Defaults to none: they are made up.
        calibration: Training pictures for int8. Defaults to none.
        note: What a reader of the numbers must know of the data. Defaults to nothing.
    """

    test: Examples | None = None
    samples: Sequence[bytes] = ()
    calibration: Sequence[np.ndarray] = field(default=(), repr=False)
    note: str = ""


@dataclass(frozen=True)
class _Measured:
    """What a file, or the network itself, gives for the pictures and for the first ones alone, and its time for one."""

    path: Path
    size: int
    numbers: np.ndarray
    alone: np.ndarray
    milliseconds: float


def publish_files(
    runtime: Runtime, model: keras.Model, task: Task, run: Path, kinds: Sequence[str], evidence: Evidence
) -> tuple[Path | None, Verification, Table]:
    """Write a network's files for a runtime into its run's folder, if they answer as it does.

    Files in float32 must give the same numbers within 1e-4. Quantized ones may lose a point of accuracy, for regression
    a hundredth of the deviation, and must give the same labels to 80 % of the pictures; what chance explains on so many
    is not held against them. If one of them fails, none is published.

    Args:
        runtime: What the files are for.
        model: The trained network.
        task: What its outputs mean.
        run: The run's folder, with the network's `model.keras`.
        kinds: Which of the runtime's files.
        evidence: What they are judged on.

    Returns:
        The folder of the files, or None; what was checked; and a table of sizes, the task's main metric and times.

    Raises:
        InputError: If the runtime is not installed, the network cannot be converted or has a weight that is not finite,
            or the folder cannot be written.
    """
    soundness.check_weights(model)
    case = _Case(task, image_size(model), evidence)
    found: list[_Measured] = []

    def build(folder: Path) -> None:
        runtime.write(model, task, folder, kinds, evidence.calibration, digest(run / "model.keras"))

    def check(folder: Path) -> Verification:
        found.append(case.measure(run / "model.keras", _keras_answer(portable.in_float32(model), task)))
        for file in (folder / runtime.files[kind] for kind in kinds):
            found.append(case.measure(file, runtime.open(file, _threads())))
        pairs = zip(kinds, found[1:], strict=True)
        return Verification(tuple(one for kind, file in pairs for one in case.checks(kind, file, found[0])))

    folder, verification = publish_folder(build, run / runtime.folder, check)
    rows = [*(case.row(one, found[0]) for one in found), *_savedmodel_rows(run, case)]  # the network itself first
    return folder, verification, case.table(runtime.name, rows, len(found[0].numbers))


def calibration_pictures(train: Examples, count: int = 200, seed: int = 0) -> list[np.ndarray]:
    """Choose training pictures to calibrate int8 with.

    Args:
        train: The training split.
        count: How many at the most, from 1. Defaults to 200.
        seed: Decides which. Defaults to 0.

    Returns:
        uint8 `(height, width, 3)` each.
    """
    check(count >= 1, "count", "a whole number from 1", count)
    chosen = np.random.default_rng(seed).permutation(len(train))[:count]
    return [train.pictures.load(tf.constant(number, tf.int64)).numpy() for number in chosen]


def _threads() -> int:
    """Return how many threads a runtime gets: one for each processor, as TensorFlow takes them."""
    return len(os.sched_getaffinity(0))


def _keras_answer(model: keras.Model, task: Task) -> Answer:
    answer, name = answers_of(model, task), portable.output_name(task)
    return lambda pictures: {name: answer(tf.constant(pictures))[name].numpy()}


def _savedmodel_rows(run: Path, case: _Case) -> Iterator[tuple]:
    """Return the row of the run's newest SavedModel, if there is one that works; it was compared when it was made."""
    version = newest_version(run / "serving")
    if version is None:
        return
    with contextlib.suppress(tf.errors.OpError, OSError, ValueError, RuntimeError):
        signatures = structure.signatures(structure.read(version))
        request = loaders.Request(structure.PIXELS, case.few[:1])
        with loaders.graph_session(version, signatures) as answer:
            taken = median_milliseconds(lambda: answer(request))
        size = sum(file.stat().st_size for file in version.rglob("*") if file.is_file())
        yield f"serving/{version.name}", size / 1e6, None, None, None, taken


@dataclass(frozen=True)
class _Case:
    """The evidence at the network's size, and the questions that it answers."""

    task: Task
    size: tuple[int, int]
    evidence: Evidence

    @cached_property
    def few(self) -> np.ndarray:
        """The first pictures."""
        return next(self.batches())[:_ALONE]

    def batches(self) -> Iterator[np.ndarray]:
        """Give the pictures, in batches of float32."""
        if self.evidence.test is None:
            yield loaders.decode(self.evidence.samples or made_up_pictures(), self.size)
            return
        for pictures, _, _ in in_order(self.evidence.test, _BATCH):
            yield pictures.numpy()

    def measure(self, path: Path, answer: Answer) -> _Measured:
        """Answer all pictures, the first ones one by one too, and time it."""
        name, singles = portable.output_name(self.task), [self.few[[number]] for number in range(len(self.few))]
        numbers = np.concatenate([answer(batch)[name] for batch in self.batches()])
        alone = np.concatenate([answer(single)[name] for single in singles])
        taken = median_milliseconds(lambda: answer(singles[0]))
        return _Measured(path, path.stat().st_size, numbers, alone, taken)

    def checks(self, kind: str, file: _Measured, network: _Measured) -> Iterator[Check]:
        """Judge a file of one kind of quantization."""
        name, test = file.path.name, self.evidence.test
        among = _difference(file.alone, file.numbers[: len(file.alone)])
        yield Check(f"{name}: batches equal single pictures", among <= MOST_DIFFERENT, _apart(among))
        apart = _difference(file.numbers, network.numbers)
        if kind == "none" or test is None or not math.isfinite(apart):
            most = MOST_DIFFERENT if kind == "none" else _WITHOUT_TEST
            yield Check(f"{name}: equals Keras within {most:g}", apart <= most, _apart(apart))
            return
        worse = _wrong(self.task, test.targets, file.numbers) - _wrong(self.task, test.targets, network.numbers)
        error = worse.std(ddof=1) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
        lost = float(worse.mean())
        metrics = {"lost": lost, "beyond chance": lost - 1.96 * error, **_apart(apart)}
        yield Check(f"{name}: loses {MOST_LOST:.0%} at most", metrics["beyond chance"] <= MOST_LOST, metrics)
        same = self._same(test.targets, file.numbers, network.numbers)
        if same is not None and same.value is not None and same.high is not None:
            found = {"same answer": same.value}
            yield Check(f"{name}: same answer to {LEAST_SAME:.0%} at least", same.high >= LEAST_SAME, found)

    def row(self, file: _Measured, network: _Measured) -> tuple:
        """Return a row of the table; the network itself is not compared with itself."""
        test, apart = self.evidence.test, _difference(file.numbers, network.numbers)
        metric = same = None
        if test is not None and math.isfinite(apart):
            metric = performance.metrics_of(self.task, test.targets, file.numbers)[self.task.main_metric]
            same = self._same(test.targets, file.numbers, network.numbers)
        compared = (None, None) if file is network else (same, apart)
        return file.path.name, file.size / 1e6, metric, *compared, file.milliseconds

    def _same(self, targets: np.ndarray, numbers: np.ndarray, reference: np.ndarray) -> Number | None:
        """Return how many pictures are given the same labels; None for numbers, which have none."""
        if self.task.kind == "regression":
            return None
        one, other = (performance.truth_and_given(self.task, targets, part)[1] for part in (numbers, reference))
        same = (one == other).all(axis=1)
        return intervals.proportion(int(same.sum()), len(same))

    def table(self, title: str, rows: Sequence[tuple], count: int) -> Table:
        """Return the table of the files."""
        metric = self.task.main_metric
        columns = ("file", "MB", metric, "same answer", "largest difference", "ms")
        on = f"On {count} {'test' if self.evidence.test else 'kept'} pictures."
        time = f"ms: one picture at a time, {_threads()} threads, the median, on the machine that exported."
        note = " ".join(filter(None, (on, self.evidence.note, time)))
        return Table(title, columns, tuple(rows), note, percent=("same answer", *([metric] if is_rate(metric) else [])))


def _wrong(task: Task, targets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return `(n,)` how wrong each answer is: 0 or 1, or the error in units of the targets' deviation."""
    if task.kind == "regression":
        deviation = targets.std(axis=0)
        return (np.abs(numbers - targets) / np.where(deviation > 0, deviation, 1.0)).mean(axis=1)
    truth, given = performance.truth_and_given(task, targets, numbers)
    return (truth != given).any(axis=1).astype(float)


def _difference(numbers: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference, relative to the largest number; infinite where one is not finite."""
    if numbers.shape != reference.shape or not (np.isfinite(numbers).all() and np.isfinite(reference).all()):
        return math.inf
    largest = np.abs(reference).max(initial=0.0) or 1.0
    return float(np.abs(numbers - reference).max(initial=0.0) / largest)


def _apart(difference: float) -> dict[str, float]:
    return {"largest difference": difference}
