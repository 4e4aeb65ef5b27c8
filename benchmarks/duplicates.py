"""How well copies are found: of each training picture of a data set one copy of each kind is looked for.

    python benchmarks/duplicates.py --data FOLDER

FOLDER has `train` and `test`. Recall is the share of copies that are found where their original is; false alarms are
the share of test pictures, which are no copies, that are said to be one. Writes results/duplicates_DATA.json.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from record import write

from tftransfer import cli

SIDE = 224


def encoded_again(picture: Image.Image) -> Image.Image:
    """Return it as a JPEG of quality 50 shows it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def half(picture: Image.Image) -> Image.Image:
    """Return it at half its size."""
    return picture.resize((max(picture.width // 2, 8), max(picture.height // 2, 8)), Image.Resampling.BILINEAR)


def cropper(generator: np.random.Generator) -> Callable[[Image.Image], Image.Image]:
    """Return a function that keeps 90 % of each side, anywhere."""

    def crop(picture: Image.Image) -> Image.Image:
        width, height = round(0.9 * picture.width), round(0.9 * picture.height)
        left = int(generator.integers(0, picture.width - width + 1))
        top = int(generator.integers(0, picture.height - height + 1))
        return picture.crop((left, top, left + width, top + height))

    return crop


def pixels(picture: Image.Image) -> np.ndarray:
    """Return it as networks see it."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    cli.import_tensorflow()
    from tftransfer import data
    from tftransfer.checks import duplicates

    kinds = {
        "same": lambda picture: picture,
        "resized": half,
        "encoded again": encoded_again,
        "cropped": cropper(np.random.default_rng(0)),
        "mirrored": ImageOps.mirror,
        "gray": lambda picture: picture.convert("L").convert("RGB"),
    }
    given, _ = data.load(options.data, image_size=(SIDE, SIDE))
    began = time.monotonic()
    found = [copy for copy in duplicates.copies(given) if (copy.split, copy.other) == ("test", "train")]
    seconds = time.monotonic() - began
    alarms = {copy.index for copy in found}
    originals = [Image.open(options.data / name).convert("RGB") for name in given.train.names]
    empty = given.validation.subset(np.arange(1))
    recall = {}
    for kind, change in kinds.items():
        changed = np.stack([pixels(change(picture)) for picture in originals])
        splits = {
            "train": (changed, list(given.train.targets.astype(str))),
            "test": (changed[:1], ["0"]),
            "validation": (changed[:1], ["0"]),
        }
        copies = data.load(splits, image_size=(SIDE, SIDE))[0].train
        hits = duplicates.copies(replace(given, test=copies, validation=empty))
        right = {copy.index for copy in hits if copy.other == "train" and copy.index == copy.other_index}
        recall[kind] = round(len(right) / len(originals), 4)
    measured = {"recall": recall, "false_alarms": round(len(alarms) / len(given.test), 4)}
    listed = [(given.test.names[copy.index], given.train.names[copy.other_index]) for copy in found]
    print(f"{options.data.name}: {measured} in {seconds:.1f} s; said to be copies: {listed[:9]}")
    setting = {"image_size": SIDE, "originals": len(originals), "others": len(given.test)}
    write(f"duplicates_{options.data.name}", measured, **setting)


if __name__ == "__main__":
    main()
