"""Fine-tuning strategies as data: a strategy is a tuple of phases, and a phase is one row.

A new strategy is a function in `named.py` and a line in the table below.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from tftransfer.errors import InputError, nearest
from tftransfer.strategies.named import (
    attention_only,
    bias_only,
    discriminative,
    distill_from_source,
    ewc,
    freeze_then_unfreeze,
    full,
    gradual,
    head_and_norm,
    l2_sp,
    linear_probe,
    lora,
    norm_only,
    partial,
    wise_ft,
)
from tftransfer.strategies.phase import (
    AUGMENTATIONS,
    OPTIMIZERS,
    SCHEDULES,
    Phase,
    Strategy,
    with_epochs,
    with_learning_rate,
    with_patience,
)

_NAMED: dict[str, Callable[..., Strategy]] = {
    function.__name__: function
    for function in (
        linear_probe,
        full,
        partial,
        freeze_then_unfreeze,
        gradual,
        discriminative,
        norm_only,
        bias_only,
        attention_only,
        head_and_norm,
        lora,
        l2_sp,
        ewc,
        distill_from_source,
        wise_ft,
    )
}

__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Phase",
    "Strategy",
    "describe",
    "names",
    "options_of",
    "parse",
    "with_epochs",
    "with_learning_rate",
    "with_common",
    "with_patience",
    *_NAMED,
]


def names() -> tuple[str, ...]:
    """Name the strategies that the command line knows."""
    return tuple(_NAMED)


def parse(
    text: str, epochs: int | None = None, learning_rate: float | None = None, *, also: tuple[str, ...] = ()
) -> Strategy:
    """Read a strategy as the command line writes it: `NAME` or `NAME:OPTION=VALUE,...`.

    Args:
        text: For instance `"partial:last=3"`. Beside its own options every strategy takes `views`,
            `average_views`, `mixup`, `cutmix`, `stochastic_depth` and `train_batch_norm` of `Phase`, for all its
            phases but a probe that others follow.
        epochs: Total epochs, shared out by the phases' own. Defaults to the strategy's.
        learning_rate: Peak rate of the last phase; earlier ones keep their ratio to it. Defaults to the strategy's.
        also: Names that the caller knows beside these, for the message. Defaults to none.

    Raises:
        InputError: If the name, an option or a value is not known.

    Example:
        >>> parse("partial:last=3", epochs=4)[0].epochs
        4
    """
    name = text.partition(":")[0]
    if name not in _NAMED:
        known = (*_NAMED, *also)
        raise InputError(f"`strategy` must be one of {', '.join(known)}.{nearest(name, known)} Received: {text!r}")
    function = _NAMED[name]
    own, common = options_of(name, function, text)
    return with_common(function(**own, epochs=epochs, learning_rate=learning_rate), common)


def with_common(strategy: Strategy, common: Mapping[str, Any]) -> Strategy:
    """Set `views`, `average_views`, `mixup` and the like of all phases but a probe that others follow.

    Example:
        >>> [phase.mixup for phase in with_common(parse("freeze_then_unfreeze"), {"mixup": 0.2})]
        [0.0, 0.2]
    """
    probes = len(strategy) > 1
    return (*strategy[:probes], *(dataclasses.replace(phase, **common) for phase in strategy[probes:]))


def describe(function: Callable[..., Any] | str) -> tuple[str, str, str, str]:
    """Return what a user chooses a strategy by: its name, what it does, its options with defaults, its source.

    Args:
        function: A strategy's function, or its name.

    Example:
        >>> describe("wise_ft")[2]
        'steps=10, augmentation=strong'
    """
    function = _NAMED[function] if isinstance(function, str) else function
    text = inspect.getdoc(function) or ""
    summary = text.partition("\n\n")[0]
    source = text.partition("Source: ")[2].partition("\n\n")[0].replace("\n", " ").rstrip(".")
    given = inspect.signature(function).parameters
    options = (f"{name}={'' if given[name].default is None else given[name].default}" for name in _options(function))
    return function.__name__, summary, ", ".join(options), source


def _options(function: Callable[..., Any]) -> dict[str, Callable[[str], Any]]:
    """Return what reads each option that the command line takes."""
    return {
        option.name: _TYPES[option.annotation]
        for option in inspect.signature(function).parameters.values()
        if option.annotation in _TYPES
        and option.kind is option.POSITIONAL_OR_KEYWORD
        and option.name not in _SHARED_OPTIONS
    }


def options_of(name: str, function: Callable[..., Any], text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the options of a strategy from `NAME:OPTION=VALUE,...`.

    Returns:
        Those that are the function's own arguments, and the others, for `with_common`.

    Raises:
        InputError: If an option or a value is not known.
    """
    types = {**_options(function), **_COMMON}
    options = text.partition(":")[2]
    found = [_option(name, part, types) for part in re.split(r",(?=\w+=)", options) if part]
    if len(dict(found)) < len(found):
        raise InputError(f"`strategy` {name} takes each option once. Received: {text!r}")
    given, own = dict(found), _options(function)
    return {key: given[key] for key in given if key in own}, {key: given[key] for key in given if key not in own}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_COMMON: dict[str, Callable[[str], Any]] = {
    "views": int,
    "average_views": _truth,
    "mixup": float,
    "cutmix": float,
    "stochastic_depth": float,
    "train_batch_norm": _truth,
}
_SHARED_OPTIONS = ("epochs", "learning_rate")
_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "str": str,
    "bool": _truth,
}  # of an option, by its annotation


def _option(strategy: str, part: str, types: Mapping[str, Callable[[str], Any]]) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    if name not in types:
        known = ", ".join(types)
        raise InputError(f"`strategy` {strategy} has the options {known}.{nearest(name, types)} Received: {part!r}")
    try:
        return name, types[name](value)
    except ValueError:
        kind = {int: "a whole number", _truth: "true or false"}.get(types[name], "a number")
        raise InputError(f"`strategy` {strategy}: `{name}` must be {kind}. Received: {part!r}") from None
