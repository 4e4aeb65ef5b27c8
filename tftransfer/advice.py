"""Strategies that need the data: which layers to train, and how the head. The test split is never looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import keras

from tftransfer import distribution, head_search, inference, planning, prefix, strategies, suggestion, surgery
from tftransfer.data import Data
from tftransfer.errors import InputError, check
from tftransfer.report import OTHER, Table
from tftransfer.shelf import PathLike, shelf_at
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task

_DECIDED = "This was decided when the run began."


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
        cache_dir: PathLike | None = None,
        decided: str = "",
    ) -> Advice:
        """Settle the strategy.

        Args:
            model, task, data, seed, batch_size, max_steps, cache_dir: As for `fine_tune`.
            decided: The decision of an earlier call, to be kept. Defaults to none.

        Raises:
            InputError: If the network does not have what the strategy that is settled asks for.
        """
        if not self.asks_the_data:
            return Advice(self.planned)
        run = {"seed": seed, "batch_size": batch_size, "max_steps": max_steps, "cache_dir": cache_dir}
        advised = self.settled(decided) if decided else self._asked(model, task, data, run)
        planning.check_strategy(model, advised.strategy, task)
        return advised

    def _asked(self, model: keras.Model, task: Task, data: Data, run: dict[str, Any]) -> Advice:
        options, common = self._options()
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
        for name in self._asking.cannot:
            if name in common:
                raise InputError(
                    f"`strategy` {self._name} has no `{name}`: what it may choose, such as the head alone, could not "
                    f"use it; name a strategy. Received: {self.text!r}"
                )
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
    search: int = 0,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
    cache_dir: PathLike | None = None,
) -> Advice:
    """Choose what trains by relative gradient norm per depth group, after a probe.

    A group whose gradient is large against its weights does not fit the new task yet; it trains, the others stay. The
    smallest set of groups is taken that holds a given share of the sum; with `search`, the best of several in a trial.

    Args:
        model: From a builder; its weights and `trainable` flags are the same afterwards.
        task: What the outputs mean.
        data: Training examples decide, validation examples stop the probe and judge the trials; the test split is not
            looked at.
        share: Of the sum of relative gradient norms that the chosen groups hold, in (0, 1]. Defaults to 0.8.
        search: For how many epochs the sets of several shares are tried, without augmentation and so on features that
            are stored; 0 takes `share` alone. Defaults to 0.
        augmentation: Of the second phase. Defaults to `"strong"`.
        epochs, learning_rate: As for `strategies.discriminative`, whose second phase trains the chosen groups.
        seed, batch_size, max_steps, cache_dir: Of the probe and the trials, as for `fine_tune`.

    Returns:
        A probe followed by a phase that trains the chosen groups, the reasons, and the table.

    Source: Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv:2210.11466
    (Auto-RGN).
    """
    probe, tune = _surgical("", share, search, augmentation, epochs, learning_rate).strategy
    trial = replace(tune, epochs=search, augmentation="none") if search else None
    found = surgery.probe_and_measure(
        model,
        task,
        data,
        probe,
        trial=trial,
        share=share,
        seed=seed,
        batch_size=batch_size,
        max_steps=max_steps,
        cache_dir=cache_dir,
    )
    norms = found.norms
    chosen = found.tried[0].groups if found.tried else surgery.largest(norms, share)
    largest = max(norms, key=lambda name: norms[name])
    held = sum(norms[name] for name in chosen) / (sum(norms.values()) or 1.0)
    reasons = (
        f"After a probe the gradient is largest, against its weights, in {largest} ({norms[largest]:.3g}).",
        f"{len(chosen)} of {len(norms)} depth groups hold {held:.0%} of the sum, so they train and the rest stays: "
        f"{', '.join(chosen)}.",
        *_about_trials(found.tried, search),
    )
    rows = tuple((name, norm, "trains" if name in chosen else "stays") for name, norm in norms.items())
    table = Table(
        "Relative gradient norms after the probe", ("group", "gradient / weights", "so it"), rows, section=OTHER
    )
    decided = _surgical(f"groups:{'+'.join(chosen)}", share, search, augmentation, epochs, learning_rate)
    return replace(decided, reasons=reasons, table=table)


def _about_trials(tried: Sequence[surgery.Tried], epochs: int) -> tuple[str, ...]:
    if not tried:
        return ()
    losses = ", ".join(f"{len(one.groups)} groups {one.loss:.3g}" for one in tried)
    return (f"Of {len(tried)} sets of groups, tried for {epochs} epochs, it loses least on validation: {losses}.",)


def _surgical(
    decided: str,
    share: float = 0.8,
    search: int = 0,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Advice:
    """Return the strategy for groups that are decided; all of them before."""
    selector = decided or "all"
    check(0 < share <= 1, "share", "in (0, 1]", share)
    check(isinstance(search, int) and search >= 0, "search", "a whole number from 0", search)
    probe, tune = strategies.discriminative(augmentation=augmentation, epochs=epochs, learning_rate=learning_rate)
    tuned = replace(tune, name="surgical", selector=selector)
    return Advice((probe, tuned), (_DECIDED,), decision=selector)


def tuned_probe(
    model: keras.Model,
    task: Task,
    data: Data,
    augmentation: str = "none",
    views: int = 0,
    average_views: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
    cache_dir: PathLike | None = None,
) -> Advice:
    """Train the head alone, at the rate and weight decay that generalise best by cross-validation on its features.

    Use it where a few hundred examples are all there is: it costs seconds more than `linear_probe`.

    Args:
        model: From a builder; it is not changed.
        task: What the outputs mean.
        data: Training examples decide; the test split is not looked at.
        augmentation: One of `AUGMENTATIONS`; without `views` heads are tried on the pictures as they are. Defaults to
            `"none"`.
        views, average_views: As for `Phase`; heads are tried on the views that training sees. Default to new ones in
            each epoch.
        epochs: As for `linear_probe`.
        learning_rate: Peak rate; only the weight decay is then chosen. Defaults to None: chosen too.
        seed: Of folds and heads. Defaults to 0.
        batch_size: Examples per step. Defaults to 32.
        max_steps: One epoch in the search, to try things out. Defaults to None: all of them.
        cache_dir: Where features are kept, as for `fine_tune`. Defaults to None.

    Returns:
        A probe, the reasons, and the table of what was tried.

    Source: Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?", arXiv:1805.08974, whose probes choose
    their penalty so.
    """
    settle = partial(_tuned_probe, views=views, average_views=average_views, epochs=epochs, learning_rate=learning_rate)
    (phase,) = settle("", augmentation).strategy
    features = inference.pooled_features(
        prefix.body(model),
        data.train,
        augmentation=augmentation if views else "none",
        views=max(views, 1),
        seed=seed,
        chunk=_chunk(model, batch_size),
        shelf=shelf_at(cache_dir),
    )
    head = {layer.name: layer for layer in model.layers if layer.name in ("head_dropout", "head_units")}
    units = head.get("head_units")
    tried = head_search.search(
        features.values,
        data.train.targets,
        data.train.weights,
        task,
        phase if max_steps is None else replace(phase, epochs=1),
        rates=(learning_rate,) if learning_rate else head_search.RATES,
        dropout=head["head_dropout"].rate if "head_dropout" in head else 0.0,
        units=(units.scale, units.offset) if units else (1.0, 0.0),
        batch_size=batch_size,
        seed=seed,
    )
    best = tried[0]
    seen = f"{views} views of the training pictures" if views else "the training pictures"
    reasons = (
        f"Of {len(tried)} heads on features of {seen}, rate {best.learning_rate:g} and weight decay "
        f"{best.weight_decay:g} lose least on unseen folds, {best.loss:.3g} (standard error {best.error:.2g}).",
        *_not_as_trained(model, phase),
    )
    columns = ("learning rate", "weight decay", "loss on unseen folds", "standard error")
    table = Table("Heads tried on stored features", columns, tuple(map(astuple, tried)), section=OTHER)
    decision = f"learning_rate={best.learning_rate!r},weight_decay={best.weight_decay!r}"
    return replace(settle(decision, augmentation), reasons=reasons, table=table)


def _not_as_trained(model: keras.Model, phase: Phase) -> tuple[str, ...]:
    """Say where the heads that were tried differ from the one that will train."""
    said = []
    if phase.augmentation != "none" and not phase.views:
        said.append(
            "They saw the pictures as they are; training makes new views in each epoch, unless `views` are given."
        )
    if any(layer.name.startswith("head_hidden") for layer in model.layers):
        said.append("They were linear; the model's has hidden layers, which another rate and decay may suit better.")
    return tuple(said)


def _tuned_probe(
    decided: str,
    augmentation: str = "none",
    views: int = 0,
    average_views: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Advice:
    """Return the strategy for a head that is decided; `linear_probe`'s own before."""
    chosen = {name: float(value) for name, value in (part.split("=") for part in decided.split(",") if part)}
    rate = chosen.pop("learning_rate", learning_rate)
    (phase,) = strategies.linear_probe(**chosen, augmentation=augmentation, epochs=epochs, learning_rate=rate)
    tuned = replace(phase, name="tuned probe", views=views, average_views=average_views)
    return Advice((tuned,), (_DECIDED,), decision=decided)


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
    cache_dir: PathLike | None = None,
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
        seed, batch_size, max_steps, cache_dir: As for `tuned_probe`.

    Returns:
        The strategy that `suggestion.suggest` names, settled, the reasons, and the table of what was measured.

    Source: Kornblith et al. 2019, arXiv:1805.08974 (what a probe says); Kumar et al. 2022, arXiv:2202.10054 (probe
    first).
    """
    shelf, chunk = shelf_at(cache_dir), _chunk(model, batch_size)
    facts = suggestion.measure(prefix.body(model), task, data.train, seed=seed, chunk=chunk, shelf=shelf)
    found = suggestion.suggest(facts, epochs, batch_size)
    choice = Choice(found.strategy, found.epochs, learning_rate)
    settled = choice(model, task, data, seed=seed, batch_size=batch_size, max_steps=max_steps, cache_dir=cache_dir)
    chosen = f"Chosen: {found.strategy}, {choice.epochs} epochs."
    reasons = (chosen, *found.reasons, found.duration, *settled.reasons)
    decision = f"{choice.epochs} {found.strategy} {settled.decision}"
    return Advice(settled.strategy, reasons, suggestion.table(facts), decision)


def _chunk(model: keras.Model, batch_size: int) -> int:
    """Return how many examples training puts through the frozen part at once, so that it finds their features."""
    return inference.chunk_of(batch_size, distribution.strategy_of(model).num_replicas_in_sync)


def _auto(decided: str, epochs: int | None = None, learning_rate: float | None = None) -> Advice:
    """Return the strategy that is decided; the widest that could be before."""
    count, text, settled = decided.split(" ") if decided else (epochs, "freeze_then_unfreeze", "")
    choice = Choice(text, None if count is None else int(count), learning_rate)
    strategy = choice.settled(settled).strategy if settled else choice.planned
    return Advice(strategy, (_DECIDED,), decision=decided)


@dataclass(frozen=True)
class _Asking:
    """A strategy that asks the data.

    Args:
        ask: What asks them.
        settle: What it comes to once that is decided ("" before).
        cannot: Options of every strategy that not all it may come to could use. Defaults to none.
    """

    ask: Callable[..., Advice]
    settle: Callable[..., Advice]
    cannot: tuple[str, ...] = ()


_ASKING = {
    "surgical": _Asking(surgical, _surgical),
    "tuned_probe": _Asking(tuned_probe, _tuned_probe),
    "auto": _Asking(auto, _auto, ("views", "average_views", "cutmix", "stochastic_depth")),
}
