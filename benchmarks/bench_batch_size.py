"""How many pictures at a time go through a frozen network fastest: what `features.BATCH` is chosen by.

    python benchmarks/bench_batch_size.py [--backbones MobileNetV2 ResNet50] [--image-size 224]

It is chosen here once, and not in each run, because the last bits of a sum depend on it: another number would train
another model. Random weights; the graphs of constants are made before, and take turns. Writes results/batch_size.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

from record import write

from tftransfer import cli

SIZES = (4, 8, 16, 32, 64, 128)
PICTURES, ROUNDS = 128, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["MobileNetV2-0.35", "MobileNetV2", "ResNet50"])
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    cli.import_tensorflow()
    import tensorflow as tf

    from tftransfer import backbones, constants, features

    side, found = (options.image_size, options.image_size), {}
    pictures = tf.random.stateless_uniform((PICTURES, *side, 3), (0, 0), 0, 255)
    for name in options.backbones:
        network = backbones.build(name, side, None)
        ways = {size: (constants.Constants(network, size), tf.split(pictures, PICTURES // size)) for size in SIZES}
        taken: dict[int, list[float]] = {size: [] for size in SIZES}
        for number in range(ROUNDS + 1):
            for size, (below, batches) in ways.items():
                began = time.perf_counter()
                for batch in batches:
                    below(batch)
                if number:  # the first makes the graphs
                    taken[size].append(time.perf_counter() - began)
        own = statistics.median(taken[features.BATCH])
        found[name] = {size: round(statistics.median(some) / own, 3) for size, some in taken.items()}
        print(name, found[name], flush=True)
    write("batch_size", {"time_against_the_chosen": found}, chosen=features.BATCH, image_size=options.image_size)


if __name__ == "__main__":
    main()
