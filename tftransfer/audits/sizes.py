"""Pictures whose size or shape is unlike that of nearly all others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tftransfer.audits.subject import Finding, Subject

_FEW = 20  # pictures below which nothing is usual
_DEVIATIONS = 8.0  # robust ones, from the median, on the logarithm
_SIDES = 6.0  # times longer or shorter sides than the median, at the least
_RATIO = 3.0  # times longer than wide, against the median, at the least


def sizes(subject: Subject) -> Iterator[Finding]:
    """Give pictures that are far larger, smaller, longer or wider than the others.

    Far is both several times the median and more than eight robust standard deviations (median absolute deviation times
    1.4826) of the logarithm away from it.
    """
    places = [place for place in subject.usable if subject.seen[place].size]
    if len(places) < _FEW:
        return
    stored = np.array([subject.seen[place].size for place in places], float)
    side, shape = np.sqrt(stored.prod(axis=1)), stored.max(axis=1) / stored.min(axis=1)
    usual = np.median(side)
    for place, far, own in zip(places, _is_far(side, _SIDES), side, strict=True):
        if far:
            word = "larger" if own > usual else "smaller"
            yield _finding(subject, place, f"far {word} than the others, whose sides are about {usual:.0f}")
    for place, far, own in zip(places, _is_far(shape, _RATIO), shape, strict=True):
        if far and own > np.median(shape):
            yield _finding(subject, place, f"one side is {own:.1f} times the other, usual is {np.median(shape):.1f}")


def _is_far(values: np.ndarray, least: float) -> np.ndarray:
    away = np.abs(np.log(values) - np.median(np.log(values)))
    return (away > np.log(least)) & (away > _DEVIATIONS * 1.4826 * np.median(away))


def _finding(subject: Subject, place: int, problem: str) -> Finding:
    one = subject.seen[place]
    height, width = one.size or (0, 0)
    return Finding(one.name, f"{width}x{height} pixels: {problem}", counts=False, examples=(place,))
