"""Pretrain the small network that the demos start from, on generated letters, signs and made-up characters.

    python recipes/pretrain_demo_backbone.py                          # into a folder of saved_models
    python recipes/pretrain_demo_backbone.py --out tftransfer/assets  # remakes the packaged files

Writes demo_backbone.weights.h5, demo_backbone.json and DEMO_BACKBONE.md, the card with the figures. No digit
takes part. Expected with the defaults: after 6 to 20 minutes on two cores, a linear probe on 10
labelled digits per class scores 0.97 (raw pixels 0.90, random weights 0.65; mean of five draws); 5 per class
0.95 (0.86, 0.54); 1 per class 0.79 (0.64, 0.31).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import tftransfer as tft
from tftransfer import cli

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
    parser.add_argument(
        "--seed",
        type=cli.at_least(0, cli.LARGEST_SEED),
        default=0,
        help="decides every random choice (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=cli.at_least(1), default=8, help="passes over the pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=cli.at_least(32), default=64, help="pixels, from 32 (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("saved_models") / NAME, help="folder (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="64 pictures and two steps; every file is written")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    options = cli.parse(parser)

    import keras
    import tensorflow as tf

    from tftransfer.data import glyphs

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
    source = {"pictures": count, "epochs": epochs, "classes": len(names), "drawn": DRAWN, "colour": COLOUR}
    write(options, backbone, {**source, "printed": len(glyphs.PRINTED), "fonts": glyphs.fonts()})


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


def write(options: argparse.Namespace, backbone: keras.Model, source: dict) -> None:
    """Write the weights, and the card with what was measured on the real digits, as JSON and as text."""
    import keras

    from tftransfer.checks import demo

    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "demo_backbone.weights.h5"
    backbone.save_weights(weights)
    size = (options.image_size, options.image_size)
    digits, _ = tft.data.load("demo", image_size=size)
    keras.utils.set_random_seed(0)
    trained, random = (tft.backbones.build(f"MobileNet-{ALPHA}", size, file) for file in (weights, None))
    probe = demo.compare_networks(digits, trained, random, draws=1 if options.smoke else 5)
    facts = {"image_size": options.image_size, "seed": options.seed, "source": source, "probe": probe}
    card = demo.card(f"MobileNet-{ALPHA}", weights, **facts)
    (options.out / "demo_backbone.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (options.out / "DEMO_BACKBONE.md").write_text(demo.card_text(card, weights.stat().st_size), encoding="utf-8")


if __name__ == "__main__":
    cli.run_recipe(main, goes_on=False)
