"""How much faster ten epochs on a frozen backbone are than by the code of the Keras guide to transfer learning.

    python benchmarks/bench_frozen_training.py [--data FOLDER --weights FILE] [--width 0.35] [--size 224]

From decoding the pictures in FOLDER/CLASS/*.jpg (500 generated ones, and random weights, unless they are given) to the
trained MobileNetV2, validation included, after `import tensorflow`. The guide augments, and computes the backbone in
every epoch. Ours is measured without augmentation (`ours`), once more with what the first run kept in files (`warm`),
and with two augmented views of each picture in turn (`views`). Writes results/frozen_training_WIDTH[_SIDE].json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import guide
import pairs
import pictures
from record import record

EPOCHS = 10


def rival(options: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    training, validation = guide.datasets(options.data, options.size)
    whole, _ = guide.model(options.width, options.size, pictures.classes(options.data), options.weights)
    accuracy = guide.fit(whole, training, validation, EPOCHS)
    return {"seconds": time.perf_counter() - began, "accuracy": accuracy}


def ours(options: argparse.Namespace, cache_dir: Path | None = None, **views: object) -> dict[str, float]:
    began = time.perf_counter()
    import dataclasses

    import tftransfer as tft

    name = "MobileNetV2" if options.width == 1 else f"MobileNetV2-{options.width:g}"
    source, size = options.scratch / "pictures.csv", (options.size, options.size)
    data, task = tft.data.load(source, image_size=size, cache_dir=cache_dir)
    model = tft.builders.image_classifier(name, task.num_outputs, image_size=options.size, weights=options.weights)
    strategy = tuple(dataclasses.replace(phase, **views) for phase in tft.strategies.linear_probe(epochs=EPOCHS))
    history = tft.fine_tune(model, task, data, strategy, cache_dir=cache_dir)
    return {"seconds": time.perf_counter() - began, "accuracy": history["val_accuracy"][-1]}


SIDES = {
    "guide": rival,
    "ours": ours,
    "warm": lambda options: ours(options, options.scratch / "kept"),
    "views": lambda options: ours(options, augmentation="light", views=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--size", type=int, default=224)
    with tempfile.TemporaryDirectory() as scratch:
        options, found = pairs.run(parser, SIDES, Path(scratch), before="warm")
    setting = {"width": options.width, "size": options.size, "epochs": EPOCHS, "data": options.data.name}
    for side in ("ours", "warm", "views"):
        both = [(one["guide"]["seconds"], one[side]["seconds"]) for one in found]
        accuracies = {name: [round(one[name]["accuracy"], 3) for one in found] for name in ("guide", side)}
        record(f"frozen_training_{options.width:g}_{side}", both, **setting, validation_accuracies=accuracies)


if __name__ == "__main__":
    main()
