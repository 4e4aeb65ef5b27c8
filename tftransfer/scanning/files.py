"""What kind of thing a file is, by its name and its first bytes; the files below a folder, without following links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOST_FILES, DEEPEST = 10_000, 32

_PROGRAMS = (".bat", ".cmd", ".com", ".dll", ".dylib", ".exe", ".jar", ".js", ".ko", ".ps1", ".sh", ".so")
_PYTHON = (".egg", ".pickle", ".pkl", ".pth", ".py", ".pyc", ".pyd", ".pyo", ".whl")
_MAGIC = {
    b"\x7fELF": "a program or library (ELF)",
    b"MZ\x90": "a program or library (Windows)",
    b"\xcf\xfa\xed\xfe": "a program or library (macOS)",
    b"\xca\xfe\xba\xbe": "a program or library (macOS or Java)",
    b"#!/": "a script",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def code_problem(name: str, head: bytes) -> str | None:
    """Say that a file is a program, script or pickle, by its name or its first bytes.

    Example:
        >>> code_problem("assets/run.sh", b"echo"), code_problem("assets/vocabulary.txt", b"the")
        ('is code (.sh), which no model needs', None)
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PROGRAMS + _PYTHON:
        return f"is code ({suffix}), which no model needs"
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return f"is {kind}, which no model needs" if kind else None


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in order, and links as they are; none is followed.

    Raises:
        OSError: If there are more than `MOST_FILES` of them, or folders more than `DEEPEST` deep.
    """
    count = 0
    todo = [(folder, 0)]
    while todo:
        place, depth = todo.pop()
        with os.scandir(place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        count += len(found)
        if count > MOST_FILES or depth > DEEPEST:
            raise OSError(f"more than {MOST_FILES} files, or folders more than {DEEPEST} deep")
        for entry in found:
            if not entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)
        todo.extend((Path(entry.path), depth + 1) for entry in reversed(found) if entry.is_dir(follow_symlinks=False))
