"""Strategies on several data sets with several backbones: which holds up where.

    python benchmarks/wide_comparison.py --data digits FLOWERS CELLS --backbones MobileNetV2-0.35=FILE MobileNet=FILE

Runs `recipes/compare_strategies.py` once for each data set and backbone, with the same budget and three seeds, and puts
the accuracies side by side. A run that was stopped goes on with the same --out, and what is finished is taken from
results/wide_comparison/: remove it to measure again. `digits` are the embedded ones, at 64 pixels and without flips.
Writes results/wide_comparison.md and .png, and the trials of each data set and backbone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, write

from tftransfer import cli

RECIPE = Path(__file__).parent.parent / "recipes" / "compare_strategies.py"
NO_FLIPS = ("digits", "spoken_digit_pictures")  # mirrored they mean something else, or nothing
STRATEGIES = ("linear_probe", "partial:last=2", "full", "freeze_then_unfreeze", "l2_sp")


def strategies(data: str) -> list[str]:
    """Return the strategies, without flips where these make no sense."""
    flips = "light_no_flip" if data in NO_FLIPS else "light"
    return [
        name if name == "linear_probe" else f"{name}{',' if ':' in name else ':'}augmentation={flips}"
        for name in STRATEGIES
    ]


def side_of(data: str, image_size: int) -> int:
    """Return the size of pictures: the embedded digits are small."""
    return 64 if data == "digits" else image_size


def run(options: argparse.Namespace, data: Path, backbone: str, weights: str) -> dict[str, Any]:
    """Compare all strategies on one data set with one backbone, unless that has been done."""
    name = f"wide_comparison/{data.name}_{backbone}"
    file = RESULTS / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    folder = options.out / f"{data.name}_{backbone}"
    side = side_of(data.name, options.image_size)
    command = [
        sys.executable, str(RECIPE), "--data", "demo" if data.name == "digits" else str(data), "--backbone", backbone,
        "--weights", weights, "--image-size", str(side), "--epochs", str(options.epochs), "--seeds", options.seeds,
        "--strategy", ",".join(strategies(data.name)), "--out", str(folder), "--quiet",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    setting = {"image_size": side, "epochs": options.epochs, "seeds": options.seeds}
    write(name, {"trials": found["trials"], "about": found["about"]}, **setting)
    return found


def plain(strategy: str) -> str:
    """Return a strategy without its augmentation, as tables call it."""
    return next(name for name in STRATEGIES if strategy.startswith(name))


def spread(found: dict[str, Any], name: str, key: str) -> list[float]:
    """Return what the trials of a strategy gave, one number per seed."""
    return [trial[key] for trial in found["trials"] if plain(trial["strategy"]) == name]


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """Write one row per data set and backbone, one column per strategy; the best of a row is bold."""
    lines = ["data, backbone | " + " | ".join(STRATEGIES), " | ".join(["---"] * (len(STRATEGIES) + 1))]
    for cell, found in cells.items():
        values = {name: spread(found, name, "metric") for name in STRATEGIES}
        best = max(np.mean(several) for several in values.values())
        parts = []
        for several in values.values():
            mark = "**" if np.mean(several) == best else ""
            parts.append(f"{mark}{np.mean(several):.1%}{mark} ({min(several):.1%} to {max(several):.1%})")
        lines.append(f"{cell} | {' | '.join(parts)}")
    seconds = [[one for found in cells.values() for one in spread(found, name, "seconds")] for name in STRATEGIES]
    lines.append("seconds, the median | " + " | ".join(f"{np.median(several):.0f}" for several in seconds))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def draw(cells: dict[str, dict[str, Any]]) -> bytes:
    """Draw a row of panels per data set, a panel per backbone: means and ranges of all strategies."""
    from tftransfer.checks import drawing

    across = len({cell.partition(", ")[2] for cell in cells})
    down = -(-len(cells) // across)
    drawn = drawing.figure(height=1.9 * down)
    for place, (cell, found) in enumerate(cells.items()):
        last = place // across == down - 1
        axes = drawing.style(drawn.add_subplot(down, across, place + 1), "accuracy" if last else "")
        axes.set_title(cell.replace(", ", "\n"), fontsize=drawing.FONT, color=drawing.INK)
        for row, name in enumerate(reversed(STRATEGIES)):
            values = spread(found, name, "metric")
            axes.plot([min(values), max(values)], [row, row], color=drawing.BLUE, linewidth=2)
            axes.plot(float(np.mean(values)), row, "o", color=drawing.BLUE, markersize=5)
        axes.set_yticks(range(len(STRATEGIES)), ["" if place % across else name for name in reversed(STRATEGIES)])
        axes.locator_params(axis="x", nbins=4)
    return drawing.png(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="digits, or folders with train and test")
    parser.add_argument("--backbones", nargs="+", required=True, help="NAME=WEIGHTS")
    parser.add_argument("--image-size", type=int, default=96, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("saved_models/wide_comparison"), help="(default: %(default)s)")
    options = parser.parse_args()
    pairs = [entry.partition("=")[::2] for entry in options.backbones]
    cells = {
        f"{data.name}, {backbone}": run(options, data, backbone, weights)
        for data in options.data
        for backbone, weights in pairs
    }
    cli.import_tensorflow()
    RESULTS.joinpath("wide_comparison.md").write_text(markdown(cells), encoding="utf-8")
    RESULTS.joinpath("wide_comparison.png").write_bytes(draw(cells))
    print(markdown(cells))


if __name__ == "__main__":
    main()
