"""Run the sides of a comparison alternately, each time in a new process, and collect what they measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pictures

Side = Callable[[argparse.Namespace], Mapping[str, float]]


def run(
    parser: argparse.ArgumentParser, sides: Mapping[str, Side], scratch: Path, before: str | None = None
) -> tuple[argparse.Namespace, list[dict[str, dict[str, float]]]]:
    """Run every side in turn, several times; returns the options and what each round gave.

    A child process is told its side, runs that function, prints the result and ends: no side finds what another left
    behind in memory. TensorFlow is imported before.

    Args:
        parser: With the benchmark's own options, `--data` among them.
        sides: From a name to a function of the options that returns named numbers.
        scratch: A folder for what they share: `pictures.csv` is in it.
        before: A side that runs once before it counts. Defaults to none.
    """
    parser.add_argument("--rounds", type=int, default=5, help="how often (default: %(default)s)")
    for hidden in ("--side", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        import tensorflow as tf  # noqa: F401  what both sides need

        options.scratch = Path(options.scratch)
        print(json.dumps(dict(sides[options.side](options))))
        sys.exit()
    options.data = pictures.folder(options.data, scratch / "pictures")
    pictures.table(options.data, scratch / "pictures.csv")
    shared = ["--scratch", str(scratch), "--data", str(options.data)]
    if before:
        _child(before, shared)
    found = []
    for number in range(options.rounds):
        found.append({side: _child(side, shared) for side in sides})
        print(f"round {number + 1}: {found[-1]}", flush=True)
    return options, found


def _child(side: str, shared: list[str]) -> dict[str, float]:
    command = [sys.executable, *sys.argv, *shared, "--side", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
