import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tftransfer.data.augment import NAMED, Augmentation, augment, geometry

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(NAMED)), st.integers(0, 2**31), st.integers(0, 2**31))
def test_shape_type_range_and_determinism(name, first, second):
    changed = augment(PICTURE, name, [first, second])
    assert changed.shape == PICTURE.shape
    assert changed.dtype == tf.float32
    assert 0 <= float(tf.reduce_min(changed)) <= float(tf.reduce_max(changed)) <= 255
    np.testing.assert_array_equal(changed, augment(PICTURE, name, [first, second]))


def test_none_is_the_identity():
    np.testing.assert_array_equal(augment(PICTURE, "none", [1, 2]), PICTURE)


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"none"}))
def test_others_change_and_depend_on_the_seed(name):
    first, second = (augment(PICTURE, name, [seed, 0]).numpy() for seed in (0, 1))
    assert (first != PICTURE).any()
    assert (first != second).any()


def test_a_flip_alone_mirrors_half_of_the_pictures():
    flip = Augmentation("flip", flip=True)
    mirrored = 0
    for seed in range(60):
        changed = augment(PICTURE, flip, [seed, 0]).numpy()
        is_mirrored = np.allclose(changed, PICTURE[:, ::-1], atol=1e-2)
        assert is_mirrored or np.allclose(changed, PICTURE, atol=1e-2)
        mirrored += is_mirrored
    assert 15 <= mirrored <= 45


@pytest.mark.parametrize("name", ["light_no_flip", "strong_no_flip"])
def test_without_flip_left_stays_left(name):
    ramp = np.repeat(np.linspace(0, 255, 32)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.float32)
    for seed in range(20):
        changed = augment(ramp, name, [seed, 0]).numpy()
        assert np.corrcoef(changed.mean(axis=(0, 2)), np.arange(32))[0, 1] > 0.5


def test_with_flip_left_is_right_in_about_half_of_the_pictures():
    ramp = np.repeat(np.linspace(0, 255, 32)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.float32)
    changed = [augment(ramp, "strong", [seed, 0]).numpy().mean(axis=(0, 2)) for seed in range(40)]
    mirrored = sum(np.corrcoef(columns, np.arange(32))[0, 1] < 0 for columns in changed)
    assert 10 <= mirrored <= 30


def test_shrinking_shows_more_than_the_picture():
    """A disc's area, over many draws: half are cropped and larger, half are shrunk and smaller, none is lost."""
    rows, columns = np.mgrid[:48, :48]
    disc = np.repeat(255.0 * ((rows - 23.5) ** 2 + (columns - 23.5) ** 2 < 64)[..., None], 3, axis=2)
    zoom = Augmentation("zoom", zoom=0.4, shrink=0.3)
    areas = np.array([augment(disc, zoom, [seed, 0]).numpy().sum() for seed in range(60)]) / disc.sum()
    assert 1 / 1.3**2 - 0.05 < areas.min() < 0.8
    assert 1.5 < areas.max() < 1 / 0.6**2 + 0.1
    assert 20 <= (areas < 1).sum() <= 40


def test_a_rotation_turns_about_the_middle():
    cross = np.zeros((21, 21, 3), np.float32)
    cross[10] = 255
    turned = augment(cross, Augmentation("turn", rotation=15.0), [3, 0]).numpy()[..., 0]
    assert turned[10, 10] > 200
    assert turned.sum() == pytest.approx(cross[..., 0].sum(), rel=0.1)


@pytest.mark.parametrize("name", NAMED)
@given(seed=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)))
@settings(max_examples=15, deadline=None)
def test_the_geometry_says_where_each_pixel_comes_from(name, seed):
    height, width = 24, 36
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    picture = np.stack([columns, rows, np.ones_like(rows)], axis=2)  # each pixel holds its place
    still = dataclasses.replace(NAMED[name], brightness=0, contrast=0, saturation=0, cutout=0)
    seen = augment(tf.constant(picture), still, seed).numpy()
    a = geometry(name, seed, (height, width)).numpy()
    x, y = (a[i] * columns + a[i + 1] * rows + a[i + 2] for i in (0, 3))
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(seen[inside][:, 0], x[inside], atol=2e-3)
    np.testing.assert_allclose(seen[inside][:, 1], y[inside], atol=2e-3)


def test_cutout_hides_its_share():
    changed = augment(np.zeros((40, 40, 3), np.float32), Augmentation("cut", cutout=0.3), [5, 1]).numpy()
    assert 0 < (changed == 127.5).mean() <= 0.3**2 + 0.03
