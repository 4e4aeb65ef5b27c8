"""The comparison as a user runs it."""

import dataclasses
import json

import pytest

from tftransfer import bundles, comparison

SMALL = ["--data", "demo", "--image-size", "32", "--smoke", "--quiet", "--epochs", "4"]


@pytest.fixture(scope="module")
def recipe(recipe_named):
    return recipe_named("compare_strategies")


@pytest.fixture(scope="module", params=["0", pytest.param("0,1", marks=pytest.mark.slow)])
def finished(request, recipe, tmp_path_factory):
    """A comparison, stopped in its second trial and after its last one; which trials were run, and its seeds."""
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    arguments = [*SMALL, "--strategy", "linear_probe,partial:last=1", "--seeds", request.param, "--out", folder]
    real, done = comparison.run_trial, []

    def noted(choice, *given, **named):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append((choice.text, named["seed"]))
        return real(choice, *given, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comparison, "run_trial", noted)
        limit = 1
        assert recipe(*arguments) == 75
        limit = None
        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(bundles, "finish", _stop)
            assert recipe(*arguments) == 75
        assert recipe(*arguments) == 0
    return folder, done, request.param


def _planned(seeds):
    return [(name, int(seed)) for name in ("linear_probe", "partial:last=1") for seed in seeds.split(",")]


def _stop(*_, **__):
    raise KeyboardInterrupt


def test_every_trial_is_written_down(finished):
    found = json.loads((finished[0] / "comparison.json").read_text())
    keys = {(trial["strategy"], trial["seed"], trial["fold"]) for trial in found["trials"]}
    assert keys == {(*trial, -1) for trial in _planned(finished[2])}
    assert {row["strategy"] for row in found["strategies"]} == {"linear_probe", "partial:last=1"}
    for trial in found["trials"]:
        assert 0 <= trial["metric"] <= 1
        assert trial["source_before"] > 0.1  # the embedded backbone knows the signs
        assert trial["seconds"] > 0
    parameters = {trial["strategy"]: trial["parameters"] for trial in found["trials"]}
    assert parameters["linear_probe"] < parameters["partial:last=1"]
    probe = next(trial for trial in found["trials"] if trial["strategy"] == "linear_probe")
    assert probe["source_before"] == probe["source_after"]  # a probe forgets nothing


def test_table_and_picture_stand_beside_it(finished):
    assert "| linear_probe |" in (finished[0] / "comparison.md").read_text()
    assert (finished[0] / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_comparison_is_not_run_again(recipe, finished, capsys):
    arguments = [*SMALL, "--strategy", "linear_probe,partial:last=1", "--seeds", finished[2], "--out", finished[0]]
    arguments.remove("--quiet")
    before = (finished[0] / "comparison.json").stat().st_mtime_ns
    assert recipe(*arguments) == 0
    assert "linear_probe" in capsys.readouterr().out
    assert (finished[0] / "comparison.json").stat().st_mtime_ns == before


def test_a_stopped_comparison_goes_on_after_its_last_trial(finished):
    assert finished[1] == _planned(finished[2])


@pytest.mark.slow
def test_folds_leave_the_test_split_alone(recipe, tmp_path, monkeypatch):
    """With folds every measurement is on training examples: the test split's loader is never asked."""
    from tftransfer import data

    real = data.load

    def closed(*given, **named):
        found, task = real(*given, **named)

        def never(index):
            raise AssertionError("the test split was read")

        if len(found.labels) > 10:  # the old task
            return found, task
        pictures = dataclasses.replace(found.test.pictures, load=never)
        return dataclasses.replace(found, test=dataclasses.replace(found.test, pictures=pictures)), task

    monkeypatch.setattr(data, "load", closed)
    folder = tmp_path / "run"
    assert recipe(*SMALL, "--strategy", "linear_probe", "--seeds", "0", "--folds", "2", "--out", folder) == 0
    found = json.loads((folder / "comparison.json").read_text())
    assert [trial["fold"] for trial in found["trials"]] == [0, 1]
    assert "not looked at" in (folder / "comparison.md").read_text()


def test_a_dry_run_writes_nothing(recipe, tmp_path, capsys):
    arguments = [argument for argument in SMALL if argument != "--quiet"]
    assert recipe(*arguments, "--dry-run", "--out", tmp_path / "run") == 0
    assert "18 trials" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--strategy", "linear_prob"], "linear_probe"),
        (["--strategy", "full,full"], "different strategies"),
        (["--strategy", "full,partial:last=50"], "depth groups of this network"),
        (["--strategy", "gradual:stages=50", "--epochs", "60"], "depth groups of this network"),
        (["--strategy", "attention_only"], "matches nothing below the head"),
        (["--strategy", "lora:where=re:nothing"], "matches no kernel"),
        (["--strategy", "gradual", "--epochs", "3"], "from 4"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--seeds", "0,a"], "seeds"),
        (["--seeds", "²"], "seeds"),
        (["--seeds", "1,01"], "seeds"),
        (["--seeds", "4294967296"], "seeds"),
        (["--folds", "1"], "folds"),
        (["--strategy", "full,wise_ft", "--train-on-validation"], "wise_ft"),
        (["--folds", "40"], "smallest class"),
        (["--data", "nowhere"], "nowhere"),
        (["--weights", "none", "--backbone", "MobileNet-0.25", "--source", "demo"], "pretrained weights"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(recipe, tmp_path, capsys, option, said):
    assert recipe(*SMALL, *option, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_strategies_against_forgetting_keep_what_full_training_forgets(recipe, tmp_path):
    """The embedded backbone tuned to digits: 15 points more of its old task, at most a point less of the new one."""
    flips = "augmentation=light_no_flip"
    keepers = [f"{name}:{flips}" for name in ("l2_sp", "ewc", "wise_ft")]
    listed = ",".join([f"full:{flips}", *keepers])
    assert recipe("--data", "demo", "--strategy", listed, "--seeds", "0", "--quiet", "--out", tmp_path / "run") == 0
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    rows = {row["strategy"]: row for row in found["strategies"]}
    full = rows[f"full:{flips}"]
    for name in keepers:
        assert rows[name]["old task after"]["value"] >= full["old task after"]["value"] + 0.15
        assert rows[name]["accuracy"]["value"] >= full["accuracy"]["value"] - 0.01
