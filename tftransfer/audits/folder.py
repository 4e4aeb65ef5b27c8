"""The folder that an audit writes: its page, its findings, and what the next one compares the data with."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tftransfer import bundles
from tftransfer.audits import contents, page
from tftransfer.audits.examination import Audit
from tftransfer.audits.moving import Moved
from tftransfer.audits.subject import Known
from tftransfer.errors import InputError

PAGE, FINDINGS, CONTENTS = "audit.html", "audit.json", "contents.json"


@dataclass(frozen=True)
class Folder:
    """Where an audit is written.

    Args:
        path: The folder.
        data: Tells these data from others without naming a path of this machine.
        earlier: What an audit before wrote down there, or None.
    """

    path: Path
    data: str
    earlier: Known | None = None


def prepared(source: str, out: Path | None) -> Folder:
    """Choose the folder, the same for the same data, and read what an earlier audit of them has left there.

    Args:
        source: `--data`, as it was given.
        out: The folder. Defaults to None: one below `saved_models`.

    Raises:
        InputError: If it holds something else, or the audit of other data.
    """
    data = _told_apart(source)
    folder = out or Path("saved_models") / f"audit-{data.replace(' ', '-')}"
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"`out` must be a folder. Received: out={str(folder)!r}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FINDINGS).is_file():
        raise InputError(f"`out` must be a new or empty folder, or that of an audit. Received: out={str(folder)!r}")
    if not (folder / CONTENTS).is_file():
        return Folder(folder, data)
    found = contents.read(folder / CONTENTS)
    if found.data != data:
        raise InputError(
            f"`out` {folder} holds the audit of other data ({found.data}): give another one, and "
            f"--against {folder / CONTENTS} to compare with that"
        )
    return Folder(folder, data, found)


def write(folder: Folder, audit: Audit, moved: Sequence[Moved] = (), accept: bool = False) -> None:
    """Write the page, the findings and, unless that would hide a change, the contents.

    Args:
        folder: From `prepared`.
        audit: What was found.
        moved: Files that were moved out of the data. Defaults to none.
        accept: Whether what has changed is right from here on. Defaults to False.

    Raises:
        InputError: If the folder cannot be written.
    """
    gone = {one.file for one in moved if one.stays is None}
    now = replace(contents.contents(audit.subject).without(gone), data=folder.data)
    changed = folder.earlier is not None and now.changed_since(folder.earlier)
    found: dict[str, Any] = {**audit.to_json(), "moved": [asdict(one) for one in moved]}
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        bundles.write_json(folder.path / FINDINGS, found)
        bundles.write_text(folder.path / PAGE, page.render(audit))
        if accept or not changed:
            bundles.write_json(folder.path / CONTENTS, contents.written(now))
    except OSError as error:
        raise InputError(f"`out` {folder.path} cannot be written: {error.strerror}") from None


def _told_apart(source: str) -> str:
    """Return a name and, of a path, a digest of it.

    Example:
        >>> _told_apart("tfds:mnist/3d"), _told_apart("demo")
        ('tfds-mnist-3d', 'demo')
    """
    if source == "demo" or source.startswith("tfds:"):
        return re.sub(r"[^\w.-]+", "-", source)
    path = os.path.realpath(os.path.expanduser(source))
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(path).encode("utf-8", "replace").decode())
    return f"{name} {hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
