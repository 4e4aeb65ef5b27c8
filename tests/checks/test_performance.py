"""Performance: the metrics with intervals, tables by hand, pictures for any task and number of classes."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn import metrics as sklearn_metrics

from tftransfer.checks.charts import confusion_picture
from tftransfer.checks.performance import learning_curves, performance
from tftransfer.data.examples import Examples, Pictures
from tftransfer.report import Findings
from tftransfer.tasks import MultiLabel, Regression, SingleLabel

AWKWARD = (
    "$x^2$",
    "naïve 猫",
    "<b>bold</b>",
    "line\nbreak",
    "a name that is much too long for a picture",
    r"\frac{",
    "",
    "z",
)


def examples(targets, loaded=None):
    """Examples whose picture i is of shade i; the indices that are read are appended to `loaded`."""

    def load(index):
        assert index.dtype == tf.int64
        if loaded is not None:
            loaded.append(int(index))
        return tf.fill((8, 8, 3), tf.cast(index % 256, tf.uint8))

    names = tuple(f"{i}.png" for i in range(len(targets)))
    return Examples(Pictures(names, load, (8, 8)), targets, np.ones(len(targets), np.float32))


def single(count=120, classes=3, accuracy=0.8, seed=0):
    random = np.random.default_rng(seed)
    targets = np.arange(count, dtype=np.int32) % classes
    scores = random.normal(size=(count, classes))
    scores[np.arange(count), targets] += np.where(random.random(count) < accuracy, 5, 0)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return SingleLabel(tuple(f"class {i}" for i in range(classes))), targets, probabilities.astype(np.float32)


def several(count=120, labels=3, seed=0):
    random = np.random.default_rng(seed)
    targets = (random.random((count, labels)) < 0.4).astype(np.float32)
    noisy = np.clip(0.2 + 0.6 * targets + 0.25 * random.normal(size=targets.shape), 0.001, 0.999)
    return MultiLabel(tuple(f"label {i}" for i in range(labels))), targets, noisy.astype(np.float32)


def numbers(count=120, seed=0):
    random = np.random.default_rng(seed)
    targets = random.normal(size=(count, 2)).astype(np.float32)
    return (
        Regression(("width", "height")),
        targets,
        (targets + 0.3 * random.normal(size=targets.shape)).astype(np.float32),
    )


CASES = {"single_label": single, "multi_label": several, "regression": numbers}


@pytest.mark.parametrize("kind", CASES)
def test_every_metric_of_the_task_has_its_value_and_an_interval_around_it(kind):
    task, targets, probabilities = CASES[kind]()
    found = performance(task, examples(targets), probabilities)
    measured = task.measure(targets, probabilities)
    assert {name: number.value for name, number in found.metrics.items()} == pytest.approx(measured, rel=1e-5)
    for number in found.metrics.values():
        assert number.low < number.value < number.high
        assert number.method in ("wilson", "wilson_effective_n", "student_t_log")


@pytest.mark.parametrize("kind", CASES)
def test_same_input_same_findings_and_a_report_keeps_them(kind, kept_by_a_report):
    task, targets, probabilities = CASES[kind](count=40)
    found = performance(task, examples(targets), probabilities, train_targets=targets)
    assert found == performance(task, examples(targets), probabilities, train_targets=targets)
    assert kept_by_a_report(found)
    for picture in found.pictures:
        width, _ = Image.open(io.BytesIO(picture.png)).size
        assert 500 <= width <= 900


def test_the_table_of_classes_by_hand():
    task = SingleLabel(("cat", "dog", "cow"))
    targets = np.array([0, 0, 0, 0, 1, 1], np.int32)
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 0]]
    found = performance(task, examples(targets), probabilities, train_targets=np.array([0, 1, 1, 2]))
    classes, matrix = found.tables[:2]
    assert classes.columns[-2:] == ("test examples", "training examples")
    cat, dog, cow = (dict(zip(classes.columns, row, strict=True)) for row in classes.rows)
    assert (cat["recall"].value, cat["precision"].value, cat["F1"]) == (0.75, 0.75, 0.75)
    assert (cat["most often taken for"], cat["test examples"], cat["training examples"]) == ("dog (1)", 4, 1)
    assert (dog["recall"].value, dog["precision"].value, dog["training examples"]) == (0.5, 0.5, 2)
    assert (cow["recall"].value, cow["F1"], cow["most often taken for"]) == (None, 0.0, "–")
    assert matrix.rows == (("cat", 3, 1, 0), ("dog", 1, 1, 0), ("cow", 0, 0, 0))
    assert found.metrics["macro_f1"].method == "none: a class has no example"


def test_the_table_of_labels_equals_scikit_learn():
    task, targets, probabilities = several()
    (table,) = [
        table for table in performance(task, examples(targets), probabilities).tables if table.title == "Each label"
    ]
    expected = sklearn_metrics.precision_recall_fscore_support(targets, probabilities >= 0.5)
    for i, row in enumerate(dict(zip(table.columns, row, strict=True)) for row in table.rows):
        assert (row["precision"].value, row["recall"].value, row["F1"]) == pytest.approx(
            [part[i] for part in expected[:3]]
        )
        average = sklearn_metrics.average_precision_score(targets[:, i], probabilities[:, i])
        assert row["average precision"] == pytest.approx(average)
        assert row["test examples"] == targets[:, i].sum()


def test_only_the_most_confident_mistakes_are_read_the_surest_first():
    task = SingleLabel(("cat", "dog"))
    sure = np.array([0.9, 0.6, 0.99, 0.7, 0.8])
    targets = np.array([1, 1, 0, 1, 0], np.int32)  # 0, 1 and 3 are wrong
    loaded = []
    found = performance(task, examples(targets, loaded), np.stack([sure, 1 - sure], axis=1), max_mistakes=2)
    assert loaded == [0, 3]
    files = found.tables[-1]
    assert files.rows == (("0.png", "dog", "cat", "90 %"), ("3.png", "dog", "cat", "70 %"))
    assert "dog taken for cat (90 %)" in found.pictures[-1].alt


def test_the_largest_errors_are_ranked_in_the_units_of_each_number():
    targets = np.stack([np.linspace(0, 1, 10), np.linspace(0, 1000, 10)], axis=1).astype(np.float32)
    predicted = targets.copy()
    predicted[3, 0] += 0.9  # three deviations of the first number; a tenth of one of the second
    predicted[5, 1] += 30
    loaded = []
    performance(Regression(("small", "large")), examples(targets, loaded), predicted)
    assert loaded == [3, 5]


def test_the_mistakes_of_several_labels_name_what_is_missing():
    task = MultiLabel(("red", "round"))
    targets = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    probabilities = np.array([[0.9, 0.1], [0.05, 0.9], [0.6, 0.1]], np.float32)
    files = performance(task, examples(targets), probabilities).tables[-1]
    assert [row[:3] for row in files.rows] == [("1.png", "red, round", "round"), ("2.png", "none", "red")]
    assert files.rows[0][3] == "off by 95 points"


@pytest.mark.parametrize("kind", CASES)
def test_a_model_without_mistakes_shows_none_and_is_not_certain(kind):
    task, targets, _ = CASES[kind](count=30)
    perfect = np.eye(3, dtype=np.float32)[targets] if kind == "single_label" else targets
    loaded = []
    found = performance(task, examples(targets, loaded), perfect)
    assert loaded == []
    if kind != "regression":
        assert found.metrics["accuracy"].low < 0.9
        assert found.metrics["macro_f1"].low < 0.97


@pytest.mark.parametrize("kind", CASES)
def test_outputs_that_are_not_finite_fail_a_check_and_are_not_measured(kind):
    task, targets, probabilities = CASES[kind](count=30)
    broken = probabilities.copy()
    broken[7, 0] = np.nan
    found = performance(task, examples(targets), broken)
    assert found.checks[0].passed is False
    assert found.checks[0].metrics == {"examples": 30, "not_finite": 1}
    assert {number.value for number in found.metrics.values()} == {None}


def test_an_empty_split_gives_nothing():
    assert performance(single()[0], examples(np.zeros(0, np.int32)), np.zeros((0, 3))) == Findings()


@pytest.mark.parametrize("classes", [2, 15, 16, 31, 100])
def test_confusion_is_drawn_for_any_number_of_classes(classes):
    task, targets, probabilities = single(count=3 * classes, classes=classes)
    found = performance(task, examples(targets), probabilities, max_mistakes=0)
    titles = [table.title for table in found.tables]
    assert ("Confusion matrix in numbers" in titles) == (classes <= 15)
    assert len(found.pictures) == 1
    if classes > 15:
        scores = [row[3] for row in found.tables[0].rows]
        assert scores == sorted(scores)


def test_labels_in_any_script_and_with_any_signs_are_drawn():
    picture = confusion_picture(np.eye(len(AWKWARD)), AWKWARD)
    assert picture.png.startswith(b"\x89PNG")


def test_learning_curves_of_one_epoch_are_drawn():
    history = {"loss": [0.69], "val_loss": [0.69], "accuracy": [0.5], "val_accuracy": [0.5]}
    picture = learning_curves(history, [{"name": "linear probe", "epochs": 1}])
    assert picture.png.startswith(b"\x89PNG")


def test_learning_curves_tell_the_last_values_and_survive_odd_histories():
    history = {"loss": [2.0, 1.0, 0.5], "val_loss": [2.1, np.nan, 0.7], "accuracy": [0.2, 0.5, 0.8],
               "val_accuracy": [0.1, 0.4, 0.75], "learning_rate": [0.1, 0.1, 0.01]}  # fmt: skip
    phases = [{"name": "probe", "epochs": 1}, {"name": "$fine-tune", "epochs": 2}]
    picture = learning_curves(history, phases)
    assert picture == learning_curves(history, phases)
    assert picture.title == "Learning curves: loss and accuracy"
    assert "validation accuracy 0.75" in picture.alt
    assert picture.png != learning_curves(history).png
    assert learning_curves({"loss": [1.0]}).title == "Learning curves: loss"
    assert learning_curves({}).png.startswith(b"\x89PNG")
