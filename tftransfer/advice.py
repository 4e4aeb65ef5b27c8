"""Choices that need the data: which layers to train, and at which learning rate. The test split is never looked at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, schedules, strategies, trainable, training
from tftransfer.checks import drawing
from tftransfer.data import Data, order
from tftransfer.errors import InputError, check
from tftransfer.report import CURVES, OTHER, Picture, Table
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task

_EXAMPLES = 512  # that gradients are measured on, at the most
_SMOOTHING = 0.9  # of the range test's losses, as in Smith's successors
_BREAKS_OUT = 4.0  # times the lowest loss


@dataclass(frozen=True)
class Advice:
    """A strategy that was chosen from the data.

    Args:
        strategy: What `fine_tune` takes.
        reasons: Why, in plain sentences. Defaults to none.
        table: The numbers behind them. Defaults to None.
        decision: What a run writes down, so that it decides the same when it goes on. Defaults to nothing.
    """

    strategy: Strategy
    reasons: tuple[str, ...] = ()
    table: Table | None = None
    decision: str = ""


@dataclass(frozen=True)
class Choice:
    """A strategy as the command line writes it, `surgical` included, which the data decide.

    Args:
        text: As for `strategies.parse`, or such as `"surgical:share=0.3"`.
        epochs, learning_rate: As for `strategies.parse`. Default to the strategy's own.
        patience: Of every phase; 0 leaves the strategy's own. Defaults to 0.

    Raises:
        InputError: If the name, an option or a value is not known.

    Example:
        >>> [phase.selector for phase in Choice("partial:last=3").planned]
        ['last:3']
    """

    text: str
    epochs: int | None = None
    learning_rate: float | None = None
    patience: int = 0

    def __post_init__(self) -> None:
        _ = self.planned  # refuses what is not known

    @property
    def asks_the_data(self) -> bool:
        """Whether the strategy depends on the data."""
        return asks_the_data(self.text)

    @property
    def planned(self) -> Strategy:
        """The strategy as far as the text decides it: for `surgical` every group trains."""
        if not self.asks_the_data:
            return self._patient(strategies.parse(self.text, self.epochs, self.learning_rate, also=("surgical",)))
        options, common = self._surgical_options()
        return self._patient(strategies.with_common(_surgical("all", **options).strategy, common))

    def __call__(
        self,
        model: keras.Model,
        task: Task,
        data: Data,
        *,
        seed: int = 0,
        batch_size: int = 32,
        max_steps: int | None = None,
        decided: str = "",
    ) -> Advice:
        """Settle the strategy.

        Args:
            model, task, data, seed, batch_size, max_steps: As for `surgical`.
            decided: The decision of an earlier call, to be kept. Defaults to none.
        """
        if not self.asks_the_data:
            return Advice(self.planned)
        options, common = self._surgical_options()
        if decided:
            advised = _surgical(decided, **options)
        else:
            advised = surgical(model, task, data, **options, seed=seed, batch_size=batch_size, max_steps=max_steps)
        return replace(advised, strategy=self._patient(strategies.with_common(advised.strategy, common)))

    def _surgical_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        own, common = strategies.options_of("surgical", surgical, self.text)
        return {**own, "epochs": self.epochs, "learning_rate": self.learning_rate}, common

    def _patient(self, strategy: Strategy) -> Strategy:
        return strategies.with_patience(strategy, self.patience) if self.patience else strategy


def asks_the_data(text: str) -> bool:
    """Whether a strategy of the command line is settled by looking at the data.

    Example:
        >>> asks_the_data("surgical:share=0.5"), asks_the_data("full")
        (True, False)
    """
    return text.partition(":")[0] == "surgical"


def surgical(
    model: keras.Model,
    task: Task,
    data: Data,
    share: float = 0.8,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
) -> Advice:
    """Choose what trains by relative gradient norm per depth group, after a probe.

    A group whose gradient is large against its weights does not fit the new task yet; it trains, the others stay. The
    smallest set of groups is taken that holds a given share of the sum.

    Args:
        model: From a builder; its weights and `trainable` flags are the same afterwards.
        task: What the outputs mean.
        data: Training examples decide, validation examples stop the probe; the test split is not looked at.
        share: Of the sum of relative gradient norms that the chosen groups hold, in (0, 1]. Defaults to 0.8.
        augmentation: Of the second phase. Defaults to `"strong"`.
        epochs, learning_rate: As for `strategies.discriminative`, whose second phase trains the chosen groups.
        seed: Of the probe. Defaults to 0.
        batch_size: Examples per step. Defaults to 32.
        max_steps: Of the probe, to try things out. Defaults to None: no bound.

    Returns:
        A probe followed by a phase that trains the chosen groups, the reasons, and the table.

    Source: Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv:2210.11466
    (Auto-RGN).
    """
    planned = _surgical("all", share, augmentation, epochs, learning_rate)
    norms = relative_gradient_norms(
        model, task, data, planned.strategy[0], seed=seed, batch_size=batch_size, max_steps=max_steps
    )
    chosen = _largest(norms, share)
    largest = max(norms, key=lambda name: norms[name])
    reasons = (
        f"After a probe the gradient is largest, against its weights, in {largest} ({norms[largest]:.3g}).",
        f"{len(chosen)} of {len(norms)} depth groups hold {share:.0%} of the sum, so they train and the rest stays: "
        f"{', '.join(chosen)}.",
    )
    rows = tuple((name, norm, "trains" if name in chosen else "stays") for name, norm in norms.items())
    table = Table(
        "Relative gradient norms after the probe", ("group", "gradient / weights", "so it"), rows, section=OTHER
    )
    decided = _surgical(f"groups:{'+'.join(chosen)}", share, augmentation, epochs, learning_rate)
    return replace(decided, reasons=reasons, table=table)


def _surgical(
    selector: str,
    share: float = 0.8,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Advice:
    """Return the strategy for groups that are decided."""
    check(0 < share <= 1, "share", "in (0, 1]", share)
    probe, tune = strategies.discriminative(augmentation=augmentation, epochs=epochs, learning_rate=learning_rate)
    tuned = replace(tune, name="surgical", selector=selector)
    kept = ("What trains was decided when this run began.",)
    return Advice((probe, tuned), kept, decision=selector)


def relative_gradient_norms(
    model: keras.Model,
    task: Task,
    data: Data,
    probe: Phase,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Return, for each depth group below the head, the norm of the gradient over that of the weights.

    Args:
        model: Its weights and `trainable` flags are the same afterwards.
        task, data: The training split is measured, 512 examples of it at the most.
        probe: The phase that fits the head first.
        seed, batch_size, max_steps: Of the probe.
    """
    norms = {}
    with _as_it_was(model):
        training.fine_tune(model, task, data, (probe,), seed=seed, batch_size=batch_size, max_steps=max_steps)
        trainable.set_trainable(model, "all")
        gradients = _gradients(model, task, data, batch_size, seed)
        for group in trainable.all_groups(model)[:-1]:
            variables = [v for name in group.layers for v in model.get_layer(name).weights if v.path in gradients]
            weights = math.sqrt(sum(float(np.square(v.numpy(), dtype=np.float64).sum()) for v in variables))
            gradient = math.sqrt(sum(float(np.square(gradients[v.path], dtype=np.float64).sum()) for v in variables))
            norms[group.name] = gradient / weights if weights else 0.0
    return norms


@contextlib.contextmanager
def _as_it_was(model: keras.Model) -> Iterator[None]:
    """Give a model its weights and `trainable` flags back, whatever happens inside."""
    weights, flags = model.get_weights(), [(layer, layer.trainable) for layer in model._flatten_layers()]
    try:
        yield
    finally:
        model.set_weights(weights)
        for layer, flag in flags:  # each after what holds it, which sets the flags of what it holds
            layer.trainable = flag


def _gradients(model: keras.Model, task: Task, data: Data, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """Return the mean gradient of the loss in inference mode: of kernels and the like, not of offsets."""
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    loss = task.loss(builders.outputs_are_logits(model), data.train.targets)

    @tf.function
    def gradient(pictures: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = loss(targets, model(pictures, training=False), sample_weight=weights)
        return [tf.convert_to_tensor(part) for part in tape.gradient(value, [v.value for v in variables])]

    steps = min(order.steps_per_epoch(len(data.train), batch_size), max(_EXAMPLES // batch_size, 1))
    sums = [np.zeros(v.shape, np.float32) for v in variables]
    batches = order.batches(data.train, batch_size, seed=seed, phase=0, steps=steps)
    traced = gradient.get_concrete_function(*batches.element_spec)
    for batch in batches:
        for total, part in zip(sums, traced(*batch), strict=True):
            total += part.numpy() / steps
    return {v.path: total for v, total in zip(variables, sums, strict=True)}


def _largest(norms: dict[str, float], share: float) -> list[str]:
    """Return the fewest names that hold a share of the sum, in the order of the network."""
    total, held, chosen = sum(norms.values()), 0.0, set()
    for name in sorted(norms, key=lambda name: -norms[name]):
        chosen.add(name)
        held += norms[name]
        if held >= share * total:
            break
    return [name for name in norms if name in chosen]


@dataclass(frozen=True)
class RateTest:
    """The outcome of a learning-rate range test.

    Args:
        rates: Learning rate of each step, rising.
        losses: Smoothed training loss of each step.
        suggestion: A tenth of the rate at which the loss is lowest: still falling steeply, well below where it
            breaks out.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float

    def picture(self) -> Picture:
        """Draw loss over learning rate, the suggestion marked."""
        drawn = drawing.figure(height=2.6)
        axes = drawing.style(drawn.subplots(), "learning rate", "training loss, smoothed")
        axes.set_xscale("log")
        axes.plot(self.rates, self.losses, color=drawing.BLUE, linewidth=1.5)
        axes.axvline(self.suggestion, color=drawing.ORANGE, linestyle="--", linewidth=1.5)
        caption = f"The dashed line marks {self.suggestion:.2g}, a tenth of the rate with the lowest loss."
        return Picture("Learning-rate range test", drawing.png(drawn), caption, CURVES)


def find_learning_rate(
    model: keras.Model,
    task: Task,
    data: Data,
    phase: Phase | None = None,
    *,
    high: float = 1.0,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> RateTest:
    """Raise the learning rate from step to step until the training loss breaks out, and suggest one well below.

    Args:
        model: Its weights and `trainable` flags are the same afterwards.
        task, data: Only training examples decide.
        phase: What trains and how; its own rate and schedule are not used. Defaults to everything, plainly.
        high: The last rate, above 0; the first is a millionth of it. Defaults to 1.
        steps: How many, at least 10; more than an epoch's are rounded to whole epochs. Defaults to 100.
        seed, batch_size: As for `fine_tune`.

    Returns:
        Rates, losses and the suggestion; `.picture().png` is a plot of them.

    Raises:
        InputError: If the very first loss is not finite.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.
    """
    check(math.isfinite(high) and high > 0, "high", "a number above 0", high)
    check(isinstance(steps, int) and steps >= 10, "steps", "a whole number from 10", steps)
    check(isinstance(batch_size, int) and batch_size >= 1, "batch_size", "a whole number from 1", batch_size)
    per_epoch = order.steps_per_epoch(len(data.train), batch_size)
    epochs = max(round(steps / per_epoch), 1)
    steps = min(steps, per_epoch) if epochs == 1 else epochs * per_epoch
    ranged = replace(
        phase or Phase("range test", "all"),
        schedule="exponential",
        learning_rate=high,
        warmup=0.0,
        epochs=epochs,
        patience=0,
        average=None,
    )
    watch = _BatchLosses(len(data.train), batch_size)
    with _as_it_was(model):
        training.fine_tune(
            model,
            task,
            data,
            (ranged,),
            callbacks=[watch],
            seed=seed,
            batch_size=batch_size,
            max_steps=steps if epochs == 1 else None,
        )
    if not watch.smoothed:
        raise InputError("the loss of the first step is not finite: look at the pictures, or at the network's outputs")
    rate = schedules.learning_rate(ranged, steps)
    rates = tuple(float(rate(step)) for step in range(len(watch.smoothed)))
    return RateTest(rates, tuple(watch.smoothed), rates[int(np.argmin(watch.smoothed))] / 10)


class _BatchLosses(keras.callbacks.Callback):
    """Collect each batch's loss, smoothed, from Keras' running means, and stop when it breaks out."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__()
        self._count, self._batch_size = count, batch_size
        self._sum = 0.0
        self._average = 0.0
        self.smoothed: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._sum = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        seen = min((batch + 1) * self._batch_size, self._count)
        total = (logs or {}).get("loss", math.nan) * seen
        loss = (total - self._sum) / (seen - batch * self._batch_size)
        self._sum = total
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING ** (len(self.smoothed) + 1))
        if not math.isfinite(smoothed) or (self.smoothed and smoothed > _BREAKS_OUT * min(self.smoothed)):
            self.model.stop_training = True
        else:
            self.smoothed.append(smoothed)
