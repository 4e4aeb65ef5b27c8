import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import penalties
from tftransfer.errors import InputError
from tftransfer.penalties import EWC, L2SP, DistillFromSource, Source, Subject


def _body(weights=((1.0, 0.0), (0.0, 1.0))) -> keras.Model:
    inputs = keras.Input((2,))
    body = keras.Model(inputs, keras.layers.Dense(2, use_bias=False, name="features")(inputs))
    body.set_weights([np.array(weights, np.float32)])
    return body


def _subject(body, examples, source=None) -> Subject:
    def below(pictures):
        return tf.reduce_mean(pictures, axis=(1, 2))[:, :2] / 255

    return Subject(body, below, tuple(body.trainable_variables), examples, source, seed=0)


@pytest.fixture
def examples(make_examples):
    pictures = np.random.default_rng(0).integers(0, 255, (6, 4, 4, 3), np.uint8)
    return make_examples(pictures, np.arange(6) % 2)


@pytest.fixture
def many(examples, make_examples):
    """The same six pictures two hundred times: as many draws of what is random."""
    pictures = np.stack([examples.pictures.load(i) for i in range(6)])
    return make_examples(np.tile(pictures, (200, 1, 1, 1)), np.tile(examples.targets, 200))


@pytest.fixture
def source(examples):
    return Source(
        "old", examples, examples, np.array([[1.0, -1.0], [0.5, 2.0]], np.float32), np.zeros(2, np.float32), 1.0
    )


def test_l2_sp_is_half_the_squared_distance_to_the_start(examples):
    body = _body()
    term = L2SP(strength=0.5).prepare(_subject(body, examples))
    assert float(term(None, None)) == 0
    body.set_weights([np.array([[1.0, 2.0], [0.0, 4.0]], np.float32)])
    assert float(term(None, None)) == pytest.approx(0.5 / 2 * (2**2 + 3**2))


def test_fisher_of_the_features_is_the_mean_squared_input(examples, many):
    """For features W x, the sum over features of the squared gradient of one weight is the squared input."""
    subject = _subject(_body(), examples)
    inputs = np.stack([subject.below(examples.pictures.load(i)[None])[0] for i in range(6)])
    expected = np.repeat((inputs**2).mean(axis=0)[:, None], 2, axis=1)
    (drawn,) = penalties.fisher(_subject(_body(), many), 1200)
    np.testing.assert_allclose(drawn, expected, rtol=0.15)


def test_fisher_of_the_old_task_is_that_of_softmax_regression(examples, many, source):
    """In closed form: E over x of x_i^2 times the covariance of the answers seen through the head."""
    subject = _subject(_body(), examples, source)
    expected = np.zeros((2, 2))
    for i in range(6):
        x = subject.below(examples.pictures.load(i)[None]).numpy()[0]
        p = tf.nn.softmax((x @ np.eye(2) @ source.kernel)[None]).numpy()[0]
        covariance = source.kernel @ (np.diag(p) - np.outer(p, p)) @ source.kernel.T
        expected += np.outer(x**2, np.diag(covariance)) / 6
    old = dataclasses.replace(source, examples=many)
    (drawn,) = penalties.fisher(_subject(_body(), examples, old), 1200)
    np.testing.assert_allclose(drawn, expected, rtol=0.2)


def test_ewc_pulls_as_l2_sp_does_where_all_weights_matter_alike(examples, monkeypatch):
    monkeypatch.setattr(penalties, "fisher", lambda subject, count: [tf.fill((2, 2), 1e-5)])
    body = _body()
    term = EWC(strength=0.5).prepare(_subject(body, examples))
    body.set_weights([np.array([[1.0, 2.0], [0.0, 4.0]], np.float32)])
    assert float(term(None, None)) == pytest.approx(0.5 / 2 * 13)


def test_ewc_pulls_more_where_the_old_task_depends_on_it(make_examples):
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[..., 0] = 200  # only the first input is ever on
    body = _body()
    subject = _subject(body, make_examples(pictures, np.zeros(4, np.int32)))
    term = EWC(strength=1.0).prepare(subject)

    def pull(row: int) -> float:
        moved = np.eye(2, dtype=np.float32)
        moved[row, 1] += 1
        body.set_weights([moved])
        return float(term(None, None))

    assert pull(0) > 0.1
    assert pull(1) == pytest.approx(0)


@pytest.mark.parametrize("known", [False, True])
def test_distillation_is_zero_at_the_start_and_grows(examples, source, known):
    body = _body()
    term = DistillFromSource().prepare(_subject(body, examples, source if known else None))
    inputs = tf.constant([[0.2, 0.9], [0.7, 0.1]])
    assert float(term(inputs, body(inputs))) == pytest.approx(0, abs=1e-6)
    body.set_weights([np.array([[0.0, 2.0], [3.0, 0.0]], np.float32)])
    assert float(term(inputs, body(inputs))) > 0.1


def test_distillation_is_the_divergence_of_softened_answers(examples, source):
    body = _body()
    term = DistillFromSource(strength=3.0, temperature=2.0).prepare(_subject(body, examples, source))
    inputs = np.array([[0.2, 0.9]], np.float32)
    teacher = tf.nn.softmax(inputs @ source.kernel / 2).numpy()[0]
    changed = np.array([[0.0, 2.0], [3.0, 0.0]], np.float32)
    body.set_weights([changed])
    student = tf.nn.softmax(inputs @ changed @ source.kernel / 2).numpy()[0]
    expected = 3.0 * 4.0 * np.sum(teacher * np.log(teacher / student))
    assert float(term(tf.constant(inputs), body(inputs))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: L2SP(-1.0),
        lambda: L2SP("a"),
        lambda: EWC(float("nan")),
        lambda: EWC(examples=0),
        lambda: DistillFromSource(temperature=0.5),
        lambda: DistillFromSource(temperature="a"),
        lambda: DistillFromSource(temperature=float("inf")),
    ],
)
def test_bad_numbers_are_refused(bad):
    with pytest.raises(InputError):
        bad()
