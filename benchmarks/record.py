"""Write a benchmark's result: the ratio of paired times, measured in one run on one machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tftransfer.bundles import versions

RESULTS = Path(__file__).parent / "results"


def record(name: str, pairs: list[tuple[float, float]], **setting: object) -> None:
    """Print and write how many times faster ours is: the median of the pairs' ratios, with their range.

    Args:
        name: The benchmark's name, and its file's.
        pairs: Seconds of the rival and of ours, measured one after the other.
        setting: What was measured.
    """
    ratio = compare(*zip(*pairs, strict=True))
    measured = {"times_faster": ratio["median"], "range": ratio["range"], "pairs": len(pairs)}
    write(name, measured, **setting)
    print(f"{name}: {measured['times_faster']} times faster, range {measured['range']} over {len(pairs)} pairs")


def compare(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return how many times longer the first took than the second: the median of the pairs' ratios, and their range."""
    ratios = sorted(one / other for one, other in zip(first, second, strict=True))
    return {"median": round(statistics.median(ratios), 2), "range": [round(ratios[0], 2), round(ratios[-1], 2)]}


def write(name: str, measured: Mapping[str, object], **setting: object) -> None:
    """Write results/NAME.json: what was measured, on what, where and when."""
    result = {
        "name": name,
        **measured,
        "setting": setting,
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
