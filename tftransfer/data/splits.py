"""Divide examples into training, validation and test, stratified and by the seed; imports no TensorFlow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tftransfer.errors import InputError

NAMES = ("train", "validation", "test")
ALIASES = {"val": "validation", "dev": "validation"}
SHARES = {"test": 0.2, "validation": 0.1}
"""What is split off train where it is missing, in this order: validation from what test leaves."""

_QUANTILES = 10


def canonical(name: str) -> str | None:
    """Return which split a folder, file or cell names, or None for another name.

    Example:
        >>> canonical("Val"), canonical("trainval")
        ('validation', None)
    """
    lower = name.strip().lower()
    lower = ALIASES.get(lower, lower)
    return lower if lower in NAMES else None


def complete(
    given: Sequence[str], strata: Sequence[Any] | np.ndarray, seed: int, every: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Split off what the source does not divide itself.

    Args:
        given: For each example the split that the source says; `"train"` for all where it says nothing.
        strata: For each example the class (or another group) whose shares are kept equal.
        seed: From 0; the same seed gives the same splits.
        every: Whether each split gets some of every stratum, as classes need it; else the totals are exact.
            Defaults to True.

    Returns:
        The examples' numbers per split, rising, and how each split came to be.

    Example:
        >>> parts, origin = complete(["train"] * 10, ["a", "b"] * 5, seed=0)
        >>> {name: len(numbers) for name, numbers in parts.items()}
        {'train': 6, 'validation': 2, 'test': 2}
        >>> origin["test"]
        {'examples': 2, 'from': '20 % of train, stratified, seed 0'}
    """
    assigned, kinds = np.asarray(given, dtype=object), np.asarray(strata)
    missing = [name for name in SHARES if name not in set(given)]
    origin = dict.fromkeys(NAMES, "the source")
    for place, name in enumerate(SHARES):
        if name in missing:
            pool = np.flatnonzero(assigned == "train")
            generator = np.random.default_rng((seed, place))
            assigned[pool[choose_share(kinds[pool], SHARES[name], generator, every)]] = name
            origin[name] = f"{SHARES[name]:.0%} of train, stratified, seed {seed}".replace("%", " %")
    parts = {name: np.flatnonzero(assigned == name) for name in NAMES}
    return parts, {name: {"examples": len(parts[name]), "from": origin[name]} for name in NAMES}


def choose_share(strata: np.ndarray, share: float, generator: np.random.Generator, every: bool = True) -> np.ndarray:
    """Choose a share of each stratum.

    With `every`, at least one of each and never all; a stratum of one is left alone. scikit-learn's
    `train_test_split(stratify=...)` keeps the total exact instead and leaves small classes out. Without `every`
    the total is exact too, and small strata share what falls to them: among several labels most may be rare, and
    one of each would be half of the examples.

    Args:
        strata: `(n,)`, the group of each example.
        share: In (0, 1).
        generator: Decides which examples.
        every: Whether at least one of each stratum is chosen. Defaults to True.

    Returns:
        The numbers of the chosen examples, rising.
    """
    groups = [generator.permutation(members) for members in _members(strata)]
    if not every:
        return np.sort(_evenly(np.concatenate([np.array([], int), *groups]), share, generator))
    chosen = [group[: _count(share, len(group))] for group in groups]
    return np.sort(np.concatenate([np.array([], int), *chosen]))


def _members(strata: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the examples of each stratum, in the order of the strata's names."""
    kinds, numbers = np.unique(strata, return_inverse=True)
    groups = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    return [groups[place] for place in sorted(range(len(kinds)), key=lambda place: str(kinds[place]))]


def _evenly(ordered: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Choose at even distances, so that each run of equals gives its share but for less than one."""
    count = _count(share, len(ordered))
    places = ((np.arange(count) + generator.random()) * len(ordered) / max(count, 1)).astype(int)
    return ordered[np.minimum(places, len(ordered) - 1)]


def _count(share: float, total: int) -> int:
    return max(min(max(round(share * total), 1), total - 1), 0)


def needed_per_class(given: Sequence[str]) -> int:
    """Return how many training examples each class needs: one, and one for each missing split.

    Example:
        >>> needed_per_class(["train", "train"]), needed_per_class(["train", "test"])
        (3, 2)
    """
    return 1 + sum(name not in given for name in SHARES)


def check_classes(given: Sequence[str], classes: Sequence[str], what: str) -> None:
    """Refuse classes that are too small to split, or that training lacks.

    Args:
        given: For each example its split.
        classes: For each example its class.
        what: The source, for the message.

    Raises:
        InputError: If there is one class only, a class has too few examples, or one occurs in validation or
        test only.
    """
    counts = Counter(name for name, split in zip(classes, given, strict=True) if split == "train")
    _check_training_has_all(given, classes, counts, what)
    if len(counts) < 2:
        raise InputError(f"{what} holds one class only ({_listed(counts)}): at least two are needed")
    needed = needed_per_class(given)
    small = {name: count for name, count in counts.items() if count < needed}
    if small:
        raise InputError(
            f"each class of {what} needs at least {needed} usable training pictures, for the splits that "
            f"are missing. "
            f"Received: {', '.join(f'{name!r} with {count}' for name, count in sorted(small.items()))}"
        )


def _check_training_has_all(given: Sequence[str], classes: Sequence[str], counts: Counter[str], what: str) -> None:
    for split in NAMES[1:]:
        unseen = {name for name, own in zip(classes, given, strict=True) if own == split and not counts[name]}
        if unseen:
            raise InputError(
                f"{split} of {what} holds classes that train lacks: {_listed(unseen)}. Add training "
                f"examples of them "
                f"or remove them from {split}"
            )


def _listed(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:10])) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")


def strata_of(targets: np.ndarray, kind: str) -> np.ndarray:
    """Return the group of each example whose share is kept equal in every split.

    Args:
        targets: As a task encodes them.
        kind: The task's kind. A single label is its own group; several labels go by the rarest of them;
            numbers by tenths of the first one's range of ranks.

    Returns:
        `(n,)` integers; -1 for an example without a label.
    """
    if kind == "single_label":
        return targets
    if kind == "multi_label":
        by_rarity = np.argsort(targets.sum(axis=0), kind="stable")
        return np.where(targets.any(axis=1), by_rarity[targets[:, by_rarity].argmax(axis=1)], -1)
    ranks = np.argsort(np.argsort(targets[:, 0], kind="stable"), kind="stable")
    return ranks * min(_QUANTILES, max(len(ranks) // 5, 1)) // max(len(ranks), 1)
