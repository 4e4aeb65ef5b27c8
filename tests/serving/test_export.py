from __future__ import annotations

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, constants, serving, tasks
from tftransfer.data.images import decode_picture
from tftransfer.serving import loaders, structure, verification

# Single-label classification is what every other test here exports.
TASKS = (
    tasks.MultiLabel(("red", "green", "blue")),
    tasks.Regression(("width", "height", "depth")),
)


def answer(directory, signature, values):
    saved_model = structure.read(directory)
    with loaders.graph_session(directory, structure.signatures(saved_model)) as session:
        return session(loaders.Request(signature, values))


@pytest.mark.parametrize("optimise", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "task",
    [pytest.param(TASKS[0], id="multi_label", marks=pytest.mark.slow), pytest.param(TASKS[1], id="regression")],
)
def test_every_task_serves_what_keras_answers(task, optimise, model, pictures, tmp_path):
    serving.export_savedmodel(model, task, tmp_path / "1", optimise=optimise)
    verification = serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=3)
    assert verification.passed, verification.lines()
    assert [check.name for check in verification.checks if not check.passed] == ["warm-up requests are answered"]
    most = 1e-5 if optimise else 0
    assert all(check.metrics.get("maximum difference", 0) <= most for check in verification.checks)


def test_an_optimised_export_holds_no_variables(model, exported, task, tmp_path):
    serving.export_savedmodel(model, task, tmp_path / "1", optimise=False)
    kept, gone = (_operations(directory) for directory in (tmp_path / "1", exported))
    assert kept["ReadVariableOp"] > 0 < kept["Rsqrt"]  # of BatchNorm
    assert gone["ReadVariableOp"] == gone["VarHandleOp"] == gone["Rsqrt"] == 0
    assert gone["Conv2D"] == kept["Conv2D"] == 2
    sizes = [sum(file.stat().st_size for file in (one / "variables").iterdir()) for one in (tmp_path / "1", exported)]
    assert sizes[1] < sizes[0]


def _operations(directory):
    graph = structure.read(directory).meta_graphs[0].graph_def
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    return Counter(node.op for body in bodies for node in body)


@pytest.mark.slow
def test_a_network_with_a_lookup_table_keeps_its_variables_and_says_so(network_with_table, task, tmp_path, pictures):
    version, verification = serving.publish(network_with_table, task, tmp_path, pictures, repeats=2)
    assert version, verification.lines()
    assert verification.checks[-1].name == "graph of constants"
    assert "lookup table" in verification.checks[-1].metrics["reason"]
    assert _operations(version)["ReadVariableOp"] > 0


def test_a_lookup_table_that_no_layer_holds_is_bad_input(task, tmp_path):
    rows = tf.lookup.KeyValueTensorInitializer(tf.constant([0, 1], tf.int64), tf.constant([1.0, 2.0]))
    table = tf.lookup.StaticHashTable(rows, 0.0)
    image = keras.Input((16, 24, 3))
    brightness = keras.layers.GlobalAveragePooling2D()(image)
    found = keras.layers.Lambda(lambda values: table.lookup(tf.cast(values, tf.int64)), output_shape=(3,))(brightness)
    with pytest.raises(InputError, match="none of its layers holds"):
        serving.export_savedmodel(keras.Model(image, found), task, tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_a_network_that_no_graph_can_hold_keeps_its_variables(model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "_MOST_BYTES", 1000)
    assert "GiB" in serving.export_savedmodel(model, task, tmp_path / "1")
    assert _operations(tmp_path / "1")["ReadVariableOp"] > 0


def test_answers_are_those_of_the_decoder_the_model_and_softmax(exported, model, task, pictures):
    pixels = np.stack([decode_picture(tf.constant(one), (16, 24)).numpy() for one in pictures])
    probabilities = tf.nn.softmax(model.predict(pixels.astype(np.float32), verbose=0)).numpy()
    answers = answer(exported, "serving_default", loaders.as_texts(pictures))
    np.testing.assert_allclose(answers["probabilities"], probabilities, atol=1e-6)
    np.testing.assert_allclose(answers["probability"], probabilities.max(axis=1), atol=1e-6)
    assert answers["label"].tolist() == [task.labels[row.argmax()].encode() for row in probabilities]
    assert len(set(answers["label"].tolist())) > 1, "one label for all pictures shows nothing"


def test_contract_of_names_and_types(exported):
    definitions = structure.read(exported).meta_graphs[0].signature_def
    for name, given in (("serving_default", "image_bytes"), ("tensor", "image")):
        assert list(definitions[name].inputs) == [given]
        assert sorted(definitions[name].outputs) == ["label", "probabilities", "probability"]
    assert structure.image_size(structure.read(exported)) == (16, 24)


@pytest.mark.slow
def test_an_empty_batch_is_answered(exported):
    answers = answer(exported, "serving_default", loaders.as_texts([]))
    assert {name: values.shape for name, values in answers.items()} == {
        "label": (0,),
        "probability": (0,),
        "probabilities": (0, 3),
    }


def test_no_path_of_this_machine_is_inside(exported, repository):
    content = (exported / "saved_model.pb").read_bytes() + (exported / "variables" / "variables.index").read_bytes()
    assert b"image_bytes" in content
    assert not any(str(path).encode() in content for path in (repository, exported.parent))


@pytest.mark.slow
def test_probabilities_from_an_activation_pass_unchanged(model, task, pictures, tmp_path):
    soft = keras.Model(model.input, keras.layers.Softmax()(model.output))
    serving.export_savedmodel(soft, task, tmp_path / "soft")
    serving.export_savedmodel(model, task, tmp_path / "logits")
    both = [answer(tmp_path / name, "serving_default", loaders.as_texts(pictures)) for name in ("soft", "logits")]
    np.testing.assert_allclose(both[0]["probabilities"], both[1]["probabilities"], atol=1e-6)


@pytest.mark.slow
def test_from_logits_can_be_said(model, task, pictures, tmp_path):
    serving.export_savedmodel(model, task, tmp_path / "1", from_logits=False)
    numbers = answer(tmp_path / "1", "serving_default", loaders.as_texts(pictures))["probabilities"]
    assert not np.allclose(numbers.sum(axis=1), 1), "softmax was applied although the outputs were declared final"


@pytest.mark.usefixtures("without_c_library")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_mixed_precision_answers_in_float32(policy, network, task, pictures, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy(before)
    serving.export_savedmodel(model, task, tmp_path / "1")
    verification = serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=3, batch_sizes=(0, 1))
    assert verification.passed, verification.lines()


@pytest.mark.usefixtures("without_c_library")
def test_active_augmentation_layers_are_off(network, task, pictures, tmp_path):
    """`model.export` keeps them on (FIELD_NOTES, SavedModels for TF Serving)."""
    inner = network()
    image = keras.Input((16, 24, 3))
    model = keras.Model(image, inner(keras.layers.RandomContrast(0.9, value_range=(0, 255))(image)))
    serving.export_savedmodel(model, task, tmp_path / "1")
    verification = serving.verify(tmp_path / "1", pictures, model=inner, task=task, repeats=5)
    assert verification.passed, verification.lines()


MIRRORED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tftransfer import serving, tasks
from conftest import small_network
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
task = tasks.SingleLabel(("red", "green", "blue"))
with strategy.scope():
    model = small_network()
    kind = type(model.weights[0].value).__name__
    version, verification = serving.publish(model, task, Path(sys.argv[1]) / "inside", repeats=3)
serving.export_savedmodel(model, task, Path(sys.argv[1]) / "outside")
print(json.dumps([kind, verification.passed, verification.lines()]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
def test_a_network_built_under_mirrored_strategy_exports(run_on_devices, tmp_path, model, task):
    kind, passed, lines = run_on_devices(MIRRORED, tmp_path, __file__.rsplit("/", 1)[0])
    assert kind.startswith("Mirrored")
    assert passed, lines
    # The same seed gave the same network here: what was mirrored answers as this one.
    verification = serving.verify(tmp_path / "outside", model=model, task=task, repeats=2)
    assert verification.passed, verification.lines()


def test_bad_input_is_refused(model, task, network, tmp_path):
    with pytest.raises(InputError, match="2 numbers"):
        serving.export_savedmodel(model, tasks.SingleLabel(("a", "b")), tmp_path / "1")
    image = keras.Input((None, None, 3))
    anything = keras.Model(image, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(image)))
    with pytest.raises(InputError, match="image_size"):
        serving.export_savedmodel(anything, task, tmp_path / "1")
    assert not (tmp_path / "1").exists()


@pytest.mark.usefixtures("without_c_library")
@pytest.mark.parametrize("kind", [tasks.SingleLabel, pytest.param(tasks.MultiLabel, marks=pytest.mark.slow)])
def test_the_most_probable_labels_come_first(kind, model, pictures, tmp_path):
    task = kind(("red", "green", "blue"))
    serving.export_savedmodel(model, task, tmp_path / "1", top_k=2)
    found = answer(tmp_path / "1", "classify", loaders.as_texts(pictures))
    probabilities = answer(tmp_path / "1", "serving_default", loaders.as_texts(pictures))["probabilities"]
    order = np.argsort(-probabilities, axis=1)[:, :2]
    assert found["classes"].tolist() == [[task.labels[place].encode() for place in row] for row in order]
    np.testing.assert_array_equal(found["scores"], np.take_along_axis(probabilities, order, axis=1))
    verification = serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=2)
    assert verification.passed
    assert "top labels are the most probable" in [check.name for check in verification.checks]


@pytest.mark.slow
def test_classify_is_asked_through_the_c_library_too(model, task, pictures, tmp_path, monkeypatch):
    serving.export_savedmodel(model, task, tmp_path / "1", top_k=2)
    assert serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=2).passed
    compare, names = verification._compare_top_labels, []
    monkeypatch.setattr(
        verification, "_compare_top_labels", lambda name, *given: (names.append(name), compare(name, *given))[1]
    )
    assert serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=2).passed
    assert names == ["top labels are the most probable", "C library equals graph session"]


@pytest.mark.parametrize(("task", "top_k"), [(tasks.SingleLabel(("a", "b", "c")), 4), (TASKS[1], 1), (TASKS[0], -1)])
def test_more_labels_than_there_are_is_bad_input(task, top_k, model, tmp_path):
    with pytest.raises(InputError, match="top_k"):
        serving.export_savedmodel(model, task, tmp_path / "1", top_k=top_k)
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
@pytest.mark.parametrize("fault", ["order", "labels"])
def test_a_wrong_classify_is_refused(fault, model, task, pictures, tmp_path, monkeypatch):
    top_k = tf.math.top_k
    if fault == "order":
        monkeypatch.setattr(tf.math, "top_k", lambda values, k: tuple(part[:, ::-1] for part in top_k(values, k + 1)))
    if fault == "labels":
        monkeypatch.setattr(tf.math, "top_k", lambda values, k: (top_k(values, k)[0], top_k(values, k)[1] * 0))
    serving.export_savedmodel(model, task, tmp_path / "1", top_k=2)
    monkeypatch.undo()
    verification = serving.verify(tmp_path / "1", pictures, model=model, task=task, repeats=2)
    assert set(verification.failed) == {"C library equals graph session", "top labels are the most probable"}
