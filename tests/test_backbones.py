"""The table covers Keras, and each row's preprocessing and features are Keras' own."""

import gc
import importlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from tftransfer import backbones
from tftransfer.errors import InputError

SMALL_ROWS = (
    "MobileNet-0.25",
    "MobileNetV2-0.35",
    "MobileNetV3Small-0.75",
    "VGG16",
    "ResNet50",
    "ResNet50V2",
    "DenseNet121",
    "InceptionV3",
    "InceptionResNetV2",
    "Xception",
    "NASNetMobile",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "ConvNeXtTiny",
)
OTHER_ROWS = tuple(name for name in backbones.names() if name not in SMALL_ROWS)
TOLERANCE = 1e-5  # of the norm


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


def _stock(name, side):
    row = backbones.backbone(name)
    width = {"alpha": row.width} if row.width != 1.0 else {}
    function = getattr(keras.applications, row.function)
    return function(include_top=False, weights=None, input_shape=(side, side, 3), **width)


@pytest.fixture(scope="module", params=SMALL_ROWS)
def built(request, estimate_batch_norm):
    """One small row per family with re-estimated BatchNorm: its name and the network."""
    keras.utils.set_random_seed(0)
    model = backbones.build(request.param, (_side(request.param),) * 2)
    yield request.param, estimate_batch_norm(model)
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


def _assert_features_equal_keras(name, model):
    side = model.input_shape[1]
    stock = _stock(name, side)
    stock.set_weights(model.get_weights())
    pictures = _pictures(side)
    features = np.asarray(model(pictures))
    assert np.abs(features).max() > 1e-3  # or a comparison would show nothing
    assert _distance(features, stock(_preprocess_input(name, pictures))) < TOLERANCE


def test_preprocessing_equals_the_familys(built):
    _assert_preprocessing_equals_keras(*built)


def test_features_equal_the_stock_networks(built):
    _assert_features_equal_keras(*built)


def test_the_network_is_flat_and_named_as_in_keras(built):
    name, model = built
    assert model.input.name == "image"
    assert model.input.dtype == "float32"
    stock_layers = [type(layer).__name__ for layer in _stock(name, model.input_shape[1]).layers]
    own = [type(layer).__name__ for layer in model.layers if layer.name != "preprocessing"]
    assert own == stock_layers


@pytest.mark.parametrize("name", ["MobileNet-0.25", "VGG16"])
def test_wrong_preprocessing_would_be_noticed(name, estimate_batch_norm):
    model = estimate_batch_norm(backbones.build(name, (64, 64)))
    stock = _stock(name, 64)
    stock.set_weights(model.get_weights())
    pictures = _pictures(64)
    wrong = keras.applications.imagenet_utils.preprocess_input(pictures.copy(), mode="torch")
    assert _distance(model(pictures), stock(wrong)) > 100 * TOLERANCE


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


def test_a_saved_backbone_loads_without_tftransfer(tmp_path):
    _assert_loads_elsewhere(backbones.build("VGG16", (32, 32)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_rows_equal_keras(name, estimate_batch_norm):
    model = estimate_batch_norm(backbones.build(name, (_side(name),) * 2))
    _assert_preprocessing_equals_keras(name, model)
    _assert_features_equal_keras(name, model)
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
