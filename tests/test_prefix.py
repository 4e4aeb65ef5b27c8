import keras
import numpy as np
import pytest

from tftransfer import planning, prefix, strategies, trainable
from tftransfer.errors import InputError


def _pictures(count: int = 4, size: int = 32) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("selector", ["head", "last:1", "last:2", "from:conv_2"])
def test_both_parts_make_up_the_network_exactly(small_network, selector):
    model = small_network()
    trainable.set_trainable(model, selector)
    parts = prefix.cut(model)
    pictures = _pictures()
    np.testing.assert_array_equal(parts.trained(parts.frozen(pictures)), model(pictures))


def test_the_cut_is_right_below_the_lowest_layer_that_trains(small_network):
    model = small_network()
    trainable.set_trainable(model, "from:conv_2")
    parts = prefix.cut(model)
    assert [layer.name for layer in parts.trained.layers][1] == "conv_2"
    assert parts.frozen.layers[-1].name == "relu_1"


def test_nothing_is_cut_where_everything_trains(small_network):
    model = small_network()
    trainable.set_trainable(model, "all")
    parts = prefix.cut(model)
    assert parts.frozen is None
    assert parts.frozen_share == 0


def test_parts_share_layers_with_the_network(small_network):
    model = small_network()
    trainable.set_trainable(model, "head")
    parts = prefix.cut(model)
    parts.trained.layers[-1].kernel.assign_add(keras.ops.ones_like(parts.trained.layers[-1].kernel))
    np.testing.assert_array_equal(parts.trained.layers[-1].kernel, model.get_layer("logits").kernel)


def test_the_heads_dropout_stays_active(small_network):
    model = small_network(dropout=0.5)
    trainable.set_trainable(model, "head")
    names = [layer.name for layer in prefix.cut(model).trained.layers]
    assert "head_dropout" in names
    assert "head_pool" not in names


def test_dropout_below_frozen_weights_is_off():
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.5, name="early")(inputs)
    x = keras.layers.Dense(4, name="frozen")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    trainable.set_trainable(model, "head")
    assert "early" in [layer.name for layer in prefix.cut(model).frozen.layers]


def test_several_tensors_can_cross():
    inputs = keras.Input((4,))
    left = keras.layers.Dense(4, name="left")(inputs)
    right = keras.layers.Dense(4, name="right")(inputs)
    joined = keras.layers.Concatenate(name="joined")([left, right])
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(joined))
    model.trainable = False
    model.trainable = True
    for name in ("left", "right"):
        model.get_layer(name).trainable = False
    parts = prefix.cut(model)
    assert len(parts.frozen.outputs) == 1  # Concatenate has no weights: it runs below the cut
    model.get_layer("right").trainable = True
    parts = prefix.cut(model)
    x = np.ones((2, 4), np.float32)
    assert len(parts.frozen.outputs) == len(parts.trained.inputs) == 2
    np.testing.assert_array_equal(parts.trained(parts.frozen(x)), model(x))


def test_nothing_to_train_is_refused(small_network):
    model = small_network()
    trainable.set_trainable(model, "none")
    with pytest.raises(InputError, match="nothing trains"):
        prefix.cut(model)


def test_the_share_of_the_work_counts_kernels_where_they_are_applied():
    pictures = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="below")(pictures)  # 8 * 8 places of 3 * 3 * 3 * 4
    x = keras.Sequential([keras.layers.Conv2D(4, 1, strides=2)], name="inside")(x)  # 4 * 4 places of 4 * 4
    x = keras.layers.Dense(5, name="logits")(keras.layers.GlobalAveragePooling2D()(x))  # 4 * 5
    model = keras.Model(pictures, x)
    model.get_layer("below").trainable = False
    assert prefix.cut(model).work_share == pytest.approx(6912 / (6912 + 256 + 20))
    model.get_layer("inside").trainable = False
    assert prefix.cut(model).work_share == pytest.approx(7168 / (7168 + 20))


def _with_a_network_inside() -> keras.Model:
    """A network with another one and a plain operation in it."""
    small = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", name="lower")(small)
    inner = keras.Model(small, keras.layers.Conv2D(3, 3, padding="same", name="upper")(x), name="inner")
    pictures = keras.Input((8, 8, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(pictures + inner(pictures))
    return keras.Model(pictures, keras.layers.Dense(2, name="logits")(pooled))


def _nodes(model: keras.Model) -> list[tuple[int, int]]:
    operations = (*model.operations, *model.get_layer("inner").operations)
    return [(len(one._inbound_nodes), len(one._outbound_nodes)) for one in operations]


def test_cuts_leave_nothing_on_the_operations_of_a_network(small_task, tmp_path):
    model = _with_a_network_inside()
    before, pictures = _nodes(model), _pictures(2, 8)
    for selector in ("head", "re:upper"):
        trainable.set_trainable(model, selector)
        with prefix.nodes_as_they_were(model):
            parts = prefix.cut(model)
            assert _nodes(model) != before  # in the second case also on what is inside of `inner`
        assert _nodes(model) == before
        np.testing.assert_array_equal(parts.trained(parts.frozen(pictures)), model(pictures))
    planning.check_strategy(model, strategies.linear_probe(), small_task)
    assert _nodes(model) == before
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(pictures), model(pictures))
    again = prefix.cut(model)
    np.testing.assert_array_equal(again.trained(again.frozen(pictures)), model(pictures))
