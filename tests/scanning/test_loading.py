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


def test_folders_are_loaded_only_where_they_were_judged(everything, tmp_path):
    """Keras takes a folder with a number in it for a checkpoint of Orbax, which no scan knows."""
    shutil.copytree(everything, tmp_path / "serving" / "1")
    with pytest.raises(InputError, match=r"is no Keras model but a folder: give its \.keras file"):
        bundles.load_model(tmp_path / "serving")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert bundles.load_model(tmp_path / "unpacked").layers


# What a refusal says helps, and whether it does.


def doubled(x):
    return x * 2


def _by_lambda(path):
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2)]).save(path)


def _by_a_vocabulary_file(path):
    words = path.with_name("words.txt")
    words.write_text("a\nb\n")
    model = keras.Sequential([keras.Input((1,), dtype="string"), keras.layers.StringLookup(vocabulary=["a", "b"])])
    model.save(path)
    _change(path, lambda text: text.replace('["a", "b"]', json.dumps(os.fspath(words))))


def _by_ones_own_layer(path):
    keras.Sequential([keras.Input((2,)), Doubled()]).save(path)


def _by_ones_own_function(path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation=doubled)]).save(path)


def _by_what_lies_beside(path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "not Keras' own")


def _change(path, change):
    """Edit the description in a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = change(members["config.json"].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("write", "name"),
    [(_by_lambda, "x.keras"), (_by_lambda, "x.h5"), (_by_a_vocabulary_file, "x.keras")],
)
def test_what_keras_refuses_too_is_not_offered_to_be_trusted(write, name, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ScanError, match="trusted or not, Keras refuses it in its safe mode.*safe_mode=False") as caught:
        bundles.load_model(tmp_path / name)
    assert "--trust" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be loaded as a Keras model"):
        bundles.load_model(tmp_path / name, trust=True)
    assert keras.saving.load_model(tmp_path / name, safe_mode=False).layers, "what the message says helps"


@pytest.mark.parametrize("write", [_by_ones_own_layer, _by_ones_own_function])
def test_what_is_ones_own_is_to_be_imported_and_trusted(write, tmp_path):
    write(tmp_path / "x.keras")
    with pytest.raises(ScanError, match="`--trust` alone does not help.*import that in Python.*`trust=True`"):
        bundles.load_model(tmp_path / "x.keras")
    with pytest.raises(InputError, match="cannot be loaded as a Keras model"):
        bundles.load_model(tmp_path / "x.keras", trust=True)
    with keras.saving.custom_object_scope({"Doubled": Doubled, "doubled": doubled}):
        assert bundles.load_model(tmp_path / "x.keras", trust=True).layers


def test_what_only_the_scan_refuses_can_be_trusted(tmp_path):
    _by_what_lies_beside(tmp_path / "x.keras")
    with pytest.raises(ScanError, match=r"notes\.txt.*`trust` it \(`--trust`\), which leaves out the scan$"):
        bundles.load_model(tmp_path / "x.keras")
    assert bundles.load_model(tmp_path / "x.keras", trust=True).layers


def test_the_advice_helps_for_all_that_is_found(tmp_path):
    _by_what_lies_beside(tmp_path / "x.keras")
    evil = '{"module": "keras.layers", "class_name": "Lambda", "config": {"function": "x"}}'
    _change(tmp_path / "x.keras", lambda text: text.replace('"layers": [', f'"layers": [{evil}, '))
    with pytest.raises(ScanError, match=r"notes\.txt.*and 1 more.*trusted or not"):
        bundles.load_model(tmp_path / "x.keras")


def test_weights_can_be_trusted_whatever_describes_the_network(tmp_path):
    """Of a `.keras` file only the weights are read."""
    path = tmp_path / "net.keras"
    backbones.build("MobileNet-0.25", (32, 32)).save(path)
    evil = '{"module": "keras.layers", "class_name": "Lambda", "config": {"function": "x"}}'
    _change(path, lambda text: text.replace('"layers": [', f'"layers": [{evil}, ', 1))
    with pytest.raises(ScanError, match="Lambda: holds Python code.*`--trust`"):
        backbones.build("MobileNet-0.25", (32, 32), path)
    assert backbones.build("MobileNet-0.25", (32, 32), path, trust=True)


def test_recipes_take_trust(capsys):
    assert cli.recipe_parser("image_classification", "A recipe.").parse_args(["--trust"]).trust


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04"])
def test_damage_is_bad_input_and_no_danger(content, tmp_path):
    (tmp_path / "model.keras").write_bytes(content)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        bundles.load_model(tmp_path / "model.keras")
    assert not isinstance(caught.value, ScanError)
