"""Groups that lie in several splits: the same subject, speaker or source, known from training, is easier to tell.

A table says in a further column what belongs together. Of folders the names of files may say it: what stands before
the last number of a name (`patient7_03.jpg`: `patient7`, `7-george-12.png`: `7-george`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePath

from tftransfer.audits.subject import Finding, Subject
from tftransfer.data.listing import some

_GROUPS = (
    "animal", "author", "camera", "case", "device", "family", "group", "individual", "object", "patient", "person",
    "photographer", "scanner", "scene", "series", "session", "site", "slide", "source", "speaker", "specimen",
    "subject", "track", "user", "video", "writer",
)  # fmt: skip
_STEM = re.compile(r"(?P<group>.*[^\W\d_].*?)[\W_]+\d+$")
_FEWEST = 3  # groups
_LARGEST = 0.5  # share of all that one group may have
_GROUPED = 0.9  # share of names that must follow the rule


def groups(subject: Subject) -> Iterator[Finding]:
    """Give columns and ways of naming files whose groups lie in several splits.

    A column counts if its name says that it groups (`subject`, `patient_id`, `speaker`, ...). Another one, and names of
    files, are mentioned where most groups lie in one split though chance would have spread them: the splits were meant
    to keep them apart. Names of files are also mentioned where nearly all follow the rule and hold a word before it.
    """
    columns: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place in subject.usable:
        for column, text in subject.seen[place].cells:
            if text:
                columns[column][text].append(place)
    for column, members in columns.items():
        is_named = not set(re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", column.lower())).isdisjoint(_GROUPS)
        if is_named or _is_kept_apart(subject, members):
            yield from _crossing(subject, f"column {column!r}", members, counts=is_named)
    stems = {} if columns else _by_stem(subject)
    if stems:
        yield from _crossing(subject, "names of files", stems, counts=False)


def stem(name: str) -> str | None:
    """Return what stands before the last number of a file's name, or None if the name holds no word and number.

    Example:
        >>> stem("train/cats/patient7_03.jpg"), stem("0_george_5.png"), stem("img_0001.png"), stem("17101762155.jpg")
        ('patient7', '0_george', 'img', None)
    """
    found = _STEM.fullmatch(PurePath(name).stem)
    return found["group"] if found else None


def _by_stem(subject: Subject) -> dict[str, list[int]]:
    """Return the groups that file names make, if they do not merely count all files or those of a class."""
    members: dict[str, list[int]] = defaultdict(list)
    for place in subject.usable:
        if "." in subject.seen[place].name and (group := stem(subject.seen[place].name)):
            members[group].append(place)
    grouped = sum(map(len, members.values()))
    largest = max(map(len, members.values()), default=0)
    several = len(members) >= max(_FEWEST, 2 * len(subject.by_class))
    is_rule = several and grouped >= _GROUPED * len(subject.usable) and largest <= _LARGEST * grouped
    return dict(members) if is_rule else {}


def _is_kept_apart(subject: Subject, members: dict[str, list[int]]) -> bool:
    """Whether most groups of several lie in one split, and few would by chance."""
    several = [own for own in members.values() if len(own) > 1]
    splits = [one.split for one in subject.seen if one.reason is None]
    shares = [splits.count(name) / len(splits) for name in set(splits)]
    whole = sum(len(_splits_of(subject, own)) == 1 for own in several)
    expected = sum(share ** len(own) for own in several for share in shares)
    return len(several) >= _FEWEST and whole > 0.5 * len(several) and expected < 0.5 * whole


def _splits_of(subject: Subject, places: list[int]) -> set[str]:
    return {subject.seen[place].split for place in places}


def _crossing(subject: Subject, what: str, members: dict[str, list[int]], counts: bool) -> Iterator[Finding]:
    crossing = {group: own for group, own in members.items() if len(_splits_of(subject, own)) > 1}
    if crossing:
        several = sum(len(own) > 1 for own in members.values())
        named = some([repr(group) for group in crossing])
        splits = sorted(set().union(*(_splits_of(subject, own) for own in crossing.values())))
        problem = f"{len(crossing)} of {several} groups of several lie in more than one of {', '.join(splits)}: {named}"
        first = next(iter(crossing.values()))
        pair = {subject.seen[place].split: place for place in first}
        yield Finding(what, problem, counts, tuple(pair.values())[:2])
