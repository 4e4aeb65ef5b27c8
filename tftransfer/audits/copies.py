"""Pictures that occur more than once: the same bytes, and those that look it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from tftransfer.audits.subject import Finding, Subject
from tftransfer.checks import duplicates
from tftransfer.data.listing import some

_MOST = 10_000  # pictures that are compared each with each
_SMALLEST = 32  # pixels of a side, of the usual picture, below which different ones look the same
_OFTEN = 0.05  # pairs that are not sure, as a share of the pictures, above which they say little


def exact(subject: Subject) -> Iterator[Finding]:
    """Give contents that several examples have.

    In two splits they spoil what is measured, with two labels one must be wrong; else they merely weigh more.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place in subject.usable:
        if subject.seen[place].digest:
            places[subject.seen[place].digest].append(place)
    for own in places.values():
        if len(own) > 1:
            yield _finding(subject, own, "the same content")


def near(subject: Subject) -> Iterator[Finding]:
    """Give pictures that are resized, re-encoded, cropped, mirrored or gray copies of others.

    Up to 10,000 pictures are compared each with each, if they usually have 32 pixels a side or more. A copy counts if
    it is very much alike and lies in two splits or has two labels; the others are mentioned, in one finding where they
    are so many that all pictures must be alike.
    """
    if subject.pictures is None or subject.places is None or not 1 < len(subject.pictures) <= _MOST:
        return
    sides = [min(subject.seen[place].size or (_SMALLEST,)) for place in subject.places]
    if np.median(sides) < _SMALLEST:
        return
    found = [copy for copy in duplicates.copies_within(subject.pictures) if not copy.exact]
    unsure = [copy for copy in found if copy.likeness < duplicates.SURE]
    if len(unsure) > max(_OFTEN * len(subject.pictures), 1):
        most = unsure[0]
        problem = (
            f"{len(unsure)} pairs are alike by {most.likeness:.2f} or less: where all are alike, they are no copies"
        )
        yield Finding(subject.name, problem, False, _places(subject, most))
        found = [copy for copy in found if copy.likeness >= duplicates.SURE]
    for copy in found:
        way = ", mirrored" if copy.mirrored else ""
        sure = copy.likeness >= duplicates.SURE
        yield _finding(subject, _places(subject, copy), f"alike by {copy.likeness:.2f}{way}", sure)


def _places(subject: Subject, copy: duplicates.Copy) -> tuple[int, ...]:
    places = subject.places if subject.places is not None else np.arange(0)
    return tuple(sorted(int(places[index]) for index in (copy.index, copy.other_index)))


def _finding(subject: Subject, places: Sequence[int], what: str, sure: bool = True) -> Finding:
    first, *others = (subject.seen[place] for place in places)
    splits = sorted({subject.seen[place].split for place in places})
    labels = sorted({subject.seen[place].label for place in places})
    told = [what, f"as {some([one.name for one in others])}"]
    told += [f"in {' and '.join(splits)}"] * (len(splits) > 1)
    told += [f"with labels {some(list(map(repr, labels)))}"] * (len(labels) > 1)
    counts = sure and (len(splits) > 1 or (len(labels) > 1 and subject.kind != "regression"))
    return Finding(first.name, ", ".join(told), counts, tuple(places[:2]))
