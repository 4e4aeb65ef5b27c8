from __future__ import annotations

import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, serving, tasks
from tftransfer.serving import files, onnx
from tftransfer.serving.loaders import keras_answers

pytest.importorskip("tf2onnx", reason="needs tf2onnx: pip install '.[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")

TASKS = (
    tasks.SingleLabel(("red", "green", "größer")),
    tasks.MultiLabel(("red", "green", "blue"), threshold=0.3),
    tasks.Regression(("width", "height", "depth")),
)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_every_task_is_answered_as_by_keras(task, model, tmp_path):
    serving.export_onnx(model, task, tmp_path / "a.onnx", source="0123")
    answer, name = onnx.open_file(tmp_path / "a.onnx"), "values" if task.kind == "regression" else "probabilities"
    pictures = np.random.default_rng(0).uniform(0, 255, (7, 16, 24, 3)).astype(np.float32)
    (expected,) = keras_answers(model, task, None, [pictures])
    for count in (7, 1, 2):
        answers = answer(pictures[:count])
        assert list(answers) == [name]
        np.testing.assert_allclose(answers[name], expected[name][:count], rtol=1e-4, atol=1e-5)
    described = onnx.read_metadata(tmp_path / "a.onnx")
    assert (described["task"], tuple(described["labels"]), described["source_sha256"]) == (
        task.kind,
        task.labels,
        "0123",
    )
    (source,) = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    assert (source.name, source.shape[1:], source.type) == ("image", [16, 24, 3], "tensor(float)")


def test_grouped_convolutions_and_gelu_are_written_out(tmp_path):
    """Keras has TensorFlow compile the one, and TensorFlow computes the other by Erfc: tf2onnx knows neither."""
    keras.utils.set_random_seed(0)
    pictures = keras.Input((16, 24, 3))
    x = keras.layers.Conv2D(12, 2, strides=2)(keras.layers.Rescaling(1 / 255)(pictures))
    x = keras.layers.Activation("gelu")(keras.layers.Conv2D(12, 7, padding="same", groups=12)(x))
    outputs = keras.layers.Dense(3, name="logits")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(pictures, outputs)
    serving.export_onnx(model, TASKS[0], tmp_path / "a.onnx")
    given = np.random.default_rng(0).uniform(0, 255, (2, 16, 24, 3)).astype(np.float32)
    (expected,) = keras_answers(model, TASKS[0], None, [given])
    answers = onnx.open_file(tmp_path / "a.onnx")(given)
    np.testing.assert_allclose(answers["probabilities"], expected["probabilities"], rtol=1e-5)


def test_pictures_that_a_file_cannot_answer_are_refused(model, task, tmp_path):
    serving.export_onnx(model, task, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="a.onnx cannot be run by ONNX Runtime"):
        onnx.open_file(tmp_path / "a.onnx")(np.zeros((1, 3, 3, 3), np.float32))


def test_a_file_is_published_if_it_answers_as_keras(model, network, task, pictures, tmp_path):
    model.save(tmp_path / "model.keras")
    evidence = files.Evidence(samples=pictures)
    folder, verification, table = files.publish_files(onnx.RUNTIME, model, task, tmp_path, ["none"], evidence)
    assert folder == tmp_path / "onnx", verification.lines()
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert (table.title, [row[0] for row in table.rows]) == ("ONNX", ["model.keras", "model.onnx"])
    wrong = replace(onnx.RUNTIME, write=lambda _, *given: onnx.RUNTIME.write(network(seed=1), *given))
    folder, verification, _ = files.publish_files(wrong, model, task, tmp_path, ["none"], evidence)
    assert folder is None
    assert verification.failed == ("model.onnx: equals Keras within 0.0001",)


def test_what_is_missing_is_named(model, task, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file"):
        onnx.open_file(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(InputError, match="cannot be loaded by ONNX Runtime"):
        onnx.open_file(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="`threads`"):
        onnx.open_file(tmp_path / "a.onnx", threads=0)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(InputError, match=r"tf2onnx is not installed: pip install 'tftransfer\[onnx\]'"):
        serving.export_onnx(model, task, tmp_path / "a.onnx")


def test_an_operation_that_onnx_lacks_is_bad_input(tmp_path):
    image = keras.Input((8, 8, 3))
    x = keras.layers.Lambda(lambda pictures: tf.math.lgamma(pictures + 1))(image)
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(InputError, match="cannot be converted to ONNX"):
        serving.export_onnx(model, tasks.SingleLabel(("a", "b")), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
