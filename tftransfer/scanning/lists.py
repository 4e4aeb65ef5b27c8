"""The lists of what a model may hold: operations of TensorFlow, and classes of Keras."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources

Sections = Mapping[str, frozenset[str]]

ALLOWED = "allowed"
FUNCTIONS, OWN, BARE = "functions", "tftransfer", "without a module"


@functools.cache
def operations() -> Sections:
    """Return the operations that a SavedModel may hold (section `allowed`), and the others by reason."""
    return _sections("scan_operations.txt")


@functools.cache
def allowed_operations() -> frozenset[str]:
    """Return the operations that a SavedModel may hold."""
    return frozenset().union(*(names for reason, names in operations().items() if reason.startswith(ALLOWED)))


def why_refused(operation: str) -> str:
    """Say why an operation is not allowed.

    Example:
        >>> why_refused("ReadFile"), why_refused("MyCustomOp")
        ('reads or writes files', 'is not one that this version knows: only its authors can say what it does')
    """
    for reason, names in operations().items():
        if operation in names and not reason.startswith(ALLOWED):
            return reason
    return "is not one that this version knows: only its authors can say what it does"


@functools.cache
def known_operations() -> frozenset[str]:
    """Return every operation that was judged, one way or the other."""
    return frozenset().union(*operations().values())


@functools.cache
def classes() -> Sections:
    """Return the names that a Keras model's description may hold, by module; see the head of the file."""
    return _sections("scan_classes.txt")


@functools.cache
def bare_classes() -> frozenset[str]:
    """Return the class names that are allowed where no module is given, as Keras 1 and 2 wrote them."""
    return frozenset().union(*(names for section, names in classes().items() if section not in (FUNCTIONS, OWN)))


def _sections(name: str) -> Sections:
    """Read a list: `[section]`, then its names, separated by spaces and line ends; # begins a comment."""
    found: dict[str, set[str]] = {}
    text = (resources.files("tftransfer") / "assets" / name).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            names = found.setdefault(line.strip("[]"), set())
        elif line and not line.startswith("#"):
            names.update(line.split())
    return {section: frozenset(names) for section, names in found.items()}
