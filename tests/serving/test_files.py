from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, tasks
from tftransfer.checks import performance
from tftransfer.serving import files, litert, loaders, tflite_files
from tftransfer.serving.files import Evidence

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")

KINDS = tuple(litert.FILES)
SIZE = (16, 24)


def soft_pictures(count, seed=0):
    """Pictures of soft patches, each mostly of its own colour."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (count, 1, 1, 3)) + generator.uniform(-60, 60, (count, 4, 4, 3))
    return np.clip(tf.image.resize(coarse, SIZE, "bicubic").numpy(), 0, 255).astype(np.uint8)


@pytest.fixture
def run(model, tmp_path):
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "model.keras")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def test_split(model, task, make_examples):
    """Forty pictures, to which the network gives two labels in turn; it is right about the first thirty."""
    pictures = soft_pictures(400)
    (answers,) = loaders.keras_answers(model, task, None, [pictures.astype(np.float32)])
    given = answers["probabilities"].argmax(axis=1).astype(np.int32)
    frequent = np.argsort(np.bincount(given))[-2:]
    chosen = np.stack([np.flatnonzero(given == label)[:20] for label in frequent], axis=1).ravel()
    targets = given[chosen]
    targets[30:] = (targets[30:] + 1) % 3
    return make_examples(pictures[chosen], targets)


@pytest.fixture(scope="session")
def evidence(test_split):
    return Evidence(test_split, calibration=list(soft_pictures(50, seed=1)))


def contents(folder):
    return sorted(os.listdir(folder))


def test_files_are_published_with_their_numbers(model, task, run, evidence):
    folder, verification, table = files.publish_files(litert.RUNTIME, model, task, run, KINDS, evidence)
    assert folder == run / "litert"
    assert verification.passed, verification.lines()
    assert contents(folder) == ["labels.txt", "model.tflite", "model_float16.tflite", "model_int8.tflite"]
    assert contents(run) == ["litert", "model.keras"]
    assert (folder / "labels.txt").read_text() == "red\ngreen\nblue\n"
    source = tflite_files.read_metadata(folder / "model.tflite")["source_sha256"]
    assert source == files.digest(run / "model.keras")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["model.keras", "model.tflite", "model_float16.tflite", "model_int8.tflite"]
    keras_row, exact = rows["model.keras"], rows["model.tflite"]
    assert (keras_row["accuracy"].value, exact["accuracy"]) == (0.75, keras_row["accuracy"])
    assert keras_row["accuracy"] == performance.intervals.proportion(30, 40)
    assert exact["same answer"].value == 1
    assert exact["largest difference"] < 1e-5 < rows["model_int8.tflite"]["largest difference"]
    assert exact["MB"] == (folder / "model.tflite").stat().st_size / 1e6
    assert all(row["ms"] > 0 for row in rows.values())
    assert "On 40 test pictures." in table.note


@pytest.mark.slow
def test_without_a_newest_savedmodel_there_is_no_time_of_it(model, task, run, exported, evidence):
    (run / "serving" / "4").mkdir(parents=True)
    (run / "serving" / "3").symlink_to(exported)
    _, _, table = files.publish_files(litert.RUNTIME, model, task, run, ["none"], evidence)
    assert len(table.rows) == 2, "the newest SavedModel is none"


def test_the_time_of_the_savedmodel_stands_beside_them(model, task, run, exported, evidence):
    (run / "serving").mkdir()
    (run / "serving" / "3").symlink_to(exported)
    _, _, table = files.publish_files(litert.RUNTIME, model, task, run, ["none"], evidence)
    name, size, *quality, taken = table.rows[-1]
    assert (name, quality) == ("serving/3", [None, None, None])
    assert size > 0 < taken


@pytest.mark.slow
def test_an_export_takes_the_place_of_the_last_one(model, task, run, evidence):
    for kinds, expected in ((KINDS[:2], ["model.tflite", "model_float16.tflite"]), (KINDS[:1], ["model.tflite"])):
        files.publish_files(litert.RUNTIME, model, task, run, kinds, evidence)
        assert contents(run / "litert") == ["labels.txt", *expected]
    assert contents(run) == ["litert", "model.keras"]


def test_another_network_is_refused_and_the_last_export_stays(model, network, task, run, evidence):
    files.publish_files(litert.RUNTIME, model, task, run, ["none"], evidence)
    other = network(seed=1)
    wrong = replace(litert.RUNTIME, write=lambda _, *given: litert.RUNTIME.write(other, *given))
    folder, verification, _ = files.publish_files(wrong, model, task, run, KINDS[:2], evidence)
    assert folder is None
    assert "model.tflite: equals Keras within 0.0001" in verification.failed
    assert "model_float16.tflite: loses 1% at most" in verification.failed
    assert contents(run / "litert") == ["labels.txt", "model.tflite"]
    assert contents(run) == ["litert", "model.keras"]


def test_int8_that_was_calibrated_on_other_pictures_is_refused(model, task, run, evidence):
    dark = replace(evidence, calibration=[np.full((*SIZE, 3), level, np.uint8) for level in range(3)])
    folder, verification, _ = files.publish_files(litert.RUNTIME, model, task, run, ["int8"], dark)
    assert folder is None
    assert "model_int8.tflite: same answer to 80% at least" in verification.failed
    assert contents(run) == ["model.keras"]


@pytest.mark.parametrize("kinds", [KINDS[:1], pytest.param(KINDS, marks=pytest.mark.slow)], ids=len)
def test_answers_that_are_not_finite_are_refused(kinds, model, task, run, evidence):
    def broken(path, threads):
        answer = tflite_files.open_file(path, threads)
        return lambda pictures: {name: values * np.nan for name, values in answer(pictures).items()}

    runtime = replace(litert.RUNTIME, open=broken)
    folder, verification, table = files.publish_files(runtime, model, task, run, kinds, evidence)
    assert folder is None
    assert len(verification.failed) == len(verification.checks) == 2 * len(kinds)
    assert [row[2:4] for row in table.rows[1:]] == [(None, None)] * len(kinds)
    json.dumps([check.metrics for check in verification.checks], allow_nan=False)


@pytest.mark.parametrize(("lost", "gained", "passes"), [(1, 0, True), (5, 0, True), (8, 0, False), (30, 28, True)])
def test_what_chance_explains_is_not_held_against_a_file(lost, gained, passes, task, make_examples, tmp_path):
    """Of 100 pictures: 8 lost is 2.7 points at least, 5 is 0.7, and 30 with 28 gained may be nothing at all."""
    targets = np.zeros(100, np.int32)
    right, wrong = np.eye(3, dtype=np.float32)[[0, 1]]
    network = np.array([wrong] * gained + [right] * (100 - gained))
    file = np.array([right] * (100 - lost) + [wrong] * lost)
    evidence = Evidence(make_examples(np.zeros((100, *SIZE, 3), np.uint8), targets))
    case = files._Case(task, SIZE, evidence)
    one, other = (files._Measured(tmp_path / "a", 1, numbers, numbers[:3], 1.0) for numbers in (file, network))
    _, loses, same = case.checks("int8", one, other)
    assert loses.passed is passes
    assert loses.metrics["lost"] == pytest.approx((lost - gained) / 100)
    assert same.metrics["same answer"] == pytest.approx(1 - (lost + gained) / 100)
    assert same.passed is (lost + gained < 20)


def test_errors_of_numbers_count_in_units_of_their_deviation():
    task = tasks.Regression(("metres", "millimetres"))
    targets = np.array([[1.0, 1000.0], [3.0, 3000.0]], np.float32)  # deviations of 1 and 1000
    off = files._wrong(task, targets, targets + np.array([0.5, 100.0], np.float32))
    np.testing.assert_allclose(off, [(0.5 + 0.1) / 2] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(tasks.MultiLabel(("red", "green", "blue")), id="multi_label", marks=pytest.mark.slow),
        pytest.param(tasks.Regression(("a", "b", "c")), id="regression"),
    ],
)
def test_other_tasks_are_published_too(task, model, run, make_examples):
    pictures, output = soft_pictures(40), "values" if task.kind == "regression" else "probabilities"
    (answers,) = loaders.keras_answers(model, task, None, [pictures.astype(np.float32)])
    numbers = answers[output]
    targets = numbers + 0.1 if task.kind == "regression" else (numbers > 0.4).astype(np.float32)
    evidence = Evidence(make_examples(pictures, targets), calibration=list(soft_pictures(50, seed=1)))
    folder, verification, table = files.publish_files(litert.RUNTIME, model, task, run, ["none", "float16"], evidence)
    assert folder, verification.lines()
    assert table.columns[2] == task.main_metric
    assert all(row[2].value > 0 for row in table.rows)
    assert [row[3] is None for row in table.rows[1:]] == [task.kind == "regression"] * 2  # the first is Keras itself
    assert (folder / "labels.txt").exists() == (task.kind != "regression")


@pytest.mark.parametrize("samples", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_data_the_pictures_that_are_kept_must_do(samples, model, task, run, pictures):
    evidence = Evidence(samples=pictures if samples else (), note="Nothing else was at hand.")
    folder, verification, table = files.publish_files(litert.RUNTIME, model, task, run, ["none", "float16"], evidence)
    assert folder, verification.lines()
    assert "model_float16.tflite: equals Keras within 0.05" in [check.name for check in verification.checks]
    assert [row[2:4] for row in table.rows] == [(None, None)] * 3
    assert f"On {len(pictures) if samples else 4} kept pictures. Nothing else was at hand." in table.note


def test_training_pictures_to_calibrate_with_are_chosen_by_the_seed(make_examples):
    pictures = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    train = make_examples(pictures, np.zeros(20, np.int32))

    def chosen(**options):
        return [int(picture[0, 0, 0]) for picture in files.calibration_pictures(train, **options)]

    assert sorted(chosen()) == list(range(20))
    assert chosen(count=5) == chosen(count=5) == chosen(count=10)[:5]
    assert chosen(count=5) != chosen(count=5, seed=1)
    with pytest.raises(InputError, match="`count`"):
        chosen(count=0)


def test_differences_are_relative_to_the_largest_number():
    one = np.array([[1.0, -200.0]])
    assert files._difference(one, one + 1) == pytest.approx(1 / 199)
    assert files._difference(one, one[:, :1]) == files._difference(one, one * np.nan) == math.inf
