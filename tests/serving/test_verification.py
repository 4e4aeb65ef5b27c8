"""Each way in which an export can be wrong, and the check that sees it."""

from __future__ import annotations

import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, serving, tasks
from tftransfer.serving import comparison, export, structure, verification
from tftransfer.serving.comparison import Difference

SIZE = (16, 24)


@pytest.fixture
def answers(model, task):
    """From pixels to the task's answers, as a right export has it."""
    return export.answers_of(model, task)


@pytest.fixture
def verify(model, task, pictures, without_c_library):
    """Return a function that verifies a folder against the network with few repeats and names what failed."""

    def failed(directory, **changes):
        given = {"model": model, "task": task, "repeats": 3, "batch_sizes": (1, 2), **changes}
        return serving.verify(directory, pictures, **given).failed

    return failed


@pytest.mark.parametrize(
    ("kind", "most"), [("exported", 1e-5), pytest.param("exported_with_variables", 0, marks=pytest.mark.slow)]
)
def test_a_right_export_passes_every_check(kind, most, model, task, pictures, request):
    verification = serving.verify(request.getfixturevalue(kind), pictures, model=model, task=task, repeats=3)
    assert [check.passed for check in verification.checks] == [*[True] * 8, None], "it has no warm-up requests"
    differences = [check.metrics.get("maximum difference") for check in verification.checks]
    assert [number is None for number in differences] == [True, True, False, False, False, True, False, True, True]
    assert all(number <= most for number in differences if number is not None), "with variables: the same bits"
    assert len(verification.rows()) == len(verification.lines()) == 9
    assert verification.lines()[0].startswith("passed: SavedModel structure")


@pytest.mark.usefixtures("without_c_library")
def test_without_samples_model_and_task_it_still_decides(exported):
    verification = serving.verify(exported, repeats=2)
    assert verification.passed
    undecided = [check.name for check in verification.checks if check.passed is None]
    assert undecided == ["graph session equals Keras", "warm-up requests are answered"]


def test_a_right_export_made_by_hand_passes(write_savedmodel, answers, verify, decoder):
    """The faulty ones below differ from this one in one thing each."""
    assert verify(write_savedmodel(answers, lambda image_bytes: answers(decoder(image_bytes)))) == ()


def test_active_augmentation_fails(write_savedmodel, answers, verify, decoder):
    def serving_default(image_bytes):
        return answers(decoder(image_bytes) * tf.random.uniform((), 0.3, 1.0))

    assert "repeated requests" in verify(write_savedmodel(answers, serving_default))


@pytest.mark.slow
def test_dropout_left_on_fails(write_savedmodel, model, task, verify, decoder):
    def tensor(image):
        return task.answers(model(image, training=True), True)

    assert "repeated requests" in verify(write_savedmodel(tensor, lambda image_bytes: tensor(decoder(image_bytes))))


@pytest.mark.parametrize("with_task", [True, False])
def test_unnamed_output_fails(with_task, model, task, tmp_path):
    model.export(tmp_path / "stock", verbose=False)
    verification = serving.verify(tmp_path / "stock", task=task if with_task else None, repeats=2)
    assert verification.failed == ("SavedModel structure",)


def test_outputs_numbered_by_keras_fail(write_savedmodel, model, verify, decoder):
    def tensor(image):
        return model(image, training=False)

    directory = write_savedmodel(tensor, lambda image_bytes: tensor(decoder(image_bytes)))
    for task in ({}, {"task": None}):
        assert verify(directory, **task) == ("SavedModel structure",)
    problems = serving.verify(directory, repeats=2).checks[0].metrics["problems"]
    assert any("output_0" in problem for problem in problems)


def test_fixed_batch_fails(write_savedmodel, answers, verify, decoder):
    directory = write_savedmodel(answers, lambda image_bytes: answers(decoder(image_bytes)), batch=1)
    assert verify(directory) == ("SavedModel structure",)


@pytest.mark.parametrize("kind", [tf.float16, tf.float64], ids=lambda kind: kind.name)
def test_answers_of_another_precision_fail(kind, write_savedmodel, answers, verify, decoder):
    def tensor(image):
        return {name: tf.cast(v, kind) if v.dtype == tf.float32 else v for name, v in answers(image).items()}

    directory = write_savedmodel(tensor, lambda image_bytes: tensor(decoder(image_bytes)))
    assert verify(directory) == ("SavedModel structure",)
    assert verify(directory, task=None) == ("SavedModel structure",)


def test_a_lookup_table_that_is_not_in_the_archive_fails(network_with_table, task, verify, tmp_path):
    """Its rows come from an operation that loading runs: without it the table is there, and empty."""
    serving.export_savedmodel(network_with_table, task, tmp_path / "1")
    assert verify(tmp_path / "1", model=network_with_table) == ()
    saved_model = structure.read(tmp_path / "1")
    graph = saved_model.meta_graphs[0]
    del graph.signature_def["__saved_model_init_op"], graph.collection_def["saved_model_main_op"]
    (tmp_path / "1" / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    assert verify(tmp_path / "1", model=network_with_table) == ("graph session",)


_VARIABLES = ("variables.index", "variables.data-00000-of-00001")


@pytest.fixture
def copied(exported_with_variables, tmp_path):
    return shutil.copytree(exported_with_variables, tmp_path / "1")


def _without(directory, file):
    (directory / "variables" / file).unlink()


def _halved(directory, file):
    whole = (directory / "variables" / file).read_bytes()
    (directory / "variables" / file).write_bytes(whole[: len(whole) // 2])


@pytest.mark.slow
@pytest.mark.parametrize("file", _VARIABLES)
@pytest.mark.parametrize("damage", [_without, _halved])
def test_missing_and_truncated_variables_fail(file, damage, copied, verify, task):
    damage(copied, file)
    assert verify(copied)[0] in ("SavedModel files", "graph session")
    found = verification.prove(copied, (), None, task, None, 2)  # what loads it says so too
    assert found.failed == ("graph session",)


def test_a_folder_of_which_the_variables_are_not_copied_yet_fails(copied, verify, task):
    shutil.rmtree(copied / "variables")
    assert verify(copied) == ("SavedModel files",)
    assert not verification.prove(copied, (), None, task, None, 2).passed


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_folder_of_which_the_graph_is_half_copied_is_bad_input(share, copied, verify):
    whole = (copied / "saved_model.pb").read_bytes()
    (copied / "saved_model.pb").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="is no SavedModel: saved_model.pb is damaged"):
        verify(copied)


def test_an_empty_graph_fails(copied, verify, task):
    (copied / "saved_model.pb").write_bytes(b"")
    assert verify(copied) == ("SavedModel files",)
    assert verification.prove(copied, (), None, task, None, 2).failed == ("SavedModel structure",)


def test_wrong_label_order_fails(model, verify, tmp_path):
    serving.export_savedmodel(model, tasks.SingleLabel(("green", "red", "blue")), tmp_path / "1")
    assert set(verify(tmp_path / "1")) == {"labels in the graph", "graph session equals Keras"}


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
def test_wrong_order_of_labels_that_no_picture_shows_fails(model, task, pictures, tmp_path):
    """The samples alone cannot see it: here they are one picture, of a class that keeps its place."""
    place = int(model.predict(export.batch_decoder(SIZE)(tf.constant(pictures[:1])), verbose=0)[0].argmax())
    others = [label for label in task.labels if label != task.labels[place]][::-1]
    labels = tuple(task.labels[place] if number == place else others.pop(0) for number in range(3))
    serving.export_savedmodel(model, tasks.SingleLabel(labels), tmp_path / "1")
    verification = serving.verify(tmp_path / "1", pictures[:1], model=model, task=task, repeats=2)
    assert verification.failed == ("labels in the graph",)


def test_changed_weights_fail(exported, network, verify):
    changed = network()
    kernel, bias = changed.get_layer("logits").get_weights()
    changed.get_layer("logits").set_weights([kernel, bias + np.array([0.001, 0, 0])])
    assert verify(exported, model=changed) == ("graph session equals Keras",)


@pytest.mark.slow
def test_a_network_of_another_size_fails(exported, verify):
    image = keras.Input((8, 8, 3))
    other = keras.Model(image, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(image)))
    assert verify(exported, model=other) == ("graph session equals Keras",)


@pytest.mark.parametrize("given", [{}, {"model": None}], ids=["with Keras", "alone"])
def test_other_resize_than_in_training_fails(given, write_savedmodel, answers, verify):
    def nearest(contents):
        pixels = tf.ensure_shape(tf.io.decode_image(contents, 3, expand_animations=False), (None, None, 3))
        return tf.image.resize(pixels, SIZE, "nearest")

    def serving_default(image_bytes):
        pixels = tf.map_fn(nearest, image_bytes, fn_output_signature=tf.TensorSpec((*SIZE, 3), tf.uint8))
        return answers(tf.cast(pixels, tf.float32))

    assert "decoded as in training" in verify(write_savedmodel(answers, serving_default), **given)


@pytest.mark.slow
def test_answers_that_depend_on_the_batch_fail(write_savedmodel, answers, verify, decoder):
    def tensor(image):
        return answers(image * (0.5 + 0.5 / tf.cast(tf.shape(image)[0], tf.float32)))

    directory = write_savedmodel(tensor, lambda image_bytes: tensor(decoder(image_bytes)))
    assert "batches equal single pictures" in verify(directory)


@pytest.mark.slow
def test_a_batch_size_that_cannot_be_answered_fails(write_savedmodel, answers, verify, decoder):
    """An empty batch is more than TensorFlow's convolutions can take; `export_savedmodel` sees to it."""
    directory = write_savedmodel(answers, lambda image_bytes: answers(decoder(image_bytes)))
    assert verify(directory, batch_sizes=(0, 1)) == ("batches equal single pictures",)


@pytest.mark.slow
def test_broken_pictures_that_are_answered_fail(write_savedmodel, answers, task, decoder):
    black = tf.io.encode_png(tf.zeros((8, 8, 3), tf.uint8)).numpy()

    def serving_default(image_bytes):
        return answers(decoder(tf.where(tf.strings.length(image_bytes) > 40, image_bytes, black)))

    faulty = write_savedmodel(answers, serving_default)
    verification = serving.verify(faulty, task=task, repeats=2, batch_sizes=(1,))
    assert set(verification.failed) == {"broken pictures are refused", "C library equals graph session"}


@pytest.mark.slow
def test_numbers_that_are_not_finite_fail(network, task, verify, tmp_path):
    broken = network()
    broken.get_layer("logits").set_weights([np.full((8, 3), np.nan), np.zeros(3)])
    serving.export_savedmodel(broken, task, tmp_path / "1")
    assert "graph session equals Keras" in verify(tmp_path / "1", model=broken)


def test_folder_without_savedmodel_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        serving.verify(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match="damaged"):
        serving.verify(tmp_path)


@pytest.mark.parametrize("given", [{"repeats": 1}, {"batch_sizes": ()}, {"batch_sizes": (-1,)}])
def test_arguments_out_of_range_are_bad_input(given, exported):
    with pytest.raises(InputError, match=next(iter(given))):
        serving.verify(exported, **given)


def test_with_check_adds_one():
    verification = serving.Verification(()).with_check("files", True)
    assert verification.passed
    assert verification.with_check("more", False, {"changed": ["a", "b"]}).lines() == [
        "passed: files",
        "FAILED: more (changed a; b)",
    ]


def single(*rows):
    probabilities = np.array(rows, np.float32)
    labels = np.array([b"a", b"b"], object)[probabilities.argmax(axis=1)]
    return {"label": labels, "probability": probabilities.max(axis=1), "probabilities": probabilities}


def test_difference_of_equal_answers_is_nothing():
    assert comparison.difference(single((0.2, 0.8)), single((0.2, 0.8))) == Difference()


def test_difference_by_hand():
    found = comparison.difference(single((0.2, 0.8), (0.6, 0.4)), single((0.2, 0.8), (0.3, 0.7)))
    assert found.texts == 1
    assert found.maximum == pytest.approx(0.3, abs=1e-6)
    assert not found.small


def test_labels_may_differ_only_where_rounding_decides():
    one, other = single((0.500001, 0.499999)), single((0.499999, 0.500001))
    found = comparison.difference(one, other)
    assert (found.texts, found.ties) == (0, 1)
    assert found.small
    swapped = {**one, "label": other["label"]}
    assert comparison.difference(one, swapped).texts == 1, "the same probabilities must have the same label"


def test_labels_at_the_threshold_are_ties():
    def multi(score):
        given = score >= 0.5
        return {
            "probabilities": np.array([[0.9, score]], np.float32),
            "labels": np.array([[b"a", b"b" if given else b""]], object),
            "scores": np.array([[0.9, score if given else 0]], np.float32),
        }

    assert comparison.difference(multi(0.500001), multi(0.499999), threshold=0.5).small
    assert not comparison.difference(multi(0.6), multi(0.4), threshold=0.5).small


def test_large_numbers_are_compared_relative_to_themselves():
    one, other = ({"values": np.array([[value]], np.float32)} for value in (1e6, 1e6 + 1))
    assert comparison.difference(one, other).small
    assert not comparison.difference(one, {"values": np.array([[1.1e6]], np.float32)}).small


@pytest.mark.parametrize(
    "other",
    [
        {"values": np.ones((2, 1), np.float32)},
        {"values": np.ones((1, 1), np.float64)},
        {"value": np.ones((1, 1), np.float32)},
        {"values": np.full((1, 1), np.nan, np.float32)},
    ],
    ids=["shape", "type", "name", "not finite"],
)
def test_answers_that_cannot_be_compared_are_not_small(other):
    assert not comparison.difference({"values": np.ones((1, 1), np.float32)}, other).small
    assert not comparison.identical({"values": np.ones((1, 1), np.float32)}, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exported", "exported_with_variables"])
def test_a_thousand_requests_have_one_answer(kind, pictures, model, task, request):
    verification = serving.verify(
        request.getfixturevalue(kind), pictures, model=model, task=task, repeats=1000, batch_sizes=(1,)
    )
    (repeated,) = (check for check in verification.checks if check.name == "repeated requests")
    assert verification.passed
    assert repeated.metrics == {"repeats": 1000, "different answers": 0}
