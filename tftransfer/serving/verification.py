"""Prove that a SavedModel answers as the trained network does, before it is published."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tftransfer import scanning
from tftransfer.errors import InputError, ScanError
from tftransfer.report import Check
from tftransfer.serving import comparison, loaders, structure, warm_up
from tftransfer.serving.comparison import Answers
from tftransfer.serving.loaders import Request
from tftransfer.serving.structure import BYTES, CLASSIFY, PIXELS
from tftransfer.tasks import Task

Answer = Callable[[Request], Answers]
BATCH_SIZES = (0, 1, 2, 7, 33)
"""Sizes of batches whose answers must equal those to single pictures."""

_INVALID_ARGUMENT = 3  # TF_INVALID_ARGUMENT, tensorflow/c/tf_status.h
_TOP_LABELS = "top labels are the most probable"
_WARM_UP = "warm-up requests are answered"
# What loading or running a faulty SavedModel raises.
_ERRORS = (tf.errors.OpError, OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Verification:
    """What `verify` found; any check that does not hold makes it fail.

    Args:
        checks: The checks that were made, in order; `passed` is None for one that could not be.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that do not hold."""
        return tuple(check.name for check in self.checks if check.passed is False)

    def with_check(self, name: str, passed: bool | None, metrics: dict | None = None) -> Verification:
        """Return the verification with one more check."""
        return Verification((*self.checks, Check(name, passed, metrics or {})))

    def rows(self) -> list[tuple[str, str, str]]:
        """Return one `(check, result, detail)` per check, for a table."""
        words = {True: "passed", False: "FAILED", None: "not checked"}
        return [(check.name, words[check.passed], _detail(check.metrics)) for check in self.checks]

    def lines(self) -> list[str]:
        """Return one line of text per check."""
        return [f"{result}: {name}{detail and f' ({detail})'}" for name, result, detail in self.rows()]


@dataclass(frozen=True)
class _Case:
    """Real inputs, both ways: encoded, and as pixels from training's decoder; and what to do with them."""

    encoded: np.ndarray
    pixels: np.ndarray
    threshold: float | None
    repeats: int
    batch_sizes: tuple[int, ...]
    labels: tuple[bytes, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """All pictures, in batches, in turn for both signatures."""
        count, size = len(self.encoded), max(*self.batch_sizes, 1)
        batches = [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
        return [self.request(signature, batch) for batch in batches for signature in (BYTES, PIXELS)]

    @property
    def broken(self) -> list[Request]:
        """Batches with one broken picture each."""
        # No damaged JPEG: TensorFlow's library for it would complain on standard error.
        good, bad = self.encoded[0], (b"", b"this is no picture", b"\x89PNG\r\n\x1a\n and no more")
        return [Request(BYTES, loaders.as_texts([good, one, good])) for one in bad]

    @property
    def unfit(self) -> list[Request]:
        """Pixels of another size, rank and type than the network takes; Python's session would not let them through."""
        pixels = self.pixels[:1]
        return [Request(PIXELS, values) for values in (pixels[:, :-1], pixels[0], pixels.astype(np.float64))]

    @property
    def ranked(self) -> list[Request]:
        """All pictures, for their probabilities and for their most probable labels."""
        return [self.request(signature, range(len(self.encoded))) for signature in (BYTES, CLASSIFY)]

    def request(self, signature: str, places: Sequence[int]) -> Request:
        """Return the pictures at some places as one batch."""
        values = self.pixels if signature == PIXELS else self.encoded
        return Request(signature, values[np.array(places, int)])

    def check(self, name: str, pairs: Iterable[tuple[Answers, Answers]]) -> Check:
        """Compare pairs of answers that must be equal."""
        differences = [comparison.difference(*pair, self.threshold) for pair in pairs]
        return comparison.largest(differences).to_check(name, pictures=len(self.encoded))


def verify(
    version_dir: str | os.PathLike[str],
    samples: Sequence[bytes] = (),
    *,
    model: keras.Model | None = None,
    task: Task | None = None,
    from_logits: bool | None = None,
    repeats: int = 50,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    trust: bool = False,
) -> Verification:
    """Check a SavedModel's structure and its answers, by three loaders.

    Numbers may differ by 1e-5 (relative beyond 1); repeated requests must be answered with the same bits.

    Args:
        version_dir: The folder that holds `saved_model.pb`.
        samples: Encoded pictures, a handful. Defaults to none: pictures are made up.
        model: The Keras model it was exported from. Without it (and `task`) the SavedModel is compared with
            itself and training's decoder only.
        task: What the outputs mean; names, types and labels are then compared with it.
        from_logits: Whether `model` gives logits. Defaults to what its last layer says.
        repeats: How often the same request is sent to each signature, at least 2. Defaults to 50.
        batch_sizes: Sizes of batches whose answers must equal those to single pictures; 0 is an empty batch.
        trust: Load it without a scan. Defaults to False.

    Returns:
        The checks made. Where the structure is wrong or nothing can be loaded, the others are missing.

    Raises:
        InputError: If the folder holds no SavedModel or an argument is out of range.
        ScanError: If a scan finds something in it.
    """
    _check_arguments(repeats, batch_sizes)
    directory = Path(version_dir)
    try:
        scanning.check(directory, trust=trust)
    except ScanError:
        raise
    except InputError as error:
        structure.read(directory)  # raises where there is no SavedModel at all
        return Verification((Check("SavedModel files", False, {"problem": str(error)}),))
    return prove(directory, samples, model, task, from_logits, repeats, batch_sizes)


def prove(
    directory: Path,
    samples: Sequence[bytes],
    model: keras.Model | None,
    task: Task | None,
    from_logits: bool | None,
    repeats: int,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Verification:
    """Do what `verify` does, without a scan: for what this process has just written."""
    saved_model = structure.read(directory)
    checks = [structure.check_structure(saved_model, task)]
    if not checks[0].passed:
        return Verification(tuple(checks))
    if task and (found := structure.check_labels(saved_model, task)):
        checks.append(found)
    encoded = list(samples) or made_up_pictures()
    pixels = loaders.decode(encoded, structure.image_size(saved_model))
    threshold = getattr(task, "threshold", None)  # only tasks with several labels have one
    labels = tuple(label.encode() for label in task.labels) if task else ()
    case = _Case(loaders.as_texts(encoded), pixels, threshold, repeats, tuple(batch_sizes), labels)
    expect = partial(_keras_answers, model, task, from_logits, case)
    return Verification((*checks, *_check_answers(directory, structure.signatures(saved_model), case, expect)))


def made_up_pictures(seed: int = 0) -> list[bytes]:
    """Return a few encoded pictures of random colours, in sizes and formats that exercise the decoder."""
    generator = np.random.default_rng(seed)
    pictures = []
    for number, (height, width, channels) in enumerate(((48, 64, 3), (131, 97, 3), (40, 40, 1), (300, 200, 3))):
        coarse = generator.uniform(0, 255, (1, 6, 6, channels))
        smooth = tf.cast(tf.image.resize(coarse, (height, width), "bicubic")[0], tf.uint8)
        encode = tf.io.encode_png if number % 2 else tf.io.encode_jpeg
        pictures.append(encode(smooth).numpy())
    return pictures


def _check_arguments(repeats: int, batch_sizes: Sequence[int]) -> None:
    if repeats < 2:
        raise InputError(f"`repeats` must be at least 2: one answer proves nothing. Received: repeats={repeats}")
    if not batch_sizes or min(batch_sizes) < 0:
        raise InputError(f"`batch_sizes` must be numbers from 0. Received: batch_sizes={tuple(batch_sizes)!r}")


def _check_answers(
    directory: Path,
    signatures: Mapping[str, structure.Signature],
    case: _Case,
    expect: Callable[[], list[Answers] | None],
) -> list[Check]:
    try:
        asked_first = warm_up.read(directory)
    except ValueError as error:
        return [Check(_WARM_UP, False, {"problem": _first_line(error)})]
    # The C library starts first and works beside this process, on its own processor if there are two.
    ranked = case.ranked if CLASSIFY in signatures else []
    with loaders.c_library(directory, signatures, [*case.requests, *ranked, *case.broken, *case.unfit]) as wait:
        try:
            with loaders.graph_session(directory, signatures) as answer:
                received = [answer(request) for request in case.requests]
                checks = [_attempt(name, check, answer, case) for name, check in _IN_SESSION.items()]
                if ranked:
                    checks.append(_attempt(_TOP_LABELS, _check_top_labels, answer, case))
                checks.append(_check_warm_up(asked_first, answer))
        except _ERRORS as error:
            return [Check("graph session", False, {"problem": _first_line(error)})]
        return [
            _check_keras(case, expect, received),
            _check_c_library(case, wait, received),
            # The signatures take turns: encoded pictures, and what training's decoder makes of them.
            case.check("decoded as in training", zip(received[::2], received[1::2], strict=True)),
            *checks,
        ]


def _attempt(name: str, check: Callable[[str, Answer, _Case], Check], answer: Answer, case: _Case) -> Check:
    try:
        return check(name, answer, case)
    except _ERRORS as error:
        return Check(name, False, {"problem": _first_line(error)})


def _keras_answers(
    model: keras.Model | None, task: Task | None, from_logits: bool | None, case: _Case
) -> list[Answers] | None:
    if model is None or task is None:
        return None
    pixels = [request.values for request in case.requests if request.signature == PIXELS]
    answers = loaders.keras_answers(model, task, from_logits, pixels)
    return [answer for answer in answers for _ in (BYTES, PIXELS)]  # both signatures must answer as Keras does


def _check_keras(case: _Case, expect: Callable[[], list[Answers] | None], received: list[Answers]) -> Check:
    name = "graph session equals Keras"
    try:
        expected = expect()
    except (*_ERRORS, TypeError) as error:  # a model of another size, for instance
        return Check(name, False, {"problem": _first_line(error)})
    if expected is None:
        return Check(name, None, {"reason": "no Keras model to compare with"})
    return case.check(name, zip(expected, received, strict=True))


def _check_c_library(case: _Case, wait: Callable[[], list[Answers | int]], received: list[Answers]) -> Check:
    name = "C library equals graph session"
    try:
        answers = wait()
    except loaders.LoaderError as error:
        return Check(name, False, {"problem": _first_line(error)})
    unfit = len(case.broken) + len(case.unfit)
    fit = len(answers) - unfit
    good = [answer for answer in answers[:fit] if not isinstance(answer, int)]
    refused = [answer for answer in answers[fit:] if answer == _INVALID_ARGUMENT]
    if len(good) != fit or len(refused) != unfit:
        counts = f"{len(good)} of {fit} answered, {len(refused)} of {unfit} broken or unfit refused"
        return Check(name, False, {"problem": counts})
    ranked = good[len(received) :]
    if ranked and not (found := _compare_top_labels(name, case, *ranked)).passed:
        return found
    return case.check(name, zip(received, good, strict=False))


def _check_repeats(name: str, answer: Answer, case: _Case) -> Check:
    different = 0
    for signature in (BYTES, PIXELS):
        request = case.request(signature, [0])
        first = answer(request)
        different += sum(not comparison.identical(first, answer(request)) for _ in range(case.repeats - 1))
    return Check(name, not different, {"repeats": case.repeats, "different answers": different})


def _check_batches(name: str, answer: Answer, case: _Case) -> Check:
    """Compare batches with single answers; the pictures are repeated until a batch is full."""
    pairs = []
    for signature in (BYTES, PIXELS):
        alone = [answer(case.request(signature, [place])) for place in range(len(case.encoded))]
        single = {output: np.concatenate([one[output] for one in alone]) for output in alone[0]}
        for size in case.batch_sizes:
            places = np.arange(size) % len(case.encoded)
            expected = {output: values[places] for output, values in single.items()}
            pairs.append((expected, answer(case.request(signature, places.tolist()))))
    found = case.check(name, pairs)
    return Check(name, found.passed, {**found.metrics, "batch sizes": list(case.batch_sizes)})


def _check_broken(name: str, answer: Answer, case: _Case) -> Check:
    """One broken picture must fail its batch with InvalidArgument."""
    outcomes = [_outcome(answer, request) for request in case.broken]
    wrong = [outcome for outcome in outcomes if outcome != "InvalidArgumentError"]
    return Check(name, not wrong, {"problem": wrong} if wrong else {"refused": len(outcomes)})


def _check_top_labels(name: str, answer: Answer, case: _Case) -> Check:
    """Each class must have the probability that it is given, and none that is left out a higher one."""
    return _compare_top_labels(name, case, *map(answer, case.ranked))


def _compare_top_labels(name: str, case: _Case, whole: Answers, found: Answers) -> Check:
    probabilities = whole["probabilities"]
    count = found["scores"].shape[1]
    worst = float(np.abs(found["scores"] + np.sort(-probabilities, axis=1)[:, :count]).max(initial=0.0))
    wrong = 0
    if case.labels:
        places = np.vectorize(case.labels.index, otypes=[int])(found["classes"])
        given = np.take_along_axis(probabilities, places, axis=1)
        wrong = int((np.abs(given - found["scores"]) > comparison.TOLERANCE).sum())
    passed = worst <= comparison.TOLERANCE and not wrong
    return Check(name, passed, {"labels": count, "maximum difference": worst, "wrong labels": wrong})


def _check_warm_up(requests: Sequence[Request] | None, answer: Answer) -> Check:
    """A model server that cannot answer a warm-up request does not serve the version at all."""
    if requests is None:
        return Check(_WARM_UP, None, {"reason": "there are none"})
    try:
        for request in requests:
            answer(request)
    except _ERRORS as error:
        return Check(_WARM_UP, False, {"problem": _first_line(error)})
    return Check(_WARM_UP, True, {"requests": len(requests), "batch sizes": [len(one.values) for one in requests]})


def _outcome(answer: Answer, request: Request) -> str:
    try:
        answer(request)
    except tf.errors.OpError as error:
        return type(error).__name__
    return "answered"


_IN_SESSION = {
    "repeated requests": _check_repeats,
    "batches equal single pictures": _check_batches,
    "broken pictures are refused": _check_broken,
}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and line != "Graph execution error:"]
    return (lines or [type(error).__name__])[0][:300]


def _detail(metrics: dict) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in metrics.items())


def _text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.2g}" if isinstance(value, float) else str(value)
