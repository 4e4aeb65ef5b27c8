"""How fast batches come, without a network: against the pipeline of the Keras guide, and a cached one.

    python benchmarks/bench_input_pipeline.py [--data FOLDER] [--epochs 5]

Every side reads 500 JPEG files and gives so many epochs of shuffled batches of 224x224 pixels. `keras` is the guide's
pipeline, which decodes, flips and rotates in every epoch; `ours_augmented` flips, crops and recolours. `keras_cached`
decodes once and does not augment; `ours` neither. Each round runs every side in a new process, from files to the last
batch. Writes results/input_pipeline_SIDE.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import guide
import pairs
from record import record

SIZE, BATCH = 224, 32
RIVALS = {"ours": "keras_cached", "ours_augmented": "keras"}


def keras_side(options: argparse.Namespace, *, cached: bool) -> dict[str, float]:
    """Go through the guide's batches."""
    began = time.perf_counter()
    training, _ = guide.datasets(options.data, SIZE, cached=cached)
    count = sum(1 for _ in range(options.epochs) for _ in training)
    return {"seconds": time.perf_counter() - began, "batches": count}


def our_side(options: argparse.Namespace, augmentation: str) -> dict[str, float]:
    """Go through the batches that training would take."""
    from tftransfer import data
    from tftransfer.data import order

    began = time.perf_counter()
    examples = data.load(options.scratch / "pictures.csv", image_size=(SIZE, SIZE))[0].train
    steps = options.epochs * order.steps_per_epoch(len(examples), BATCH)
    batches = order.batches(examples, BATCH, seed=0, phase=0, steps=steps, augmentation=augmentation)
    count = sum(1 for _ in batches)
    return {"seconds": time.perf_counter() - began, "batches": count}


SIDES = {
    "keras": lambda options: keras_side(options, cached=False),
    "keras_cached": lambda options: keras_side(options, cached=True),
    "ours": lambda options: our_side(options, "none"),
    "ours_augmented": lambda options: our_side(options, "light"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="FOLDER with CLASS/*.jpg (default: 500 generated pictures)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    with tempfile.TemporaryDirectory() as scratch:
        options, found = pairs.run(parser, SIDES, Path(scratch))
    for ours, rival in RIVALS.items():
        both = [(one[rival]["seconds"], one[ours]["seconds"]) for one in found]
        record(f"input_pipeline_{ours}", both, rival=rival, epochs=options.epochs, data=options.data.name, size=SIZE)


if __name__ == "__main__":
    main()
