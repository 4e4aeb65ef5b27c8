"""Weights go in whole or not at all, from each kind of file, and the manifest says which they were."""

import functools
import json
import shutil
import zipfile
from unittest import mock

import keras
import numpy as np
import pytest

from tftransfer import backbones, weights
from tftransfer.errors import InputError, ScanError

NAME = "MobileNet-0.25"
SIZE = (32, 32)


def _stock(include_top=False):
    top = {"classes": 10} if include_top else {}
    return keras.applications.MobileNet(
        alpha=0.25, weights=None, include_top=include_top, input_shape=(32, 32, 3), **top
    )


def _random(model, seed=0):
    """Give every tensor, BatchNorm's too, values of its own, so that a swapped pair is noticed."""
    generator = np.random.default_rng(seed)
    model.set_weights([generator.uniform(0.5, 1.5, tensor.shape) for tensor in model.get_weights()])
    return model


def _assert_same_weights(model, source):
    """Compare in order; the source may have more at its end."""
    for found, expected in zip(model.get_weights(), source.get_weights(), strict=False):
        np.testing.assert_array_equal(found, expected)


def _write(model, path):
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


@pytest.mark.parametrize(
    ("file", "include_top"),
    [
        ("net.h5", False),
        ("net.weights.h5", False),
        ("net.keras", False),
        ("net.h5", True),
        *(pytest.param(file, True, marks=pytest.mark.slow) for file in ("net.weights.h5", "net.keras")),
    ],
)
def test_each_kind_of_file_is_loaded(tmp_path, file, include_top):
    source = _random(_stock(include_top))
    path = _write(source, tmp_path / file)
    _assert_same_weights(backbones.build(NAME, SIZE, path), source)


@pytest.mark.parametrize("file", ["net.h5", "net.weights.h5"])
def test_numbered_layers_of_another_session_are_matched(tmp_path, file):
    source = _random(keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3)))
    path = _write(source, tmp_path / file)
    assert "conv2d_3" in [layer.name for layer in source.layers]
    _assert_same_weights(backbones.build("Xception", (71, 71), path), source)


def test_nested_blocks_of_convnext_are_loaded(tmp_path):
    source = keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3))
    path = _write(_random(source), tmp_path / "net.weights.h5")
    _assert_same_weights(backbones.build("ConvNeXtTiny", SIZE, path), source)


def test_a_classifier_of_this_toolkit_gives_its_backbone(tmp_path):
    base = _random(backbones.build(NAME, SIZE))
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(base.output)
    dropped = keras.layers.Dropout(0.5, name="head_dropout")(pooled)  # has a seed among its variables
    model = keras.Model(base.input, keras.layers.Dense(3, name="logits")(dropped))
    model.compile("adam", "mse")
    path = _write(model, tmp_path / "model.keras")
    _assert_same_weights(backbones.build(NAME, SIZE, path), base)


def test_code_in_a_keras_file_is_refused_and_with_trust_not_run(tmp_path, capsys):
    path = _write(_random(_stock()), tmp_path / "net.keras")
    hostile = tmp_path / "hostile.keras"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(hostile, "w") as bad:
        bad.writestr("model.weights.h5", good.read("model.weights.h5"))
        bad.writestr("config.json", json.dumps({"class_name": "Lambda", "config": {"function": "exit()"}}))
    with mock.patch("keras.saving.deserialize_keras_object", side_effect=AssertionError("was run")):
        with pytest.raises(ScanError, match="Lambda: holds Python code"):
            backbones.build(NAME, SIZE, hostile)
        _assert_same_weights(backbones.build(NAME, SIZE, hostile, trust=True), _random(_stock()))
    assert "hostile.keras is loaded without a scan" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["net.h5", "net.weights.h5", "net.keras"])
def test_a_file_of_another_network_says_what_differs_and_whose_it_is(tmp_path, file):
    other = backbones.build("MobileNet-0.5", SIZE)
    path = _write(other, tmp_path / file)
    message = (
        r"does not fit MobileNet-0.25: net.* differs in \d+ places: conv1/kernel: shape \(3, 3, 3, 8\) "
        r"expected, \(3, 3, 3, 16\) found; .* and \d+ more. The file has the size of MobileNet-0.5\.$"
    )
    with pytest.raises(InputError, match=message):
        backbones.build(NAME, SIZE, path)


def test_layers_that_the_backbone_lacks_are_not_left_out_in_silence(tmp_path):
    base = backbones.build(NAME, SIZE)
    x = keras.layers.Conv2D(4, 3, padding="same", name="additional")(base.output)
    path = _write(keras.Model(base.input, x), tmp_path / "net.weights.h5")
    with pytest.raises(InputError, match=r"differs in one place: .*not in MobileNet-0.25"):
        backbones.build(NAME, SIZE, path)


def test_a_file_with_fewer_layers_is_refused(tmp_path):
    base = backbones.build(NAME, SIZE)
    short = keras.Model(base.input, base.get_layer("conv_pw_12_relu").output)
    path = _write(short, tmp_path / "net.weights.h5")
    with pytest.raises(InputError, match="4 tensors expected, 0 found"):
        backbones.build(NAME, SIZE, path)


@pytest.mark.parametrize("file", ["net.h5", "net.weights.h5", "net.keras"])
def test_a_file_cut_short_is_refused(tmp_path, file):
    path = _write(_stock(), tmp_path / file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="damaged, cut short or of another kind"):
        backbones.build(NAME, SIZE, path)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>"])
def test_a_file_that_is_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "net.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged, cut short or of another kind"):
        backbones.build(NAME, SIZE, path)


def test_an_archive_without_weights_is_refused(tmp_path):
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(InputError, match="damaged, cut short or of another kind"):
        backbones.build(NAME, SIZE, path)
    with pytest.raises(InputError, match=r"no whole \.keras file"):
        backbones.build("EfficientNetB0", SIZE, path, trust=True)


def test_a_missing_file_and_unknown_words_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        backbones.build(NAME, SIZE, tmp_path / "none.h5")
    with pytest.raises(InputError, match="Received: weights='imagnet'"):
        backbones.build(NAME, SIZE, "imagnet")
    with pytest.raises(InputError, match="must be None or 'imagenet'"):
        backbones.build(NAME, SIZE, weights_kind="noisy-student")


def test_a_file_with_keras_name_but_another_digest_is_refused(tmp_path):
    path = _write(_stock(), tmp_path / "net.h5")
    named = shutil.copy(path, tmp_path / "mobilenet_2_5_224_tf_no_top.h5")
    with pytest.raises(InputError, match="not its SHA256 dbdb03ee"):
        backbones.build(NAME, SIZE, named)
    backbones.build(NAME, SIZE, path)


# ImageNet weights without a network: Keras' download is replaced by a file of random weights.


def _download(monkeypatch, result):
    replacement = mock.Mock(side_effect=[result] if isinstance(result, Exception) else None)
    replacement.return_value = result
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", replacement)


@pytest.fixture
def download(monkeypatch):
    """Return a function that sets what Keras' download gives: a file, or an exception."""
    return functools.partial(_download, monkeypatch)


def test_a_failed_download_says_what_to_do(download):
    download(Exception("URL fetch failure on https://storage.example/net.h5: None -- timed out"))
    with pytest.raises(InputError, match="could not be downloaded: URL fetch failure .*Give a file instead"):
        backbones.build(NAME, SIZE, "imagenet")


def test_keras_download_is_used_for_imagenet(tmp_path, download):
    source = _random(_stock())
    download(str(_write(source, tmp_path / "net.h5")))
    _assert_same_weights(backbones.build(NAME, SIZE, "imagenet"), source)


def _efficientnet(weights):
    return keras.applications.EfficientNetB0(
        weights=weights, include_top=False, input_shape=(32, 32, 3), name="efficientnetb0"
    )


def _features(model):
    return np.asarray(model(np.random.default_rng(3).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)))


def _distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory, estimate_batch_norm):
    """A file of EfficientNetB0 weights, and Keras' own network with them as its ImageNet weights."""
    keras.utils.set_random_seed(0)
    source = estimate_batch_norm(_efficientnet(None))
    path = _write(source, tmp_path_factory.mktemp("efficientnet") / "net.h5")
    with pytest.MonkeyPatch.context() as patched:
        _download(patched, str(path))
        return path, _efficientnet("imagenet")


def test_efficientnet_from_a_file_equals_efficientnet_with_its_own_weights(efficientnet, download):
    path, keras_own = efficientnet
    download(str(path))
    expected = _features(keras_own)
    assert np.abs(expected).max() > 1e-3
    from_file = backbones.build("EfficientNetB0", SIZE, path, weights_kind="imagenet")
    assert _distance(_features(from_file), expected) < 1e-5
    assert _distance(_features(backbones.build("EfficientNetB0", SIZE, "imagenet")), expected) < 1e-5
    plain = backbones.build("EfficientNetB0", SIZE, path)  # the trap: tensorflow#62193
    assert _distance(_features(plain), expected) > 1e-2


def test_efficientnets_own_digest_is_known(efficientnet, monkeypatch):
    path, keras_own = efficientnet
    known = json.loads(json.dumps(weights.asset("keras_weights.json")))
    known["md5"]["efficientnetb0_notop.h5"] = weights.digest(path, "md5")
    monkeypatch.setattr(weights, "asset", lambda name: known)
    description = backbones.describe_weights("EfficientNetB0", path)
    assert description["known"]
    assert description["imagenet_rescaling"]
    assert _distance(_features(backbones.build("EfficientNetB0", SIZE, path)), _features(keras_own)) < 1e-5


def test_a_keras_file_says_itself_whether_it_rescales(efficientnet, tmp_path):
    _, keras_own = efficientnet
    path = _write(keras_own, tmp_path / "net.keras")
    assert backbones.describe_weights("EfficientNetB0", path)["imagenet_rescaling"]
    assert _distance(_features(backbones.build("EfficientNetB0", SIZE, path)), _features(keras_own)) < 1e-5
    without = _write(_efficientnet(None), tmp_path / "without.keras")
    assert not backbones.describe_weights("EfficientNetB0", without)["imagenet_rescaling"]


def test_published_table_covers_every_row():
    table = weights.asset("keras_weights.json")
    assert set(table["networks"]) == set(backbones.names())
    efficientnets = [name for name in table["md5"] if name.startswith("efficientnetb")]
    assert len(efficientnets) == 16  # B0 to B7, with and without the top


def test_descriptions_for_the_manifest(tmp_path):
    path = _write(_stock(), tmp_path / "net.h5")
    assert backbones.describe_weights(NAME, None) == {
        "kind": "random",
        "file": None,
        "sha256": None,
        "known": False,
        "imagenet_rescaling": False,
    }
    description = backbones.describe_weights(NAME, path)
    assert description["kind"] == "file"
    assert description["file"] == "net.h5"
    assert description["sha256"] == weights.digest(path)
    assert not description["known"]
    small = backbones.describe_weights("MobileNetV2-0.35", "imagenet", image_size=(96, 96))
    assert small["file"] == "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96_no_top.h5"
    assert backbones.describe_weights("EfficientNetB3", "imagenet")["imagenet_rescaling"]
    assert not backbones.describe_weights("EfficientNetV2B0", "imagenet")["imagenet_rescaling"]


def test_the_demo_weights_fit_their_row_only():
    card = weights.demo_card()
    side = card["image_size"]
    model = backbones.build(card["backbone"], (side, side), "demo")
    assert backbones.describe_weights(card["backbone"], "demo")["sha256"] == card["sha256"]
    assert np.isfinite(np.asarray(model(np.zeros((1, side, side, 3))))).all()
    with pytest.raises(InputError, match=r"`weights='demo'` fits '.*' only"):
        backbones.build("ResNet50", SIZE, "demo")


def test_damaged_demo_weights_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "demo_backbone.weights.h5"
    damaged.write_bytes(b"nothing")
    monkeypatch.setattr(weights, "demo_weights_path", lambda: damaged)
    with pytest.raises(InputError, match="missing or damaged"):
        backbones.build(weights.demo_card()["backbone"], (64, 64), "demo")


@pytest.mark.parametrize(
    ("name", "file", "known"),
    [
        ("MobileNet-0.25", "mobilenet_2_5_224_tf_no_top.h5", True),
        ("MobileNetV2-0.35", "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5", False),
    ],
)
def test_real_files_load_as_keras_loads_them(assets, name, file, known):
    path = assets / "weights" / file
    model = backbones.build(name, (64, 64), path)
    before = model.get_weights()
    model.load_weights(path)
    for found, expected in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert backbones.describe_weights(name, path)["known"] == known


def test_a_real_file_of_another_row_is_recognised(assets):
    path = assets / "weights" / "mobilenet_2_5_224_tf_no_top.h5"
    with pytest.raises(InputError, match="The file has the size of MobileNet-0.25"):
        backbones.build("MobileNetV2-0.35", (32, 32), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.names())
def test_published_table_is_what_the_installed_keras_asks_for(name):
    from tests.golden import keras_weights

    table = weights.asset("keras_weights.json")
    row = backbones.backbone(name)
    file, md5 = keras_weights.asked(row, include_top=False)
    assert table["networks"][name]["file"] == file
    assert table["md5"].get(file) == md5
    model = backbones.build(name, (row.smallest_size,) * 2)
    assert table["networks"][name]["parameters"] == model.count_params()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet-0.25", "MobileNetV2-0.35"])
@pytest.mark.parametrize("side", [96, 100, 128, 224])
def test_the_described_file_is_the_one_that_keras_asks_for(name, side, monkeypatch):
    get_file = mock.Mock(side_effect=Exception("asked"))
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", get_file)
    with pytest.raises(InputError, match="asked"):
        backbones.build(name, (side, side), "imagenet")
    description = backbones.describe_weights(name, "imagenet", image_size=(side, side))
    assert get_file.call_args.args[0] == description["file"]
