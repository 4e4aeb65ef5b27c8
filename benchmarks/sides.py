"""What training benchmarks compare: the Keras guide's code, plain `fit` on cached pictures, and `tftransfer`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guide
import keras
import pictures
import torch_guide
from record import record

RATE = 1e-3


def parser(text: str) -> argparse.ArgumentParser:
    """Return a parser with the options that training benchmarks share."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help="FOLDER with CLASS/*.jpg (default: 500 generated pictures)")
    made.add_argument("--weights", help="file for MobileNetV2 of that width (default: random)")
    made.add_argument("--width", type=float, default=0.35, help="of MobileNetV2 (default: %(default)s)")
    made.add_argument("--size", type=int, default=224, help="side of the pictures (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    return made


def keras_side(options: argparse.Namespace, *, opened: str | None, cached: bool = False) -> dict[str, float]:
    """Train by the guide's code: new flips and rotations in every epoch, or (`cached`) decoded pictures kept instead.

    Args:
        options: Of `parser`.
        opened: The lowest layer of the backbone that trains; "" for all of it, None for none.
        cached: Whether the decoded pictures are cached, and not augmented, and BatchNorm is held in inference mode.
            Defaults to False.
    """
    began = time.perf_counter()
    training, validation = guide.datasets(options.data, options.size, cached=cached)
    whole, base = guide.model(options.width, options.size, pictures.classes(options.data), options.weights)
    if opened is not None:
        guide.open_from(base, opened, hold_batch_norm=cached)
    accuracy = guide.fit(whole, training, validation, options.epochs, RATE)
    return {"seconds": time.perf_counter() - began, "accuracy": accuracy}


def torch_side(options: argparse.Namespace) -> dict[str, float]:
    """Train the head by PyTorch's tutorial."""
    began = time.perf_counter()
    accuracy = torch_guide.train(options.data, options.size, options.width, options.epochs)
    return {"seconds": time.perf_counter() - began, "accuracy": accuracy}


def our_side(
    options: argparse.Namespace, strategy: Callable[[Any], Any], cache_dir: Path | None = None, cache: str = "auto"
) -> dict[str, float]:
    """Train by a strategy of `tftransfer`.

    Args:
        options: Of `parser`.
        strategy: From the package to the strategy.
        cache_dir, cache: As for `fine_tune`.
    """
    import tftransfer as tft

    _ = tft.fine_tune, tft.builders, tft.data, tft.strategies  # imported by now, as the rivals' libraries are
    began = time.perf_counter()
    keras.utils.set_random_seed(0)
    name = "MobileNetV2" if options.width == 1 else f"MobileNetV2-{options.width:g}"
    source, size = options.scratch / "pictures.csv", (options.size, options.size)
    data, task = tft.data.load(source, image_size=size, cache_dir=cache_dir)
    model = tft.builders.image_classifier(name, task.num_outputs, image_size=options.size, weights=options.weights)
    history = tft.fine_tune(model, task, data, strategy(tft), cache_dir=cache_dir, cache=cache)
    return {"seconds": time.perf_counter() - began, "accuracy": history["val_accuracy"][-1]}


def record_all(name: str, options: argparse.Namespace, found: list[dict[str, dict[str, float]]]) -> None:
    """Write one result for each of our sides against each rival: those that begin with `keras`, and `torch`."""
    setting = {"width": options.width, "size": options.size, "epochs": options.epochs, "data": options.data.name}
    rivals = [side for side in found[0] if side.startswith(("keras", "torch"))]
    only = sum(side.startswith("keras") for side in rivals) == 1
    for rival in rivals:
        for side in found[0]:
            if side not in rivals:
                both = [(one[rival]["seconds"], one[side]["seconds"]) for one in found]
                accuracies = {key: [round(one[key]["accuracy"], 3) for one in found] for key in (rival, side)}
                label = f"{name}_{options.width:g}_{side}" + ("" if only and rival == "keras" else f"_against_{rival}")
                versions = torch_guide.versions() if rival == "torch" else {}
                record(label, both, rival=rival, **setting, validation_accuracies=accuracies, **versions)
