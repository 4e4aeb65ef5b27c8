"""Pretrain the small network that the demos start from, on generated letters, signs and invented characters.

    python recipes/pretrain_demo_backbone.py                          # writes saved_models/pretrain_demo_backbone
    python recipes/pretrain_demo_backbone.py --out tftransfer/assets  # remakes the packaged files

Writes demo_backbone.weights.h5, demo_backbone.json and DEMO_BACKBONE.md, the card with the figures. No picture
of a digit takes part. Expected with the defaults: @@EXPECTED@@
"""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np

from tftransfer import cli
from tftransfer.data import glyphs

NAME = "pretrain_demo_backbone"
ALPHA = 0.25
DRAWN = 400  # invented characters beside the printed ones
COLOUR = 0.1  # share of pictures in colour
PICTURES = 40_000
PEAK_LEARNING_RATE = 0.3  # SGD; with Adam at 1e-3 this network did not leave its first plateau in as many steps


def main() -> None:
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
    trainer.fit(
        pictures, [labels, labels], batch_size=batch_size, epochs=epochs, verbose=0 if options.quiet else 2
    )
    write(options, backbone, names, count, epochs)


def new_backbone(image_size: int):  # noqa: ANN201
    """Build the row `MobileNet-0.25` with Keras' own random weights."""
    import keras

    shape = (image_size, image_size, 3)
    return keras.applications.MobileNet(alpha=ALPHA, include_top=False, weights=None, input_shape=shape)


def ease_start(backbone, seed: int) -> None:  # noqa: ANN001
    """Let signals through 27 plain layers from the first step on, and let BatchNorm's averages follow.

    Keras starts depthwise kernels so small that BatchNorm's epsilon (1e-3) swallows part of the signal. Here they
    start as the identity plus noise and the 1x1 kernels as orthogonal matrices. Momentum 0.999 would leave the
    moving averages behind after a few thousand steps.
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


def with_two_classifiers(backbone, num_classes: int):  # noqa: ANN001, ANN201
    """Put a classifier on the last and one on the eleventh block, which helps the lower half to learn."""
    import keras

    image = keras.Input(backbone.input_shape[1:])
    levels = keras.Model(backbone.input, [backbone.output, backbone.get_layer("conv_pw_11_relu").output])
    top, middle = levels(keras.layers.Rescaling(1 / 127.5, offset=-1)(image))
    pooled = keras.layers.GlobalAveragePooling2D()(top)
    pooled_middle = keras.layers.Flatten()(keras.layers.MaxPooling2D(2, padding="same")(middle))
    normalised = [keras.layers.BatchNormalization(momentum=0.95)(x) for x in (pooled, pooled_middle)]
    return keras.Model(image, [keras.layers.Dense(num_classes)(x) for x in normalised])


def one_cycle(steps: int):  # noqa: ANN201
    """Rise from a twentieth of the peak in the first 60 steps at most, then fall to zero along a cosine."""
    import keras

    rise = min(60, steps // 2)
    return keras.optimizers.schedules.CosineDecay(
        PEAK_LEARNING_RATE / 20, steps - rise, warmup_target=PEAK_LEARNING_RATE, warmup_steps=rise
    )


if __name__ == "__main__":
    cli.run_recipe(main)
