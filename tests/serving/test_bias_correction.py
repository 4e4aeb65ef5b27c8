from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import serving, tasks
from tftransfer.serving import bias_correction, litert, tflite_files
from tftransfer.serving.loaders import keras_answers

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")

TASK = tasks.Regression(("width", "height", "depth"))


def flat_picture(means):
    return np.ones((1, 5, 5, len(means)), np.float32) * means


def test_a_mean_moves_as_far_as_tensorflow_says():
    generator = np.random.default_rng(0)
    means = generator.uniform(0, 2, 4).astype(np.float32)
    shapes = ((6, 3, 3, 4), (6, 3, 3, 2), (1, 3, 3, 8))  # the last: two filters for each of four channels
    full, grouped, depthwise = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    expected = tf.nn.conv2d(flat_picture(means), full.transpose(1, 2, 3, 0), 1, "VALID")[0, 0, 0]
    np.testing.assert_allclose(bias_correction._move("CONV_2D", full, means), expected, rtol=1e-5)
    halves = [
        tf.nn.conv2d(flat_picture(means[2 * half :][:2]), part.transpose(1, 2, 3, 0), 1, "VALID")[0, 0, 0]
        for half, part in enumerate((grouped[:3], grouped[3:]))
    ]
    np.testing.assert_allclose(bias_correction._move("CONV_2D", grouped, means), np.concatenate(halves), rtol=1e-5)
    expected = tf.nn.depthwise_conv2d(flat_picture(means), depthwise.reshape(3, 3, 4, 2), (1, 1, 1, 1), "VALID")[
        0, 0, 0
    ]
    np.testing.assert_allclose(bias_correction._move("DEPTHWISE_CONV_2D", depthwise, means), expected, rtol=1e-5)
    dense = generator.normal(size=(3, 4))
    np.testing.assert_allclose(bias_correction._move("FULLY_CONNECTED", dense, means), dense @ means)


def _network():
    """Layers whose few weights per channel leave their rounding errors standing."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    image = keras.Input((24, 24, 3))
    x = layers.Conv2D(8, 3, activation="relu")(layers.Rescaling(1 / 255)(image))
    for _ in range(4):
        x = layers.DepthwiseConv2D(3, activation="relu", bias_initializer="ones")(x)
        x = layers.Conv2D(8, 1, activation="relu", bias_initializer="ones")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, name="logits")(x))


def test_answers_come_closer_to_those_in_float(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    pictures = np.clip(generator.uniform(0, 255, (80, 1, 1, 3)) + generator.normal(0, 20, (80, 24, 24, 3)), 0, 255)
    pictures, model = pictures.astype(np.float32), _network()
    (expected,) = keras_answers(model, TASK, None, [pictures[40:]])
    apart = {}
    for name in ("corrected", "as it was"):
        if name == "as it was":
            monkeypatch.setattr(litert, "corrected", lambda quantized, *_: quantized)
        path = tmp_path / f"{name}.tflite"
        serving.export_litert(model, TASK, path, quantize="int8", calibration=pictures[:40])
        apart[name] = np.abs(tflite_files.open_file(path)(pictures[40:])["values"] - expected["values"]).mean()
    assert apart["corrected"] < 0.7 * apart["as it was"]


@pytest.mark.slow
def test_layers_that_share_a_bias_keep_their_own(tmp_path):
    pictures = np.random.default_rng(0).uniform(0, 255, (4, 24, 24, 3)).astype(np.float32)
    serving.export_litert(_network(), TASK, tmp_path / "a.tflite", quantize="int8", calibration=pictures)
    model = tflite_files.unpacked((tmp_path / "a.tflite").read_bytes())
    layers = [layer for kind, layer in tflite_files.operations(model) if kind == "DEPTHWISE_CONV_2D"]
    tensors = model.subgraphs[0].tensors
    first, second = (layer.inputs[2] for layer in layers[:2])
    tensors[second].buffer = tensors[first].buffer
    layers[2].inputs = np.array([*layers[2].inputs[:2], first], np.int32)
    kept = bias_correction._values(model, first, np.int32)
    bias_correction._add_to_bias(model, layers[0], np.ones(8))
    changed = bias_correction._values(model, layers[0].inputs[2], np.int32)
    np.testing.assert_allclose(changed, kept + 1, atol=1e-3)
    for layer in layers[1:3]:
        stored = model.buffers[tensors[layer.inputs[2]].buffer].data.view(np.int32)
        np.testing.assert_allclose(stored * bias_correction._scale(tensors[first]), kept)
