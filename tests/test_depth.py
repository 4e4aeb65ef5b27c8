"""Groups and levels are found again after a load, and in networks that are not of the table.

That they hold for each row is in `test_backbones.py`, which builds them.
"""

import keras
import pytest

from tftransfer import backbones


def _side(name):
    return 64 if backbones.backbone(name).smallest_size <= 64 else 96


def _with_head(model):
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(model.output)
    hidden = keras.layers.Dense(3, name="head_hidden_1")(pooled)
    return keras.Model(model.input, keras.layers.Dense(2, name="logits")(hidden))


def _shape(groups):
    """What is the same in every session: names and numbers of layers, but not Keras' numbered layer names."""
    return [(group.name, len(group.layers)) for group in groups]


@pytest.mark.parametrize(
    "name",
    [
        "ConvNeXtTiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("MobileNetV2-0.35", "InceptionV3", "Xception")),
    ],
)
def test_groups_are_found_again_after_a_load_in_another_session(name, tmp_path):
    model = _with_head(backbones.build(name, (_side(name),) * 2))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert backbones.depth_groups(again) == backbones.depth_groups(model)
    assert backbones.feature_levels(again) == backbones.feature_levels(model)
    keras.layers.Conv2D(1, 1), keras.layers.BatchNormalization()  # Keras now numbers layers from elsewhere
    other = backbones.build(name, (_side(name),) * 2)
    assert _shape(backbones.depth_groups(other)) == _shape(backbones.depth_groups(model))


def test_a_block_of_numbered_layers_holds_its_own_convolutions():
    model = backbones.build("Xception", (96, 96))
    group = next(group for group in backbones.depth_groups(model) if group.name == "block13")
    shortcut = [name for name in group.layers if name.startswith(("conv2d", "batch_normalization"))]
    assert len(shortcut) == 2
    assert model.get_layer(shortcut[0]).kernel.shape == (1, 1, 728, 1024)


def test_a_network_of_the_users_has_a_group_per_layer():
    inputs = keras.Input((32, 32, 3))
    inner = keras.Sequential([keras.layers.Conv2D(4, 3, name="a"), keras.layers.Conv2D(4, 3)], name="inner")
    x = keras.layers.ReLU()(inner(inputs))
    x = keras.layers.Conv2D(4, 3, name="upper")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(keras.layers.Flatten()(x)))
    assert [group.name for group in backbones.depth_groups(model)] == ["inner", "upper"]


def test_layers_that_the_user_put_on_top_are_groups_of_their_own():
    base = backbones.build("MobileNetV2-0.35", (32, 32))
    x = keras.layers.Conv2D(4, 1, name="mine")(base.output)
    names = [group.name for group in backbones.depth_groups(keras.Model(base.input, x))]
    assert names[-2:] == ["top", "mine"]


def test_a_network_cut_below_its_top_keeps_its_groups():
    base = backbones.build("MobileNetV2-0.35", (64, 64))
    cut = keras.Model(base.input, base.get_layer("block_5_add").output)
    assert backbones.depth_groups(cut) == backbones.depth_groups(base)[:7]
    assert tuple(backbones.feature_levels(cut)) == (4, 8)


def test_levels_of_a_known_network():
    model = backbones.build("ResNet50", (64, 64))
    assert backbones.feature_levels(model) == {
        4: "conv2_block3_out",
        8: "conv3_block4_out",
        16: "conv4_block6_out",
        32: "conv5_block3_out",
    }
