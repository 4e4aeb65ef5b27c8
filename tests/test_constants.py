import gc
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import constants


def _pictures(count: int = 4, size: int = 32) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def test_constants_give_the_networks_features(small_network):
    model = small_network()
    pictures = _pictures(5)
    ours = constants.as_constant_function(model)(tf.constant(pictures))[0].numpy()
    theirs = model(pictures, training=False).numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_wrong_network_is_told_apart(small_network):
    """The tolerance above can fail: another BatchNorm statistic is seen."""
    model = small_network()
    pictures = _pictures(5)
    ours = constants.as_constant_function(model)(tf.constant(pictures))[0].numpy()
    norm = model.get_layer("norm_3")
    norm.moving_mean.assign(norm.moving_mean + 0.01)
    theirs = model(pictures, training=False).numpy()
    assert np.linalg.norm(ours - theirs) > 1e-5 * np.linalg.norm(theirs)


def test_constants_do_not_follow_later_training(small_network):
    model = small_network()
    pictures = tf.constant(_pictures())
    infer = constants.as_constant_function(model)
    before = infer(pictures)[0].numpy()
    model.get_layer("logits").kernel.assign(model.get_layer("logits").kernel * 2)
    np.testing.assert_array_equal(infer(pictures)[0], before)


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
    (actual,) = constants.as_constant_function(network, 4)(tf.constant(_pictures(5, 16)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_folding_leaves_no_factor_behind_a_depthwise_convolution_that_is_used_once():
    network = _depthwise_network()
    graph = constants._optimised(constants._graph_of_constants(network, [tf.TensorSpec((4, 16, 16, 3))])).definition
    operations = {node.name: node.op for node in graph.node}
    scaled = [node for node in graph.node if node.op == "Mul" and _depthwise_input(node, operations)]
    assert len(scaled) <= 1, scaled
    assert sum("Depthwise" in operation for operation in operations.values()) == 3


def test_a_portable_graph_has_batch_norm_in_filters_and_biases_and_nothing_for_one_machine():
    network = _depthwise_network()
    infer = constants.as_portable_function(network)
    for count in (1, 5):
        (expected,) = tf.nest.flatten(network(_pictures(count, 16), training=False))
        np.testing.assert_allclose(infer(tf.constant(_pictures(count, 16)))[0], expected, rtol=1e-5)
    traced = tf.function(infer, input_signature=[tf.TensorSpec((None, 16, 16, 3))]).get_concrete_function()
    library = traced.graph.as_graph_def().library.function
    nodes = [node for function in library for node in function.node_def]
    assert not any(node.op.startswith("_") or node.device for node in nodes)
    operations = Counter(node.op for node in nodes)
    assert (operations["Conv2D"], operations["DepthwiseConv2dNative"]) == (1, 3)
    assert operations["BiasAdd"] == 2  # the third convolution is used twice, once without BatchNorm
    assert operations["Mul"] == 1


def _random(network):
    generator = np.random.default_rng(0)
    for variable in network.variables:
        variable.assign(generator.uniform(0.2, 2.0, variable.shape))
    return network


def _portable_operations(network):
    """Compare a network with its portable graph, and return how often each operation is in that."""
    infer = constants.as_portable_function(network)
    pictures = tf.constant(_pictures(3, 16))
    expected = tf.nest.flatten(network(pictures, training=False))
    for one, other in zip(infer(pictures), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    specs = [tf.TensorSpec((None, 16, 16, 3))]
    graph = tf.function(infer, input_signature=specs).get_concrete_function().graph.as_graph_def()
    return Counter(node.op for function in graph.library.function for node in function.node_def)


def test_a_bias_before_batch_norm_is_scaled_too():
    """As in ResNet, whose convolutions have one."""
    pictures = keras.Input((16, 16, 3))
    x = pictures
    for layer in (keras.layers.Conv2D(4, 3), keras.layers.DepthwiseConv2D(3)):
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(layer(x)))
    found = _portable_operations(_random(keras.Model(pictures, x)))
    assert found["Mul"] == found["AddV2"] == 0
    assert found["BiasAdd"] == found["Conv2D"] + found["DepthwiseConv2dNative"] == 2


def test_convolutions_in_groups_are_functions_of_their_own_and_stay_right():
    pictures = keras.Input((16, 16, 3))
    grouped = keras.layers.Conv2D(6, 1, groups=2)(keras.layers.Conv2D(4, 3)(pictures))
    _portable_operations(_random(keras.Model(pictures, keras.layers.BatchNormalization()(grouped))))


def test_what_is_no_bias_stays_what_it_is():
    """One number for all channels, another number for each place, and a bias of two convolutions."""
    pictures = keras.Input((16, 16, 3))
    bias = np.arange(1.0, 6.0, dtype=np.float32)
    x = keras.layers.Conv2D(5, 3, use_bias=False)(pictures)
    whole = x + np.float32([0.5])
    places = x + np.random.default_rng(0).normal(size=(14, 14, 5)).astype(np.float32)
    twice = [keras.layers.Conv2D(5, 3, use_bias=False)(pictures) + bias for _ in range(2)]
    network = keras.Model(pictures, keras.layers.Concatenate()([whole, places, *twice]))
    assert _portable_operations(_random(network))["BiasAdd"] == 2


def test_chains_and_loops_stay_operations_that_any_device_has():
    pictures = keras.Input((16, 16, 3))
    chain = keras.ops.exp(-keras.ops.sqrt(keras.layers.ReLU()(pictures)))
    rows = keras.layers.GRU(4)(keras.layers.Reshape((16, 48))(pictures / 255.0))
    network = keras.Model(pictures, [chain, rows])
    found = _portable_operations(network)
    assert not any(name.startswith("_") for name in found)


def test_a_network_of_whole_numbers_takes_what_it_is_given():
    pictures = keras.Input((16, 16, 3), dtype="uint8")
    network = keras.Model(pictures, keras.layers.Rescaling(1 / 255)(pictures))
    given = tf.constant(np.full((2, 16, 16, 3), 51, np.float32))
    np.testing.assert_allclose(constants.as_portable_function(network)(given)[0], 0.2, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_a_graph_for_converters_asks_for_no_sizes_and_answers_the_same(count):
    """Keras reshapes by what it finds the batch to be, in squeeze-and-excitation and for Dense on maps."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, activation="swish")(image)
    scale = keras.layers.Dense(6, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(x))
    x = keras.layers.Dense(4)(x * keras.layers.Reshape((1, 1, 6))(scale))
    network = keras.Model(image, [keras.layers.Reshape((-1, 4))(x), keras.layers.Flatten()(x)])
    infer = constants.as_convertible_function(network)
    for found, expected in zip(infer(_pictures(count, 8)), network(_pictures(count, 8), training=False), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    traced = tf.function(infer, input_signature=[tf.TensorSpec((None, 8, 8, 3))]).get_concrete_function()
    nodes = [node for function in traced.graph.as_graph_def().library.function for node in function.node_def]
    reshapes = [node for node in nodes if node.op == "Reshape"]
    sizes = {node.name: tf.make_ndarray(node.attr["value"].tensor) for node in nodes if node.op == "Const"}
    assert len(reshapes) >= 4
    assert all(list(sizes[node.input[1].partition(":")[0]]).count(-1) <= 1 for node in reshapes)
    assert not any("_gradient_op_type" in node.attr for node in nodes)


def test_what_cannot_be_constants_says_why():
    words = keras.Input((1,), dtype="int64")
    looked_up = keras.layers.IntegerLookup(vocabulary=[3, 5], output_mode="one_hot")(words)
    network = keras.Model(words, keras.layers.Dense(2)(looked_up))
    for made in (constants.as_portable_function, constants.as_convertible_function):
        with pytest.raises(constants.NotConstant, match="lookup table"):
            made(network)


def _depthwise_input(node, operations: dict[str, str]) -> bool:
    return any(operations.get(name) == "DepthwiseConv2dNative" for name in node.input)


@pytest.mark.parametrize("chunk", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_functions_that_layers_trace_live_as_long_as_the_graph(chunk):
    """Keras puts grouped convolutions into functions of their own, which TensorFlow forgets with the traced graph."""
    inputs = keras.Input((8, 8, 4))
    network = keras.Model(inputs, keras.layers.Conv2D(8, 3, groups=4)(inputs))
    infer = constants.as_constant_function(network, chunk)
    keras.backend.clear_session()
    gc.collect()
    pictures = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(infer(tf.constant(pictures))[0], network(pictures), atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_network_with_several_inputs_and_outputs_runs_in_chunks(count):
    wide, flags = keras.Input((5, 2)), keras.Input((5,), dtype="bool")
    masked = keras.layers.Lambda(lambda both: keras.ops.where(both[1][..., None], both[0], 0.0))([wide, flags])
    network = keras.Model([wide, flags], [flags, keras.layers.Dense(3)(masked)])
    generator = np.random.default_rng(0)
    inputs = [generator.normal(size=(count, 5, 2)).astype(np.float32), generator.random((count, 5)) < 0.5]
    found = constants.as_constant_function(network, 4)(*map(tf.constant, inputs))
    np.testing.assert_array_equal(found[0], inputs[1])
    np.testing.assert_allclose(found[1], network(inputs)[1], atol=1e-6)


def test_a_network_in_two_stages_gives_what_it_gives_in_one(small_network):
    model = small_network()
    lower = keras.Model(model.inputs[0], model.get_layer("relu_1").output)
    upper = keras.Model(model.get_layer("relu_1").output, model.outputs[0])
    below = constants.Constants(lower, 4)
    staged = constants.Constants(upper, 4, lower=below)
    pictures = tf.constant(_pictures(5))
    np.testing.assert_allclose(staged(pictures)[0], model(pictures, training=False), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(staged(pictures)[0], staged.after(below(pictures))[0])
    assert staged.digest.startswith(below.digest)
    assert staged.digest != constants.Constants(model, 4).digest
