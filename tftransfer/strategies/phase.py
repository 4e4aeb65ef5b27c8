"""A phase: one row of a strategy, and what can be done to several rows at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tftransfer.adapters import Lora
from tftransfer.averages import Ema, WiseFt
from tftransfer.errors import InputError, check, is_number
from tftransfer.penalties import EWC, L2SP, DistillFromSource

SCHEDULES = ("cosine", "one_cycle", "constant", "exponential")
OPTIMIZERS = ("adamw", "sgd")
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
        schedule: `"cosine"` (up from zero, down to zero), `"one_cycle"` (up from a 25th of the peak along a cosine,
            down to zero along another), `"constant"` (after the warm-up) or `"exponential"` (up from a millionth of
            the peak, for a range test). Defaults to `"cosine"`.
        warmup: Share of the phase's steps in which the rate rises, in [0, 1). Defaults to 0.1.
        weight_decay: Decoupled weight decay per unit of learning rate, from 0. Defaults to 1e-4.
        augmentation: One of `AUGMENTATIONS`. Defaults to `"none"`.
        views: How many different augmented views of each example there are, in turn, so that what is frozen is computed
            once per view; 0 for a new view each epoch. Defaults to 0.
        average_views: Whether each step sees all views of its examples, not one in turn, and takes the mean of their
            losses: gradients are steadier, and a step costs as many times more. Defaults to False.
        patience: Epochs without a better validation loss before the phase ends; 0 for never. Defaults to 0.
        optimizer: `"adamw"` or `"sgd"` (momentum 0.9). Defaults to `"adamw"`.
        mixup, cutmix: Parameter of the Beta distribution by which examples are mixed, see `mixing.mix`; 0 for off.
            Where both are given, a coin decides in each step. Default to 0.
        stochastic_depth: Share of examples for which the topmost residual branch is left out in a step, falling to
            zero at the bottom, in [0, 1). Defaults to 0.
        adapter: `Lora(...)`, trained instead of the kernels, with the head; merged when the last phase ends. Defaults
            to None.
        penalty: `L2SP(...)`, `EWC(...)` or `DistillFromSource(...)`. Defaults to None.
        average: `Ema(...)` or `WiseFt(...)`. Defaults to None.
        carry_moments: Whether the optimizer begins with the moments of the phase before. Defaults to False.
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
    views: int = 0
    average_views: bool = False
    patience: int = 0
    optimizer: str = "adamw"
    mixup: float = 0.0
    cutmix: float = 0.0
    stochastic_depth: float = 0.0
    adapter: Lora | None = None
    penalty: L2SP | EWC | DistillFromSource | None = None
    average: Ema | WiseFt | None = None
    carry_moments: bool = False
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        check(isinstance(self.epochs, int) and self.epochs >= 1, "epochs", "a whole number from 1", self.epochs)
        _check_rate(self.learning_rate)
        decays = is_number(self.layer_decay) and 0 < self.layer_decay <= 1
        check(decays, "layer_decay", "in (0, 1]", self.layer_decay)
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("augmentation", AUGMENTATIONS)):
            value = getattr(self, name)
            check(value in known, name, f"one of {', '.join(known)}", value)
        for name in ("warmup", "stochastic_depth"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < 1, name, "in [0, 1)", value)
        for name in ("weight_decay", "mixup", "cutmix"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, "a number from 0", value)
        if self.adapter:
            where = '"head" where an adapter changes what is below'
            check(self.selector == "head", "selector", where, self.selector)
            check(self.penalty is None, "penalty", "left out beside an adapter, which holds the base by itself", "one")
            check(not isinstance(self.average, WiseFt), "average", "None or `Ema` beside an adapter", self.average)
        check(isinstance(self.views, int) and self.views >= 0, "views", "a whole number from 0", self.views)
        seen = "0 where nothing is augmented: give an `augmentation` too"
        check(not self.views or self.augmentation != "none", "views", seen, self.views)
        alone = "False where there are fewer than two views: give `views` from 2 too"
        check(not self.average_views or self.views >= 2, "average_views", alone, self.average_views)
        check(isinstance(self.patience, int) and self.patience >= 0, "patience", "a whole number from 0", self.patience)

    def to_json(self) -> dict[str, Any]:
        """Describe the phase for `report.json`: adapter, penalty and average with their kind."""
        parts = {name: getattr(self, name) for name in ("adapter", "penalty", "average")}
        kinds = {
            name: {"kind": type(part).__name__, **dataclasses.asdict(part)} for name, part in parts.items() if part
        }
        return {**dataclasses.asdict(self), **kinds}


Strategy = tuple[Phase, ...]


def with_epochs(strategy: Strategy, total: int) -> Strategy:
    """Share a number of epochs out over the phases in proportion to their own, at least one each.

    Raises:
        InputError: If there are fewer epochs than phases.

    Example:
        >>> from tftransfer.strategies import freeze_then_unfreeze
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
        >>> from tftransfer.strategies import freeze_then_unfreeze
        >>> [round(phase.learning_rate, 6) for phase in with_learning_rate(freeze_then_unfreeze(), 0.001)]
        [0.018, 0.001]
    """
    _check_rate(rate)
    factor = rate / strategy[-1].learning_rate
    return tuple(dataclasses.replace(phase, learning_rate=phase.learning_rate * factor) for phase in strategy)


def with_patience(strategy: Strategy, patience: int) -> Strategy:
    """Let every phase end early, after so many epochs without a lower validation loss.

    Example:
        >>> from tftransfer.strategies import freeze_then_unfreeze
        >>> [phase.patience for phase in with_patience(freeze_then_unfreeze(), 3)]
        [3, 3]
    """
    return tuple(dataclasses.replace(phase, patience=patience) for phase in strategy)


def scaled(strategy: Strategy, epochs: int | None, learning_rate: float | None) -> Strategy:
    """Apply the total of epochs and the peak rate where they are given."""
    if epochs is not None:
        strategy = with_epochs(strategy, epochs)
    return strategy if learning_rate is None else with_learning_rate(strategy, learning_rate)


def _check_rate(rate: float) -> None:
    check(is_number(rate) and rate > 0, "learning_rate", "a number above 0", rate)
