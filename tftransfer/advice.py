"""Strategies that need the data: which layers to train, and how the head. The test split is never looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, head_search, inference, prefix, strategies, suggestion, trainable, training
from tftransfer.data import Data, order
from tftransfer.errors import check
from tftransfer.report import OTHER, Table
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task

_DECIDED = "This was decided when the run began."
_EXAMPLES = 512  # that gradients are measured on, at the most


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
    """A strategy as the command line writes it, also one that the data decide.

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
            return self._patient(strategies.parse(self.text, self.epochs, self.learning_rate, also=tuple(_ASKING)))
        return self.settled("").strategy

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
            model, task, data, seed, batch_size, max_steps: As for `surgical` and the like.
            decided: The decision of an earlier call, to be kept. Defaults to none.
        """
        if not self.asks_the_data:
            return Advice(self.planned)
        options, common = self._options()
        if decided:
            return self.settled(decided)
        run = {"seed": seed, "batch_size": batch_size, "max_steps": max_steps}
        advised = self._asking.ask(model, task, data, **options, **run)
        return replace(advised, strategy=self._patient(strategies.with_common(advised.strategy, common)))

    def settled(self, decided: str) -> Advice:
        """Return what an earlier call came to, by its decision."""
        options, common = self._options()
        advised = self._asking.settle(decided, **options)
        return replace(advised, strategy=self._patient(strategies.with_common(advised.strategy, common)))

    @property
    def _name(self) -> str:
        return self.text.partition(":")[0]

    @property
    def _asking(self) -> _Asking:
        return _ASKING[self._name]

    def _options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        own, common = strategies.options_of(self._name, self._asking.ask, self.text)
        return {**own, "epochs": self.epochs, "learning_rate": self.learning_rate}, common

    def _patient(self, strategy: Strategy) -> Strategy:
        return strategies.with_patience(strategy, self.patience) if self.patience else strategy


def asks_the_data(text: str) -> bool:
    """Whether a strategy of the command line is settled by looking at the data.

    Example:
        >>> asks_the_data("surgical:share=0.5"), asks_the_data("full")
        (True, False)
    """
    return text.partition(":")[0] in _ASKING


def asking() -> tuple[Callable[..., Advice], ...]:
    """Return the strategies that are settled by looking at the data, as `strategies.describe` takes them."""
    return tuple(row.ask for row in _ASKING.values())


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
    planned = _surgical("", share, augmentation, epochs, learning_rate)
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
    decided: str,
    share: float = 0.8,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Advice:
    """Return the strategy for groups that are decided; all of them before."""
    selector = decided or "all"
    check(0 < share <= 1, "share", "in (0, 1]", share)
    probe, tune = strategies.discriminative(augmentation=augmentation, epochs=epochs, learning_rate=learning_rate)
    tuned = replace(tune, name="surgical", selector=selector)
    return Advice((probe, tuned), (_DECIDED,), decision=selector)


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
    with trainable.as_it_was(model):
        training.fine_tune(model, task, data, (probe,), seed=seed, batch_size=batch_size, max_steps=max_steps)
        trainable.set_trainable(model, "all")
        gradients = _gradients(model, task, data, batch_size, seed)
        for group in trainable.all_groups(model)[:-1]:
            variables = [v for name in group.layers for v in model.get_layer(name).weights if v.path in gradients]
            weights = math.sqrt(sum(float(np.square(v.numpy(), dtype=np.float64).sum()) for v in variables))
            gradient = math.sqrt(sum(float(np.square(gradients[v.path], dtype=np.float64).sum()) for v in variables))
            norms[group.name] = gradient / weights if weights else 0.0
    return norms


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


def tuned_probe(
    model: keras.Model,
    task: Task,
    data: Data,
    augmentation: str = "none",
    epochs: int | None = None,
    learning_rate: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
) -> Advice:
    """Train the head alone, at the rate and weight decay that generalise best by cross-validation on its features.

    Use it where a few hundred examples are all there is: it costs seconds more than `linear_probe`.

    Args:
        model: From a builder; it is not changed.
        task: What the outputs mean.
        data: Training examples decide; the test split is not looked at.
        augmentation: One of `AUGMENTATIONS`; best with `views`, which can be kept. Defaults to `"none"`.
        epochs: As for `linear_probe`.
        learning_rate: Peak rate; only the weight decay is then chosen. Defaults to None: chosen too.
        seed: Of folds and heads. Defaults to 0.
        batch_size: Examples per step. Defaults to 32.
        max_steps: Not more of them in the search, to try things out. Defaults to None: no bound.

    Returns:
        A probe, the reasons, and the table of what was tried.

    Source: Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?", arXiv:1805.08974, whose probes choose
    their penalty so.
    """
    (phase,) = _tuned_probe("", augmentation, epochs, learning_rate).strategy
    features = inference.pooled_features(keras.Model(model.inputs, prefix.features(model)), data.train)
    dropout = [layer.rate for layer in model.layers if layer.name == "head_dropout"]
    tried = head_search.search(
        features.values[0],
        data.train.targets,
        data.train.weights,
        task,
        phase if max_steps is None else replace(phase, epochs=1),
        rates=(learning_rate,) if learning_rate else head_search.RATES,
        dropout=dropout[0] if dropout else 0.0,
        batch_size=batch_size,
        seed=seed,
    )
    best = tried[0]
    reasons = (
        f"Of {len(tried)} heads on features of the training pictures, rate {best.learning_rate:g} and weight decay "
        f"{best.weight_decay:g} lose least on unseen folds, {best.loss:.3g} (standard error {best.error:.2g}).",
    )
    columns = ("learning rate", "weight decay", "loss on unseen folds", "standard error")
    table = Table("Heads tried on stored features", columns, tuple(map(astuple, tried)), section=OTHER)
    decision = f"learning_rate={best.learning_rate!r},weight_decay={best.weight_decay!r}"
    return replace(_tuned_probe(decision, augmentation, epochs, learning_rate), reasons=reasons, table=table)


def _tuned_probe(
    decided: str, augmentation: str = "none", epochs: int | None = None, learning_rate: float | None = None
) -> Advice:
    """Return the strategy for a head that is decided; `linear_probe`'s own before."""
    chosen = {name: float(value) for name, value in (part.split("=") for part in decided.split(",") if part)}
    rate = chosen.pop("learning_rate", learning_rate)
    (phase,) = strategies.linear_probe(**chosen, augmentation=augmentation, epochs=epochs, learning_rate=rate)
    return Advice((replace(phase, name="tuned probe"),), (_DECIDED,), decision=decided)


def auto(
    model: keras.Model,
    task: Task,
    data: Data,
    epochs: int | None = None,
    learning_rate: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
) -> Advice:
    """Let the data choose: the head alone where that is enough or all there is to learn from, else probe and tune.

    Use it where you do not know; it says why, and what to write instead. `tftransfer suggest` also chooses the network
    and the size of the pictures.

    Args:
        model: From a builder, with pretrained weights; it is not changed.
        task: What the outputs mean.
        data: Training examples decide; no other split is looked at.
        epochs: Total passes. Defaults to what the number of examples suggests.
        learning_rate: As for the strategy that is chosen.
        seed, batch_size, max_steps: As for `tuned_probe`.

    Returns:
        The strategy that `suggestion.suggest` names, settled, the reasons, and the table of what was measured.

    Source: Kornblith et al. 2019, arXiv:1805.08974 (what a probe says); Kumar et al. 2022, arXiv:2202.10054 (probe
    first).
    """
    facts = suggestion.measure(suggestion.network_below(model), task, data.train, seed=seed)
    found = suggestion.suggest(facts)
    choice = Choice(found.strategy, epochs or found.epochs, learning_rate)
    settled = choice(model, task, data, seed=seed, batch_size=batch_size, max_steps=max_steps)
    minutes = () if found.minutes is None else (f"Training is expected to take {found.minutes:.1f} minutes.",)
    reasons = (f"Chosen: {found.strategy}, {choice.epochs} epochs.", *found.reasons, *minutes, *settled.reasons)
    decision = f"{choice.epochs} {found.strategy} {settled.decision}"
    return Advice(settled.strategy, reasons, suggestion.table(facts), decision)


def _auto(decided: str, epochs: int | None = None, learning_rate: float | None = None) -> Advice:
    """Return the strategy that is decided; the widest that could be before."""
    count, text, settled = decided.split(" ") if decided else (epochs, "freeze_then_unfreeze", "")
    choice = Choice(text, None if count is None else int(count), learning_rate)
    strategy = choice.settled(settled).strategy if settled else choice.planned
    return Advice(strategy, (_DECIDED,), decision=decided)


@dataclass(frozen=True)
class _Asking:
    """A strategy that asks the data: what asks them, and what it comes to once that is decided ("" before)."""

    ask: Callable[..., Advice]
    settle: Callable[..., Advice]


_ASKING = {
    "surgical": _Asking(surgical, _surgical),
    "tuned_probe": _Asking(tuned_probe, _tuned_probe),
    "auto": _Asking(auto, _auto),
}
