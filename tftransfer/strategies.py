"""Fine-tuning strategies as data: a strategy is a tuple of phases, and a phase is one row."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from tftransfer.errors import InputError, nearest

SCHEDULES = ("cosine", "constant")
AUGMENTATIONS = ("none", "light", "strong", "light_no_flip", "strong_no_flip")  # `data.augment` says what they do


@dataclass(frozen=True)
class Phase:
    """One stretch of training in which the same variables train.

    Args:
        name: What tables and logs call it.
        selector: What trains, see `set_trainable`. Defaults to `"head"`.
        epochs: Passes over the training split, at least 1. Defaults to 10.
        learning_rate: Peak learning rate, above 0. Defaults to 1e-3.
        layer_decay: Factor on the learning rate per depth group below the head, in (0, 1]. Defaults to 1.
        schedule: `"cosine"` (down to zero) or `"constant"`. Defaults to `"cosine"`.
        warmup: Share of the phase's steps in which the rate rises from zero, in [0, 1). Defaults to 0.1.
        weight_decay: Decoupled weight decay of AdamW, from 0. Defaults to 1e-4.
        augmentation: One of `AUGMENTATIONS`. Defaults to `"none"`.
        patience: Epochs without a better validation loss before the phase ends; 0 for never. Defaults to 0.
        averaging: Epochs over which the weights are averaged: validation and the result use an exponential moving
            average that forgets at this pace (Polyak & Juditsky 1992, doi:10.1137/0330046). Defaults to 0: none.
        train_batch_norm: Whether BatchNorm's statistics move in the layers that train. Defaults to False.

    Example:
        >>> Phase("probe", epochs=5).selector
        'head'
    """

    name: str
    selector: str = "head"
    epochs: int = 10
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    augmentation: str = "none"
    patience: int = 0
    averaging: float = 0.0
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        _check(isinstance(self.epochs, int) and self.epochs >= 1, "epochs", "a whole number from 1", self.epochs)
        positive = math.isfinite(self.learning_rate) and self.learning_rate > 0
        _check(positive, "learning_rate", "a number above 0", self.learning_rate)
        _check(0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]", self.layer_decay)
        _check(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        known = f"one of {', '.join(AUGMENTATIONS)}"
        _check(self.augmentation in AUGMENTATIONS, "augmentation", known, self.augmentation)
        _check(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        _check(self.weight_decay >= 0, "weight_decay", "a number from 0", self.weight_decay)
        _check(self.patience >= 0, "patience", "a whole number from 0", self.patience)
        averages = math.isfinite(self.averaging) and self.averaging >= 0
        _check(averages, "averaging", "a number of epochs from 0", self.averaging)


Strategy = tuple[Phase, ...]


def linear_probe(epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Train the head alone: the strongest choice for a handful of examples, and the cheapest.

    Args:
        epochs: Total passes over the training split. Defaults to 30.
        learning_rate: Peak rate of the last phase. Defaults to 1e-2.

    Example:
        >>> [phase.selector for phase in linear_probe()]
        ['head']
    """
    return _scaled((Phase("linear probe", "head", 30, 1e-2, weight_decay=1.0),), epochs, learning_rate)


def full(
    layer_decay: float = 1.0,
    augmentation: str = "light",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Train everything at once: for many examples, or a task far from the backbone's.

    Args:
        layer_decay: Factor on the rate per depth group below the head, in (0, 1]. Defaults to 1.
        augmentation: One of `AUGMENTATIONS`. Defaults to `"light"`.
        epochs: Total passes over the training split. Defaults to 20.
        learning_rate: Peak rate. Defaults to 1e-3.

    Example:
        >>> [phase.selector for phase in full()]
        ['all']
    """
    return _scaled((Phase("full", "all", 20, 1e-3, layer_decay, augmentation=augmentation),), epochs, learning_rate)


def partial(
    last: int = 2,
    augmentation: str = "light",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Train the head and the topmost depth groups: between a probe and full fine-tuning.

    Args:
        last: How many depth groups of the backbone train, at least 1. Defaults to 2.
        augmentation: One of `AUGMENTATIONS`. Defaults to `"light"`.
        epochs: Total passes over the training split. Defaults to 20.
        learning_rate: Peak rate. Defaults to 1e-3.

    Example:
        >>> [phase.selector for phase in partial(last=3)]
        ['last:3']
    """
    _check(isinstance(last, int) and last >= 1, "last", "a whole number from 1", last)
    return _scaled((Phase("partial", f"last:{last}", 20, 1e-3, augmentation=augmentation),), epochs, learning_rate)


def freeze_then_unfreeze(
    augmentation: str = "strong", epochs: int | None = None, learning_rate: float | None = None
) -> Strategy:
    """Probe first, then train everything from there: a good default from a few hundred examples up.

    Starting from a trained head keeps the first steps from spoiling the features.

    Args:
        augmentation: One of `AUGMENTATIONS`, for the second phase. Defaults to `"strong"`.
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase; the probe's is 18 times as high. Defaults to 5e-4.

    Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features" (LP-FT), arXiv:2202.10054.

    Example:
        >>> [(phase.selector, phase.epochs) for phase in freeze_then_unfreeze(epochs=6)]
        [('head', 2), ('all', 4)]
    """
    probe = Phase("probe", "head", 10, 9e-3, weight_decay=1.0)
    tune = Phase(
        "fine-tune", "all", 20, 5e-4, layer_decay=0.9, weight_decay=0.05, augmentation=augmentation, averaging=4.0
    )
    return _scaled((probe, tune), epochs, learning_rate)


_NAMED: dict[str, Callable[..., Strategy]] = {
    "linear_probe": linear_probe,
    "full": full,
    "partial": partial,
    "freeze_then_unfreeze": freeze_then_unfreeze,
}


def names() -> tuple[str, ...]:
    """Name the strategies that the command line knows."""
    return tuple(_NAMED)


def parse(text: str, epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Read a strategy as the command line writes it: `NAME` or `NAME:OPTION=VALUE,...`.

    Args:
        text: For instance `"partial:last=3"`.
        epochs: Total epochs, shared out by the phases' own. Defaults to the strategy's.
        learning_rate: Peak rate of the last phase; earlier ones keep their ratio to it. Defaults to the strategy's.

    Raises:
        InputError: If the name, an option or a value is not known.

    Example:
        >>> parse("partial:last=3", epochs=4)[0].epochs
        4
    """
    name, _, options = text.partition(":")
    if name not in _NAMED:
        raise InputError(
            f"`strategy` must be one of {', '.join(_NAMED)}.{nearest(name, _NAMED)} Received: strategy={text!r}"
        )
    function = _NAMED[name]
    parameters = inspect.signature(function).parameters.values()
    types = {option.name: _TYPES[option.annotation] for option in parameters if option.name not in _SHARED_OPTIONS}
    chosen = dict(_option(name, part, types) for part in options.split(",") if part)
    return function(**chosen, epochs=epochs, learning_rate=learning_rate)


def with_epochs(strategy: Strategy, total: int) -> Strategy:
    """Share a number of epochs out over the phases in proportion to their own, at least one each.

    Raises:
        InputError: If there are fewer epochs than phases.

    Example:
        >>> [phase.epochs for phase in with_epochs(freeze_then_unfreeze(), 10)]
        [4, 6]
    """
    if not isinstance(total, int) or total < len(strategy):
        raise InputError(
            f"`epochs` must be a whole number from {len(strategy)}, one for each phase. Received: epochs={total!r}"
        )
    spare, weight = total - len(strategy), sum(phase.epochs for phase in strategy)
    exact = [spare * phase.epochs / weight for phase in strategy]
    given = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(strategy)), key=lambda i: given[i] - exact[i])
    for i in by_remainder[: spare - sum(given)]:
        given[i] += 1
    return tuple(dataclasses.replace(phase, epochs=1 + extra) for phase, extra in zip(strategy, given, strict=True))


def with_learning_rate(strategy: Strategy, rate: float) -> Strategy:
    """Set the last phase's peak learning rate; the earlier ones keep their ratio to it.

    Example:
        >>> [round(phase.learning_rate, 6) for phase in with_learning_rate(freeze_then_unfreeze(), 0.001)]
        [0.018, 0.001]
    """
    _check(math.isfinite(rate) and rate > 0, "learning_rate", "a number above 0", rate)
    factor = rate / strategy[-1].learning_rate
    return tuple(dataclasses.replace(phase, learning_rate=phase.learning_rate * factor) for phase in strategy)


def with_patience(strategy: Strategy, patience: int) -> Strategy:
    """Let every phase end early, after so many epochs without a lower validation loss.

    Example:
        >>> [phase.patience for phase in with_patience(freeze_then_unfreeze(), 3)]
        [3, 3]
    """
    return tuple(dataclasses.replace(phase, patience=patience) for phase in strategy)


_SHARED_OPTIONS = ("epochs", "learning_rate")
_TYPES = {"int": int, "float": float, "str": str}  # of an option, by its annotation


def _scaled(strategy: Strategy, epochs: int | None, learning_rate: float | None) -> Strategy:
    if epochs is not None:
        strategy = with_epochs(strategy, epochs)
    return strategy if learning_rate is None else with_learning_rate(strategy, learning_rate)


def _option(strategy: str, part: str, types: dict[str, type]) -> tuple[str, int | float | str]:
    name, _, value = part.partition("=")
    if name not in types:
        has = f"has the options {', '.join(types)}" if types else "has no options"
        raise InputError(f"`strategy` {strategy} {has}.{nearest(name, types)} Received: {part!r}")
    try:
        return name, types[name](value)
    except ValueError:
        kind = "a whole number" if types[name] is int else "a number"
        raise InputError(f"`strategy` {strategy}: `{name}` must be {kind}. Received: {part!r}") from None


def _check(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"`{name}` must be {expected}. Received: {name}={value!r}")
