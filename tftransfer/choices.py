"""What a recipe's options mean: the network, the strategy and the old task of a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import keras

from tftransfer import advice, backbones, weights
from tftransfer.checks import forgetting
from tftransfer.data import load
from tftransfer.errors import InputError, check
from tftransfer.penalties import Source

_KINDS = {"demo": "demo", None: "random"}  # what tables say of weights that are neither ImageNet's nor a file


@dataclass(frozen=True)
class Network:
    """Which pretrained network a run starts from: a backbone, its weights, and the pictures' `(height, width)`."""

    backbone: str
    weights: str | None
    image_size: tuple[int, int]

    @property
    def is_demo(self) -> bool:
        """Whether the weights are the embedded ones."""
        return self.weights == "demo"


def choose_network(options: argparse.Namespace) -> Network:
    """Fill in what the options leave open: the embedded backbone for the demo data, else MobileNetV2 from ImageNet.

    Raises:
        InputError: If the backbone is not known.
    """
    card = weights.demo_card()
    wants_demo = options.weights == "demo" or (options.weights is None and options.data == "demo")
    name = options.backbone or (card["backbone"] if wants_demo else "MobileNetV2")
    kind = options.weights or ("demo" if wants_demo and name == card["backbone"] else "imagenet")
    return _network(name, kind, options.image_size)


def _network(name: str, kind: str, image_size: tuple[int, int] | None) -> Network:
    row = backbones.backbone(name)
    natural = weights.demo_card()["image_size"] if kind == "demo" else row.natural_size
    # The row's own name: "MobileNet-1.0" is Keras' "MobileNet".
    return Network(row.name, None if kind == "none" else kind, image_size or (natural, natural))


def listed_networks(text: str, image_size: tuple[int, int] | None = None) -> dict[str, Network]:
    """Read a comma list of `NAME[=WEIGHTS]`; without weights those of ImageNet.

    Args:
        text: As the command line has it.
        image_size: Of all of them. Defaults to each one's natural size.

    Returns:
        The networks, by what tables call them.

    Raises:
        InputError: If a backbone is not known, or an entry is given twice.

    Example:
        >>> listed_networks("MobileNetV2,MobileNet-0.25=demo")["MobileNet-0.25 demo"].image_size
        (64, 64)
    """
    found = {}
    for entry in text.split(","):
        name, _, kind = entry.partition("=")
        network = _network(name.strip(), kind.strip() or "imagenet", image_size)
        shown = f"{network.backbone} {_KINDS.get(network.weights, '')}".strip()
        shown = f"{network.backbone} {Path(kind).stem}" if shown in found and kind else shown
        check(shown not in found, "backbones", "a comma list of different networks", text)
        found[shown] = network
    return found


def sizes_to_try(network: Network, *, given: bool) -> tuple[tuple[int, int], ...]:
    """Return which sizes of pictures are worth a try: the network's, and half of it unless one was asked for.

    Example:
        >>> sizes_to_try(Network("MobileNetV2", None, (224, 224)), given=False)
        ((224, 224), (128, 128))
    """
    smallest = backbones.backbone(network.backbone).smallest_size
    half = max(round(network.image_size[0] / 64 + 0.25) * 32, smallest)
    tried = (network.image_size, (half, half))
    return tried[:1] if given or half >= network.image_size[0] else tried


def strategy_choice(options: argparse.Namespace) -> advice.Choice:
    """Read the strategy; without one probe first and then train everything, mirroring no digits.

    Raises:
        InputError: If the strategy is not known, or a number is out of its range.
    """
    usual = "freeze_then_unfreeze:augmentation=light_no_flip" if options.data == "demo" else "freeze_then_unfreeze"
    return advice.Choice(
        options.strategy or usual, options.epochs, options.learning_rate, getattr(options, "patience", None) or 0
    )


def old_task(name: str | None, network: Network, model: keras.Model, options: argparse.Namespace) -> Source | None:
    """Fit a head for the task that the backbone comes from, to see later what was forgotten.

    Args:
        name: `"demo"` for generated signs, or a data set as `--data` takes it; None for none.
        network: Where the model's weights come from.
        model: Not tuned yet.
        options: The recipe's, with `seed` and `smoke`.

    Raises:
        InputError: If the data cannot be read or holds no single labels, or the network never learned them.
    """
    if name is None:
        return None
    if network.weights is None:
        raise InputError(f"`source` needs pretrained weights: `--weights none` has no old task. Received: {name!r}")
    limit = 600 if options.smoke else None
    if name != "demo":
        data = load(name, image_size=network.image_size, seed=options.seed, limit=limit)[0]
        return forgetting.source_probe(model, data)
    if not network.is_demo:
        raise InputError(
            "`source` demo is the task of the embedded backbone (--weights demo): give the data that "
            f"{network.backbone} was trained on, as --data takes it"
        )
    return forgetting.source_probe(
        model, forgetting.demo_source(network.image_size, options.seed, limit), "generated signs"
    )
