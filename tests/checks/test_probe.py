import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from tftransfer.checks.probe import compare_probe, draw_per_class
from tftransfer.errors import InputError


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return train_test_split(data.data, data.target, test_size=0.2, stratify=data.target, random_state=0)


def test_raw_pixels_of_digits_reach_the_known_accuracy(digits):
    train, test, labels, test_labels = digits
    row = compare_probe({"raw": train}, labels, {"raw": test}, test_labels, per_class=(10,))[0]
    assert 0.87 < row.mean < 0.93
    assert len(row.accuracies) == 5
    assert row.low == min(row.accuracies) <= row.mean <= row.high == max(row.accuracies)


def test_agrees_with_scikit_learn_by_hand(digits):
    train, test, labels, test_labels = digits
    row = compare_probe({"raw": train}, labels, {"raw": test}, test_labels, (3,), draws=1, seed=7)[0]
    some = draw_per_class(labels, 3, 7)
    scale = np.sqrt(((train[some] - train[some].mean(0)) ** 2).sum(1).mean())
    by_hand = LogisticRegression(C=10.0, max_iter=2000).fit(train[some] / scale, labels[some])
    assert row.mean == pytest.approx(by_hand.score(test / scale, test_labels), abs=1e-9)


def test_scale_and_offset_of_features_do_not_matter(digits):
    train, test, labels, test_labels = digits
    features = {"as is": train, "tiny": train * 1e-12 + 1e-9}
    test_features = {"as is": test, "tiny": test * 1e-12 + 1e-9}
    one, other = compare_probe(features, labels, test_features, test_labels, per_class=(5,), draws=2)
    assert other.mean == pytest.approx(one.mean, abs=0.02)


def test_features_without_information_stay_at_chance(digits):
    train, test, labels, test_labels = digits
    features = {"constant": np.ones((len(train), 2, 2)), "raw": train}
    test_features = {"constant": np.ones((len(test), 2, 2)), "raw": test}
    constant, raw = compare_probe(features, labels, test_features, test_labels, per_class=(2,), draws=1)
    assert constant.mean < 0.2 < 0.5 < raw.mean


def test_rows_and_draws(digits):
    train, test, labels, test_labels = digits
    both = {"a": train, "b": train}, labels, {"a": test, "b": test}, test_labels
    rows = compare_probe(*both, per_class=(1, 2), draws=3)
    assert [(row.features, row.per_class) for row in rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert rows[0].accuracies == rows[1].accuracies
    assert len(set(rows[0].accuracies)) > 1
    drawn = draw_per_class(labels, 4, 0)
    np.testing.assert_array_equal(np.bincount(labels[drawn]), np.full(10, 4))
    assert len(set(drawn)) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_features": {"b": np.ones((4, 1))}}, "same names"),
        ({"features": {"a": np.ones((3, 1))}}, "one row per label, 4. Received: 3 rows"),
        ({"per_class": (3,)}, "size of the smallest class, 2"),
        ({"per_class": (0,)}, "Received: draws=1, per_class=\\(0,\\)"),
        ({"draws": 0}, "`draws` must be at least 1"),
    ],
)
def test_wrong_input_is_explained(change, message):
    right = {
        "features": {"a": np.ones((4, 1))},
        "labels": np.array([0, 0, 1, 1]),
        "test_features": {"a": np.ones((4, 1))},
        "test_labels": np.array([0, 0, 1, 1]),
        "per_class": (1,),
        "draws": 1,
    }
    with pytest.raises(InputError, match=message):
        compare_probe(**{**right, **change})
