"""Scores of features, against their definitions and independent computations."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from tftransfer import transferability
from tftransfer.errors import InputError


def _problem(separation=1.0, count=60, size=8, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    centres = generator.normal(size=(classes, size)) * separation
    return centres[targets] + generator.normal(size=(count, size)), targets


@pytest.mark.parametrize("size", [4, 90], ids=["fewer features than examples", "more"])
def test_logme_is_the_largest_evidence_of_a_gaussian_process(size):
    features, targets = _problem(size=size)

    def negative(column):
        def of(precisions):
            prior, noise = np.exp(precisions)
            covariance = features @ features.T / prior + np.eye(len(features)) / noise
            return -multivariate_normal(cov=covariance).logpdf(column) / len(features)

        return of

    best = [-minimize(negative(column), [0.0, 0.0], method="Nelder-Mead").fun for column in np.eye(3)[targets].T]
    assert transferability.logme(features, targets) == pytest.approx(np.mean(best), abs=1e-3)


def test_every_score_prefers_features_that_tell_classes_apart():
    scores = (transferability.logme, transferability.h_score, transferability.n_leep, transferability.neighbours)
    for score in scores:
        values = [score(*_problem(separation)) for separation in (0.0, 0.5, 1.0, 3.0)]
        assert values == sorted(values), score.__name__
        assert values[0] < values[-1]


def test_h_score_of_classes_that_share_no_variance_is_their_number_less_one():
    features = np.repeat(np.eye(3) * 5, 2000, axis=0) + np.random.default_rng(0).normal(size=(6000, 3)) * 0.01
    assert transferability.h_score(features, np.repeat(np.arange(3), 2000)) == pytest.approx(2, abs=0.02)
    shuffled = np.random.default_rng(1).permutation(np.repeat(np.arange(3), 2000))
    assert transferability.h_score(features, shuffled) == pytest.approx(0, abs=0.01)


def test_leep_by_hand():
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    # P(y=0|z) = (1.4/1.5, 0.6/1.5); P(y=1|z) = (0.1/1.5, 0.9/1.5)
    expected = [0.8 * 1.4 / 1.5 + 0.2 * 0.6 / 1.5, 0.6 * 1.4 / 1.5 + 0.4 * 0.6 / 1.5, 0.1 * 0.1 / 1.5 + 0.9 * 0.9 / 1.5]
    value = transferability.leep(probabilities, np.array([0, 0, 1]))
    assert value == pytest.approx(np.mean(np.log(expected)))


def test_neighbours_are_those_of_scikit_learn():
    features, targets = _problem(0.8, count=90)
    centred = features - features.mean(axis=0)
    correct = 0
    for left_out in range(len(centred)):
        rest = np.delete(np.arange(len(centred)), left_out)
        model = KNeighborsClassifier(1, metric="cosine").fit(centred[rest], targets[rest])
        correct += int(model.predict(centred[left_out : left_out + 1])[0] == targets[left_out])
    assert transferability.neighbours(features, targets, count=1) == pytest.approx(correct / len(centred))


def test_probe_predicts_examples_that_it_has_not_seen():
    features, targets = _problem(3.0)
    assert np.mean(transferability.probe(features, targets).argmax(axis=1) == targets) > 0.9
    noise, random = np.random.default_rng(0).normal(size=(60, 200)), np.random.default_rng(1).integers(0, 2, 60)
    assert np.mean(transferability.probe(noise, random).argmax(axis=1) == random) < 0.75
    values = features[:, :2] * 3
    given = transferability.probe(features, values)
    assert given.shape == (60, 2)
    assert np.corrcoef(given[:, 0], values[:, 0])[0, 1] > 0.9


@pytest.mark.parametrize("targets", [[0, 0, 0, 0, 1], [1, 0], [0, 1, 2], [0] * 7 + [1] * 7 + [2, 3]])
def test_a_class_of_one_example_is_predicted_by_the_folds_that_know_it(targets):
    targets = np.array(targets)
    features = np.random.default_rng(0).normal(size=(len(targets), 4)) + 20 * np.eye(4)[targets]
    parts = transferability.divided(targets, 5, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([outside for _, outside in parts])), np.arange(len(targets)))
    given = transferability.probe(features, targets, seed=1)
    np.testing.assert_allclose(given.sum(axis=1), 1)
    sizes = np.bincount(targets)
    for inside, outside in parts:
        unknown = sorted(set(targets) - set(targets[inside]))
        assert all(sizes[name] == 1 for name in unknown)
        assert not given[np.ix_(outside, unknown)].any()
        if len(set(targets[inside])) == 1:
            assert (given[outside, targets[inside][0]] == 1).all()
    many = sizes[targets] > 5
    assert (given[many].argmax(axis=1) == targets[many]).all()


def test_classes_are_divided_as_scikit_learn_stratifies_them():
    targets = np.random.default_rng(0).integers(0, 4, 60)
    expected = StratifiedKFold(5, shuffle=True, random_state=3).split(targets, targets)
    for (_, own), (_, outside) in zip(transferability.divided(targets, 5, seed=3), expected, strict=True):
        np.testing.assert_array_equal(own, outside)


@pytest.mark.parametrize("features", [np.zeros((3, 2)), np.zeros(4), np.full((4, 2), np.nan)])
def test_features_that_do_not_fit_are_refused(features):
    with pytest.raises(InputError, match="`features`"):
        transferability.logme(features, np.array([0, 1, 0, 1]))


def test_little_linear_algebra_takes_one_thread_and_much_all(monkeypatch):
    taken = []
    monkeypatch.setattr(transferability, "threadpool_limits", lambda limit: taken.append(limit))
    transferability.threads_for(np.zeros((10, 10)))
    monkeypatch.setattr(transferability, "_MANY", 100)
    transferability.threads_for(np.zeros((10, 10)))
    assert taken == [1, None]
