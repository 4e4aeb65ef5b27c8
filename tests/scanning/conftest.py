"""A SavedModel and a Keras file with everything in it that crafted ones hide in, and ways to edit copies of them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import keras
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tftransfer.scanning import scan


class Everything(tf.Module):
    """A condition, a loop, a dataset, a variable and a table that is read from an asset."""

    def __init__(self, vocabulary):
        super().__init__()
        self.weight = tf.Variable([2.0])
        # Tracked, as Keras' ExportArchive needs it too: without it the asset would not be exported.
        initializer = tf.lookup.TextFileInitializer(
            vocabulary, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        self.table = tf.lookup.StaticHashTable(initializer, -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="word")])
    def serve(self, word):
        number = tf.cast(self.table.lookup(word), tf.float32) * self.weight
        number = tf.cond(tf.reduce_sum(number) > 0, lambda: number + 1, lambda: number - 1)
        number = tf.while_loop(lambda x: tf.reduce_sum(x) < 9, lambda x: (x + 3,), (number,))[0]
        doubled = tf.data.Dataset.from_tensor_slices(number).map(lambda x: x * 2)
        return {"number": number, "sum": doubled.reduce(0.0, lambda x, y: x + y)}


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """A SavedModel that nobody may change."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "words.txt").write_text("red\ngreen\nblue\n")
    module = Everything(os.fspath(folder / "words.txt"))
    tf.saved_model.save(module, os.fspath(folder / "model"), signatures={"serving_default": module.serve})
    return folder / "model"


@pytest.fixture
def edited(everything, tmp_path):
    """Return a function that writes a copy of the SavedModel whose protocol buffer was edited."""

    def edit(change):
        folder = tmp_path / "edited"
        shutil.copytree(everything, folder)
        saved_model = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        change(saved_model)
        (folder / "saved_model.pb").write_bytes(saved_model.SerializeToString())
        return folder

    return edit


@pytest.fixture(scope="session")
def problems_of():
    """Return a function that scans a path and returns what was found, a line each."""
    return lambda path: [str(finding) for finding in scan(path)]


@pytest.fixture(scope="session")
def network():
    """A functional network with an operation, an activation as an object and a vocabulary."""
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="conv", kernel_regularizer="l2")(keras.ops.flip(image, axis=-1))
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Activation(keras.activations.relu, name="relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    word = keras.Input((1,), dtype="string", name="word")
    y = keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="multi_hot", name="lookup")(word)
    model = keras.Model([image, word], keras.layers.Dense(3, name="logits")(keras.layers.Concatenate()([x, y])))
    model.compile("adam", "mse", metrics=["mae", keras.metrics.MeanSquaredError()])
    return model


@pytest.fixture(scope="session")
def kept(network, tmp_path_factory):
    """The members of a `.keras` file, by name."""
    path = tmp_path_factory.mktemp("kept") / "model.keras"
    network.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def config(kept):
    """The description of the network in the `.keras` file, to be changed."""
    return json.loads(kept["config.json"])


@pytest.fixture
def write_keras(kept, tmp_path):
    """Return a function that writes a `.keras` file with some members replaced or added."""

    def write(members=(), config=None, name="model.keras"):
        changed = dict(kept) | dict(members)
        if config is not None:
            changed["config.json"] = json.dumps(config).encode()
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in changed.items():
                archive.writestr(member, content)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def layer_of():
    """Return a function from a description and a layer's name to that layer's part of it."""

    def find(config, name):
        return next(layer for layer in config["config"]["layers"] if layer["name"] == name)

    return find
