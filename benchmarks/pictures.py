"""The pictures that benchmarks run on: a folder of the user's, or generated ones."""

from __future__ import annotations

import csv
from pathlib import Path

CLASSES, PER_CLASS, SIDE = 5, 100, 320
EVERY = 10  # picture of a class is for validation


def folder(given: Path | None, scratch: Path) -> Path:
    """Return a folder `CLASS/*.jpg`: the one that is given, or 500 generated pictures in a scratch folder."""
    if given:
        return given
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)
    for number in range(CLASSES * PER_CLASS):
        coarse = generator.integers(0, 256, (1, 12, 16, 3)).astype(np.float32)
        coarse[..., number % 3] *= 1 - 0.15 * (number % CLASSES)
        picture = tf.cast(tf.image.resize(coarse, (SIDE, SIDE * 4 // 3), "bicubic")[0], tf.uint8)
        path = scratch / f"class_{number % CLASSES}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(picture, quality=90).numpy())
    return scratch


def table(source: Path, file: Path) -> Path:
    """Write a table of a folder `CLASS/*.jpg`: every tenth picture is for validation, one per class also the test."""
    rows = []
    for one in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(one.glob("*.jpg"))
        rows += [(path, one.name, "train" if at % EVERY else "validation") for at, path in enumerate(files)]
        rows.append((files[0], one.name, "test"))
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("image", "label", "split"), *rows])
    return file


def classes(source: Path) -> int:
    """Return how many classes a folder has."""
    return sum(path.is_dir() for path in source.iterdir())
