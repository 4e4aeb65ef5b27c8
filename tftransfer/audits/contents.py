"""What has changed since an earlier audit wrote down the content of every example."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tftransfer.audits.subject import Finding, Subject
from tftransfer.errors import InputError


def changes(subject: Subject) -> Iterator[Finding]:
    """Give examples whose content has changed, that are missing, or that are new, since an earlier audit."""
    if subject.known is None:
        return
    now = contents(subject)
    places = {one.name: place for place, one in enumerate(subject.seen)}
    for name, digest in subject.known.items():
        if name not in places:
            yield Finding(name, "is missing: the earlier audit has it")
        elif now.get(name) != digest:
            yield Finding(name, "has changed since the earlier audit", examples=(places[name],))
    for name in now:
        if name not in subject.known:
            yield Finding(name, "is new since the earlier audit", counts=False, examples=(places[name],))


def contents(subject: Subject) -> dict[str, str]:
    """Return the SHA-256 of every example that could be read, by its name."""
    return {one.name: one.digest for one in subject.seen if one.digest}


def read(path: Path) -> dict[str, Any]:
    """Read what an earlier audit wrote down.

    Returns:
        `data`, which data they are, and `examples`, SHA-256 by name.

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
    return content


def _is_contents(content: Any) -> bool:
    examples = content.get("examples") if isinstance(content, Mapping) else None
    return isinstance(examples, Mapping) and all(
        isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in examples.values()
    )
