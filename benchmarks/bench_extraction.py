"""How much faster features come from the graph of constants than from `model.predict`, on the same pictures.

    python benchmarks/bench_extraction.py [--backbone MobileNetV2] [--image-size 224]

Random weights: the time does not depend on them. Runs both alternately and writes results/extraction.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from record import record

from tftransfer import cli

PAIRS = 7
PICTURES, BATCH = 128, 32


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="MobileNetV2")
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    cli.import_tensorflow()
    import tensorflow as tf

    from tftransfer import backbones, prefix

    side = options.image_size
    network = backbones.build(options.backbone, (side, side), None)
    constants = prefix.as_constant_function(network)
    batches = tf.data.Dataset.from_tensor_slices(tf.random.uniform((PICTURES, side, side, 3), 0, 255)).batch(BATCH)

    def theirs() -> None:
        network.predict(batches, verbose=0)

    def ours() -> None:
        for batch in batches:
            constants(batch)

    theirs(), ours()  # tracing is not what is measured
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(PAIRS)]
    record("extraction", pairs, backbone=options.backbone, image_size=side, pictures=PICTURES, batch=BATCH)


if __name__ == "__main__":
    main()
