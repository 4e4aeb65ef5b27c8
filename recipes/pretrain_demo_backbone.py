"""Pretrain the small network that the demos start from, on generated letters, signs and made-up characters.

    python recipes/pretrain_demo_backbone.py                          # into a folder of saved_models
    python recipes/pretrain_demo_backbone.py --out tftransfer/assets  # remakes the packaged files

Writes demo_backbone.weights.h5, demo_backbone.json and DEMO_BACKBONE.md, the card with the figures. No digit
takes part. Expected with the defaults: after 6 to 20 minutes on two cores, a linear probe on 10
labelled digits per class scores 0.97 (raw pixels 0.90, random weights 0.57; mean of five draws); 5 per class
0.95 (0.85, 0.49); 1 per class 0.80 (0.64, 0.34).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import PIL
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tftransfer import cli
from tftransfer.checks.probe import ProbeRow, compare_probe
from tftransfer.data import glyphs

if TYPE_CHECKING:
    import keras

NAME = "pretrain_demo_backbone"
ALPHA = 0.25
DRAWN = 400  # invented characters beside the printed ones
COLOUR = 0.1  # share of pictures in colour
PICTURES = 40_000
PEAK_LEARNING_RATE = 0.3  # SGD; with Adam at 1e-3 this network did not leave its first plateau in as many steps


def main() -> None:
    """Generate, train, measure, write."""
    parser = cli.Parser(prog=f"recipes/{NAME}.py", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="decides every random choice (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the pictures (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, from 32 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("saved_models") / NAME, help="folder (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="64 pictures and two steps; every file is written")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    options = cli.parse(parser)

    import keras
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(options.seed)
    count, batch_size = (64, 32) if options.smoke else (PICTURES, 64)
    epochs = 1 if options.smoke else options.epochs
    pictures, labels, names = glyphs.generated_signs(count, options.image_size, options.seed, DRAWN, COLOUR)

    backbone = new_backbone(options.image_size)
    ease_start(backbone, options.seed)
    trainer = with_two_classifiers(backbone, len(names))
    steps = count // batch_size * epochs
    trainer.compile(
        keras.optimizers.SGD(one_cycle(steps), momentum=0.9, nesterov=True),
        loss=[keras.losses.SparseCategoricalCrossentropy(from_logits=True) for _ in trainer.outputs],
    )
    trainer.fit(pictures, [labels, labels], batch_size=batch_size, epochs=epochs, verbose=0 if options.quiet else 2)
    facts = {"pictures": count, "epochs": epochs, "classes": len(names), "drawn": DRAWN, "colour": COLOUR}
    write(options, backbone, {**facts, "printed": len(glyphs.PRINTED)})


def new_backbone(image_size: int) -> keras.Model:
    """Build the row `MobileNet-0.25` with Keras' own random weights."""
    import keras

    shape = (image_size, image_size, 3)
    return keras.applications.MobileNet(alpha=ALPHA, include_top=False, weights=None, input_shape=shape)


def ease_start(backbone: keras.Model, seed: int) -> None:
    """Let signals through 27 plain layers from the first step on, and let BatchNorm's averages follow.

    Keras starts depthwise kernels so small that BatchNorm's epsilon (1e-3) swallows part of the signal. Here
    they start as the identity plus noise and the 1x1 kernels as orthogonal matrices. Momentum 0.999 would
    leave the moving averages behind after a few thousand steps.
    """
    import keras

    orthogonal = keras.initializers.Orthogonal(gain=2**0.5, seed=seed)
    rng = np.random.default_rng(seed)
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.95
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            kernel = rng.normal(0, 0.1, layer.kernel.shape)
            kernel[1, 1] += 1
            layer.kernel.assign(kernel)
        elif isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (1, 1):
            layer.kernel.assign(orthogonal(layer.kernel.shape))


def with_two_classifiers(backbone: keras.Model, num_classes: int) -> keras.Model:
    """Put a classifier on the last and one on the eleventh block, which helps the lower half to learn."""
    import keras

    image = keras.Input(backbone.input_shape[1:])
    levels = keras.Model(backbone.input, [backbone.output, backbone.get_layer("conv_pw_11_relu").output])
    top, middle = levels(keras.layers.Rescaling(1 / 127.5, offset=-1)(image))
    pooled = keras.layers.GlobalAveragePooling2D()(top)
    pooled_middle = keras.layers.Flatten()(keras.layers.MaxPooling2D(2, padding="same")(middle))
    normalised = [keras.layers.BatchNormalization(momentum=0.95)(x) for x in (pooled, pooled_middle)]
    return keras.Model(image, [keras.layers.Dense(num_classes)(x) for x in normalised])


def one_cycle(steps: int) -> keras.optimizers.schedules.CosineDecay:
    """Rise from a twentieth of the peak in the first 60 steps at most, then fall to zero along a cosine."""
    import keras

    rise = min(60, steps // 2)
    return keras.optimizers.schedules.CosineDecay(
        PEAK_LEARNING_RATE / 20, steps - rise, warmup_target=PEAK_LEARNING_RATE, warmup_steps=rise
    )


def write(options: argparse.Namespace, backbone: keras.Model, facts: dict) -> None:
    """Write the weights, and the card with what was measured, as JSON and as text."""
    import keras
    import tensorflow as tf

    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "demo_backbone.weights.h5"
    backbone.save_weights(weights)
    card = {
        "backbone": f"MobileNet-{ALPHA}",
        "image_size": options.image_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "seed": options.seed,
        "source": {
            **facts,
            "fonts": {
                name: {"sha256": glyphs.font_sha256(name), "licence": licence}
                for name, (_, licence) in glyphs.FONTS.items()
            },
        },
        "probe": [dataclasses.asdict(row) for row in compare(backbone, draws=1 if options.smoke else 5)],
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }
    (options.out / "demo_backbone.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (options.out / "DEMO_BACKBONE.md").write_text(as_text(card, weights.stat().st_size), encoding="utf-8")


def compare(backbone: keras.Model, draws: int) -> list[ProbeRow]:
    """Probe real digits: labelled ones are drawn from the demo's training part, the test part is scored."""
    import keras

    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    keras.utils.set_random_seed(0)
    networks = {"demo backbone": backbone, "random weights": new_backbone(backbone.input_shape[1])}
    features = {name: pooled_features(network, digits.images) for name, network in networks.items()}
    features["raw pixels"] = digits.data
    (train, train_labels), (test, test_labels) = (
        ({name: values[part] for name, values in features.items()}, digits.target[part]) for part in parts
    )
    return compare_probe(train, train_labels, test, test_labels, draws=draws)


def pooled_features(backbone: keras.Model, digits: np.ndarray) -> np.ndarray:
    """Run digits `(n, 8, 8)` with values 0 to 16 through a network and average over places."""
    import tensorflow as tf

    pictures = np.repeat(digits[..., None] * 255 / 16, 3, axis=-1)
    pictures = tf.image.resize(pictures, backbone.input_shape[1:3], antialias=True)
    batches = tf.data.Dataset.from_tensor_slices(pictures / 127.5 - 1).batch(256)
    return np.concatenate([backbone(batch, training=False).numpy().mean(axis=(1, 2)) for batch in batches])


def as_text(card: dict, size: int) -> str:
    """Write the card for people."""
    rows = [
        "| {features} | {per_class} | {mean:.3f} | {low:.3f} to {high:.3f} |".format(**row) for row in card["probe"]
    ]
    source = card["source"]
    return CARD.format(
        **{key: card[key] for key in ("backbone", "image_size", "sha256", "seed")},
        **{key: source[key] for key in ("pictures", "classes", "printed", "drawn", "epochs")},
        megabytes=size / 1e6,
        table="\n".join(rows),
        licences="; ".join(sorted({font["licence"] for font in source["fonts"].values()})),
        versions=", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    )


CARD = """# The demo backbone

`demo_backbone.weights.h5` ({megabytes:.2f} MB) holds the weights of
`keras.applications.MobileNet(alpha=0.25, include_top=False)` ({backbone}) for RGB pictures of {image_size}
x {image_size} pixels, scaled to [-1, 1]. This project pretrained it itself, so that demos, tests and
tutorials show transfer learning without a download.

## How it was made
    python recipes/pretrain_demo_backbone.py --out tftransfer/assets

remakes this file, the weights and `demo_backbone.json`; the same seed ({seed}) gives the same bits on the
same machine and versions ({versions}). SHA-256 of the weights:
`{sha256}`

The source is {pictures:,} generated pictures of {classes} classes, seen in {epochs} epochs
(`tftransfer.data.glyphs.generated_signs`): {printed} printed letters and signs (Latin, Greek, Cyrillic,
punctuation, mathematics) in the fonts that Matplotlib ships, and {drawn} characters invented by formula,
one to three pen strokes each, freshly handwritten in every picture. No digit and no other character of a
number category is among them; some letters do look like digits, above all the Cyrillic З (like 3) and Ч (like
4) and the Latin O, S, Z and B. No photograph and no data set of people took part. Half of the pictures pass
through 8 x 8 pixels, as the demo's digits do: the recipe was made for that demo, and its settings were chosen
on the training part of those digits.

## What it is good for
Logistic regression on few labelled examples per class of scikit-learn's real handwritten digits (draws from
the demo's training part, accuracy on its test part of 360; mean and range of five draws; protocol in
`tftransfer.checks.probe`):

| features | per class | mean accuracy | range |
|---|---|---|---|
{table}

## Limits
It has seen single characters only, most of them light on dark. It is no substitute for ImageNet weights:
for photographs, take those. A test part of 360 has a standard error of about one point.

## Licences
The weights and the generated pictures carry this project's licence. The fonts are not part of them; they
were rendered under their own licences ({licences}); names and SHA-256 of every font file are in
`demo_backbone.json`.
"""


if __name__ == "__main__":
    cli.run_recipe(main)
