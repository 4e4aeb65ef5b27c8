"""Parts of splits, and splits put together: names, pictures, targets and weights stay with each other."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf


@pytest.mark.parametrize("at_once", [True, False])
def test_a_joined_split_is_one_after_the_other(small_data, at_once):
    first, second = (
        dataclasses.replace(part, pictures=dataclasses.replace(part.pictures, at_once=at_once))
        for part in (small_data.train, small_data.validation)
    )
    both = first.joined(second)
    assert both.names == first.names + second.names
    assert both.pictures.at_once == at_once
    np.testing.assert_array_equal(both.targets, [*first.targets, *second.targets])
    np.testing.assert_array_equal(both.weights, [*first.weights, *second.weights])
    for number in (0, len(first) - 1, len(first), len(both) - 1):
        part, place = (first, number) if number < len(first) else (second, number - len(first))
        np.testing.assert_array_equal(both.pictures.load(tf.constant(number, tf.int64)), part.pictures.load(place))


def test_a_joined_split_reads_several_at_once():
    from tftransfer.data import load

    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    data, _ = load({name: (pictures + n, list("ab" * 6)) for n, name in enumerate(("train", "validation", "test"))},
                   image_size=(8, 8))  # fmt: skip
    both = data.train.joined(data.validation)
    several = both.pictures.load(tf.constant([13, 0, 11, 12], tf.int64))
    np.testing.assert_array_equal(several, np.stack([pictures[1] + 1, pictures[0], pictures[11], pictures[0] + 1]))
    assert both.pictures.digests == data.train.pictures.digests + data.validation.pictures.digests


def test_a_subset_keeps_the_order_asked_for(small_data):
    some = small_data.train.subset(np.array([5, 2]))
    assert some.names == (small_data.train.names[5], small_data.train.names[2])
    np.testing.assert_array_equal(some.targets, small_data.train.targets[[5, 2]])
    np.testing.assert_array_equal(some.pictures.load(1), small_data.train.pictures.load(2))
