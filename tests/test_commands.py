"""Commands on a run's folder that was written without training."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import bundles, cli, constants, serving, strategies
from tftransfer.report import Report
from tftransfer.serving import publication, structure, warm_up


@pytest.fixture
def run(tmp_path, small_network, small_task):
    """A finished run without a SavedModel."""
    folder = tmp_path / "run"
    configuration = {"recipe": "image_classification", "seed": 0}
    bundles.begin(folder, configuration)
    data = {"name": "colours", "train": 24, "validation": 12, "test": 12, "quarantined": []}
    report = Report("image_classification", "small", [], True, data, {})
    bundles.save(folder, small_network(), small_task, report, configuration=configuration, provenance={"data": {}})
    return folder


def _pictures(folder, count):
    generator = np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(count)]
    for file in files:
        file.write_bytes(tf.io.encode_png(generator.integers(0, 255, (32, 32, 3), np.uint8)).numpy())
    return files


def test_strategies_are_listed_with_options_and_sources(capsys):
    assert cli.main(["strategies", "--json"]) == 0
    found = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {*strategies.names(), "surgical", "tuned_probe", "auto"}
    assert found["gradual"]["options and defaults"] == "stages=3, augmentation=strong"
    assert all("arXiv" in row["source"] for row in found.values())
    assert all(row["what it does"].endswith(".") for row in found.values())


def test_predict_takes_pictures_in_batches_and_answers_in_order(run, tmp_path, capsys, monkeypatch):
    sizes = []
    freeze = constants.as_constant_function

    def watched(network):
        infer = freeze(network)
        return lambda batch: sizes.append(len(batch)) or infer(batch)

    monkeypatch.setattr(constants, "as_constant_function", watched)
    files = _pictures(tmp_path, 70)
    assert cli.main(["predict", str(run), *map(str, files), "--csv"]) == 0
    assert sizes == [32, 32, 6]
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == list(map(str, files))
    assert cli.main(["predict", str(run), str(files[69]), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)[0]
    assert alone["label"] == rows[69]["label"]
    assert alone["probability"] == pytest.approx(float(rows[69]["probability"]), abs=1e-4)


@pytest.mark.parametrize("form", ["--csv", "--json", None])
def test_names_that_are_not_utf8_are_answered(run, tmp_path, capsys, form, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    file = _pictures(tmp_path, 1)[0].rename(tmp_path / "caf\udce9.png")
    assert cli.main(["predict", str(run), str(file), *filter(None, [form])]) == 0
    assert "caf\\udce9.png" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_is_not_the_trained_one_fails_verification(run, capsys):
    assert cli.main(["export", str(run), "--quiet"]) == 0
    (run / "model.keras").write_bytes(b"changed")
    assert cli.main(["verify", str(run), "--repeats", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    failed = [check for check in found["checks"] if check["passed"] is False]
    assert [check["name"] for check in failed] == ["files equal the manifest"]
    assert failed[0]["metrics"]["changed"] == ["model.keras"]


@pytest.fixture
def verified(monkeypatch):
    """Let every SavedModel pass; returns what `serving.verify` was given, call by call."""
    calls = []

    def verify(version, samples=(), **options):
        calls.append({"version": version, "samples": samples, **options})
        return serving.Verification(()).with_check("looked", True)

    monkeypatch.setattr(serving, "verify", verify)
    return calls


def _verify(run, capsys, *options):
    """Verify a run; returns the exit code, and what each check found by its name."""
    code = cli.main(["verify", str(run), "--json", *map(str, options)])
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0)
    return code, {check["name"]: (check["passed"], check["metrics"]) for check in found["checks"]}


def test_a_whole_run_is_verified(written_run, verified, capsys):
    code, found = _verify(written_run, capsys)
    assert code == 0
    assert list(found) == ["looked", "manifest equals its seal", "files equal the manifest"]
    (call,) = verified
    assert call["version"] == written_run / "serving" / "2"
    assert call["model"] is not None
    assert len(call["samples"]) == 2


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("path", [".", "serving/2"])
def test_a_changed_manifest_fails_and_nothing_is_loaded(written_run, verified, flip_a_bit, capsys, name, path):
    flip_a_bit(written_run / name)
    code, found = _verify(written_run / path, capsys)
    assert code == 1
    assert found == {"manifest equals its seal": (False, {"changed": [name]})}
    assert verified == []


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_missing_manifest_or_seal_fails(written_run, verified, capsys, name):
    (written_run / name).unlink()
    code, found = _verify(written_run, capsys)
    assert code == 1
    assert found["manifest equals its seal"] == (False, {"missing": [name]})
    assert verified == []


def test_a_folder_that_is_no_run_is_bad_input(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serving/2/saved_model.pb", "serving/2/more", "serving/3/saved_model.pb"])
def test_a_version_that_is_not_what_was_published_is_not_loaded(written_run, verified, capsys, name):
    (written_run / name).parent.mkdir(exist_ok=True)
    (written_run / name).write_text("another graph")
    code, found = _verify(written_run, capsys)
    assert code == 1
    assert found["SavedModel"][0] is None
    assert (name in str(found["files equal the manifest"])) or "serving/3" in str(found["files equal the manifest"])
    assert verified == []


def test_a_run_whose_version_is_gone_fails_with_its_files(written_run, verified, capsys):
    shutil.rmtree(written_run / "serving")
    code, found = _verify(written_run, capsys)
    assert code == 1
    assert "serving/2/saved_model.pb" in found["files equal the manifest"][1]["missing"]


@pytest.mark.parametrize(
    "name", ["model.keras", "samples/0.png", "report.html", "checkpoints/001-000000000/state.safetensors"]
)
def test_another_changed_file_is_named_and_not_used(written_run, verified, flip_a_bit, capsys, name):
    flip_a_bit(written_run / name)
    code, found = _verify(written_run, capsys)
    assert code == 1
    assert found["files equal the manifest"] == (False, {"changed": [name]})
    (call,) = verified
    assert (call["model"] is None) == (name == "model.keras")
    assert len(call["samples"]) == (1 if name.startswith("samples") else 2)


def test_a_signature_that_nobody_asked_for_is_not_checked(written_run, verified, capsys):
    (written_run / "model.sig").write_text("{}")
    code, found = _verify(written_run, capsys)
    assert code == 0
    assert found["signature holds"] == (None, {"reason": "no --public-key was given"})


def test_a_public_key_is_of_no_use_without_a_run(tmp_path, capsys):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert cli.main(["verify", str(tmp_path), "--public-key", "own.pub.pem"]) == 2
    assert "no part of a run" in capsys.readouterr().err


def test_an_export_says_that_a_signature_is_stale(written_run, monkeypatch, capsys):
    (written_run / "serving" / "3").mkdir()
    (written_run / "serving" / "3" / "saved_model.pb").write_text("graph")
    passed = serving.Verification(()).with_check("looked", True)
    monkeypatch.setattr(serving, "publish", lambda *_, **__: (written_run / "serving" / "3", passed))
    assert cli.main(["export", str(written_run)]) == 0
    assert "sign again" not in capsys.readouterr().out
    (written_run / "model.sig").write_text("{}")
    assert cli.main(["export", str(written_run)]) == 0
    assert "sign again" in capsys.readouterr().out
    assert bundles.read_manifest(written_run)["current"] == "3"


def test_a_run_without_a_savedmodel_is_bad_input_to_verify(run, capsys):
    assert cli.main(["verify", str(run)]) == 2
    assert "tftransfer export" in capsys.readouterr().err


@pytest.mark.slow
def test_every_option_of_export_does_what_it_says(run, capsys, monkeypatch):
    prove = publication.prove
    monkeypatch.setattr(publication, "prove", lambda *given: prove(*given[:5], 2, (0, 1)))
    for options in (["--no-optimise", "--warm-up", "none"], ["--top-k", "2", "--warm-up", "3,4", "--keep", "1"]):
        assert cli.main(["export", str(run), "--quiet", *options]) == 0
        version = serving.newest_version(run / "serving")
        graph = structure.read(version).meta_graphs[0].graph_def
        nodes = [node.op for function in graph.library.function for node in function.node_def]
        constant = options[0] == "--top-k"
        assert ("ReadVariableOp" not in nodes) is constant
        assert ("classify" in structure.signatures(structure.read(version))) is constant
        sizes = [len(request.values) for request in warm_up.read(version) or ()]
        assert sizes == ([3, 4, 3, 4, 1] if constant else [])
    assert publication.versions(run / "serving") == [2]
    assert bundles.read_manifest(run)["current"] == "2"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--top-k", "0"], "--top-k"),
        (["--top-k", "4"], "top_k"),  # of three labels
        (["--keep", "0"], "--keep"),
        (["--warm-up", "0"], "--warm-up"),
        (["--warm-up", "1,,8"], "--warm-up"),
        (["--warm-up", "some"], "--warm-up"),
    ],
)
def test_options_of_export_that_do_not_fit_are_bad_input(run, capsys, options, named):
    try:
        code = cli.main(["export", str(run), *options])
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (run / "serving").exists()
