import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import backbones, mixing


def _batch(shape=(6, 8, 8, 1)):
    inputs = tf.reshape(tf.range(np.prod(shape), dtype=tf.float32), shape)
    return inputs, tf.range(shape[0]), tf.ones(shape[0])


def _key(number: int) -> tf.Tensor:
    return tf.constant([0, number], tf.int64)


def test_mixup_blends_each_example_with_its_partner():
    batch = _batch()
    mixed, partners, own = mixing.mix(batch, _key(1), mixup=1.0, cutmix=0.0)
    np.testing.assert_allclose(mixed, own * batch[0] + (1 - own) * tf.gather(batch[0], partners), rtol=1e-6)
    assert sorted(partners.numpy()) == list(range(6))


def test_cutmix_takes_a_rectangle_from_the_partner_and_counts_its_pixels():
    batch = _batch()
    for number in range(5):
        mixed, partners, own = mixing.mix(batch, _key(number), mixup=0.0, cutmix=1.0)
        is_own = (mixed == batch[0]).numpy()
        others = np.flatnonzero(partners.numpy() != np.arange(6))
        assert is_own[others].mean() == pytest.approx(float(own), abs=1e-6)
        np.testing.assert_array_equal(np.where(is_own, batch[0], tf.gather(batch[0], partners)), mixed)


def test_several_inputs_are_mixed_at_the_same_place():
    wide = tf.ones((2, 16, 16, 1)) * tf.reshape([0.0, 1.0], (2, 1, 1, 1))
    narrow = tf.ones((2, 8, 8, 3)) * tf.reshape([0.0, 1.0], (2, 1, 1, 1))
    keys = (_key(number) for number in range(20))
    mixed = (mixing.mix(((wide, narrow), tf.range(2), tf.ones(2)), key, 0.0, 1.0) for key in keys)
    (one, two), _, _ = next(found for found in mixed if found[1][0] == 1 and found[2] < 0.8)
    shares = [float(tf.reduce_mean(part[0])) for part in (one, two)]
    assert shares[0] == pytest.approx(shares[1], abs=0.15)
    assert shares[0] > 0.1


def test_a_coin_decides_where_both_are_asked_for():
    batch = _batch()
    kinds = set()
    for number in range(12):
        mixed, _, _ = mixing.mix(batch, _key(number), 1.0, 1.0)
        whole = np.isin(mixed.numpy(), batch[0].numpy()).all()
        kinds.add("cutmix" if whole else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_the_same_key_gives_the_same_mix():
    first, second, other = (mixing.mix(_batch(), _key(k), 0.4, 0.0)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "count"),
    [("MobileNetV2-0.35", 10), pytest.param("ConvNeXtTiny", 18, marks=pytest.mark.slow), ("VGG16", 0)],
)
def test_identity_shortcuts_are_found(name, count):
    """MobileNetV2 has ten blocks with a shortcut, ConvNeXtTiny a shortcut in each of its 18 blocks."""
    assert len(mixing.residual_branches(backbones.build(name, (32, 32)))) == count


def test_the_branch_is_told_from_the_shortcut():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4)(inputs)
    branch = keras.layers.Dense(4)(x)
    first = keras.layers.Add(name="first")([x, branch])
    second = keras.layers.Add(name="second")([keras.layers.Dense(4)(first), first])
    model = keras.Model(inputs, second)
    found = mixing.residual_branches(model)
    assert found == {id(model.get_layer("first")): 1, id(model.get_layer("second")): 0}


def test_a_dropped_branch_is_made_up_for_in_the_mean():
    shortcut, branch = tf.zeros((20_000, 1)), tf.ones((20_000, 1))
    joined = mixing.drop_branch(1, 0.25, _key(0))([shortcut, branch]).numpy()
    assert set(np.unique(joined)) == {np.float32(0), np.float32(1 / 0.75)}
    assert joined.mean() == pytest.approx(1.0, abs=0.02)
