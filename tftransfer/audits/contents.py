"""What has changed since an earlier audit wrote down the content and the label of every example."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tftransfer.audits.subject import Finding, Known, Subject
from tftransfer.errors import InputError


def changes(subject: Subject) -> Iterator[Finding]:
    """Give examples whose content or label has changed, that are missing, or that are new, since an earlier audit."""
    if subject.known is None:
        return
    now, earlier = contents(subject), subject.known
    places = {one.name: place for place, one in enumerate(subject.seen)}
    for name, digest in earlier.digests.items():
        if name not in places:
            yield Finding(name, "is missing: the earlier audit has it")
        elif now.digests.get(name) != digest:
            yield Finding(name, "has changed since the earlier audit", examples=(places[name],))
        elif earlier.labels.get(name) not in (None, now.labels[name]):
            problem = f"has the label {now.labels[name]!r}, and {earlier.labels[name]!r} in the earlier audit"
            yield Finding(name, problem, examples=(places[name],))
    for name in now.digests:
        if name not in earlier.digests:
            yield Finding(name, "is new since the earlier audit", counts=False, examples=(places[name],))


def contents(subject: Subject) -> Known:
    """Return what is to be known of every example that could be read; labels of one that is listed twice as one."""
    read = [one for one in subject.seen if one.digest]
    labels: dict[str, set[str]] = defaultdict(set)
    for one in read:
        labels[one.name].add(one.label)
    joined = {name: ", ".join(sorted(own)) for name, own in labels.items()}
    return Known({one.name: one.digest for one in read}, joined)


def read(path: Path) -> Known:
    """Read what an earlier audit wrote down.

    Raises:
        InputError: If the file cannot be read or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON: expected the contents.json of an earlier audit") from None
    if not _is_contents(content):
        raise InputError(f"{path} is no contents.json of an earlier audit: expected names with their SHA-256")
    return Known(content["examples"], content.get("labels", {}), str(content.get("data", "")))


def written(known: Known) -> dict[str, Any]:
    """Return what `read` reads, as JSON takes it."""
    return {"data": known.data, "examples": dict(known.digests), "labels": dict(known.labels)}


def _is_contents(content: Any) -> bool:
    if not isinstance(content, Mapping):
        return False
    examples, labels = content.get("examples"), content.get("labels", {})
    return (
        isinstance(examples, Mapping)
        and all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in examples.values())
        and isinstance(labels, Mapping)
        and all(isinstance(label, str) for label in labels.values())
    )
