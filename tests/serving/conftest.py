"""A small network, a task for it, and its SavedModel."""

from __future__ import annotations

import contextlib
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import serving, tasks
from tftransfer.report import Check
from tftransfer.serving import export, loaders, verification

SIZE = (16, 24)
LABELS = ("red", "green", "blue")


def small_network(num_outputs=3, seed=0):
    """Two convolutions whose answers differ clearly from picture to picture."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="first")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="second")(x)
    x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
    x = keras.layers.Dropout(0.5, name="head_dropout")(x)
    x = keras.layers.Dense(num_outputs, dtype="float32", name="logits")(x)
    model = keras.Model(image, x)
    # Larger weights in the last layer: answers that are nearly uniform would hide differences.
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel * 8, bias])
    return model


@pytest.fixture(scope="session")
def network():
    return small_network


@pytest.fixture(scope="session")
def task():
    return tasks.SingleLabel(LABELS)


@pytest.fixture(scope="session")
def model():
    return small_network()


@pytest.fixture
def network_with_table():
    """A network that looks numbers up: no graph of constants can hold it."""
    image = keras.Input((*SIZE, 3))
    brightness = keras.layers.GlobalAveragePooling2D()(image)
    row = keras.ops.cast(keras.layers.Dense(1)(brightness) > 0, "int64")
    found = keras.layers.IntegerLookup(vocabulary=[1, 2, 3], output_mode="one_hot")(row)
    return keras.Model(image, keras.layers.Dense(3, name="logits")(keras.layers.Concatenate()([brightness, found])))


@pytest.fixture(scope="session")
def exported(model, task, tmp_path_factory):
    """A SavedModel that nobody may change."""
    directory = tmp_path_factory.mktemp("exported") / "1"
    serving.export_savedmodel(model, task, directory)
    return directory


@pytest.fixture(scope="session")
def exported_with_variables(model, task, tmp_path_factory):
    """A SavedModel that keeps its variables, and that nobody may change either."""
    directory = tmp_path_factory.mktemp("exported_with_variables") / "1"
    serving.export_savedmodel(model, task, directory, optimise=False)
    return directory


@pytest.fixture
def write_savedmodel(tmp_path):
    """Return a function that writes a SavedModel of one's own making, faulty or not."""

    def write(tensor, serving_default, batch=None):
        archive = keras.export.ExportArchive()
        encoded = tf.TensorSpec((batch,), tf.string, name="image_bytes")
        pictures = tf.TensorSpec((batch, *SIZE, 3), tf.float32, name="image")
        archive.add_endpoint("serving_default", serving_default, input_signature=[encoded])
        archive.add_endpoint("tensor", tensor, input_signature=[pictures])
        archive.write_out(os.fspath(tmp_path / "faulty"), verbose=False)
        return tmp_path / "faulty"

    return write


@pytest.fixture(scope="session")
def decoder():
    """From encoded pictures to pixels at the small network's size, traced once: that takes seconds."""
    encoded = tf.TensorSpec((None,), tf.string)
    return tf.function(lambda texts: tf.cast(export.batch_decoder(SIZE)(texts), tf.float32), input_signature=[encoded])


@pytest.fixture
def without_c_library(monkeypatch, decoder):
    """Leave the C library out: it takes two seconds, and the tests that are about it do without this."""
    monkeypatch.setattr(loaders, "decode", lambda samples, _: decoder(tf.constant(samples)).numpy())
    passed = Check("C library equals graph session", True)
    monkeypatch.setattr(loaders, "c_library", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(verification, "_check_c_library", lambda *_: passed)


@pytest.fixture(scope="session")
def pictures():
    """Encoded pictures of other sizes than the network's, each mostly of one colour."""
    generator = np.random.default_rng(7)
    encoded = []
    for number, (height, width) in enumerate(((40, 30), (16, 24), (9, 50), (61, 61), (25, 80))):
        pixels = generator.integers(0, 120, (height, width, 3), np.uint8)
        pixels[..., number % 3] += 120
        encode = tf.io.encode_png if number % 2 else tf.io.encode_jpeg
        encoded.append(encode(pixels).numpy())
    return encoded
