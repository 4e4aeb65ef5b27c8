import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tftransfer.data import order
from tftransfer.data.augment import NAMED
from tftransfer.errors import InputError


def epoch_of(count, batch_size, seed=0, phase=0, epoch=0):
    steps = order.steps_per_epoch(count, batch_size)
    batches = [order.batch_indices(count, batch_size, seed, phase, epoch * steps + step) for step in range(steps)]
    return [batch.numpy() for batch in batches]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 2**31), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_a_permutation(count, batch_size, seed, phase, epoch):
    batches = epoch_of(count, batch_size, seed, phase, epoch)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_order_differs_by_seed_phase_and_epoch_only():
    first = np.concatenate(epoch_of(50, 50))
    np.testing.assert_array_equal(first, np.concatenate(epoch_of(50, 7)))
    for other in ({"seed": 1}, {"phase": 1}, {"epoch": 1}):
        assert (np.concatenate(epoch_of(50, 50, **other)) != first).any()


def test_order_is_spread_evenly():
    """The example that comes first is each one about equally often."""
    firsts = [int(order.batch_indices(8, 1, seed, 0, 0)[0]) for seed in range(400)]
    assert np.bincount(firsts, minlength=8).min() > 20


@pytest.fixture
def examples(make_examples):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 8, 9, 3), np.uint8)
    return make_examples(pictures, np.arange(10, dtype=np.int32), np.linspace(0, 1, 10).astype(np.float32))


@pytest.mark.parametrize("augmentation", ["none", "light", "strong"])
def test_a_run_can_start_at_any_step(examples, augmentation):
    options = {"seed": 3, "phase": 1, "augmentation": augmentation}
    whole = list(order.batches(examples, 4, steps=7, **options))
    later = list(order.batches(examples, 4, steps=3, start=4, **options))
    assert [len(batch[0]) for batch in whole] == [4, 4, 2, 4, 4, 2, 4]
    for expected, found in zip(whole[4:], later, strict=True):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_pictures_targets_and_weights_belong_together(examples):
    for pictures, targets, weights in order.batches(examples, 4, seed=0, phase=0, steps=3):
        assert pictures.dtype == tf.float32
        for picture, target, weight in zip(pictures, targets.numpy(), weights.numpy(), strict=True):
            np.testing.assert_array_equal(picture, examples.pictures.load(tf.constant(target, tf.int64)))
            assert weight == examples.weights[target]


def test_augmentation_differs_per_epoch(make_examples):
    one = make_examples(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(1, 8, 8, 3), np.zeros(1, np.int32))
    first, second = (batch[0] for batch in order.batches(one, 1, seed=0, phase=0, steps=2, augmentation="strong"))
    assert (first.numpy() != second.numpy()).any()


def test_in_order_gives_each_example_once(examples):
    batches = list(order.in_order(examples, 4))
    assert order.in_order(examples, 4).cardinality() == 3
    np.testing.assert_array_equal(np.concatenate([batch[1] for batch in batches]), np.arange(10))


@pytest.mark.slow
def test_averaged_views_are_those_that_come_in_turn_otherwise(examples):
    options = {"seed": 3, "phase": 1, "augmentation": "light", "views": 3}
    for step, joined in enumerate(order.batches(examples, 4, steps=5, average_views=True, **options)):
        chosen = order.batch_indices(10, 4, 3, 1, step)
        for view in range(3):
            part = slice(view * len(chosen), (view + 1) * len(chosen))
            expected = order.pictures(examples, "light", seed=3, views=3)(chosen, tf.constant(view, tf.int64))
            np.testing.assert_array_equal(joined[0][part], expected)
            np.testing.assert_array_equal(joined[1][part], examples.targets[chosen])
            np.testing.assert_array_equal(joined[2][part], examples.weights[chosen])
        assert len(joined[0]) == 3 * len(chosen)


def test_all_tensors_of_several_are_averaged_over_views(examples):
    def read(chosen, view):
        return chosen, tf.stack([chosen, chosen + 10 * view], axis=1)

    ((first, second), targets, _) = next(
        iter(
            order.batches(
                examples, 3, seed=0, phase=0, steps=1, augmentation="light", views=2, average_views=True, read=read
            )
        )
    )
    np.testing.assert_array_equal(first, targets)
    np.testing.assert_array_equal(second[:, 1] - second[:, 0], [0, 0, 0, 10, 10, 10])


PLACED = [
    pytest.param(*case, marks=() if case in {("strong", 0), ("light", 2)} else pytest.mark.slow)
    for case in itertools.product(("none", "light", "strong"), (0, 2))
]


@pytest.mark.parametrize(("name", "views"), PLACED)
def test_each_picture_lies_where_its_geometry_says(make_examples, name, views):
    height, width = 24, 36
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    picture = np.stack([columns, rows, np.zeros_like(rows)], axis=2)  # each pixel holds its place
    examples = make_examples(np.stack([picture] * 6), np.arange(6, dtype=np.int32))
    pictures = dataclasses.replace(examples.pictures, digests=tuple(f"{7 * number:015x}" for number in range(6)))
    examples = dataclasses.replace(examples, pictures=pictures)
    still = dataclasses.replace(NAMED[name], brightness=0, contrast=0, saturation=0, cutout=0)
    where = order.geometries(examples, name, seed=5, phase=1, views=views)
    batches = order.batches(examples, 4, seed=5, phase=1, steps=6, augmentation=still, views=views)
    found = set()
    for step, (seen, chosen, _) in enumerate(batches):
        transforms = where(tf.cast(chosen, tf.int64), tf.constant(step // 2, tf.int64)).numpy()
        for own, a in zip(seen.numpy(), transforms, strict=True):
            x, y = (a[i] * columns + a[i + 1] * rows + a[i + 2] for i in (0, 3))
            inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
            assert inside.mean() > 0.2
            np.testing.assert_allclose(own[inside][:, 0], x[inside], atol=2e-3)
            np.testing.assert_allclose(own[inside][:, 1], y[inside], atol=2e-3)
            found.add(tuple(a))
    assert len(found) == (1 if name == "none" else 6 * (views or 3))


def test_bad_arguments(examples, make_examples):
    with pytest.raises(InputError, match="batch_size"):
        order.in_order(examples, 0)
    with pytest.raises(InputError, match="Did you mean 'light'"):
        order.batches(examples, 1, seed=0, phase=0, steps=1, augmentation="ligth")
    with pytest.raises(InputError, match="`views` must be from 2"):
        order.batches(examples, 1, seed=0, phase=0, steps=1, augmentation="light", views=1, average_views=True)
    with pytest.raises(InputError, match="at least one example"):
        order.in_order(make_examples(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int32)), 4)
