"""Whether `--strategy auto` chooses well: against fixed strategies, on several data sets and numbers of examples.

    python benchmarks/advice.py --data digits FLOWERS CELLS --sizes 100 0 --backbone MobileNetV2-0.35 --weights FILE

A setting is a data set and a number of its training examples (0 for all, the others stratified). All strategies get
the same epochs and seeds. What the advice loses is measured against the strategy that is best on the *other* seeds, so
that no one is compared with the luckiest. Seconds are of the clock and of the processor. Settings that are in
results/advice.json already are not measured again, nor are trials that are in results/wide_comparison/, but for `full`,
whose cost is compared: remove them there to do so. `digits` are the embedded ones, at 64 pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, write
from wide_comparison import plain, side_of, strategies

from tftransfer import cli

AUTO = "auto"


def settings(options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Return data and task of each setting, a data set's name and its number of training examples."""
    from sklearn.model_selection import train_test_split

    from tftransfer import data as source

    found = {}
    for path in options.data:
        side = side_of(path.name, options.image_size)
        every, task = source.load("demo" if path.name == "digits" else path, image_size=(side, side))
        for count in options.sizes:
            targets = every.train.targets
            if count and count >= len(targets) - len(task.labels):
                continue
            chosen = every.train
            if count:
                some = train_test_split(np.arange(len(targets)), train_size=count, stratify=targets, random_state=0)[0]
                chosen = chosen.subset(np.sort(some))
            found[f"{path.name}, {len(chosen)}"] = (dataclasses.replace(every, train=chosen), task)
    return found


def trial(options: argparse.Namespace, text: str, seed: int, data: Any, task: Any) -> dict[str, float]:
    """Train one strategy; returns its accuracy on the test split and what it cost."""
    from tftransfer import advice, builders, comparison

    began = time.process_time()
    done = comparison.run_trial(
        advice.Choice(text, options.epochs),
        lambda: builders.image_classifier(
            options.backbone, task.num_outputs, image_size=data.train.pictures.image_size, weights=options.weights
        ),
        task,
        data,
        seed=seed,
    )
    return {"metric": done.metric or 0.0, "seconds": done.seconds, "processor": time.process_time() - began}


def known(options: argparse.Namespace, setting: str, data: Any) -> dict[str, dict[str, float]]:
    """Return the trials of a setting that the wide comparison has made with the same network, budget and seeds."""
    name, _, count = setting.partition(", ")
    file = RESULTS / "wide_comparison" / f"{name}_{options.backbone}.json"
    if not file.exists():
        return {}
    made = json.loads(file.read_text(encoding="utf-8"))
    asked = {
        "image_size": list(data.train.pictures.image_size),
        "weights": Path(options.weights).name,
        "train": int(count),
    }
    same = made["about"].items() >= asked.items() and made["setting"]["epochs"] == options.epochs
    trials = made["trials"] if same else []
    return {f"{trial['strategy']} {trial['seed']}": {"metric": trial["metric"]} for trial in trials}


def judged(found: dict[str, dict[str, dict[str, float]]], seeds: list[int]) -> dict[str, Any]:
    """Compare the advice of one setting with the best of the others on other seeds, and its cost with `full`'s."""
    names = sorted({key.rpartition(" ")[0] for key in found})
    fixed = [name for name in names if name != AUTO]
    metrics = {name: np.array([found[f"{name} {seed}"]["metric"] for seed in seeds]) for name in names}
    lost = []
    for place in range(len(seeds)):
        others = np.arange(len(seeds)) != place
        best = max(fixed, key=lambda name: metrics[name][others].mean())
        lost.append(float(metrics[best][place] - metrics[AUTO][place]))
    everything = next(name for name in fixed if plain(name) == "full")
    both = [(found[f"{AUTO} {seed}"], found[f"{everything} {seed}"]) for seed in seeds]
    cost = {
        kind: float(np.median([own[kind] / other[kind] for own, other in both])) for kind in ("seconds", "processor")
    }
    means = {name: round(float(values.mean()), 4) for name, values in metrics.items()}
    return {"lost": round(float(np.mean(lost)), 4), "cost": {k: round(v, 2) for k, v in cost.items()}, "means": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="digits, or folders with train and test")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 0], help="training examples (default: 100 0)")
    parser.add_argument("--backbone", default="MobileNetV2-0.35")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--image-size", type=int, default=96, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    options = parser.parse_args()
    cli.import_tensorflow()
    file = RESULTS / "advice.json"
    found = json.loads(file.read_text(encoding="utf-8"))["settings"] if file.exists() else {}
    about = {"backbone": options.backbone, "image_size": options.image_size, "epochs": options.epochs}
    for setting, (data, task) in settings(options).items():
        if setting in found:
            continue
        texts = (*strategies(setting.split(",")[0]), AUTO)
        there = known(options, setting, data)
        own = {
            key: trial(options, text, seed, data, task) if text.startswith("full") or key not in there else there[key]
            for seed in options.seeds
            for text in texts
            for key in (f"{text} {seed}",)
        }
        found[setting] = {**judged(own, options.seeds), "trials": own}
        measured = {
            "lost_on_average": round(float(np.mean([one["lost"] for one in found.values()])), 4),
            "dearest": {kind: max(one["cost"][kind] for one in found.values()) for kind in ("seconds", "processor")},
            "settings": found,
        }
        write("advice", measured, **about, seeds=options.seeds)
        print(setting, {**found[setting], "trials": len(own)}, flush=True)


if __name__ == "__main__":
    main()
