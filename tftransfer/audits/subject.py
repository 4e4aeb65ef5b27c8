"""What an audit looks at, and what it says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tftransfer.data.examples import Examples, Seen
from tftransfer.tasks.multi_label import split_labels


@dataclass(frozen=True)
class Finding:
    """One thing about the data that somebody should look at.

    Args:
        where: The file, line, class or column.
        problem: What is the matter.
        counts: Whether it fails an audit that is strict. Defaults to True; False for what may well be meant.
        examples: Places among what was seen that show it. Defaults to none.
    """

    where: str
    problem: str
    counts: bool = True
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class Known:
    """What is known of each example, by its name: what an audit writes down for the next one.

    Args:
        digests: SHA-256 of its content.
        labels: Its label. Defaults to none: audits once wrote down contents alone.
        data: Which data they are. Defaults to nothing.
    """

    digests: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    data: str = ""

    def without(self, names: Container[str]) -> Known:
        """Return what is known of the others."""
        digests, labels = (
            {name: own[name] for name in own if name not in names} for own in (self.digests, self.labels)
        )
        return Known(digests, labels, self.data)

    def changed_since(self, earlier: Known) -> bool:
        """Whether an example has another content or label than it had, or is gone."""
        mine = {name: self.labels.get(name) for name in earlier.labels}
        return mine != earlier.labels or any(self.digests.get(name) != own for name, own in earlier.digests.items())


@dataclass(frozen=True)
class Subject:
    """Data as an audit sees them.

    Args:
        name: What reports call them.
        kind: `"single_label"`, `"multi_label"` or `"regression"`.
        seen: What was seen of each example.
        pictures: Those that can be used, for what needs their pixels. Defaults to None: they are not looked at.
        places: For each of those its place in `seen`. Defaults to none.
        faults: What is wrong with the source itself. Defaults to nothing.
        refused: Why a run would refuse them, or None.
        notes: What was left out. Defaults to nothing.
        known: What an earlier audit wrote down. Defaults to None: there was none.
    """

    name: str
    kind: str
    seen: tuple[Seen, ...]
    pictures: Examples | None = None
    places: np.ndarray | None = None
    faults: tuple[str, ...] = ()
    refused: str | None = None
    notes: tuple[str, ...] = ()
    known: Known | None = None

    @cached_property
    def usable(self) -> tuple[int, ...]:
        """The places of what can be used."""
        return tuple(place for place, one in enumerate(self.seen) if one.reason is None)

    @cached_property
    def by_class(self) -> dict[str, list[int]]:
        """The places of each class's usable examples, classes in order of their names; of numbers nothing."""
        found: dict[str, list[int]] = defaultdict(list)
        for place in self.usable:
            for name in self.classes_of(place):
                found[name].append(place)
        return dict(sorted(found.items()))

    def classes_of(self, place: int) -> list[str]:
        """Return the classes of one example."""
        label = self.seen[place].label
        return {"regression": [], "multi_label": split_labels(label)}.get(self.kind, [label])


Check = Callable[[Subject], Iterator[Finding]]
"""Looks at the data and gives what it finds."""
