"""What the embedded backbone is worth: its linear probe on the digits against random weights and raw pixels."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import backbones, constants, weights
from tftransfer.checks.probe import ProbeRow, compare_probe
from tftransfer.data import Data, Examples, order
from tftransfer.report import Findings, Number, Table

PER_CLASS = (1, 5, 10)
_SIDE = 8  # the digits' own size
_DECIDE = ("keras", "tensorflow", "numpy", "pillow", "matplotlib")  # packages that the weights depend on


def demo_comparison(data: Data, image_size: tuple[int, int]) -> Findings:
    """Compare linear probes on few labelled digits: embedded weights, random weights, raw pixels.

    The random weights are Keras' own initial ones; they follow from `keras.utils.set_random_seed`.

    Args:
        data: The demo's data at `image_size`.
        image_size: `(height, width)` of the backbone's input.

    Returns:
        A table of test accuracies at 1, 5 and 10 labelled digits per class (as far as there are that many): mean over
        five draws with their range.
    """
    card = weights.demo_card()
    random = backbones.build(card["backbone"], image_size, None)
    embedded = backbones.build(card["backbone"], image_size, "demo")
    return Findings(tables=(_table(compare_networks(data, embedded, random), len(data.test)),))


def compare_networks(data: Data, embedded: keras.Model, random: keras.Model, draws: int = 5) -> list[ProbeRow]:
    """Probe the digits on two networks and on raw pixels; labelled digits come from the training split.

    Args:
        data: The demo's data at the networks' image size.
        embedded: A network with the weights in question, from pixels in [0, 255] to features.
        random: The same network with random weights.
        draws: How often labelled digits are drawn. Defaults to 5.

    Returns:
        One row per kind of features and number of labelled digits per class, see `compare_probe`.
    """
    smallest = int(np.bincount(data.train.targets).min())
    per_class = tuple(count for count in PER_CLASS if count <= smallest)
    train, test = (_features(examples, embedded, random) for examples in (data.train, data.test))
    return compare_probe(train, data.train.targets, test, data.test.targets, per_class, draws)


def card(
    backbone: str, file: Path, *, image_size: int, seed: int, source: dict[str, Any], probe: Sequence[ProbeRow]
) -> dict[str, Any]:
    """Describe embedded weights: which network, how they were made, what they are worth.

    Args:
        backbone: The row of the backbone table.
        file: The weights.
        image_size: Side of the pictures they were made for, in pixels.
        seed: The seed of every random choice.
        source: What the network was pretrained on.
        probe: From `compare_networks`.

    Returns:
        What `demo_backbone.json` holds.
    """
    return {
        "backbone": backbone,
        "image_size": image_size,
        "sha256": weights.digest(file),
        "seed": seed,
        "source": source,
        "probe": [asdict(row) for row in probe],
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _DECIDE}},
    }


def card_text(card: Mapping[str, Any], size: int) -> str:
    """Write the card for people; `size` is that of the weights in bytes."""
    template = resources.files("tftransfer").joinpath("assets/demo_card.txt").read_text(encoding="utf-8")
    line = "| {features} | {per_class} | {mean:.3f} | {low:.3f} to {high:.3f} |"
    return template.format(
        **{**card, **card["source"]},
        megabytes=size / 1e6,
        table="\n".join(line.format(**row) for row in card["probe"]),
        licences="; ".join(sorted({font["licence"] for font in card["source"]["fonts"].values()})),
        made_with=", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    )


def _features(examples: Examples, embedded: keras.Model, random: keras.Model) -> dict[str, np.ndarray]:
    return {
        "demo backbone": _pooled(embedded, examples),
        "random weights": _pooled(random, examples),
        "raw pixels": _raw_pixels(examples),
    }


def _pooled(network: keras.Model, examples: Examples) -> np.ndarray:
    infer = constants.as_constant_function(network)
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
    columns = ("probe on", *(f"{k} per class" for k in numbers))
    note = f"Accuracy on the {count} test digits: mean and range over five draws of labelled training digits."
    return Table("What the embedded backbone is worth", columns, cells, note, percent=columns[1:])
