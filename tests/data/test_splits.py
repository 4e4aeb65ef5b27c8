import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tftransfer.data import splits
from tftransfer.errors import InputError

LABELS = st.dictionaries(st.sampled_from("abcdef"), st.integers(3, 60), min_size=2).map(
    lambda counts: [name for name, count in counts.items() for _ in range(count)]
)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 1000))
def test_splits_are_disjoint_complete_and_stratified(labels, seed):
    parts, origin = splits.complete(["train"] * len(labels), labels, seed)
    together = np.concatenate(list(parts.values()))
    assert sorted(together) == list(range(len(labels)))
    for name, count in Counter(labels).items():
        own = {split: sum(labels[number] == name for number in numbers) for split, numbers in parts.items()}
        assert min(own.values()) >= 1
        assert own["test"] == pytest.approx(0.2 * count, abs=1)
        assert own["validation"] == pytest.approx(0.1 * (count - own["test"]), abs=1)
    assert {split: record["examples"] for split, record in origin.items()} == {s: len(n) for s, n in parts.items()}


@pytest.mark.parametrize("repeats", [1, 2, 3, 50])
def test_totals_hold_for_a_long_tail_of_groups(repeats):
    strata = np.arange(300) // repeats
    parts, _ = splits.complete(["train"] * 300, strata, seed=0, every=False)
    assert {name: len(numbers) for name, numbers in parts.items()} == {"train": 216, "validation": 24, "test": 60}
    for name, share in (("test", 0.2), ("validation", 0.08)):
        counts = np.bincount(strata[parts[name]], minlength=300 // repeats)
        assert np.abs(counts - share * repeats).max() <= 2, "each group gives its share"


@given(st.integers(3, 40), st.integers(1, 40), st.integers(0, 9))
def test_no_split_is_empty_from_three_examples(count, kinds, seed):
    parts, _ = splits.complete(["train"] * count, np.arange(count) % kinds, seed, every=False)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert all(len(numbers) for numbers in parts.values())


def test_many_classes_are_divided_in_linear_time():
    began = time.process_time()
    splits.complete(["train"] * 100_000, np.arange(100_000, dtype=np.int32) % 5000, 0)
    assert time.process_time() - began < 3  # one pass over all examples per class takes 8 s


def test_the_seed_decides():
    labels = ["a", "b"] * 50
    first, same, other = (splits.complete(["train"] * 100, labels, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["test"], same["test"])
    assert (first["test"] != other["test"]).any()


def test_given_splits_are_kept_and_missing_ones_are_written_down():
    given_splits = ["train"] * 20 + ["test"] * 10
    parts, origin = splits.complete(given_splits, ["a", "b"] * 15, seed=4)
    np.testing.assert_array_equal(parts["test"], range(20, 30))
    assert len(parts["validation"]) == 2
    assert origin["test"]["from"] == "the source"
    assert origin["validation"]["from"] == "10 % of train, stratified, seed 4"


def test_a_group_of_one_stays_in_training():
    chosen = splits.choose_share(np.array(["a"] * 10 + ["alone"]), 0.2, np.random.default_rng(0))
    assert len(chosen) == 2
    assert 10 not in chosen


@pytest.mark.parametrize(
    ("given_splits", "classes", "message"),
    [
        (["train"] * 4, ["a"] * 4, "one class only \\('a'\\)"),
        (["train"] * 4, ["a", "a", "a", "b"], "at least 3 .*'b' with 1"),
        (["train", "train", "train", "test", "test"], ["a", "a", "b", "a", "b"], "at least 2 .*'b' with 1"),
        (["train"] * 4 + ["test"], ["a", "a", "b", "b", "c"], "test .* train lacks: 'c'"),
        (["train"] * 4 + ["validation"], ["a", "a", "b", "b", "c"], "validation .* train lacks: 'c'"),
    ],
)
def test_classes_that_cannot_be_divided(given_splits, classes, message):
    with pytest.raises(InputError, match=message):
        splits.check_classes(given_splits, classes, "photos")


def test_several_labels_are_divided_by_the_rarest():
    targets = np.zeros((40, 3), np.float32)
    targets[:, 0], targets[:10, 1], targets[:3, 2] = 1, 1, 1
    targets[39] = 0
    strata = splits.strata_of(targets, "multi_label")
    assert Counter(strata.tolist()) == {0: 29, 1: 7, 2: 3, -1: 1}


def test_numbers_are_divided_by_rank():
    targets = np.random.default_rng(0).normal(size=(200, 1)).astype(np.float32)
    strata = splits.strata_of(targets, "regression")
    assert set(Counter(strata.tolist()).values()) == {20}
    parts, _ = splits.complete(["train"] * 200, strata, seed=0)
    assert targets[parts["test"]].mean() == pytest.approx(targets.mean(), abs=0.1)
