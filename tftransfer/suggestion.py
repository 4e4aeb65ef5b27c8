"""What to train for a data set, and how: measured facts, and the rules that follow from them in plain sentences.

The facts come from features of the frozen network, which are computed in seconds: what a linear model makes of them on
examples that it has not seen, what it makes of features that nobody trained, and whether it still knows the pictures
mirrored. The untrained features are those of random filters (Saxe et al. 2011, "On Random Weights and Unsupervised
Feature Learning"), and plain pixels. They stand for the same network with random weights, whose BatchNorm would have to
be estimated first: to make it and run it takes longer than all else that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

from tftransfer import inference, transferability
from tftransfer.data import Examples, order
from tftransfer.report import OTHER, Table
from tftransfer.shelf import Shelf
from tftransfer.tasks import Task

_FEW = 8  # examples of the smallest class below which only a head is trained
_STEPS = 225  # over all epochs, below which a tuned head is ahead of a probe and then everything, see `_why_the_head`
_MISTAKES = 3  # of the probe, below which there is nothing left to gain
_SIDE = 8  # pixels of the thumbnails that stand for no network at all
_FILTERS, _SEEN_BY_FILTERS = 128, 32  # how many random ones, and the side of the thumbnails that they see
_COMPONENTS = 64  # of what they find
_SEEN = 60_000  # examples, over all epochs, that are enough
_EPOCHS = (10, 27)  # of which a third for the head: so that no more than the 20 of `full` train everything
_BACKWARD = 5.0  # how many times longer a training step takes than the graph of constants, by benchmarks
_SPREAD = 2.0  # standard errors that are more than chance


@dataclass(frozen=True)
class Facts:
    """What was measured of a network and a training split.

    Args:
        examples: How many.
        smallest: Of them in the rarest class; None unless each has one class.
        metric: The task's main metric, in which the next four are; larger is better for all but an error.
        probe: Of a linear model on the network's features, cross-validated.
        random: The same of what random filters find in each quarter of a picture, without a network.
        pixels: The same of 8x8 pixels.
        mirrored: The same as `probe` on mirrored pictures, by its models.
        logme: Of the network's features, see `transferability.logme`; it compares networks on the same examples.
        error: Standard error of `probe`; None unless each example has one class.
        milliseconds: What one picture takes as constants, measured on the mirrored ones, which are never in files.
    """

    examples: int
    smallest: int | None
    metric: str
    probe: float
    random: float
    pixels: float
    mirrored: float
    logme: float
    error: float | None
    milliseconds: float


@dataclass(frozen=True)
class Suggestion:
    """What to do.

    Args:
        strategy: As `--strategy` takes it.
        epochs: Over all phases.
        batch_size: Examples per step.
        minutes: What training is expected to take on this machine.
        reasons: Why, in plain sentences.
    """

    strategy: str
    epochs: int
    batch_size: int
    minutes: float
    reasons: tuple[str, ...]

    @property
    def duration(self) -> str:
        """The minutes as a sentence."""
        return f"Training is expected to take {self.minutes:.1f} minutes."


def measure(
    network: keras.Model,
    task: Task,
    examples: Examples,
    *,
    seed: int = 0,
    chunk: int = 32,
    shelf: Shelf | None = None,
) -> Facts:
    """Look at a training split with a frozen network.

    Args:
        network: Headless, such as `prefix.body` of a builder's model.
        task: What the targets mean.
        examples: The training split.
        seed: Of folds. Defaults to 0.
        chunk: As for `inference.pooled_features`. Defaults to 32.
        shelf: Where features are kept for later. Defaults to None.
    """
    pooled = inference.Pooled(network, chunk)
    found, other = pooled(examples, shelf=shelf), pooled(_mirrored(examples))
    targets, single = examples.targets, examples.targets.ndim == 1
    own, flipped = transferability.probe_on((found.values[0], other.values[0]), targets, seed=seed)
    filtered, thumbnails = _untrained(examples, seed)
    plain = (transferability.probe(part, targets, seed=seed) for part in (_reduced(filtered, seed), thumbnails))
    score, mirrored, random, pixels = (
        task.measure(targets, one)[task.main_metric] or 0.0 for one in (own, flipped, *plain)
    )
    return Facts(
        len(examples),
        int(np.bincount(targets)[np.unique(targets)].min()) if single else None,
        task.main_metric,
        score,
        random,
        pixels,
        mirrored,
        transferability.logme(found.values[0], targets),
        math.sqrt(max(score * (1 - score), 1 / len(examples)) / len(examples)) if single else None,
        other.milliseconds or 0.0,
    )


def suggest(facts: Facts, epochs: int | None = None, batch_size: int | None = None) -> Suggestion:
    """Choose strategy, epochs and batch size by what was measured.

    Args:
        facts: From `measure`.
        epochs: How many there shall be. Defaults to what the number of examples suggests.
        batch_size: Examples per step. Defaults to what that number suggests.

    Example:
        >>> facts = Facts(500, 100, "accuracy", 0.85, 0.55, 0.4, 0.85, 0.2, 0.016, 3.0)
        >>> suggest(facts).strategy, suggest(facts).epochs
        ('freeze_then_unfreeze:augmentation=light', 27)
    """
    flips, about_flips = _flips(facts)
    said = (
        f"A linear model on the frozen network's features reaches {facts.metric} {facts.probe:.3f} on examples that it "
        f"has not seen{_worth(facts)}.",
    )
    epochs, batch_size = epochs or _epochs(facts), batch_size or _batch_size(facts)
    why = _why_the_head(facts, epochs, batch_size)
    if why:
        return Suggestion("tuned_probe", epochs, batch_size, _minutes(facts, 1.0), (*said, why))
    strategy = f"freeze_then_unfreeze:augmentation={'light' if flips else 'light_no_flip'}"
    why = (
        "There is more to gain: first the head is trained, a third of the epochs, and from there everything, which "
        "costs less than to train everything from the beginning and spoils less of what the network knows."
    )
    minutes = _minutes(facts, 1.0 + _BACKWARD * epochs * 2 / 3)
    return Suggestion(strategy, epochs, batch_size, minutes, (*said, why, about_flips))


def _why_the_head(facts: Facts, epochs: int, batch_size: int) -> str:
    """Say why no more than the head is to be trained; nothing if more is.

    On folds of four data sets with `MobileNet-0.25` a tuned head was ahead of a probe and then everything at up to 156
    steps (by 3 points on average) and behind from 300 (by 6); it costs a fifth.
    """
    chosen = "than the head, whose rate and weight decay are chosen by cross-validation."
    if facts.smallest is not None and facts.smallest < _FEW:
        size = "one example" if facts.smallest == 1 else f"{facts.smallest} examples"
        return f"The smallest class has {size}: too few to train more {chosen}"
    if _is_solved(facts):
        return "That is all but every one of them: only the head is trained, and more would cost more for nothing."
    steps = epochs * math.ceil(facts.examples / batch_size)
    if steps < _STEPS:
        return f"{epochs} epochs are {steps} steps of {batch_size} examples: too few to train more {chosen}"
    return ""


def choose(several: Sequence[Facts]) -> tuple[int, str]:
    """Choose among networks and sizes of pictures: the fastest of those that the best is not better than by chance.

    Args:
        several: One for each, of the same examples.

    Returns:
        Its place, and why, as the end of a sentence.

    Example:
        >>> large = Facts(500, 100, "accuracy", 0.86, 0.55, 0.4, 0.85, 0.2, 0.016, 9.0)
        >>> choose([large, replace(large, probe=0.85, milliseconds=3.0)])[0]
        1
    """
    sign = -1 if "error" in several[0].metric else 1
    best = max(range(len(several)), key=lambda place: sign * several[place].probe)
    if len(several) == 1:
        return best, "nothing else was given."
    slack = several[best].error or 0.0
    good = [place for place, one in enumerate(several) if sign * (several[best].probe - one.probe) <= slack]
    fastest = min(good, key=lambda place: (several[place].milliseconds, place != best))
    if fastest == best:
        return best, f"its features serve a linear model best, {several[best].metric} {several[best].probe:.3f}."
    return fastest, (
        f"its features serve a linear model as well as the best ({several[fastest].probe:.3f} against "
        f"{several[best].probe:.3f}, standard error {slack:.3f}), and take {several[fastest].milliseconds:.1f} instead "
        f"of {several[best].milliseconds:.1f} milliseconds."
    )


def table(facts: Facts) -> Table:
    """Show what was measured."""
    shown: Sequence[tuple[str, object]] = (
        ("training examples", facts.examples),
        ("of the rarest class", facts.smallest),
        (f"{facts.metric}, linear model on features", facts.probe),
        (f"{facts.metric}, the same on mirrored pictures", facts.mirrored),
        (f"{facts.metric}, linear model on random filters", facts.random),
        (f"{facts.metric}, linear model on 8x8 pixels", facts.pixels),
        ("LogME of the features", facts.logme),
        ("milliseconds per picture, frozen", facts.milliseconds),
    )
    rows = tuple((name, value) for name, value in shown if value is not None)
    return Table("What the suggestion is based on", ("measured on the training split", "value"), rows, section=OTHER)


def _worth(facts: Facts) -> str:
    """Say what the network's features are worth, as the end of a sentence."""
    if "error" in facts.metric:
        return f", on those of random filters {facts.random:.3f}, on 8x8 pixels {facts.pixels:.3f}"
    filters, pixels = (100 * (facts.probe - other) for other in (facts.random, facts.pixels))
    return (
        f": {abs(filters):.1f} points {'more' if filters >= 0 else 'less'} than on those of random filters "
        f"({facts.random:.3f}), {abs(pixels):.1f} {'more' if pixels >= 0 else 'less'} than on 8x8 pixels "
        f"({facts.pixels:.3f})"
    )


def _is_solved(facts: Facts) -> bool:
    """Whether the probe makes hardly a mistake; numbers are never right."""
    return facts.error is not None and (1 - facts.probe) * facts.examples < _MISTAKES


def _flips(facts: Facts) -> tuple[bool, str]:
    """Whether mirrored pictures are the same thing, and how one sees that."""
    loss = facts.mirrored - facts.probe if "error" in facts.metric else facts.probe - facts.mirrored
    error = 0.02 * abs(facts.probe) if facts.error is None else facts.error
    least = 0.0 if "error" in facts.metric else 0.02  # an error may have any unit
    if loss > max(_SPREAD * error, least):
        return False, f"Mirrored pictures are known less well ({facts.mirrored:.3f}), so none is mirrored in training."
    return True, f"Mirrored pictures are known as well ({facts.mirrored:.3f}), so half are mirrored in training."


def _epochs(facts: Facts) -> int:
    return min(max(round(_SEEN / facts.examples), _EPOCHS[0]), _EPOCHS[1])


def _batch_size(facts: Facts) -> int:
    """Return examples per step; never fewer than go through a frozen network at once, so that features are found."""
    return 32 if facts.examples < 20_000 else 64


def _minutes(facts: Facts, passes: float) -> float:
    """Return what so many passes of constants over the examples take."""
    return passes * facts.examples * facts.milliseconds / 60_000


def _mirrored(examples: Examples) -> Examples:
    """Return the examples with left and right exchanged; of other content, so that no features are confused."""
    load = examples.pictures.load
    pictures = replace(examples.pictures, load=lambda index: tf.reverse(load(index), [-2]), digests=())
    return replace(examples, pictures=pictures)


def _untrained(examples: Examples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what random filters find in each quarter of each picture, and its 8x8 pixels, a row each."""
    filters = tf.random.stateless_normal((6, 6, 3, _FILTERS), (seed, 0))
    filters -= tf.reduce_mean(filters, axis=(0, 1, 2))  # blind to brightness
    found = []
    for batch in order.in_order(examples, 64):
        small = tf.image.resize(batch[0], (_SEEN_BY_FILTERS, _SEEN_BY_FILTERS), method="area") / 255
        maps = tf.nn.relu(tf.nn.conv2d(small, filters, strides=2, padding="VALID"))
        quarters = tf.nn.avg_pool2d(maps, maps.shape[1] // 2, maps.shape[1] // 2, "VALID")
        pixels = tf.image.resize(batch[0], (_SIDE, _SIDE), method="area")
        found.append([tensor.numpy().reshape(len(tensor), -1) for tensor in (quarters, pixels)])
    random, plain = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return random, plain


def _reduced(features: np.ndarray, seed: int) -> np.ndarray:
    """Return the principal components, on which a linear model is fitted ten times as fast; of few examples, all."""
    if len(features) < 8 * _COMPONENTS:
        return features
    return PCA(_COMPONENTS, svd_solver="randomized", random_state=seed).fit_transform(features)
