import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from tftransfer.checks import labels
from tftransfer.errors import InputError


def _blobs(count=120, size=6, classes=3, separation=4.0, seed=0):
    generator = np.random.default_rng(seed)
    targets = np.arange(count, dtype=np.int32) % classes
    return generator.normal(size=(count, size)) + separation * np.eye(classes, size)[targets], targets


def _flipped(targets, count, seed=0):
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(targets), count, replace=False)
    changed = targets.copy()
    changed[chosen] = (targets[chosen] + 1) % 3
    return changed, set(chosen.tolist())


def test_flipped_labels_come_first_and_are_counted():
    features, targets = _blobs()
    given, flipped = _flipped(targets, 12)
    probabilities = labels.out_of_fold(features, given)
    ranked = labels.suspects(probabilities, given)
    assert len({one.index for one in ranked[:12]} & flipped) >= 11
    assert all(one.likelier == targets[one.index] for one in ranked[:12] if one.index in flipped)
    assert 9 <= labels.estimated_count(probabilities, given) <= 15
    doubts = [one.doubt for one in ranked]
    assert doubts == sorted(doubts, reverse=True)
    assert sum(doubt > 0 for doubt in doubts) <= 16


def test_clean_labels_are_left_alone():
    features, targets = _blobs(separation=8.0)
    probabilities = labels.out_of_fold(features, targets)
    assert max(one.doubt for one in labels.suspects(probabilities, targets)) < 0
    assert labels.estimated_count(probabilities, targets) == 0


def test_probabilities_are_those_of_models_that_have_not_seen_the_example():
    features, targets = _blobs(separation=1.0)
    centred = features - features.mean(axis=0)
    scaled = centred / np.sqrt((centred**2).sum(axis=1).mean())
    expected = np.zeros((120, 3))
    parts = StratifiedKFold(4, shuffle=True, random_state=np.random.RandomState([7, 0]))
    for inside, outside in parts.split(scaled, targets):
        model = LogisticRegression(C=1.0, max_iter=300).fit(scaled[inside], targets[inside])
        expected[outside] = model.predict_proba(scaled[outside])
    found = labels.out_of_fold(features, targets, folds=4, repeats=1, seed=7)
    np.testing.assert_allclose(found, expected)
    views = np.stack([features - 0.5, features + 0.5])
    np.testing.assert_allclose(labels.out_of_fold(views, targets, folds=4, repeats=1, seed=7), expected, rtol=1e-6)


def test_classes_may_be_small_or_missing():
    features, targets = _blobs(30)
    targets = np.where(targets == 2, 4, targets)
    found = labels.out_of_fold(features[:8], targets[:8])
    assert found.shape == (8, 5)
    assert not found[:, 2:4].any()
    np.testing.assert_allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": np.full((30, 6), np.nan)}, "features"),
        ({"features": np.zeros((29, 6))}, "features"),
        ({"targets": np.zeros((30, 3))}, "targets"),
        ({"targets": np.zeros(30, np.int32)}, "targets"),
        ({"targets": np.array([1] + [0] * 29, np.int32)}, "targets"),
        ({"folds": 1}, "folds"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_bad_input_is_refused(change, said):
    features, targets = _blobs(30)
    with pytest.raises(InputError, match=f"`{said}`"):
        labels.out_of_fold(**{"features": features, "targets": targets, **change})


def test_the_report_names_files_and_shows_pictures(small_task, small_data):
    examples = small_data.train
    features = np.stack([examples.pictures.load(i).numpy().mean(axis=(0, 1)) for i in range(24)])
    wrong = examples.targets.copy()
    wrong[5] = (wrong[5] + 1) % 3
    found = labels.labels(small_task, type(examples)(examples.pictures, wrong, examples.weights), features)
    (check,) = found.checks
    assert check.metrics["looked_at"] == 24
    assert check.metrics["listed"] >= 1
    row = found.tables[0].rows[0]
    assert row[:3] == ("picture 5", small_task.labels[wrong[5]], small_task.labels[examples.targets[5]])
    assert found.pictures[0].png.startswith(b"\x89PNG")
    clean = labels.labels(small_task, examples, np.eye(3)[examples.targets] + 0.001 * features)
    assert clean.tables == ()
    assert clean.checks[0].metrics["estimated_wrong"] == 0
