"""How fast training everything is against plain `fit` on cached pictures, and against the code of the Keras guide.

    python benchmarks/bench_full_training.py [--data FOLDER --weights FILE] [--width 0.35] [--epochs 3]

Nothing is frozen, so there is nothing to keep: what is measured is that ours costs nothing. `keras_cached` decodes
once and does not augment, as ours here; `keras` is the code of the guide, which decodes and augments in every epoch.
BatchNorm runs in inference mode, layer by layer, in `keras_cached` and ours; in the guide's code it does not, whatever
it says. Writes results/full_training_WIDTH_ours_against_RIVAL.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pairs
import sides

SIDES = {
    "keras": lambda options: sides.keras_side(options, opened=""),
    "keras_cached": lambda options: sides.keras_side(options, opened="", cached=True),
    "ours": lambda options: sides.our_side(
        options, lambda tft: tft.strategies.parse("full:augmentation=none", options.epochs, sides.RATE)
    ),
}


def main() -> None:
    parser = sides.parser(__doc__)
    parser.set_defaults(epochs=3)
    with tempfile.TemporaryDirectory() as scratch:
        options, found = pairs.run(parser, SIDES, Path(scratch))
    sides.record_all("full_training", options, found)


if __name__ == "__main__":
    main()
