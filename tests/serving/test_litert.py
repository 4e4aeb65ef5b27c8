from __future__ import annotations

import sys
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, serving, tasks
from tftransfer.serving import litert, tflite_files
from tftransfer.serving.loaders import keras_answers

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")

SIZE = (16, 24)
TASKS = (
    tasks.SingleLabel(("red", "green", "blue")),
    tasks.MultiLabel(("red", "green", "blue"), threshold=0.3),
    tasks.Regression(("width", "height", "depth")),
)
OUTPUT = {"single_label": "probabilities", "multi_label": "probabilities", "regression": "values"}
# Against the largest number: 8 bits say an activation to 1/255 of its span, and a few layers add up.
TOLERANCE = {"none": 1e-5, "float16": 0.02, "int8": 0.1}


def smooth_pictures(count, seed=0, size=SIZE):
    """Pictures of soft patches, each mostly of its own colour."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (count, 1, 1, 3)) + generator.uniform(-60, 60, (count, 4, 4, 3))
    return np.clip(tf.image.resize(coarse, size, "bicubic").numpy(), 0, 255)


def written(model, task, path, quantize="none", **options):
    calibration = smooth_pictures(50, seed=1) if quantize == "int8" else ()
    serving.export_litert(model, task, path, quantize=quantize, calibration=calibration, **options)
    return tflite_files.open_file(path)


def described_tensors(path):
    schema = tflite_files.module("schema_py_generated")
    names = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes()).subgraphs[0]
    return Counter(names[tensor.type] for tensor in graph.tensors)


def operations(path):
    interpreter = tflite_files.module("interpreter").Interpreter(model_path=str(path))
    interpreter.allocate_tensors()  # which also hands operations to the processor's delegate
    return Counter(found["op_name"] for found in interpreter._get_ops_details())


@pytest.mark.parametrize("quantize", litert.FILES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_every_kind_answers_every_task_as_keras_does(task, quantize, model, tmp_path):
    answer = written(model, task, tmp_path / "a.tflite", quantize)
    pictures = smooth_pictures(12)
    answers = answer(pictures)
    assert list(answers) == [OUTPUT[task.kind]]
    (expected,) = (one[OUTPUT[task.kind]] for one in keras_answers(model, task, None, [pictures]))
    (numbers,) = answers.values()
    assert (numbers.shape, numbers.dtype) == ((12, 3), np.float32)
    assert np.ptp(expected, axis=0).max() > 0.3 * np.abs(expected).max(), "answers that are all alike show nothing"
    assert np.abs(numbers - expected).max() <= TOLERANCE[quantize] * np.abs(expected).max()


def test_kinds_are_what_they_say(model, task, tmp_path):
    files = {kind: tmp_path / name for kind, name in litert.FILES.items()}
    for kind, path in files.items():
        written(model, task, path, kind)
    tensors = {kind: described_tensors(path) for kind, path in files.items()}
    assert set(tensors["none"]) <= {"FLOAT32", "INT32"}
    assert tensors["float16"]["FLOAT16"] == 6  # filters and biases of three layers
    assert tensors["int8"]["INT8"] > 6
    assert operations(files["none"])["CONV_2D"] == operations(files["int8"])["CONV_2D"] == 2
    assert operations(files["none"])["RSQRT"] == 0, "BatchNorm is folded"


def test_what_surrounds_the_layers_with_weights_stays_in_float(model, task, tmp_path):
    """In int8 softmax would give multiples of 1/256, and ties."""
    probabilities = written(model, task, tmp_path / "a.tflite", "int8")(smooth_pictures(12))["probabilities"]
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-5
    steps = probabilities * 256
    assert np.abs(steps - steps.round()).max() > 0.1
    found = operations(tmp_path / "a.tflite")
    assert (found["QUANTIZE"], found["DEQUANTIZE"]) == (1, 1)


@pytest.mark.parametrize("quantize", litert.FILES)
def test_batches_of_any_size_answer_as_single_pictures(quantize, model, task, tmp_path):
    answer, pictures = written(model, task, tmp_path / "a.tflite", quantize), smooth_pictures(7)
    alone = np.concatenate([answer(picture[None])["probabilities"] for picture in pictures])
    for count in (2, 7, 1):
        np.testing.assert_allclose(answer(pictures[:count])["probabilities"], alone[:count], atol=1e-6)


def test_nothing_depends_on_the_size_of_the_batch_inside(task, tmp_path):
    """Keras' Reshape asks for it; each such question would split the network between two processors' parts."""
    image = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(8, 3, activation="swish")(image / 255)
    scale = keras.layers.Dense(8, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(x))
    x = x * keras.layers.Reshape((1, 1, 8))(scale)
    x = keras.layers.Dense(8, activation="relu")(x)  # on maps: Keras shapes them to vectors and back
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    answer, pictures = written(model, task, tmp_path / "a.tflite"), smooth_pictures(5)
    found = operations(tmp_path / "a.tflite")
    assert found["RESHAPE"] >= 1
    assert (found["SHAPE"], found["DELEGATE"]) == (0, 1)
    (expected,) = keras_answers(model, task, None, [pictures])
    np.testing.assert_allclose(answer(pictures)["probabilities"], expected["probabilities"], atol=1e-5)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_description_comes_back(quantize, model, tmp_path):
    task = tasks.MultiLabel(('quote"d', "größer\nals", "caf\udce9"), threshold=0.25)
    written(model, task, tmp_path / "a.tflite", quantize, source="0123")
    found = tflite_files.read_metadata(tmp_path / "a.tflite")
    assert (found["task"], tuple(found["labels"]), found["threshold"]) == ("multi_label", task.labels, 0.25)
    assert (found["quantization"], found["source_sha256"]) == (quantize, "0123")
    assert found.get("calibration_pictures") == (50 if quantize == "int8" else None)
    assert found["input"]["shape"] == [None, 16, 24, 3]
    assert (found["input"]["name"], found["input"]["range"]) == ("image", [0, 255])
    assert found["input"]["normalisation"] == {"mean": 0.0, "deviation": 1.0}
    assert found["outputs"] == {"probabilities": {"shape": [None, 3], "type": "float32"}}


def test_buffers_lie_where_the_schema_wants_them(model, task, tmp_path):
    written(model, task, tmp_path / "a.tflite", "int8")
    schema = tflite_files.module("schema_py_generated")
    content = (tmp_path / "a.tflite").read_bytes()
    found = schema.Model.GetRootAs(content, 0)
    begins = [found.Buffers(number).DataAsNumpy() for number in range(found.BuffersLength())]
    places = [data.ctypes.data - np.frombuffer(content, np.uint8).ctypes.data for data in begins if len_of(data)]
    assert len(places) > 5
    assert not any(place % 16 for place in places)


def len_of(data):
    return 0 if isinstance(data, int) else len(data)


def test_the_same_network_gives_the_same_file_with_no_path_inside(model, task, tmp_path, repository):
    for name in ("a", "b"):
        written(model, task, tmp_path / f"{name}.tflite", "int8")
    content = (tmp_path / "a.tflite").read_bytes()
    assert content == (tmp_path / "b.tflite").read_bytes()
    assert not any(str(path).encode() in content for path in (repository, tmp_path, "/tmp/"))


@pytest.mark.parametrize("policy", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_mixed_precision_becomes_float32(policy, network, task, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy(before)
    same = network()
    same.set_weights(model.get_weights())
    pictures = smooth_pictures(5)
    (expected,) = keras_answers(same, task, None, [pictures])
    answers = written(model, task, tmp_path / "a.tflite")(pictures)
    np.testing.assert_allclose(answers["probabilities"], expected["probabilities"], atol=1e-5)


def test_augmentation_is_off(network, task, tmp_path):
    inner = network()
    image = keras.Input((*SIZE, 3))
    model = keras.Model(image, inner(keras.layers.RandomContrast(0.9, value_range=(0, 255))(image)))
    pictures = smooth_pictures(3)
    (expected,) = keras_answers(inner, task, None, [pictures])
    answers = written(model, task, tmp_path / "a.tflite")(pictures)
    np.testing.assert_allclose(answers["probabilities"], expected["probabilities"], atol=1e-5)


def test_a_file_is_read_run_and_timed_without_tensorflow(model, task, tmp_path, run_python):
    written(model, task, tmp_path / "a.tflite")
    program = """
    import json, sys, numpy as np
    from tftransfer.serving import tflite_files
    path = sys.argv[1]
    labels = tflite_files.read_metadata(path)["labels"]
    shape = tflite_files.open_file(path, threads=2)(np.zeros((2, 16, 24, 3), np.float32))["probabilities"].shape
    taken = [tflite_files.milliseconds(path, size, rounds=5) for size in (1, 16)]
    print(json.dumps([labels, shape, taken, "tensorflow" in sys.modules]))
    """
    labels, shape, (one, sixteen), tensorflow = run_python(program, tmp_path / "a.tflite")
    assert (labels, shape, tensorflow) == (["red", "green", "blue"], [2, 3], False)
    assert 0 < one < sixteen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "`quantize` must be one of none, float16, int8. Received: quantize='int4'"),
        ({"quantize": "int8"}, "`calibration` must be pictures"),
    ],
)
def test_bad_arguments_are_bad_input(options, message, model, task, tmp_path):
    with pytest.raises(InputError, match=message):
        serving.export_litert(model, task, tmp_path / "a.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_a_network_that_does_not_fit_is_bad_input(model, tmp_path):
    with pytest.raises(InputError, match="must give 2 numbers"):
        serving.export_litert(model, tasks.SingleLabel(("a", "b")), tmp_path / "a.tflite")
    looked_up = keras.layers.IntegerLookup(vocabulary=[1, 2], output_mode="one_hot")
    image = keras.Input((8, 8, 3))
    row = keras.ops.cast(keras.layers.GlobalAveragePooling2D()(image)[:, :1], "int64")
    table = keras.Model(image, keras.layers.Dense(3)(looked_up(row)))
    with pytest.raises(InputError, match="cannot be converted: it holds a .* lookup table"):
        serving.export_litert(table, tasks.SingleLabel(("a", "b", "c")), tmp_path / "a.tflite")


def test_an_operation_that_litert_lacks_is_bad_input(tmp_path):
    image = keras.Input((8, 8, 3))
    x = keras.layers.Lambda(lambda pictures: tf.image.adjust_hue(pictures, 0.1))(image)
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(InputError, match="cannot be converted to LiteRT") as raised:
        serving.export_litert(model, tasks.SingleLabel(("a", "b")), tmp_path / "a.tflite")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_line_says_what_to_install(model, task, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == "ai_edge_litert":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(InputError, match=r"pip install 'tftransfer\[litert\]'"):
        serving.export_litert(model, task, tmp_path / "a.tflite")


def test_files_that_are_none_of_ours_are_bad_input(model, task, tmp_path):
    written(model, task, tmp_path / "a.tflite")
    content = (tmp_path / "a.tflite").read_bytes()
    bare = bytes(tflite_files.module("tools.flatbuffer_utils").convert_object_to_bytearray(_without_metadata(content)))
    cases = {
        "cannot be read": None,
        "no LiteRT file": b"\x08\x00\x00\x00JPEG and no more",
        "cannot be read as a LiteRT file": content[:64],
        "not exported by tftransfer": bare,
    }
    for message, found in cases.items():
        path = tmp_path / "b.tflite"
        path.unlink(missing_ok=True)
        if found is not None:
            path.write_bytes(found)
        with pytest.raises(InputError, match=message):
            tflite_files.read_metadata(path)
    (tmp_path / "b.tflite").write_bytes(content[:200])
    with pytest.raises(InputError, match="cannot be loaded by LiteRT"):
        tflite_files.open_file(tmp_path / "b.tflite")
    for options in ({"batch_size": 0}, {"threads": 0}, {"rounds": 0}):
        with pytest.raises(InputError, match="whole number from 1"):
            tflite_files.milliseconds(tmp_path / "a.tflite", **options)


def _without_metadata(content):
    model = tflite_files.module("schema_py_generated").ModelT.InitFromPackedBuf(content)
    model.metadata = []
    return model


def test_a_place_that_cannot_be_written_is_bad_input(model, task, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        serving.export_litert(model, task, tmp_path / "missing" / "a.tflite")
