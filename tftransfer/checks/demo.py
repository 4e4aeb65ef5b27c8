"""What the embedded backbone is worth: its linear probe on the digits against random weights and raw pixels."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tftransfer import backbones, prefix, weights
from tftransfer.checks.probe import ProbeRow, compare_probe
from tftransfer.data import Data, Examples, order
from tftransfer.report import Findings, Number, Table

PER_CLASS = (1, 5, 10)
_SIDE = 8  # the digits' own size


def demo_comparison(data: Data, image_size: tuple[int, int]) -> Findings:
    """Compare linear probes on few labelled digits: embedded weights, random weights, raw pixels.

    Args:
        data: The demo's data at `image_size`.
        image_size: `(height, width)` of the backbone's input.

    Returns:
        A table of test accuracies at 1, 5 and 10 labelled digits per class (as far as there are that many): mean over
        five draws with their range.
    """
    smallest = int(np.bincount(data.train.targets).min())
    per_class = tuple(count for count in PER_CLASS if count <= smallest)
    train, test = _features(data.train, image_size), _features(data.test, image_size)
    rows = compare_probe(train, data.train.targets, test, data.test.targets, per_class)
    return Findings(tables=(_table(rows, len(data.test)),))


def _features(examples: Examples, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    name = weights.demo_card()["backbone"]
    return {
        "demo backbone": _pooled(backbones.build(name, image_size, "demo"), examples),
        "random weights": _pooled(_random(name, image_size), examples),
        "raw pixels": _raw_pixels(examples),
    }


def _random(name: str, image_size: tuple[int, int]) -> keras.Model:
    """Build the network with random weights that do not depend on what was built before."""
    network = backbones.build(name, image_size, None)
    for number, layer in enumerate(layer for layer in network.layers if hasattr(layer, "kernel_initializer")):
        initializer = keras.initializers.GlorotUniform(seed=number)
        layer.kernel.assign(initializer(layer.kernel.shape))
    return network


def _pooled(network: keras.Model, examples: Examples) -> np.ndarray:
    infer = prefix.as_constant_function(network)
    features = [infer(batch[0])[0].numpy().mean(axis=(1, 2)) for batch in order.in_order(examples, 64)]
    return np.concatenate(features)


def _raw_pixels(examples: Examples) -> np.ndarray:
    """Return the pictures at the digits' own size, one channel: `(n, 64)`."""
    batches = [
        tf.image.resize(batch[0], (_SIDE, _SIDE), antialias=True).numpy()[..., 0]
        for batch in order.in_order(examples, 256)
    ]
    return np.concatenate(batches).reshape(len(examples), -1)


def _table(rows: list[ProbeRow], count: int) -> Table:
    best = {(row.features, row.per_class): row for row in rows}
    numbers = sorted({row.per_class for row in rows})
    cells = tuple(
        (name, *(Number(best[name, k].mean, best[name, k].low, best[name, k].high, "range") for k in numbers))
        for name in dict.fromkeys(row.features for row in rows)
    )
    columns = ("linear probe on", *(f"{k} per class" for k in numbers))
    note = f"Accuracy on the {count} test digits: mean and range over five draws of labelled training digits."
    return Table("What the embedded backbone is worth", columns, cells, note, percent=columns[1:])
