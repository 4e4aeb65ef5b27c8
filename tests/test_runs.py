"""What recipes share around their training, without training."""

from __future__ import annotations

import argparse

import pytest

from tftransfer import bundles, distribution, runs
from tftransfer.errors import InputError
from tftransfer.report import Table


def _prepared(folder, seed=0):
    return runs.prepare("image_classification", argparse.Namespace(seed=seed, out=folder, quiet=True))


def _begin(run, data):
    with distribution.devices("cpu") as devices:
        runs.begin(run, data, devices)


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_runs_prepared_together_one_begins(tmp_path, small_data, seed):
    first, second = _prepared(tmp_path / "run"), _prepared(tmp_path / "run", seed)
    _begin(first, small_data)
    with pytest.raises(InputError, match="another run"):
        _begin(second, small_data)
    assert bundles.read_manifest(tmp_path / "run")["configuration"]["seed"] == 0


def test_an_interrupted_run_begins_again(tmp_path, small_data):
    _begin(_prepared(tmp_path), small_data)
    _begin(_prepared(tmp_path), small_data)


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
