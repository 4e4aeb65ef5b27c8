"""Whatever loads a user's file scans it first; `trust` loads it all the same, and says so."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import keras
import pytest
import tensorflow as tf

from tftransfer import backbones, builders, bundles, cli, serving
from tftransfer.errors import InputError, ScanError
from tftransfer.report import Report

LOUD = "is loaded without a scan"


class Doubled(keras.layers.Layer):
    """A layer of somebody's own, which no list knows."""

    def call(self, x):
        return x * 2


def add_evil(path):
    """Add a layer with code to the description in a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    evil = {"module": "os", "class_name": "system", "config": {}, "registered_name": None}
    config["config"]["layers"].append({**evil, "name": "evil", "inbound_nodes": []})
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def run(tmp_path, small_network, small_task):
    """A finished run whose model somebody changed, with its manifest."""
    folder, configuration = tmp_path / "run", {"recipe": "image_classification", "seed": 0}
    bundles.begin(folder, configuration)
    data = {"name": "colours", "train": 24, "validation": 12, "test": 12, "quarantined": []}
    report = Report("image_classification", "small", [], True, data, {})
    bundles.save(folder, small_network(), small_task, report, configuration=configuration, provenance={"data": {}})
    add_evil(folder / "model.keras")
    bundles.refresh(folder)
    return folder


@pytest.fixture
def evil_weights(tmp_path):
    path = tmp_path / "net.keras"
    backbones.build("MobileNet-0.25", (32, 32)).save(path)
    add_evil(path)
    return path


@pytest.fixture
def evil_export(tmp_path):
    """A SavedModel that writes a file when it is asked."""
    module = tf.Module()
    written = os.fspath(tmp_path / "sentinel")
    signature = [tf.TensorSpec([None], tf.string, name="image_bytes")]

    @tf.function(input_signature=signature)
    def serve(image_bytes):
        with tf.control_dependencies([tf.io.write_file(written, "written")]):
            return tf.identity(image_bytes)

    module.serve = serve
    tf.saved_model.save(module, os.fspath(tmp_path / "1"), signatures=serve)
    return tmp_path / "1"


def test_a_model_is_scanned(run, capsys, monkeypatch):
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("was loaded"))
    for load in (lambda: bundles.load(run), lambda: bundles.load_model(run / "model.keras")):
        with pytest.raises(ScanError, match="class system of os"):
            load()
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: "loaded")
    assert bundles.load_model(run / "model.keras", trust=True) == "loaded"
    assert LOUD in capsys.readouterr().err


def test_layers_of_ones_own_need_trust(tmp_path):
    model = keras.Sequential([keras.Input((2,)), Doubled()])
    model.save(tmp_path / "own.keras")
    with pytest.raises(ScanError, match="class .*Doubled.* is not on the list|somebody's own"):
        bundles.load_model(tmp_path / "own.keras")
    with keras.saving.custom_object_scope({"Doubled": Doubled}):
        assert bundles.load_model(tmp_path / "own.keras", trust=True).layers


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "verify"])
def test_commands_on_a_run_scan_its_model(command, run, everything, capsys):
    (run / "serving").mkdir()
    shutil.copytree(everything, run / "serving" / "1")
    bundles.refresh(run, "serving/1")  # `verify` loads nothing that the manifest does not know
    extra = {"predict": ["picture.png"], "evaluate": ["--data", "demo"]}.get(command, [])
    assert cli.main([command, str(run), *extra]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "class system of os" in error
    with pytest.raises((TypeError, ValueError)):  # of Keras, which then reads it
        bundles.load(run, trust=True)
    cli.main([command, str(run), *extra, "--trust"])
    assert LOUD in capsys.readouterr().err


def test_weights_are_scanned(evil_weights, capsys):
    with pytest.raises(ScanError, match="class system of os"):
        builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=evil_weights)
    builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=evil_weights, trust=True)
    assert LOUD in capsys.readouterr().err


def test_ranking_scans_weights(evil_weights, capsys):
    options = ["--data", "demo", "--backbones", f"MobileNet-0.25={evil_weights}", "--image-size", "32"]
    assert cli.main(["rank", *options]) == 1
    assert "class system of os" in capsys.readouterr().err


def test_a_savedmodel_is_scanned_before_it_is_verified(evil_export, tmp_path, capsys):
    with pytest.raises(ScanError, match="operation WriteFile"):
        serving.verify(evil_export)
    assert cli.main(["verify", str(evil_export)]) == 1
    assert "operation WriteFile" in capsys.readouterr().err
    assert not (tmp_path / "sentinel").exists()
    assert not serving.verify(evil_export, trust=True).passed
    assert LOUD in capsys.readouterr().err


def test_recipes_take_trust(capsys):
    assert cli.recipe_parser("image_classification", "A recipe.").parse_args(["--trust"]).trust


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04"])
def test_damage_is_bad_input_and_no_danger(content, tmp_path):
    (tmp_path / "model.keras").write_bytes(content)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        bundles.load_model(tmp_path / "model.keras")
    assert not isinstance(caught.value, ScanError)
