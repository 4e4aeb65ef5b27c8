"""What a network still knows of the task that it came from."""

from __future__ import annotations

import keras
import numpy as np

from tftransfer import constants, prefix
from tftransfer.checks.intervals import proportion
from tftransfer.checks.probe import fitted
from tftransfer.data import Data, Examples, glyphs, load, order
from tftransfer.errors import InputError
from tftransfer.penalties import Source
from tftransfer.report import OTHER, Check, Findings, Number, Table

PICTURES = (2000, 1000)  # generated for training and test of the built-in probe
_SEEDS = 1_000_000  # apart from the seeds that the embedded weights may be pretrained with


def demo_source(image_size: tuple[int, int], seed: int = 0, limit: int | None = None) -> Data:
    """Generate pictures of the task that the embedded backbone was pretrained on: printed letters and signs.

    Args:
        image_size: `(height, width)` in pixels; the pictures are made square and resized.
        seed: From 0; other pictures than those that the weights were pretrained on. Defaults to 0.
        limit: Use at most about this many of them, for a quick try. Defaults to all.

    Returns:
        2,000 pictures for training (a tenth of them for validation) and 1,000 for test.
    """
    side, parts = max(image_size), {}
    for number, (name, count) in enumerate(zip(("train", "test"), PICTURES, strict=True)):
        pictures, labels, _ = glyphs.generated_signs(count, side, _SEEDS + 2 * seed + number, drawn=0)
        parts[name] = (pictures, labels)
    data, _ = load(parts, image_size=image_size, seed=seed, limit=limit)
    return data


def source_probe(model: keras.Model, data: Data, name: str = "") -> Source:
    """Fit a linear head for the old task to a network that is not tuned yet.

    Args:
        model: From a builder; only its backbone is used.
        data: Single-label data of a task that the backbone was trained for, at the model's image size.
        name: What the report calls it. Defaults to the data's own name.

    Returns:
        What `fine_tune` takes as `source`, and `forgetting` afterwards; with the accuracy before tuning.

    Raises:
        InputError: If the data's image size is not the model's, or its labels are not single ones.

    Example:
        >>> import tftransfer as tft
        >>> model = tft.builders.image_classifier("MobileNet-0.25", 10, image_size=64, weights="demo")
        >>> source = source_probe(model, demo_source((64, 64), limit=600))
        >>> forgetting(model, source).checks[0].name
        'forgetting'
    """
    given, expected = data.train.pictures.image_size, tuple(model.input_shape[1:3])
    if expected != (None, None) and given != expected:
        raise InputError(f"`source` must be loaded at the model's image size {expected}. Received: {given}")
    if data.train.targets.ndim != 1:
        raise InputError("`source` must hold one class per picture; several labels or numbers cannot be probed")
    kernel, bias = _fitted(_features(model, data.train), data.train.targets, len(data.labels))
    before = _accuracy(_features(model, data.test) @ kernel + bias, data.test.targets)
    return Source(name or data.name, data.train, data.test, kernel, bias, before)


def source_accuracy(model: keras.Model, source: Source) -> float:
    """Measure how well a network does the old task with the old task's head, in [0, 1].

    Args:
        model: The network, as it stands.
        source: From `source_probe`, before tuning.
    """
    return _accuracy(_features(model, source.test) @ source.kernel + source.bias, source.test.targets)


def forgetting(model: keras.Model, source: Source) -> Findings:
    """Compare what a tuned network knows of the old task with what it knew.

    Args:
        model: The tuned network.
        source: From `source_probe`, before tuning.

    Returns:
        A table, and a check without a verdict that carries the numbers.
    """
    targets, features = source.test.targets, _features(model, source.test)
    kernel, bias = _fitted(_features(model, source.examples), source.examples.targets, source.kernel.shape[1])
    after = _accuracy(features @ source.kernel + source.bias, targets)
    fitted_again = _accuracy(features @ kernel + bias, targets)
    rows = (
        ("its own head", _with_interval(source.before, targets), _with_interval(after, targets)),
        ("a head fitted again", _with_interval(source.before, targets), _with_interval(fitted_again, targets)),
    )
    table = Table(
        f"What is left of the old task ({source.name})",
        ("read by", "before", "after"),
        rows,
        note="Accuracy on the old task. The first row is what the network forgot; where the second stays "
        "high, its features still hold what the old head can no longer read.",
        section=OTHER,
        percent=("before", "after"),
    )
    metrics = {"before": source.before, "after": after, "after_fitted_again": fitted_again}
    return Findings(tables=(table,), checks=(Check("forgetting", None, metrics),))


def _with_interval(accuracy: float, targets: np.ndarray) -> Number:
    return proportion(round(accuracy * len(targets)), len(targets))


def _features(model: keras.Model, examples: Examples) -> np.ndarray:
    infer = constants.as_constant_function(prefix.body(model))
    return np.concatenate([infer(batch[0])[0].numpy() for batch in order.in_order(examples, 64)]).astype(np.float32)


def _fitted(features: np.ndarray, targets: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear head; centre and scale are folded into it."""
    probe, centre, length = fitted(features, targets)
    kernel = np.zeros((features.shape[1], classes), np.float32)
    bias = np.full(classes, -1e9, np.float32)  # a class without examples is never the answer
    if len(probe.classes_) == 2:  # scikit-learn fits one column for two classes
        coefficients, intercepts = np.concatenate([-probe.coef_, probe.coef_]) / 2, np.tile(probe.intercept_, 2) / 2
        intercepts[0] *= -1
    else:
        coefficients, intercepts = probe.coef_, probe.intercept_
    kernel[:, probe.classes_] = coefficients.T / length
    bias[probe.classes_] = intercepts - coefficients @ centre / length
    return kernel, bias


def _accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, axis=1) == targets))
