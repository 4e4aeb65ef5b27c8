"""Recipes that are stopped, by a signal or by their own limit, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tftransfer import bundles

SMALL = ["--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "32", "--epochs", "2", "--quiet"]


@pytest.fixture(scope="module")
def recipe(recipe_named):
    """Return a function that runs the recipe in this process and returns its exit code."""
    return recipe_named("image_classification")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """The report of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert recipe(*SMALL, "--out", folder) == 0
    return _report(folder)


def _report(folder):
    return json.loads((folder / "report.json").read_text())


def _same(folder, straight):
    report = _report(folder)
    assert report["complete"]
    assert report["metrics"] == straight["metrics"]
    assert report["intervals"] == straight["intervals"]
    (name,) = (path.name for path in (folder / "checkpoints").iterdir())
    assert name == "002-000000000"
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_a_time_limit_gives_a_model_and_the_same_command_goes_on(recipe, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    limited = [argument for argument in SMALL if argument != "--quiet"]
    assert recipe(*limited, "--out", folder, "--time-limit", "0.001") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"Training ended at the time limit: the same command with `--out {folder}` goes on with it" in told
    assert not _report(folder)["complete"]
    assert (folder / "serving" / "1" / "saved_model.pb").is_file()
    assert "Incomplete." in (folder / "report.html").read_text()
    assert recipe(*SMALL, "--out", folder) == 0
    _same(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75_and_the_same_command_goes_on(recipe, straight, repository, tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, str(repository / "recipes" / "image_classification.py"), *SMALL, "--out", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "logs").is_dir():  # made when the first phase begins to train
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate()
    assert process.returncode == 75
    assert told.splitlines()[-1] == (
        "stopped; the same command with --resume, or with the same --out, goes on with this run"
    )
    assert list((folder / "checkpoints").iterdir())
    assert not bundles.read_manifest(folder)["complete"]
    assert recipe(*SMALL, "--out", folder, "--resume") == 0
    _same(folder, straight)


def test_there_must_be_something_to_go_on_with(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe(*SMALL, "--resume") == 2
    assert "no unfinished run of these options in saved_models" in capsys.readouterr().err
    assert recipe(*SMALL, "--resume", "--out", "run") == 2
    assert "`resume`: run holds no run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "nan", "1d"])
def test_a_limit_that_is_no_time_is_bad_input(recipe, capsys, limit):
    assert recipe("--time-limit", limit) == 2
    assert "expected seconds above 0, or such as 90m or 2h" in capsys.readouterr().err
