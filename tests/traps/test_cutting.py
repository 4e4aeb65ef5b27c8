"""What goes wrong where a network is cut in two, with stock Keras, and that it does not with ours."""

import keras
import numpy as np
import pytest

from tftransfer import backbones, builders, constants, feeding, prefix, tasks, trainable, training
from tftransfer.strategies import Phase


@pytest.fixture
def encoder() -> keras.Model:
    """A network that reads tokens, of which 0 is none: its mask is computed behind the scenes."""
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=True, name="embed")(tokens)
    x = keras.layers.GRU(5, name="read")(x)
    return keras.Model(tokens, keras.layers.Dense(3, name="logits")(x))


TOKENS = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0], [6, 7, 8, 9, 10, 11]], np.int32)


def test_an_implicit_mask_is_missing_in_a_stock_cut(encoder):
    with pytest.raises(ValueError, match="not connected"):
        keras.Model(encoder.get_layer("embed").output, encoder.output)


def test_an_implicit_mask_crosses_our_cut(encoder):
    encoder.get_layer("embed").trainable = False
    parts = prefix.cut(encoder)
    assert [tensor.dtype for tensor in parts.frozen.outputs] == ["float32", "bool"]
    below = constants.Constants(parts.frozen, 2)
    assert [spec.dtype.name for spec in below.outputs] == ["float32", "bool"]
    np.testing.assert_array_equal(parts.trained(below(TOKENS)), encoder(TOKENS))
    without = TOKENS.copy()
    without[0, 3:] = 12
    assert np.abs(encoder(without)[0] - encoder(TOKENS)[0]).max() > 1e-4  # the mask matters


@pytest.mark.slow  # NASNet takes its time to build
def test_nasnet_crosses_with_two_tensors():
    network = builders.image_classifier("NASNetMobile", 3, image_size=32, weights=None)
    trainable.set_trainable(network, "last:2")
    parts = prefix.cut(network)
    assert len(parts.frozen.outputs) > 1
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(parts.trained(parts.frozen(pictures)), network(pictures, training=False))


def test_convnext_has_operations_that_are_no_layers_and_is_cut_right():
    network = builders.image_classifier("ConvNeXtTiny", 3, image_size=32, weights=None)
    assert any(operation not in network.layers for operation in network.operations)
    trainable.set_trainable(network, "last:1")
    parts = prefix.cut(network)
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(parts.trained(parts.frozen(pictures)), network(pictures, training=False))


@pytest.fixture
def as_the_guide_builds() -> keras.Model:
    """A backbone as one layer of the network, called with `training=False`."""
    backbone = backbones.build("MobileNet-0.25", (32, 32), None)
    pictures = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(backbone(pictures, training=False))
    return keras.Model(pictures, keras.layers.Dense(3, name="logits")(x))


def test_a_cut_goes_through_a_nested_backbone(as_the_guide_builds, estimate_batch_norm):
    model = estimate_batch_norm(as_the_guide_builds)
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    backbone.trainable = False
    for layer in backbone.layers[-6:]:
        layer.trainable = True
    opened = next(layer for layer in backbone.layers[-6:] if layer.weights)
    parts = prefix.cut(model)
    trained = [layer.name for layer in parts.trained.layers]
    assert opened.name in trained
    assert backbone.layers[1].name not in trained
    assert parts.work_share > 0.5
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(parts.trained(parts.frozen(pictures)), model(pictures, training=False))


def test_a_nested_backbone_trains_above_what_is_kept(as_the_guide_builds, estimate_batch_norm, small_data, monkeypatch):
    monkeypatch.setattr(feeding, "_PAYS", 0.0)
    model = estimate_batch_norm(as_the_guide_builds)
    start, ended = model.get_weights(), []
    for cache in ("auto", "off"):
        model.set_weights(start)
        task = tasks.SingleLabel(small_data.labels)
        phase = Phase("top", "re:conv_pw_13.*|logits", 2, 1e-3)
        history = training.fine_tune(model, task, small_data, (phase,), batch_size=8, cache=cache)
        assert history.phases[0].frozen_share > 0.3
        assert history.phases[0].store.startswith("kept") == (cache == "auto")
        ended.append(model.get_weights())
    for kept, computed in zip(*ended, strict=True):
        np.testing.assert_array_equal(kept, computed)
    both = zip(model.weights, start, strict=True)
    changed = [variable.path for variable, old in both if not np.array_equal(variable.numpy(), old)]
    assert changed
    assert all("conv_pw_13" in path or "logits" in path for path in changed)
