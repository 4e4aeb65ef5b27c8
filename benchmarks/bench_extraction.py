"""How fast features come: against `model.predict`, against the bare graph of constants, and from files.

    python benchmarks/bench_extraction.py [--backbone MobileNetV2] [--image-size 224]

Random weights and generated pictures: the time does not depend on them. In turn, over the same pictures: `predict` on
decoded ones; the graph of constants on tensors that are there already, which is as fast as it gets; ours from decoded
pictures; ours from JPEG files, decoding included. Graphs are traced before. Writes results/extraction.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pictures
from record import compare, write

from tftransfer import cli

ROUNDS = 7
BATCH = 32


def seconds(run: Callable[[], object]) -> float:
    """Return what a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="MobileNetV2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--data", type=Path, help="FOLDER with CLASS/*.jpg (default: 500 generated pictures)")
    options = parser.parse_args()
    cli.import_tensorflow()
    import tensorflow as tf

    from tftransfer import backbones, constants, data, features
    from tftransfer.data.augment import Augmentation

    side = (options.image_size, options.image_size)
    network = backbones.build(options.backbone, side, None)
    below = constants.Constants(network, BATCH)
    room = features.Room(sys.maxsize)

    def keep(examples: data.Examples) -> None:
        features.keep(below, examples, Augmentation(), views=1, seed=0, room=room)

    with tempfile.TemporaryDirectory() as scratch:
        table = pictures.table(pictures.folder(options.data, Path(scratch)), Path(scratch) / "pictures.csv")
        examples = data.load(table, image_size=side)[0].train
        decoded = examples.pictures.load(tf.range(len(examples), dtype=tf.int64))
        batches = tf.data.Dataset.from_tensor_slices(decoded).batch(BATCH)
        ready = [tf.cast(batch, tf.float32) for batch in batches]
        ways = {
            "predict": lambda: network.predict(batches, verbose=0),
            "constant_graph": lambda: [below(batch) for batch in ready],
            "from_decoded": lambda: keep(examples),
            "from_files": lambda: keep(data.load(table, image_size=side)[0].train),
        }
        for run in ways.values():
            run()  # tracing is not what is measured
        rounds = [{name: seconds(run) for name, run in ways.items()} for _ in range(ROUNDS)]
    times = {name: [one[name] for one in rounds] for name in ways}
    measured = {
        "faster_than_predict": compare(times["predict"], times["from_decoded"]),
        "slower_than_the_constant_graph": compare(times["from_decoded"], times["constant_graph"]),
        "slower_from_files": compare(times["from_files"], times["constant_graph"]),
    }
    print(f"extraction: {measured}")
    setting = {"backbone": options.backbone, "image_size": options.image_size, "pictures": len(examples)}
    write("extraction", {**measured, "rounds": ROUNDS}, **setting, batch=BATCH)


if __name__ == "__main__":
    main()
