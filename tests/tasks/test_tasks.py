import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn import metrics as sklearn_metrics

from tftransfer import tasks
from tftransfer.errors import InputError

ALL = (
    tasks.SingleLabel(("a", "b", "c"), label_smoothing=0.1, balance=True),
    tasks.MultiLabel(("a", "b", "c"), threshold=0.4),
    tasks.Regression(("width", "height")),
)
RAW = {"single_label": ["b", "a", "c"], "multi_label": ["a|c", "", "b"], "regression": ["1|2", "3|4", "5|-6"]}


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.kind)
class TestEveryTask:
    def test_survives_json(self, task):
        assert tasks.from_json(tasks.to_json(task)) == task

    def test_loss_and_metrics_take_targets_and_outputs(self, task):
        targets = task.encode(RAW[task.kind])
        outputs = tf.random.stateless_normal((3, task.num_outputs), (1, 2))
        weights = task.example_weights(targets)
        assert weights.shape == (3,)
        assert weights.dtype == np.float32
        assert np.isfinite(task.loss(from_logits=True)(targets, outputs, sample_weight=weights))
        for metric in task.metrics(from_logits=True):
            metric.update_state(targets, outputs)
            assert np.isfinite(metric.result())

    def test_logits_and_probabilities_give_the_same_loss_and_answers(self, task):
        targets = task.encode(RAW[task.kind])
        logits = tf.random.stateless_normal((3, task.num_outputs), (1, 2))
        probabilities = task.probabilities(logits, from_logits=True)
        first = task.loss(from_logits=True)(targets, logits)
        second = task.loss(from_logits=False)(targets, probabilities)
        assert float(first) == pytest.approx(float(second), rel=1e-4)
        one, two = task.answers(logits, True), task.answers(probabilities, False)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])

    def test_answers_are_float32_and_text(self, task):
        answers = task.answers(tf.zeros((2, task.num_outputs)), True)
        assert {value.dtype for value in answers.values()} <= {tf.float32, tf.string}
        assert all(value.shape[0] == 2 for value in answers.values())

    def test_measures_are_numbers_or_none(self, task):
        targets = task.encode(RAW[task.kind])
        outputs = task.probabilities(tf.zeros((3, task.num_outputs)), True).numpy()
        assert all(value is None or np.isfinite(value) for value in task.measure(targets, outputs).values())


def test_unknown_kind_is_refused():
    with pytest.raises(InputError, match="single_label"):
        tasks.from_json({"kind": "ranking", "labels": ["a"]})


def test_single_label_by_hand():
    task = tasks.SingleLabel(("a", "b"))
    measured = task.measure(np.array([0, 1, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]]))
    assert measured["accuracy"] == 0.75
    assert measured["macro_recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert measured["macro_precision"] == pytest.approx((1 / 2 + 1) / 2)
    assert measured["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.9]).mean(), rel=1e-6)


def test_label_answers_name_the_most_probable_class():
    answers = tasks.SingleLabel(("a", "b")).answers(tf.constant([[0.0, 2.0], [1.0, 0.0]]), True)
    assert answers["label"].numpy().tolist() == [b"b", b"a"]
    assert answers["probability"].numpy() == pytest.approx([0.8808, 0.7311], abs=1e-4)


def test_balance_gives_every_class_the_same_total():
    task = tasks.SingleLabel(("a", "b", "c"), balance=True)
    targets = np.array([0, 0, 0, 1, 1, 2], np.int32)
    weights = task.example_weights(targets)
    totals = np.bincount(targets, weights)
    assert totals == pytest.approx([2, 2, 2])
    assert weights.mean() == pytest.approx(1)


def test_label_smoothing_equals_keras_on_one_hot_targets():
    task = tasks.SingleLabel(("a", "b", "c"), label_smoothing=0.2)
    targets, logits = np.array([2, 0], np.int32), tf.constant([[0.1, 2.0, -1.0], [1.0, 0.0, 0.5]])
    theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    one_hot = keras.ops.one_hot(targets, 3)
    assert float(task.loss(True)(targets, logits)) == pytest.approx(float(theirs(one_hot, logits)), rel=1e-6)


def test_smoothed_loss_survives_its_config():
    loss = tasks.SingleLabel(("a", "b"), label_smoothing=0.2).loss(True)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()


def test_multi_label_measures_equal_scikit_learn():
    task = tasks.MultiLabel(("a", "b", "c"))
    generator = np.random.default_rng(0)
    truth = (generator.random((40, 3)) > 0.5).astype(np.float32)
    scores = generator.random((40, 3)).astype(np.float32)
    measured = task.measure(truth, scores)
    given = (scores >= 0.5).astype(int)
    assert measured["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth.astype(int), given))
    assert measured["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth.astype(int), given, average="macro"))
    assert measured["mean_average_precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(truth.astype(int), scores)
    )


def test_one_label_alone_is_measured_by_its_presence():
    task = tasks.MultiLabel(("round",))
    truth = np.array([[1.0]] * 10 + [[0.0]] * 30, np.float32)
    scores = np.array([[0.9]] * 5 + [[0.1]] * 35, np.float32)
    measured = task.measure(truth, scores)
    assert measured["macro_recall"] == 0.5
    assert measured["macro_precision"] == 1.0
    assert measured["macro_f1"] == pytest.approx(2 / 3)


def test_multi_label_answers_are_padded():
    task = tasks.MultiLabel(("a", "b", "c"))
    answers = task.answers(tf.constant([[0.1, 0.9, 0.6]]), False)
    assert answers["labels"].numpy().tolist() == [[b"b", b"c", b""]]
    assert answers["scores"].numpy()[0] == pytest.approx([0.9, 0.6, 0.0])


def test_multi_label_threshold_reaches_the_metric():
    metric = tasks.MultiLabel(("a", "b"), threshold=0.9).metrics(from_logits=True)[0]
    metric.update_state([[0.0, 1.0]], [[1.0, 3.0]])  # sigmoid 0.73 and 0.95
    assert float(metric.result()) == 1.0


def test_regression_by_hand():
    measured = tasks.Regression(("x",)).measure(np.array([[1.0], [3.0]]), np.array([[2.0], [5.0]]))
    assert measured["mean_absolute_error"] == 1.5
    assert measured["root_mean_squared_error"] == pytest.approx(np.sqrt(2.5))
    assert measured["r_squared"] == pytest.approx(1 - 5 / 2)
    assert tasks.Regression(("x",)).measure(np.ones((2, 1)), np.ones((2, 1)))["r_squared"] is None


@pytest.mark.parametrize("text", ["", "one", "1|2|3", "nan", "inf|1", "1|"])
def test_bad_numbers_are_refused(text):
    with pytest.raises(InputError, match="2 finite numbers"):
        tasks.Regression(("x", "y")).encode([text])


def test_unknown_labels_name_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'daisy'"):
        tasks.SingleLabel(("daisy", "rose")).encode(["daysy"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tasks.SingleLabel(("a",)), "at least 2"),
        (lambda: tasks.SingleLabel(("a", "a")), "unique"),
        (lambda: tasks.SingleLabel(("a", "b"), label_smoothing=1.0), "label_smoothing"),
        (lambda: tasks.MultiLabel(()), "at least 1"),
        (lambda: tasks.MultiLabel(("a",), threshold=1.0), "threshold"),
    ],
)
def test_bad_tasks_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("text", ["1e39", "-1e39", "nan", "inf", "1_000", "1|2", "one", ""])
def test_labels_that_are_no_float32_are_refused(text):
    with pytest.raises(InputError, match="must hold 1 finite numbers"):
        tasks.Regression().encode([text])
    assert tasks.Regression().encode(["3.4e38", " -2 "]).tolist() == [[np.float32(3.4e38)], [-2]]
