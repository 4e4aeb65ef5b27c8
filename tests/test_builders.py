import subprocess
import sys

import keras
import numpy as np
import pytest

from tftransfer import builders
from tftransfer.errors import InputError

SMALL = {"image_size": 32, "weights": None}


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)


def test_the_network_of_the_textbooks_is_one_call():
    model = builders.image_classifier("ResNet50", 10, hidden=(1024,), **SMALL)
    assert model.output_shape == (None, 10)
    head = {w.path: tuple(w.shape) for w in model.weights if w.path.startswith(("head_", "logits"))}
    assert head == {
        "head_hidden_1/kernel": (2048, 1024),
        "head_hidden_1/bias": (1024,),
        "logits/kernel": (1024, 10),
        "logits/bias": (10,),
    }
    assert model.get_layer("head_hidden_1").activation is keras.activations.relu
    assert isinstance(model.get_layer("head_pool"), keras.layers.GlobalAveragePooling2D)


def test_the_head_is_what_its_arguments_say():
    model = builders.image_classifier(
        "MobileNet-0.25", 4, hidden=(8, 6), dropout=0.5, activation="sigmoid", l1=0.1, l2=0.2, **SMALL
    )
    names = [layer.name for layer in model.layers if layer.name.startswith(("head_", "logits"))]
    assert names == ["head_pool", "head_hidden_1", "head_dropout_1", "head_hidden_2", "head_dropout", "logits"]
    assert model.get_layer("head_dropout").rate == 0.5
    assert model.get_layer("logits").activation is keras.activations.sigmoid
    penalised = [layer for layer in model.layers if getattr(layer, "kernel_regularizer", None)]
    assert [layer.name for layer in penalised] == ["head_hidden_1", "head_hidden_2", "logits"]
    kernels = [layer.kernel.numpy() for layer in penalised]
    expected = sum(0.1 * np.abs(kernel).sum() + 0.2 * np.square(kernel).sum() for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_without_dropout_there_is_no_dropout_layer():
    model = builders.image_classifier("MobileNet-0.25", 4, dropout=0.0, **SMALL)
    assert not any("head_dropout" in layer.name for layer in model.layers)


def test_uint8_and_float_pixels_give_the_same_answer(pictures):
    model = builders.image_classifier("MobileNet-0.25", 3, **SMALL)
    np.testing.assert_array_equal(model(pictures), model(pictures.astype(np.uint8)))


def _dense(activation: str | None = None):
    inputs = keras.Input((4,))
    return inputs, keras.layers.Dense(3, activation=activation)(inputs)


@pytest.mark.parametrize(
    ("after", "activation", "logits"),
    [
        (lambda x: x, None, True),
        (lambda x: x, "softmax", False),
        (keras.ops.softmax, None, False),
        (keras.activations.sigmoid, None, False),
        (keras.layers.Activation("linear", dtype="float32"), "softmax", False),
        (keras.layers.Activation("linear", dtype="float32"), None, True),
        (keras.layers.Reshape((3, 1)), "softmax", False),
        (lambda x: keras.ops.cast(x, "float32"), "sigmoid", False),
        (lambda x: keras.ops.reshape(x, (-1, 3)), None, True),
        (keras.layers.Softmax(), None, False),
        (keras.layers.Rescaling(2.0), None, True),
    ],
)
def test_logits_are_told_from_probabilities(after, activation, logits):
    inputs, x = _dense(activation)
    assert builders.outputs_are_logits(keras.Model(inputs, after(x))) == logits


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_logits_are_told_through_nested_models(activation):
    inner = keras.Model(*_dense(activation))
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation=activation)])
    inputs = keras.Input((4,))
    for nested in (inner, sequential):
        assert builders.outputs_are_logits(keras.Model(inputs, nested(inputs))) == (activation is None)


_LOADED_ELSEWHERE = """
import sys
import keras
import numpy as np
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], model(np.load(sys.argv[3])))
assert "tftransfer" not in sys.modules
"""


@pytest.mark.parametrize(
    "name",
    ["MobileNet-0.25", *(pytest.param(name, marks=pytest.mark.slow) for name in ("EfficientNetB0", "ResNet50V2"))],
)
def test_a_process_without_tftransfer_loads_the_model(name, pictures, tmp_path):
    model = builders.image_classifier(name, 3, **SMALL)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "pictures.npy", pictures)
    files = [tmp_path / file for file in ("model.keras", "answers.npy", "pictures.npy")]
    done = subprocess.run(
        [sys.executable, "-c", _LOADED_ELSEWHERE, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(model(pictures), np.load(tmp_path / "answers.npy"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 2.0}, "num_classes"),
        ({"hidden": (0,)}, "hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"l1": -1.0}, "l1"),
        ({"l2": float("nan")}, "l2"),
        ({"image_size": (32,)}, "image_size"),
        ({"image_size": (32, 32, 3)}, "image_size"),
        ({"image_size": (32, 32, 1)}, "repeat an array yourself"),
        ({"image_size": (32, 32, 4)}, "three channels only"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 16}, "too small"),
        ({"backbone": "MobilNet-0.25"}, "Did you mean"),
        ({"weights": "nowhere.h5"}, "nowhere.h5"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(InputError, match=said):
        builders.image_classifier(**{"backbone": "MobileNet-0.25", "num_classes": 3, **SMALL, **arguments})


def test_units_follow_the_targets(pictures):
    model = builders.image_classifier("MobileNet-0.25", 2, dropout=0.0, **SMALL)
    targets = np.array([[10.0, 5.0], [30.0, 5.0]], np.float32)
    scaled = builders.in_units_of(model, targets)
    np.testing.assert_allclose(scaled(pictures), model(pictures) * [10.0, 1.0] + [20.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "logits"), [(None, True), ("linear", True), ("softmax", False), ("sigmoid", False)]
)
def test_logits_are_told_from_the_last_layer(activation, logits):
    assert (
        builders.outputs_are_logits(builders.image_classifier("MobileNet-0.25", 2, activation=activation, **SMALL))
        is logits
    )


@pytest.mark.parametrize(
    ("layer", "logits"),
    [(keras.layers.Softmax(), False), (keras.layers.Activation("linear"), True)],
)
def test_logits_are_told_where_the_activation_is_a_layer(layer, logits):
    inputs = keras.Input((4,))
    assert builders.outputs_are_logits(keras.Model(inputs, layer(keras.layers.Dense(2)(inputs)))) is logits
