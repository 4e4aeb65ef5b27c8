"""Whether memory stays flat: a frozen network's head is trained on few and on many pictures with the same budget.

    python benchmarks/bench_memory.py [--few 1000] [--many 20000] [--budget 64]

Decoded pictures and features may take `--budget` MiB each, what is beyond lies in files. Each size runs in a new
process, whose peak resident size is watched. Writes results/memory.json: the peaks, and by how much the larger exceeds
the smaller against the budget.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from record import write

from tftransfer import cli

SIZE, SIDE, EPOCHS = 96, 120, 2


def generate(folder: Path, count: int) -> Path:
    """Write so many small JPEG files of two classes, and a table of them."""
    import numpy as np
    import tensorflow as tf

    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = generator.integers(0, 256, (1, 6, 8, 3)).astype(np.float32)
        coarse[..., number % 2] *= 0.7
        picture = tf.cast(tf.image.resize(coarse, (SIDE, SIDE))[0], tf.uint8)
        path = folder / f"{number:06}.jpg"
        path.write_bytes(tf.io.encode_jpeg(picture, quality=85).numpy())
        rows.append((path, "ab"[number % 2], "validation" if number % 20 < 2 else "test" if number < 100 else "train"))
    table = folder / "pictures.csv"
    with table.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("image", "label", "split"), *rows])
    return table


def train(table: Path, cache_dir: Path, budget: int) -> dict[str, float]:
    """Train a head with so many bytes for pictures and for features; returns the peak resident MiB."""
    import keras
    import psutil

    import tftransfer as tft
    from tftransfer import features

    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    features.MEMORY_SHARE = budget / psutil.virtual_memory().available
    keras.utils.set_random_seed(0)
    data, task = tft.data.load(table, image_size=(SIZE, SIZE), memory_budget=budget, cache_dir=cache_dir)
    model = tft.builders.image_classifier("MobileNetV2-0.35", task.num_outputs, image_size=SIZE, weights=None)
    tft.fine_tune(model, task, data, tft.strategies.linear_probe(epochs=EPOCHS), cache_dir=cache_dir)
    done.set()
    return {"peak": peak[0] / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--many", type=int, default=20000)
    parser.add_argument("--budget", type=int, default=64, help="MiB for pictures, and for features (default: 64)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cli.import_tensorflow()
    if options.child:
        print(json.dumps(train(options.child, options.child.parent / "cache", options.budget * 2**20)))
        return
    peaks = {}
    for count in (options.few, options.many):
        with tempfile.TemporaryDirectory() as scratch:
            table = generate(Path(scratch) / "pictures", count)
            command = [sys.executable, *sys.argv, "--child", str(table)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[count] = json.loads(done.stdout.splitlines()[-1])["peak"]
        print(f"{count} pictures: peak {peaks[count]:.0f} MiB", flush=True)
    growth = peaks[options.many] - peaks[options.few]
    measured = {
        "peak_mib": {str(count): round(peak) for count, peak in peaks.items()},
        "growth_mib": round(growth),
        "growth_of_peak": round(growth / peaks[options.few], 3),
    }
    print(f"memory: {measured}")
    write("memory", measured, budget_mib=options.budget, size=SIZE, epochs=EPOCHS, backbone="MobileNetV2-0.35")


if __name__ == "__main__":
    main()
