"""Exports of a run that was written without training, judged on pictures in a folder."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import InputError, bundles, cli, exports, integrity, runs
from tftransfer.data import load
from tftransfer.report import Number, Report, Table

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install '.[litert]'")

LABELS = ("blue", "green", "red")


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A folder of pictures that are mostly of one colour, 24 to train and 12 to test; two are in both splits."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 6), ("test", 12)):
        for number in range(count):
            label = number % 3
            pixels = generator.integers(0, 120, (4, 4, 3))
            pixels[..., 2 - label] += 120
            place = folder / split / LABELS[label]
            place.mkdir(parents=True, exist_ok=True)
            large = tf.cast(tf.image.resize(pixels, (32, 32), "bicubic"), tf.uint8)
            (place / f"{number}.png").write_bytes(tf.io.encode_png(large).numpy())
    for label in LABELS[:2]:
        first = min((folder / "train" / label).iterdir())
        shutil.copy(first, folder / "test" / label / "again.png")
    return folder


@pytest.fixture
def write_run(tmp_path, small_network, small_task):
    """Return a function that writes a finished run of a small network whose answers differ from picture to picture."""
    task = replace(small_task, labels=LABELS)
    model = small_network()
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel * 4, bias])

    def write(data="", fingerprint="", **configuration):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        configuration = {
            "recipe": "image_classification",
            "seed": 0,
            **configuration,
            **({"data": data} if data else {}),
        }
        bundles.begin(folder, configuration)
        described = {"name": "colours", "train": 24, "validation": 6, "test": 14, "quarantined": []}
        kept = Table("Kept", ("what",), (("as it was",),))
        report = Report("image_classification", "small", [], True, described, {"accuracy": Number(0.5)}, tables=(kept,))
        provenance = {"data": {"fingerprint": fingerprint}}
        bundles.write_samples(folder, [tf.io.encode_png(np.full((32, 32, 3), 77, np.uint8)).numpy()])
        bundles.save(folder, model, task, report, configuration=configuration, provenance=provenance)
        return folder

    return write


@pytest.fixture
def run(write_run, colours):
    data, _ = load(str(colours), image_size=(32, 32))
    return write_run(str(colours), data.fingerprint)


def export(run, *options):
    return cli.main(["export", str(run), "--format", "litert", *options])


def files_of(run):
    return sorted(path.name for path in (run / "litert").iterdir())


def test_a_run_is_exported_in_three_kinds_and_its_report_says_so(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = json.loads((run / "report.json").read_text())
    assert export(run) == 0
    printed = capsys.readouterr()
    assert files_of(run) == ["labels.txt", "model.tflite", "model_float16.tflite", "model_int8.tflite"]
    assert (run / "litert" / "labels.txt").read_text().split() == list(LABELS)
    assert "model_int8.tflite" in printed.out
    assert str(run / "litert") in printed.out.replace("\n", "")
    assert printed.err == ""
    assert integrity.changed_files(run, bundles.read_manifest(run)) == []
    assert "litert/model_int8.tflite" in bundles.read_manifest(run)["files"]
    after = json.loads((run / "report.json").read_text())
    *others, table = after.pop("tables")
    assert (others, after) == (before.pop("tables"), before)
    assert table["title"] == "LiteRT"
    assert [row[0] for row in table["rows"]] == ["model.keras", *files_of(run)[1:]]
    assert "On 14 test pictures. ms:" in table["note"]
    assert "model_float16.tflite" in (run / "report.html").read_text()


def test_what_is_asked_for_is_written_and_the_table_is_the_last_exports(run, capsys):
    assert export(run, "--quantize", "float16,none", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert export(run, "--quantize", "none", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert [row["file"] for row in found["files"]] == ["model.keras", "model.tflite"]
    assert found["files"][1]["accuracy"]["low"] < found["files"][1]["accuracy"]["high"]
    assert files_of(run) == ["labels.txt", "model.tflite"]
    assert [table.title for table in bundles.read_report(run).tables] == ["Kept", "LiteRT"]
    assert integrity.changed_files(run, bundles.read_manifest(run)) == []


def test_what_does_not_answer_as_keras_ends_with_1_and_changes_nothing(run, capsys, monkeypatch, small_network):
    from tftransfer.serving import litert

    other = small_network()
    write = litert.RUNTIME.write
    monkeypatch.setattr(litert, "RUNTIME", replace(litert.RUNTIME, write=lambda _, *given: write(other, *given)))
    assert export(run, "--quantize", "none", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert export(run, "--quantize", "none, float16") == 1
    assert "Nothing was published: every file must pass, and `--quantize` leaves" in capsys.readouterr().out
    assert not (run / "litert").exists()
    assert integrity.changed_files(run, bundles.read_manifest(run)) == []
    assert [table.title for table in bundles.read_report(run).tables] == ["Kept"]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["", "missing"])
def test_data_that_cannot_be_read_are_needed_for_int8_only(data, write_run, capsys):
    run = write_run(data)
    assert export(run) == 2
    message = capsys.readouterr().err
    assert "int8 is calibrated on the run's training pictures" in message
    assert "give `--data`" in message
    assert message.count("\n") == 1
    assert not (run / "litert").exists()
    assert export(run, "--quantize", "none,float16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["accuracy"] for row in found["files"]] == [None] * 3
    assert "Accuracy was not measured: " in bundles.read_report(run).tables[-1].note
    assert export(run, "--quantize", "none", "--data", str(run / "nowhere")) == 2


def test_other_data_can_be_named_and_that_is_said(write_run, colours, tmp_path, capsys):
    run = write_run("missing")
    assert export(run, "--data", str(colours), "--quantize", "none", "--json") == 0
    capsys.readouterr()
    assert "is not what the run was trained on, or has changed since" in bundles.read_report(run).tables[-1].note
    shutil.copytree(colours, tmp_path / "renamed")
    for split in ("train", "validation", "test"):
        (tmp_path / "renamed" / split / "red").rename(tmp_path / "renamed" / split / "violet")
    assert export(run, "--data", str(tmp_path / "renamed")) == 2
    assert "has other labels than the run: 'blue', 'green', 'violet', not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int4"], "`quantize` must be a comma list of none, float16, int8. Received: quantize='int4'"),
        (["--quantize", ""], "`quantize` must be a comma list"),
        (["--keep", "3"], "`keep` must be left out for `--format litert`"),
        (["--no-optimise"], "`optimise` must be left out for `--format litert`"),
        (["--format", "savedmodel", "--quantize", "none"], "`quantize` must be left out for `--format savedmodel`"),
        (["--format", "onnx", "--quantize", "none"], "`quantize` must be left out for `--format onnx`"),
    ],
)
def test_options_that_do_not_apply_are_bad_input(options, message, tmp_path, capsys):
    assert export(tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_format_is_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export(tmp_path, "--format", "pickle")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_that_is_damaged_is_bad_input_before_anything_is_written(run, capsys):
    (run / "report.json").write_text("{}")
    assert export(run) == 2
    assert "is no report of a run" in capsys.readouterr().err
    assert not (run / "litert").exists()


@pytest.mark.slow
def test_data_are_divided_as_they_were(write_run, colours):
    whole, _ = load(str(colours), image_size=(32, 32))
    without, _ = runs.without_duplicates(whole)
    assert without.fingerprint != whole.fingerprint
    for data, configuration in ((whole, {}), (without, {"remove_duplicates": True})):
        bundle = bundles.load(write_run(str(colours), data.fingerprint, **configuration))
        again, note = exports.data_again(bundle)
        assert (again.fingerprint, note) == (data.fingerprint, "")
    few, _ = load("demo", image_size=(32, 32), seed=3, limit=64)
    bundle = bundles.load(write_run("demo", few.fingerprint, seed=3, smoke=True))
    with pytest.raises(InputError, match="demo has other labels than the run: '0', '1', '2', '3', '4', ..., not"):
        exports.data_again(bundle)
    bundle = replace(bundle, task=replace(bundle.task, labels=few.labels))
    again, note = exports.data_again(bundle)
    assert (again.fingerprint, note) == (few.fingerprint, "")


def test_data_whose_path_the_run_does_not_keep_must_be_named(write_run, colours):
    configuration = runs.prepare("image_classification", _options(colours)).configuration
    bundle = bundles.load(write_run(data=configuration["data"]))
    with pytest.raises(InputError, match="keeps no absolute paths.*by `--data`"):
        exports.data_again(bundle)
    assert len(exports.data_again(bundle, str(colours))[0].test) == 14


def _options(data):
    return argparse.Namespace(data=str(data), out=None, quiet=True)
