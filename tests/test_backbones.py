"""The table covers Keras, and each row's preprocessing and features are Keras' own."""

import gc
import importlib
import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest

from tftransfer import backbones
from tftransfer.errors import InputError

# One small row per family: its lowest group, a middle one, the topmost and how many, by the papers' blocks.
SMALL_ROWS = {
    "MobileNet-0.25": ("stem", "block_7", "block_13", 14),
    "MobileNetV2-0.35": ("stem", "block_8", "top", 19),
    "MobileNetV3Small-0.75": ("stem", "block_5", "top", 13),
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
OTHER_ROWS = tuple(name for name in backbones.names() if name not in SMALL_ROWS)
TOLERANCE = 1e-5  # of the norm
END_TO_END = 1e-3  # what the last bit of preprocessing grows to in deep networks of random weights


def _side(name):
    return 64 if backbones.backbone(name).smallest_size <= 64 else 96


def _pictures(side, count=4):
    return np.random.default_rng(1).uniform(0, 255, (count, side, side, 3)).astype(np.float32)


def _distance(found, expected):
    """The norm of the difference relative to the norm of what is expected."""
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def _preprocess_input(name, pictures):
    module = importlib.import_module(f"keras.applications.{backbones.backbone(name).family}")
    return module.preprocess_input(pictures.copy())


def _stock(name, model):
    """Return Keras' own network with the weights of ours."""
    row = backbones.backbone(name)
    width = {"alpha": row.width} if row.width != 1.0 else {}
    function = getattr(keras.applications, row.function)
    stock = function(include_top=False, weights=None, input_shape=model.input_shape[1:], **width)
    stock.set_weights(model.get_weights())
    return stock


LARGE = ("InceptionResNetV2", "NASNetMobile")  # prepared as other families are, and long to build


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in SMALL_ROWS],
)
def built(request, estimate_batch_norm):
    """One row per family with re-estimated BatchNorm: name, network, and Keras' network with its weights."""
    keras.utils.set_random_seed(0)
    model = estimate_batch_norm(backbones.build(request.param, (_side(request.param),) * 2))
    yield request.param, model, _stock(request.param, model)
    del model
    gc.collect()


def test_table_covers_keras_applications():
    functions = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(backbones.names(variants=False)) == functions
    assert len(functions) == 40


def test_table_is_consistent():
    for name in backbones.names():
        row = backbones.backbone(name)
        assert row.name == name
        assert row.preprocessing in ("tf", "torch", "caffe", "inside")
        assert 32 <= row.smallest_size <= row.natural_size
        assert hasattr(keras.applications, row.function)
        assert hasattr(importlib.import_module(f"keras.applications.{row.family}"), "preprocess_input")
        assert row.levels == (4, 8, 16, 32)


def test_width_of_one_is_the_plain_row():
    assert backbones.backbone("MobileNetV2-1.0") == backbones.backbone("MobileNetV2")
    assert backbones.backbone("MobileNet-0.50").name == "MobileNet-0.5"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ResNet5", "Did you mean 'ResNet50'"),
        ("efficientnetb0", "Did you mean 'EfficientNetB0'"),
        ("MobileNetV2-0.4", r"one of the widths \[0.35, 0.5, 0.75, 1.0, 1.3, 1.4\]"),
        ("MobileNetV2-wide", "one of the widths"),
        ("MobileNetV2-nan", "one of the widths"),
        ("ResNet50-0.5", "takes no width"),
        ("", "is not known"),
    ],
)
def test_unknown_names_say_what_is_near(name, message):
    with pytest.raises(InputError, match=message):
        backbones.backbone(name)


@pytest.mark.parametrize("size", [(31, 224), (224, 31)])
def test_too_small_a_picture_is_refused(size):
    with pytest.raises(InputError, match="at least 32 pixels a side, naturally 224"):
        backbones.build("MobileNet", size)


@pytest.mark.parametrize("size", [(224.0, 224), (224,)])
def test_a_size_that_is_no_pair_of_whole_numbers_is_refused(size):
    with pytest.raises(InputError, match="must be .height, width."):
        backbones.build("MobileNet", size)


def test_channels_other_than_three_get_an_answer():
    backbones.check_channels(3)
    with pytest.raises(InputError, match="repeat an array yourself"):
        backbones.check_channels(1)
    with pytest.raises(InputError, match="Received: channels=4"):
        backbones.check_channels(4)


def test_channels_first_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    with pytest.raises(InputError, match="channels_last"):
        backbones.build("MobileNet", (32, 32))


def _assert_preprocessing_equals_keras(name, model):
    if backbones.backbone(name).preprocessing == "inside":
        assert "preprocessing" not in [layer.name for layer in model.layers]
        pictures = _pictures(8)
        np.testing.assert_array_equal(_preprocess_input(name, pictures), pictures)
        return
    inside = keras.Model(model.input, model.get_layer("preprocessing").output)
    pictures = _pictures(model.input_shape[1])
    assert _distance(inside(pictures), _preprocess_input(name, pictures)) < 1e-6


def _assert_features_equal_keras(name, model, stock):
    pictures = _pictures(model.input_shape[1])
    features = np.asarray(model(pictures))
    assert np.abs(features).max() > 1e-3  # or a comparison would show nothing
    assert _distance(features, stock(_preprocess_input(name, pictures))) < END_TO_END
    if backbones.backbone(name).preprocessing != "inside":
        pictures = keras.Model(model.input, model.get_layer("preprocessing").output)(pictures)
    assert _distance(features, stock(pictures)) < TOLERANCE


def test_preprocessing_equals_the_familys(built):
    _assert_preprocessing_equals_keras(*built[:2])


def test_features_equal_the_stock_networks(built):
    _assert_features_equal_keras(*built)


def test_the_network_is_flat_and_has_the_layers_of_keras(built):
    _, model, stock = built
    assert model.input.name == "image"
    assert model.input.dtype == "float32"
    own = [type(layer).__name__ for layer in model.layers if layer.name != "preprocessing"]
    assert own == [type(layer).__name__ for layer in stock.layers]


def _with_head(model):
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(model.output)
    hidden = keras.layers.Dense(3, name="head_hidden_1")(pooled)
    return keras.Model(model.input, keras.layers.Dense(2, name="logits")(hidden))


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
    for (rows, columns), (next_rows, _) in itertools.pairwise(sizes):
        assert rows == columns
        assert (rows - 1) // 2 <= next_rows <= (rows + 1) // 2
    assert backbones.level_output(model, levels[32]) is model.output


def test_groups_cover_every_layer_with_weights_once(built):
    _assert_groups_cover(built[1])


def test_groups_are_the_networks_blocks(built):
    name, model, _ = built
    groups = [group.name for group in backbones.depth_groups(model)]
    stem, middle, top, count = SMALL_ROWS[name]
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


@pytest.mark.parametrize("name", ["MobileNet-0.25", "VGG16"])
def test_wrong_preprocessing_would_be_noticed(name, estimate_batch_norm):
    model = estimate_batch_norm(backbones.build(name, (64, 64)))
    stock = _stock(name, model)
    pictures = _pictures(64)
    wrong = keras.applications.imagenet_utils.preprocess_input(pictures.copy(), mode="torch")
    assert _distance(model(pictures), stock(wrong)) > 100 * END_TO_END


def test_whole_number_pixels_are_taken_as_floats_are():
    model = backbones.build("MobileNet-0.25", (32, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(model(pixels), model(pixels.astype(np.float32)))


@pytest.fixture
def bfloat16():
    """Mixed precision while a test runs."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("name", ["VGG16", "EfficientNetB0", "EfficientNetV2B0", "MobileNetV3Small"])
def test_preprocessing_stays_float32_under_mixed_precision(name, bfloat16):
    model = backbones.build(name, (32, 32))
    scaling = (keras.layers.Rescaling, keras.layers.Normalization)
    last = [layer for layer in model.layers if isinstance(layer, scaling)][-1]
    preprocessed = np.asarray(keras.Model(model.input, last.output)(_pictures(32)))
    assert preprocessed.dtype == np.float32
    assert len(np.unique(preprocessed)) > 1000  # bfloat16 has a few hundred values in such a range
    convolution = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    assert convolution.compute_dtype == "bfloat16"


LOAD = """
import sys, numpy as np, keras
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model(np.load(sys.argv[2])))
assert not any(name.split(".")[0] == "tftransfer" for name in sys.modules)
"""


def _assert_loads_elsewhere(model, folder):
    pictures = _pictures(model.input_shape[1])
    model.save(folder / "model.keras")
    np.save(folder / "pictures.npy", pictures)
    paths = [str(folder / name) for name in ("model.keras", "pictures.npy", "features.npy")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, capture_output=True, cwd=folder)
    assert _distance(np.load(folder / "features.npy"), model(pictures)) < TOLERANCE


@pytest.mark.slow
def test_a_saved_backbone_loads_without_tftransfer(tmp_path):
    _assert_loads_elsewhere(backbones.build("VGG16", (32, 32)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_rows_keep_the_contract(name, estimate_batch_norm):
    model = estimate_batch_norm(backbones.build(name, (_side(name),) * 2))
    _assert_preprocessing_equals_keras(name, model)
    _assert_features_equal_keras(name, model, _stock(name, model))
    _assert_groups_cover(model)
    _assert_levels(model)
    assert len(backbones.depth_groups(model)) >= 5
    del model
    keras.backend.clear_session()
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_ROWS)
def test_every_family_loads_without_tftransfer(name, tmp_path):
    _assert_loads_elsewhere(backbones.build(name, (_side(name),) * 2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.names())
def test_smallest_size_works(name):
    side = backbones.backbone(name).smallest_size
    model = backbones.build(name, (side, side))
    assert min(model.output_shape[1:3]) >= 1
    del model
    keras.backend.clear_session()
    gc.collect()
