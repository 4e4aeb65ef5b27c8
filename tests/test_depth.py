"""Groups cover the weights in order and are found again; levels have the strides they claim."""

import gc

import keras
import pytest

from tftransfer import backbones

# The lowest group, one in the middle, the topmost, and how many: from the papers' block counts.
GROUPS = {
    "MobileNet-0.25": ("stem", "block_7", "block_13", 14),
    "MobileNetV2-0.35": ("stem", "block_8", "top", 19),
    "MobileNetV3Small": ("stem", "block_5", "top", 13),
    "VGG16": ("stage_1", "stage_3", "stage_5", 5),
    "ResNet50": ("stem", "conv4_block2", "conv5_block3", 17),
    "ResNet50V2": ("stem", "conv4_block1", "top", 18),
    "DenseNet121": ("stem", "dense_block_4", "top", 6),
    "InceptionV3": ("stem", "mixed5", "mixed10", 12),
    "InceptionResNetV2": ("stem", "block17_10", "top", 45),
    "Xception": ("stem", "block8", "block14", 14),
    "NASNetMobile": ("stem", "reduction_4", "cell_12", 17),
    "EfficientNetB0": ("stem", "block5a", "top", 18),
    "EfficientNetV2B0": ("stem", "block6a", "top", 23),
    "ConvNeXtTiny": ("stem", "stage_2_block_4", "top", 20),
}
OTHERS = tuple(name for name in backbones.names() if name not in GROUPS)


def _side(name):
    return 64 if backbones.backbone(name).smallest_size <= 64 else 96


@pytest.fixture(scope="module", params=GROUPS)
def built(request):
    """One row of each family."""
    model = backbones.build(request.param, (_side(request.param),) * 2)
    yield request.param, model
    del model
    gc.collect()


def _with_head(model):
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(model.output)
    hidden = keras.layers.Dense(3, name="head_hidden_1")(pooled)
    return keras.Model(model.input, keras.layers.Dense(2, name="logits")(hidden))


def _shape(groups):
    """What is the same in every session: names and numbers of layers, but not Keras' numbered layer names."""
    return [(group.name, len(group.layers)) for group in groups]


def _assert_groups_cover(model):
    weighted = [layer.name for layer in model.layers if layer.weights and not backbones.is_head(layer.name)]
    grouped = [name for group in backbones.depth_groups(model) for name in group.layers]
    assert sorted(grouped) == sorted(weighted)


def _assert_levels(model):
    levels = backbones.feature_levels(model)
    assert tuple(levels) == (4, 8, 16, 32)
    sizes = [backbones.level_output(model, name).shape[1:3] for name in levels.values()]
    side = model.input_shape[1]
    assert side / 4 - 5 <= sizes[0][0] <= side / 4  # `valid` padding loses up to five rows
    for (rows, columns), (next_rows, _) in zip(sizes, sizes[1:], strict=False):
        assert rows == columns
        assert (rows - 1) // 2 <= next_rows <= (rows + 1) // 2
    assert backbones.level_output(model, levels[32]) is model.output


def test_groups_cover_every_layer_with_weights_once(built):
    _assert_groups_cover(built[1])


def test_groups_are_the_networks_blocks(built):
    name, model = built
    groups = [group.name for group in backbones.depth_groups(model)]
    stem, middle, top, count = GROUPS[name]
    assert (groups[0], groups[-1], len(groups)) == (stem, top, count)
    assert middle in groups


def test_groups_stand_in_the_order_of_the_layers(built):
    model = built[1]
    position = {layer.name: number for number, layer in enumerate(model.layers)}
    lasts = [position[group.layers[-1]] for group in backbones.depth_groups(model)]
    assert lasts == sorted(lasts)


def test_a_head_changes_no_group(built):
    model = built[1]
    assert backbones.depth_groups(_with_head(model)) == backbones.depth_groups(model)


def test_levels_have_their_strides(built):
    _assert_levels(built[1])


@pytest.mark.parametrize("name", ["InceptionV3", "Xception", "ConvNeXtTiny", "MobileNetV2-0.35"])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_rows(name):
    model = backbones.build(name, (_side(name),) * 2)
    _assert_groups_cover(model)
    _assert_levels(model)
    assert len(backbones.depth_groups(model)) >= 5
    assert all("_" not in group.name or len(group.layers) > 1 for group in backbones.depth_groups(model))
    del model
    keras.backend.clear_session()
    gc.collect()
