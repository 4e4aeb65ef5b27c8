import numpy as np
import pytest

from tftransfer import strategies, tasks
from tftransfer.checks.overfitting import overfitting, remedy


def _found(right_seen: int, right_unseen: int, count: int = 100, phases=()):
    task = tasks.SingleLabel(("a", "b"))

    def pair(right: int) -> tuple[np.ndarray, np.ndarray]:
        targets = np.arange(count, dtype=np.int32) % 2
        return targets, np.eye(2)[np.where(np.arange(count) < right, targets, 1 - targets)]

    return overfitting(task, pair(right_seen), pair(right_unseen), list(phases)).tables[0]


def test_a_large_gap_is_said_and_a_remedy_named():
    table = _found(100, 70, phases=[{"selector": "all", "augmentation": "strong"}])
    assert [row[2] for row in table.rows] == [1.0, 0.7]
    assert "by heart" in table.note
    assert "l2_sp" in table.note


def test_a_model_that_gives_one_answer_to_all_is_told_so():
    task = tasks.SingleLabel(("a", "b", "c"))
    targets = np.array([0, 0, 1, 2], np.int32)
    always_b = targets, np.tile([[0.2, 0.6, 0.2]], (4, 1))
    right = targets, np.eye(3)[targets]
    note = overfitting(task, always_b, always_b, []).tables[0].note
    assert "no better than one answer for all, 0.5. A lower `--learning-rate`" in note
    assert "one answer" not in overfitting(task, right, right, []).tables[0].note


@pytest.mark.parametrize("task", [tasks.Regression(("size",)), tasks.MultiLabel(("a",))], ids=lambda task: task.kind)
def test_numbers_and_several_labels_that_stay_the_same_are_told_so(task):
    targets = np.array([[0.0], [1.0], [1.0], [1.0]])
    same = targets, np.full((4, 1), 0.75)
    assert "no better than one answer for all" in overfitting(task, same, same, []).tables[0].note
    assert "one answer" not in overfitting(task, same, (targets, targets), []).tables[0].note


def test_a_gap_within_chance_is_called_so():
    assert "no more apart than chance (standard error 0.04" in _found(92, 90, phases=[{"selector": "all"}]).note


def test_the_same_gap_counts_with_more_examples():
    assert "chance" in _found(9, 8, count=10).note
    assert "by heart" in _found(9000, 8000, count=10_000).note


def test_a_small_gap_that_is_certain_is_not_called_chance():
    note = _found(99_900, 99_200, count=100_000).note
    assert "small gap" in note
    assert "by heart" not in note


def test_a_model_that_is_better_on_unseen_examples_is_not_said_to_learn_by_heart():
    assert "better on what it has not seen" in _found(700, 900, count=1000).note


@pytest.mark.parametrize("name", strategies.names())
def test_the_remedy_is_another_strategy_that_exists(name):
    used = strategies.parse(name)
    text = remedy([phase.to_json() for phase in used]).split("`")[1].removeprefix("--strategy ")
    assert strategies.parse(text) != used


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({"selector": "head", "weight_decay": 1.0}, "linear_probe:weight_decay=10"),
        ({"selector": "all", "augmentation": "none"}, "freeze_then_unfreeze:augmentation=strong`"),
        ({"selector": "all", "augmentation": "light_no_flip"}, "freeze_then_unfreeze:augmentation=strong_no_flip"),
        ({"selector": "all", "augmentation": "strong"}, "l2_sp:augmentation=strong`"),
        ({"selector": "all", "augmentation": "strong", "penalty": {"kind": "L2SP"}}, "linear_probe`"),
        ({"selector": "last:2", "augmentation": "light"}, "linear_probe`"),
    ],
)
def test_the_remedy_fits_what_was_done(phase, said):
    assert said in remedy([phase])


def test_numbers_are_compared_by_squared_error():
    task = tasks.Regression(("size",))
    targets = np.arange(20.0)[:, None]
    table = overfitting(task, (targets, targets), (targets, targets + 5), [{"selector": "all"}]).tables[0]
    assert [row[2] for row in table.rows] == [0, 25]
    assert "by heart" in table.note


def test_several_labels_are_compared_label_by_label():
    task = tasks.MultiLabel(("a", "b"))
    targets = np.tile([[1.0, 0.0]], (10, 1))
    table = overfitting(task, (targets, targets), (targets, 1 - targets), [{"selector": "all"}]).tables[0]
    assert [row[2] for row in table.rows] == [1, 0]
