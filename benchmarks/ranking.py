"""Whether `tftransfer rank` puts networks in the order that fine-tuning them would, and what each costs.

    python benchmarks/ranking.py --data digits FLOWERS CELLS --backbones MobileNetV2-0.35=FILE MobileNet-0.25=FILE \\
        MobileNet-0.25=demo MobileNet-0.25=none MobileNetV2-0.35=none

Every network is ranked on the training split, and then tuned with the same budget: by the recipes' default or, from
random weights, all of it at once at ten times the rate, with BatchNorm that moves, as it has no statistics to begin
with; accuracies are those on the test split. A pair of networks truly differs if the lower end of the one-sided 95 %
interval of their accuracies' difference is above three points; it agrees if LogME says the same. `all_pairs` counts
those too that a test split of some hundreds tells apart by chance. Runs of `recipes/compare_strategies.py` that were
stopped go on with the same --out. Writes results/ranking.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write
from wide_comparison import NO_FLIPS, side_of

from tftransfer import cli

RECIPE = Path(__file__).parent.parent / "recipes" / "compare_strategies.py"
DIFFERENT, SURE = 0.03, 1.645  # a difference that matters, and standard errors that make it sure


def strategy(data: str, weights: str) -> str:
    """Return what a network is tuned by."""
    augmentation = f"augmentation={'light_no_flip' if data in NO_FLIPS else 'light'}"
    if weights == "none":
        return f"full:{augmentation},train_batch_norm=true"
    return f"freeze_then_unfreeze:{augmentation}"


def tuned(options: argparse.Namespace, data: Path, backbone: str, weights: str) -> dict[str, Any]:
    """Fine-tune one network; returns its accuracy and seconds, means over the seeds."""
    folder = options.out / f"{data.name}_{backbone}_{Path(weights).stem}"
    command = [
        sys.executable, str(RECIPE), "--data", "demo" if data.name == "digits" else str(data), "--backbone", backbone,
        "--weights", weights, "--image-size", str(side_of(data.name, options.image_size)), "--epochs",
        str(options.epochs),
        "--seeds", options.seeds, "--strategy", strategy(data.name, weights), "--out", str(folder), "--quiet",
    ]  # fmt: skip
    subprocess.run([*command, *(["--learning-rate", "3e-3"] if weights == "none" else [])], check=True)
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    means = {name: float(np.mean([trial[name] for trial in found["trials"]])) for name in ("metric", "seconds")}
    return {**means, "examples": found["about"]["test"]}


def agreement(networks: dict[str, list[dict[str, Any]]], sure: float) -> dict[str, Any]:
    """Return how many pairs differ by so many standard errors more than what matters, and which share agrees."""
    right, count = {"logme": 0, "probe": 0}, 0
    for first, second in itertools.chain.from_iterable(itertools.combinations(rows, 2) for rows in networks.values()):
        gap = first["metric"] - second["metric"]
        error = math.sqrt(sum(one["metric"] * (1 - one["metric"]) / one["examples"] for one in (first, second)))
        if abs(gap) - sure * error <= DIFFERENT:
            continue
        count += 1
        for score in right:
            right[score] += (first["ranking"][score] > second["ranking"][score]) == (gap > 0)
    return {"pairs": count, "agree": {score: round(number / max(count, 1), 3) for score, number in right.items()}}


def ranked(options: argparse.Namespace, data: Path, backbones: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Score all networks on one data set."""
    import keras

    from tftransfer import backbones as table
    from tftransfer import data as source
    from tftransfer import ranking

    side = side_of(data.name, options.image_size)
    size = (side, side)
    loaded, task = source.load("demo" if data.name == "digits" else data, image_size=size)
    keras.utils.set_random_seed(0)
    rows = []
    for backbone, weights in backbones:
        began = time.perf_counter()
        network = table.build(backbone, size, None if weights == "none" else weights)
        scores = ranking.score(network, backbone, task, loaded)
        rows.append({"logme": scores.logme, "probe": scores.probe, "seconds": time.perf_counter() - began})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="digits, or folders with train and test")
    parser.add_argument("--backbones", nargs="+", required=True, help="NAME=WEIGHTS, at least two")
    parser.add_argument("--image-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="those of the strategy (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("saved_models/ranking"), help="(default: %(default)s)")
    options = parser.parse_args()
    backbones = [entry.partition("=")[::2] for entry in options.backbones]
    cli.import_tensorflow()
    found: dict[str, list[dict[str, Any]]] = {}
    for data in options.data:
        scores = ranked(options, data, backbones)
        rows = [
            {"backbone": backbone, "weights": Path(weights).name, "ranking": own} | tuned(options, data, *pair)
            for pair in backbones
            for (backbone, weights), own in [(pair, scores[backbones.index(pair)])]
        ]
        found[data.name] = rows
        print(data.name, json.dumps(rows), flush=True)
    every = [row for rows in found.values() for row in rows]
    cost = sum(row["ranking"]["seconds"] for row in every) / sum(row["seconds"] for row in every)
    measured = {
        "pairs_that_truly_differ": agreement(found, SURE),
        "all_pairs": agreement(found, 0.0),
        "cost_against_fine_tuning": round(cost, 3),
        "networks": found,
    }
    print({name: value for name, value in measured.items() if name != "networks"})
    write("ranking", measured, image_size=options.image_size, epochs=options.epochs, seeds=options.seeds)


if __name__ == "__main__":
    main()
