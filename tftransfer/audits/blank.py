"""Pictures that show nothing."""

from __future__ import annotations

from collections.abc import Iterator

from tftransfer.audits.subject import Finding, Subject

_BLANK, _NEARLY = 0.5, 3.0  # standard deviations of pixels in [0, 255]


def blank(subject: Subject) -> Iterator[Finding]:
    """Give pictures of one colour, and nearly so: a lens cap, an empty page, a failed download."""
    for place in subject.usable:
        one = subject.seen[place]
        if one.spread is not None and one.spread < _NEARLY:
            word = "blank" if one.spread < _BLANK else "nearly blank"
            problem = f"{word}: its pixels deviate by {one.spread:.1f} of 255"
            yield Finding(one.name, problem, counts=one.spread < _BLANK, examples=(place,))
