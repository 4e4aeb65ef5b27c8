"""Names of classes that may mean the same one: other case or spaces, a letter too many, too few, or two in turn."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator

from tftransfer.audits.subject import Finding, Subject

_SHORTEST = 5  # letters below which one letter more or less is another word
_RARE = 0.05  # share of the other's examples below which a near-equal name may be a slip
_VERY_RARE = 2  # examples
_MISSING = {"nan", "none", "null", "na", "n/a", "#n/a", "?"}  # as programs write an empty cell


def label_names(subject: Subject) -> Iterator[Finding]:
    """Give pairs of classes whose names are equal but for case, spaces, dashes and accents' spelling, or nearly equal.

    Nearly is one letter inserted, left out or changed, or two in turn; digits tell classes apart. Such a pair is a
    slip where one has hardly any examples; where both have many, only a plural is mentioned. So are names such as
    `nan`, which programs write where a label is missing.
    """
    counts = {name: len(own) for name, own in subject.by_class.items()}
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda name: -counts[name]):
        alike[plain(name)].append(name)
        if any(not letter.isprintable() for letter in name):
            problem = "holds line breaks or letters that nobody sees; a quote may be missing in the table"
            yield Finding(repr(name), problem, examples=tuple(subject.by_class[name][:2]))
        if plain(name) in _MISSING:
            problem = "may stand for a label that is missing"
            yield Finding(f"class {name!r}", problem, counts=False, examples=tuple(subject.by_class[name][:2]))
    for names in alike.values():
        for name in names[1:]:
            problem = f"is {names[0]!r} but for case, spaces or dashes"
            yield Finding(f"class {name!r}", problem, examples=_of(subject, name, names[0]))
    for one, other in near(list(alike)):
        rare, usual = sorted((alike[one][0], alike[other][0]), key=lambda name: counts[name])
        is_slip = counts[rare] <= max(_RARE * counts[usual], _VERY_RARE) and counts[rare] < counts[usual]
        is_plural = one + "s" == other or other + "s" == one
        if is_slip or is_plural:
            problem = f"({counts[rare]} examples) is nearly {usual!r} ({counts[usual]})"
            yield Finding(f"class {rare!r}", problem, counts=is_slip, examples=_of(subject, rare, usual))


def _of(subject: Subject, *names: str) -> tuple[int, ...]:
    return tuple(subject.by_class[name][0] for name in names)


def plain(name: str) -> str:
    """Return a name without what a slip of the hand changes: case, spaces, dashes, underscores, ways to write accents.

    Example:
        >>> plain(" Sun-Flower"), plain("sun_flower")
        ('sun flower', 'sun flower')
    """
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(" " if letter in "-_" else letter for letter in folded).split())


def near(names: list[str]) -> Iterator[tuple[str, str]]:
    """Give the pairs of different names that one slip turns into each other, in time that grows with their number.

    Example:
        >>> list(near(["tulip", "tluip", "tulips", "rose", "class 1", "class 2"]))
        [('tulip', 'tluip'), ('tulip', 'tulips')]
    """
    holders: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for name in names:
        if len(name) >= _SHORTEST:
            for key in {name, *(name[:place] + name[place + 1 :] for place in range(len(name)))}:
                for other in holders[key]:
                    if (other, name) not in seen and _is_one_slip(other, name):
                        seen.add((other, name))
                        yield other, name
                holders[key].append(name)


def _is_one_slip(one: str, other: str) -> bool:
    """Whether names are one step apart (Damerau 1964); a digit that differs is none."""
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    first, second = one[start : len(one) - end], other[start : len(other) - end]
    if any(letter.isdigit() for letter in first + second):
        return False
    return max(len(first), len(second)) <= 1 or (len(first) == len(second) == 2 and first == second[::-1])
