import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import prefix, trainable
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


def test_constants_give_the_networks_features(small_network):
    model = small_network()
    pictures = _pictures(5)
    ours = prefix.as_constant_function(model)(tf.constant(pictures))[0].numpy()
    theirs = model(pictures, training=False).numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_wrong_network_is_told_apart(small_network):
    """The tolerance above can fail: another BatchNorm statistic is seen."""
    model = small_network()
    pictures = _pictures(5)
    ours = prefix.as_constant_function(model)(tf.constant(pictures))[0].numpy()
    norm = model.get_layer("norm_3")
    norm.moving_mean.assign(norm.moving_mean + 0.01)
    theirs = model(pictures, training=False).numpy()
    assert np.linalg.norm(ours - theirs) > 1e-5 * np.linalg.norm(theirs)


def test_constants_do_not_follow_later_training(small_network):
    model = small_network()
    pictures = tf.constant(_pictures())
    infer = prefix.as_constant_function(model)
    before = infer(pictures)[0].numpy()
    model.get_layer("logits").kernel.assign(model.get_layer("logits").kernel * 2)
    np.testing.assert_array_equal(infer(pictures)[0], before)


def test_nothing_to_train_is_refused(small_network):
    model = small_network()
    trainable.set_trainable(model, "none")
    with pytest.raises(InputError, match="nothing trains"):
        prefix.cut(model)


def _depthwise_network() -> keras.Model:
    """Depthwise convolutions as BatchNorm follows them: directly, with several channels each, and used twice."""
    pictures = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(6, 3, use_bias=False)(pictures)
    for multiplier in (1, 2):
        x = keras.layers.DepthwiseConv2D(3, depth_multiplier=multiplier, use_bias=False)(x)
        x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    twice = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = keras.layers.Concatenate()([twice, keras.layers.BatchNormalization()(twice)])
    network = keras.Model(pictures, keras.layers.GlobalAveragePooling2D()(x))
    generator = np.random.default_rng(0)
    for variable in network.variables:
        variable.assign(generator.uniform(0.2, 2.0, variable.shape))
    return network


def test_batchnorm_folds_into_depthwise_filters():
    network = _depthwise_network()
    (expected,) = tf.nest.flatten(network(_pictures(5, 16), training=False))
    (actual,) = prefix.as_constant_function(network, 4)(tf.constant(_pictures(5, 16)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_folding_leaves_no_factor_behind_a_depthwise_convolution_that_is_used_once():
    network = _depthwise_network()
    graph = prefix._optimised(prefix._graph_of_constants(network, tf.TensorSpec((4, 16, 16, 3)))).definition
    operations = {node.name: node.op for node in graph.node}
    scaled = [node for node in graph.node if node.op == "Mul" and _depthwise_input(node, operations)]
    assert len(scaled) <= 1, scaled
    assert sum("Depthwise" in operation for operation in operations.values()) == 3


def _depthwise_input(node, operations: dict[str, str]) -> bool:
    return any(operations.get(name) == "DepthwiseConv2dNative" for name in node.input)


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


@pytest.mark.parametrize("chunk", [None, 4])
def test_functions_that_layers_trace_live_as_long_as_the_graph(chunk):
    """Keras puts grouped convolutions into functions of their own, which TensorFlow forgets with the traced graph."""
    inputs = keras.Input((8, 8, 4))
    network = keras.Model(inputs, keras.layers.Conv2D(8, 3, groups=4)(inputs))
    infer = prefix.as_constant_function(network, chunk)
    keras.backend.clear_session()
    gc.collect()
    pictures = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(infer(tf.constant(pictures))[0], network(pictures), atol=1e-5)
