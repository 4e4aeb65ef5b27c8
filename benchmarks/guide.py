"""The rival: training as the Keras guide to transfer learning writes it, straight, on a folder of pictures.

https://keras.io/guides/transfer_learning: pictures from files, flips and small rotations, a frozen backbone in
inference mode inside `fit`, dropout and one Dense layer. It decodes and augments in every epoch, and so computes the
whole backbone in every epoch.
"""

from __future__ import annotations

from pathlib import Path

import keras
import tensorflow as tf


def datasets(folder: Path, side: int, cached: bool = False) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Return batches of 32 for training, nine tenths of `FOLDER/CLASS/*.jpg`, and for validation.

    Args:
        folder: With a folder per class.
        side: Of the pictures, in pixels.
        cached: Whether the decoded pictures are kept in memory, and not augmented. Defaults to False.
    """
    training, validation = keras.utils.image_dataset_from_directory(
        folder, image_size=(side, side), batch_size=32, validation_split=0.1, subset="both", seed=0, verbose=False
    )
    if cached:
        shuffled = training.unbatch().cache().shuffle(512).batch(32)
        return shuffled.prefetch(tf.data.AUTOTUNE), validation.cache().prefetch(tf.data.AUTOTUNE)
    layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)]

    def augmented(pictures: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        for layer in layers:
            pictures = layer(pictures, training=True)
        return pictures, targets

    augmenting = training.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return augmenting.prefetch(tf.data.AUTOTUNE), validation.prefetch(tf.data.AUTOTUNE)


def model(alpha: float, side: int, classes: int, weights: str | None) -> tuple[keras.Model, keras.Model]:
    """Return the whole model and its frozen backbone, MobileNetV2."""
    base = keras.applications.MobileNetV2(input_shape=(side, side, 3), alpha=alpha, include_top=False, weights=weights)
    base.trainable = False
    inputs = keras.Input((side, side, 3))
    scaled = keras.layers.Rescaling(scale=1 / 127.5, offset=-1)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(base(scaled, training=False))
    return keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.Dropout(0.2)(x))), base


def open_from(base: keras.Model, lowest: str, *, hold_batch_norm: bool = False) -> None:
    """Let the backbone train from a layer on; everything for an empty name.

    Args:
        base: The backbone.
        lowest: The layer's name.
        hold_batch_norm: Whether BatchNorm runs in inference mode, and its factors train all the same, as in ours; the
            guide believes so of `training=False`, which `fit` overrules. Defaults to False: the guide's code.
    """
    base.trainable = True
    for layer in base.layers:
        if layer.name == lowest:
            break
        layer.trainable = not lowest
    for layer in base.layers if hold_batch_norm else ():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            layer.trainable = False
            layer.gamma.trainable = layer.beta.trainable = True


def fit(
    whole: keras.Model, training: tf.data.Dataset, validation: tf.data.Dataset, epochs: int, rate: float = 1e-3
) -> float:
    """Train, and return the last validation accuracy."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return whole.fit(training, epochs=epochs, validation_data=validation, verbose=0).history["val_accuracy"][-1]
