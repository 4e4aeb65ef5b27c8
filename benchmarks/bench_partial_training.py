"""How much faster ten epochs of the two topmost groups are than by the code of the Keras guide.

    python benchmarks/bench_partial_training.py [--data FOLDER --weights FILE] [--width 0.35]

As bench_frozen_training.py, but the head and the topmost two depth groups train (`partial:last=2`): in ours without
augmentation (`ours`), the same with features in files, as where memory does not hold them (`files`), and with two
augmented views of each picture in turn (`views`); by the guide's code, with new flips and rotations in every epoch,
from the same layer on. Writes results/partial_training_WIDTH_SIDE.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pairs
import sides

LOWEST = "block_16_expand"  # of the last residual block; the other group is the convolution above it


def partial(options: argparse.Namespace, text: str) -> Any:
    """Return the strategy, as a function of the package."""
    return lambda tft: tft.strategies.parse(f"partial:last=2,{text}", options.epochs, sides.RATE)


def in_files(options: argparse.Namespace) -> dict[str, float]:
    """Train with no memory for features."""
    from tftransfer import features

    features.MEMORY_SHARE = 0.0
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        return sides.our_side(options, partial(options, "augmentation=none"), Path(folder))


SIDES = {
    "keras": lambda options: sides.keras_side(options, opened=LOWEST),
    "ours": lambda options: sides.our_side(options, partial(options, "augmentation=none")),
    "files": in_files,
    "views": lambda options: sides.our_side(options, partial(options, "augmentation=light,views=2")),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        options, found = pairs.run(sides.parser(__doc__), SIDES, Path(scratch))
    sides.record_all("partial_training", options, found)


if __name__ == "__main__":
    main()
