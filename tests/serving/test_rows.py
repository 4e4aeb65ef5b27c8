"""One row of each family answers in other runtimes as in Keras."""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import backbones, builders, serving, tasks
from tftransfer.serving import files, onnx, tflite_files
from tftransfer.serving.loaders import keras_answers

TASK = tasks.SingleLabel(("red", "green", "blue"))


def _rows():
    for number, family in enumerate(backbones.FAMILIES):
        function = next(iter(family.sizes))
        name = f"{function}-{min(family.widths)}" if family.widths else function
        yield pytest.param(name, id=name, marks=[pytest.mark.slow] if number else [])


@pytest.fixture(scope="module", params=_rows())
def row(request, with_scales, estimate_batch_norm):
    """A network with random weights whose answers differ, five pictures, and what it answers."""
    name = request.param
    side = max(64, backbones.backbone(name).smallest_size)  # tf2onnx gets maps of one pixel wrong (ConvNeXt)
    keras.utils.set_random_seed(0)
    model = estimate_batch_norm(with_scales(builders.image_classifier(name, 3, image_size=side, weights=None)))
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (5, 1, 1, 3)) + generator.uniform(-60, 60, (5, 4, 4, 3))
    pictures = np.clip(tf.image.resize(coarse, (side, side), "bicubic").numpy(), 0, 255)
    _let_answers_differ(model, pictures)
    (answers,) = keras_answers(model, TASK, None, [pictures])
    assert np.ptp(answers["probabilities"], axis=0).max() > 0.01, "answers that are all alike show nothing"
    yield model, pictures, answers["probabilities"]
    del model
    gc.collect()


def _let_answers_differ(model: keras.Model, pictures: np.ndarray) -> None:
    """Bring each logit to mean 0 and deviation 1 over the pictures."""
    logits = model(pictures, training=False).numpy()
    kernel, bias = model.get_layer("logits").get_weights()
    deviation = logits.std(axis=0)
    model.get_layer("logits").set_weights([kernel / deviation, (bias - logits.mean(axis=0)) / deviation])


def test_litert_answers_as_keras(row, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")
    model, pictures, expected = row
    serving.export_litert(model, TASK, tmp_path / "a.tflite")
    answer = tflite_files.open_file(tmp_path / "a.tflite", threads=2)
    assert files._difference(answer(pictures)["probabilities"], expected) <= files.MOST_DIFFERENT
    make = tflite_files.module("interpreter").Interpreter
    operations = {found["op_name"] for found in make(model_path=str(tmp_path / "a.tflite"))._get_ops_details()}
    assert not operations & {"SHAPE", "READ_VARIABLE"}


def test_int8_answers_much_as_keras(row, tmp_path):
    """With random weights each layer adds to the noise, so this shows that every operation is there, and no more."""
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")
    model, pictures, _ = row
    serving.export_litert(model, TASK, tmp_path / "a.tflite", quantize="int8", calibration=pictures)
    probabilities = tflite_files.open_file(tmp_path / "a.tflite", threads=2)(pictures)["probabilities"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_onnx_answers_as_keras(row, tmp_path):
    pytest.importorskip("tf2onnx", reason="needs tf2onnx: pip install '.[onnx]'")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    model, pictures, expected = row
    serving.export_onnx(model, TASK, tmp_path / "a.onnx")
    answers = onnx.open_file(tmp_path / "a.onnx", threads=2)(pictures)
    assert files._difference(answers["probabilities"], expected) <= files.MOST_DIFFERENT
