"""Files that cannot be used, have the extension of another format, or were not read at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tftransfer.audits.subject import Finding, Subject

_LINE = re.compile(r"(?P<where>.*?, line \d+): (?P<problem>.*)", re.DOTALL)


def unusable(subject: Subject) -> Iterator[Finding]:
    """Give what every run sets aside, with the reason."""
    for place, one in enumerate(subject.seen):
        if one.reason is not None:
            yield Finding(one.name, one.reason, examples=(place,))


def misnamed(subject: Subject) -> Iterator[Finding]:
    """Give files whose extension is that of another format; they are read by content, so it does no harm here."""
    for place in subject.usable:
        if subject.seen[place].misnamed:
            yield Finding(subject.seen[place].name, "the extension of another format", counts=False, examples=(place,))


def source(subject: Subject) -> Iterator[Finding]:
    """Give faults of the source itself: lines of a table, empty class folders, why a run would refuse the data."""
    for fault in subject.faults:
        line = _LINE.fullmatch(fault)
        yield Finding(line["where"], line["problem"]) if line else Finding(subject.name, fault)
    if subject.refused:
        yield Finding(subject.name, f"a run would refuse these data: {subject.refused}")
    for note in subject.notes:
        yield Finding(subject.name, note, counts=False)
