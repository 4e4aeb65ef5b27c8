"""How much faster ten epochs on a frozen backbone are than by the code of the Keras guide to transfer learning.

    python benchmarks/bench_frozen_training.py [--data FOLDER --weights FILE] [--width 0.35]

From decoding the pictures in FOLDER/CLASS/*.jpg (500 generated ones, and random weights, unless they are given) to the
trained MobileNetV2, validation included, after `import tensorflow`. The guide augments, and computes the backbone in
every epoch. Ours is measured without augmentation (`ours`), once more with what an earlier run kept in files (`warm`),
and with two augmented views of each picture in turn (`views`). PyTorch's tutorial is a second rival where torch and
torchvision are installed. Writes results/frozen_training_WIDTH_SIDE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pairs
import sides
import torch_guide


def probe(options: argparse.Namespace, **changes: Any) -> Any:
    """Return the strategy, as a function of the package."""

    def strategy(tft: Any) -> Any:
        return tuple(dataclasses.replace(one, **changes) for one in tft.strategies.linear_probe(epochs=options.epochs))

    return strategy


SIDES = {
    "keras": lambda options: sides.keras_side(options, opened=None),
    **({"torch": sides.torch_side} if torch_guide.INSTALLED else {}),
    "ours": lambda options: sides.our_side(options, probe(options)),
    "warm": lambda options: sides.our_side(options, probe(options), options.scratch / "kept"),
    "views": lambda options: sides.our_side(options, probe(options, augmentation="light", views=2)),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        options, found = pairs.run(sides.parser(__doc__), SIDES, Path(scratch), before="warm")
    sides.record_all("frozen_training", options, found)


if __name__ == "__main__":
    main()
