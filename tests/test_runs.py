"""What recipes share around their training, without training."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import pytest

from tftransfer import advice, audits, bundles, distribution, runs
from tftransfer.data.examples import Seen
from tftransfer.errors import InputError
from tftransfer.history import History
from tftransfer.report import Check, Findings, Number, Report, Table


def _prepared(folder, seed=0, quiet=True):
    return runs.prepare("image_classification", argparse.Namespace(seed=seed, out=folder, quiet=quiet))


def _begin(run, data):
    with distribution.devices("cpu") as devices:
        runs.begin(run, data, devices, advice.Advice(()))


def _finished(folder, model, task, **provenance):
    """Write a finished run without training; returns the same command's second call."""
    run = _prepared(folder)
    bundles.begin(folder, run.configuration)
    report = Report("image_classification", "small", [], True, {"name": "colours"}, {"accuracy": Number(0.5)})
    provenance = {"data": {}, **provenance}
    bundles.save(folder, model, task, report, configuration=run.configuration, provenance=provenance)
    return _prepared(folder, quiet=False)


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_runs_prepared_together_one_begins(tmp_path, small_data, seed):
    first, second = _prepared(tmp_path / "run"), _prepared(tmp_path / "run", seed)
    _begin(first, small_data)
    with pytest.raises(InputError, match="another run"):
        _begin(second, small_data)
    assert bundles.read_manifest(tmp_path / "run")["configuration"]["seed"] == 0


def test_a_report_counts_the_seconds_of_the_processes_before(tmp_path, small_data, small_task):
    history, network = History(), SimpleNamespace(backbone="small")
    history.seconds_before = 3600.0
    report = runs._report(_prepared(tmp_path), small_task, small_data, history, network, Findings(), ())
    assert 3600 < report.seconds["total"] < 3660


def test_an_interrupted_run_begins_again(tmp_path, small_data):
    _begin(_prepared(tmp_path), small_data)
    _begin(_prepared(tmp_path), small_data)


def test_a_manifest_holds_no_absolute_path_and_tells_them_apart(tmp_path):
    def configuration(**given):
        options = argparse.Namespace(out=tmp_path / "run", quiet=True, **given)
        return runs.prepare("image_classification", options).configuration

    one, other = (configuration(data=f"{tmp_path}/{name}/photos", weights=tmp_path / "w.h5") for name in "ab")
    assert one["data"].startswith("photos (path ")
    assert one["weights"].startswith("w.h5 (path ")
    assert str(tmp_path) not in str(one)
    assert one["data"] != other["data"]
    assert one == configuration(data=f"{tmp_path}/a/photos", weights=tmp_path / "w.h5")
    assert configuration(data="a/photos", image_size=(3, 4))["data"] == "a/photos"


def test_paths_and_labels_are_printed_as_they_are(capsys):
    console = runs.literal_console()
    text = "photos/[bold]:smile:[/]"
    console.print(text, soft_wrap=True)
    runs.print_table(console, Table(text, (text,), ((text,),), note=text))
    assert capsys.readouterr().out.count(text) == 5


def test_a_recipes_console_is_literal(tmp_path, capsys):
    run = runs.prepare("image_classification", argparse.Namespace(out=tmp_path / ":smile:", quiet=False))
    run.console.print(f"{run.folder}", soft_wrap=True)
    assert capsys.readouterr().out == f"{tmp_path / ':smile:'}\n"


def test_a_run_says_what_an_audit_of_what_it_has_read_finds(tmp_path, small_data, capsys):
    twice = [Seen(f"{split}.png", "red", split, "same") for split in ("train", "test")]
    data = dataclasses.replace(small_data, seen=tuple(twice))
    with distribution.devices("cpu") as devices:
        runs.announce(_prepared(tmp_path / "run", quiet=False), data, devices)
        printed = " ".join(capsys.readouterr().out.split())
        assert "Audit: 1 findings" in printed
        assert "train.png: the same content, as test.png, in test and train" in printed
        runs.announce(_prepared(tmp_path / "run", quiet=False), small_data, devices)
        assert "Audit" not in capsys.readouterr().out
    found = audits.page.findings(audits.of_data(data))
    assert [(check.name, check.passed) for check in found.checks] == [("data_audit", False)]
    assert found.tables[0].rows[0][1:3] == ("train.png", "the same content, as test.png, in test and train")
    assert audits.page.findings(audits.of_data(small_data)).checks[0].passed


@pytest.mark.parametrize(("current", "code"), [("1", 0), (None, 1)])
def test_a_finished_run_says_again_whether_it_was_published(tmp_path, small_network, small_task, capsys, current, code):
    run = _finished(tmp_path / "run", small_network(), small_task, current=current)
    assert run.finished
    assert runs.show_finished(run) == code
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert ("not published" in printed) == bool(code)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", "5", '{"metrics": []}', "\xff"])
def test_a_finished_run_without_its_report_is_bad_input(tmp_path, small_network, small_task, content):
    run = _finished(tmp_path / "run", small_network(), small_task)
    if content is None:
        (run.folder / "report.json").unlink()
    else:
        (run.folder / "report.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"report\.json"):
        runs.show_finished(run)


def test_a_finished_run_with_outputs_that_are_not_finite_ends_with_1_again(tmp_path, small_network, small_task):
    run = _finished(tmp_path / "run", small_network(), small_task, current="1")
    report = bundles.read_report(run.folder)
    checks = (Check("finite_outputs", False, {}),)
    bundles.write_json(run.folder / "report.json", dataclasses.replace(report, checks=checks).to_json())
    assert runs.show_finished(run) == 1
