"""The exceptions that the command line turns into one line and an exit code."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable


class InputError(ValueError):
    """Say in one line what was wrong with what the user gave, what was expected and what to do."""


class ScanError(InputError):
    """Say what a scan found in a file that was to be loaded; the command line ends with exit code 1."""


class DivergedError(ArithmeticError):
    """Say that training met numbers that are not finite again and again, and where; exit code 1 on the command line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known words that are closest to a misspelt one.

    Args:
        name: The word that was given.
        known: The words that exist.

    Returns:
        A clause such as `" Did you mean 'ResNet50' or 'ResNet50V2'?"`, or an empty string.

    Example:
        >>> nearest("ResNet5", ["VGG16", "ResNet50"])
        " Did you mean 'ResNet50'?"
    """
    by_lower_case = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.6)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(by_lower_case[word]) for word in close)}?"


def check(holds: bool, name: str, expected: str, value: object) -> None:
    """Refuse an argument that is out of its range.

    Args:
        holds: Whether it is as expected.
        name: The argument's name.
        expected: What it must be, such as `"a number above 0"`.
        value: What it is.

    Raises:
        InputError: If it does not hold.

    Example:
        >>> check(0.5 < 1, "dropout", "below 1", 0.5)
    """
    if not holds:
        raise InputError(f"`{name}` must be {expected}. Received: {name}={value!r}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number, Python's or NumPy's.

    Example:
        >>> is_number(1e-3), is_number("a"), is_number(float("nan"))
        (True, False, False)
    """
    return isinstance(value, numbers.Real) and math.isfinite(value)
