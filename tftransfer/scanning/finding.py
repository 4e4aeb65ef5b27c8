"""What a scan reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Problem = tuple[str, str]
"""Where in a file, and what is wrong there."""

Problems = Iterator[Problem]


class Damage(str):
    """A problem of a file that is cut short, damaged or of another kind: bad input rather than a danger."""

    __slots__ = ()


class Advised(str):
    """A problem of a file that whatever loads it refuses too, so that trusting it is not enough.

    Args:
        text: The problem.
        advice: Who refuses it, and what helps.
    """

    __slots__ = ("advice",)

    advice: str

    def __new__(cls, text: str, advice: str) -> Advised:
        problem = super().__new__(cls, text)
        problem.advice = advice
        return problem


@dataclass(frozen=True)
class Finding:
    """One reason not to load a file.

    Args:
        file: The file, as the caller named it or a path below that.
        where: The place in the file, such as `"function f, node Write"`; empty for the file as a whole.
        problem: What is wrong there.
        damaged: Whether the file is cut short, damaged or of another kind, which loading it would say too.
        advice: Who else refuses it, and what helps; empty if trusting the file is enough.

    Example:
        >>> str(Finding("m.keras", "config.json: layers[2]", "class Lambda of keras.layers is not on the list"))
        'm.keras: config.json: layers[2]: class Lambda of keras.layers is not on the list'
    """

    file: str
    where: str
    problem: str
    damaged: bool = False
    advice: str = ""

    def __str__(self) -> str:
        return printable(": ".join(part for part in (self.file, self.where, self.problem) if part))


def described(problems: Problems, place: str) -> Problems:
    """Put a place before where each problem is."""
    for where, problem in problems:
        yield ": ".join(part for part in (place, where) if part), problem


def printable(text: str) -> str:
    """Return a text in one line without characters that steer a terminal: it may come from the file.

    Example:
        >>> printable("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
