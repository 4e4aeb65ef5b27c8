"""Classes that are rare, or that a split lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tftransfer.audits.subject import Finding, Subject

_FEW = 10  # training examples below which a class is hardly learned
_TIMES = 20.0  # how much rarer than the largest


def balance(subject: Subject) -> Iterator[Finding]:
    """Give classes with few examples, far fewer than the largest has, or none in a split.

    A class that is too small for the splits is a fault of the source: a run refuses it.
    """
    counts = {name: Counter(subject.seen[place].split for place in own) for name, own in subject.by_class.items()}
    largest = max((count["train"] for count in counts.values()), default=0)
    splits = {one.split for one in subject.seen if one.reason is None}
    for name, count in counts.items():
        trained = count["train"]
        if 0 < trained < _FEW:
            yield Finding(_named(name), f"has {trained} training examples only", counts=False)
        elif trained and largest > _TIMES * trained:
            yield Finding(_named(name), f"is {largest / trained:.0f} times rarer than the largest class", counts=False)
        for split in ("validation", "test"):
            if split in splits and not count[split]:
                yield Finding(_named(name), f"has no example in {split}: it is not measured there", counts=False)


def _named(name: str) -> str:
    return f"class {name!r}"
