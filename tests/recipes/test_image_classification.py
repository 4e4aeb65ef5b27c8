"""The recipe as a user runs it: what it writes, what it prints, what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import adapters, builders, bundles, cli, integrity, model_card, surgery

SMALL = ["--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "32", "--quiet"]
DEMO = ["--smoke", "--source", "demo", "--checks", "labels,duplicates"]
DATA_DECIDES = ("calibration", "duplicates")  # whether these pass
CONTRACT = {
    "model.keras", "manifest.json", "manifest.sha256", "history.csv", "report.json", "report.html", "MODEL_CARD.md",
    "checkpoints", "logs", "samples", "serving",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(recipe_named):
    """Return a function that runs the recipe in this process and returns its exit code."""
    return recipe_named("image_classification")


def _photos(folder, classes=("cat", "dog"), count=6, seed=0):
    generator = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture = generator.integers(0, 100, (40, 48, 3), np.uint8)
            picture[..., number % 3] += 120
            (folder / name / f"{index}.png").write_bytes(tf.io.encode_png(picture).numpy())
    return folder


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A smoke run on the demo, finished."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert recipe(*DEMO, "--quiet", "--out", folder) == 0
    return folder


def test_smoke_writes_every_file(finished):
    assert {path.name for path in finished.iterdir()} == CONTRACT
    assert (finished / "serving" / "1" / "saved_model.pb").is_file()
    assert integrity.changed_files(finished, bundles.read_manifest(finished)) == []


def test_a_flipped_bit_in_any_file_of_a_run_is_named(finished, tmp_path, flip_a_bit):
    copy = shutil.copytree(finished, tmp_path / "copy")
    manifest = bundles.read_manifest(copy)
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json", "manifest.sha256"}
    assert any(name.startswith("logs/") for name in names)
    for name in sorted(names):
        whole = (copy / name).read_bytes()
        flip_a_bit(copy / name)
        found = (integrity.check_seal(copy), integrity.check_files(copy, manifest))
        failed = [check.metrics for check in found if check.passed is False]
        assert failed == [{"changed": [name]}], name
        (copy / name).write_bytes(whole)


def test_nothing_of_this_machine_is_in_manifest_and_card(finished):
    for name in ("manifest.json", "MODEL_CARD.md"):
        text = (finished / name).read_text()
        assert str(finished.parent) not in text
        assert str(Path(bundles.__file__).parent) not in text


def test_the_card_is_that_of_report_and_manifest_and_its_code_runs(finished, monkeypatch, capsys):
    card = (finished / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert model_card.render(bundles.read_report(finished), bundles.read_manifest(finished)) == card
    assert "not for use" in card, "a smoke run"
    monkeypatch.chdir(finished)
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(code, "MODEL_CARD.md", "exec"), {})
    assert "probabilities" in capsys.readouterr().out


def test_report_keeps_to_the_contract(finished):
    report = json.loads((finished / "report.json").read_text())
    assert {"task", "backbone", "strategy", "complete", "data", "metrics", "intervals", "seconds", "checks", "versions",
            "seed"} <= set(report)  # fmt: skip
    assert report["task"] == "image_classification"
    assert report["complete"] is True
    assert {"accuracy", "macro_precision", "macro_recall", "macro_f1", "log_loss"} <= set(report["metrics"])
    assert {"low", "high", "method"} == set(report["intervals"]["accuracy"])
    assert {"decode", "extract", "train", "total"} <= set(report["seconds"])
    judged = [check for check in report["checks"] if check["passed"] is not None and check["name"] not in DATA_DECIDES]
    assert judged
    assert all(check["passed"] for check in judged)
    assert sum(report["data"][split] for split in ("train", "validation", "test")) <= 64


def test_further_checks_are_in_the_report(finished):
    report = json.loads((finished / "report.json").read_text())
    (looked,) = (check for check in report["checks"] if check["name"] == "labels")
    assert looked["metrics"]["looked_at"] == report["data"]["train"]
    assert bool(looked["metrics"]["listed"]) == any(table["title"] == "Labels to look at" for table in report["tables"])


@pytest.fixture
def with_copies(tmp_path):
    """A folder with three splits of random pictures, two of which are in training and test."""
    generator = np.random.default_rng(5)
    pictures = [generator.integers(0, 256, (40, 48, 3), np.uint8) for _ in range(20)]
    for split, own in (("train", pictures[:12]), ("test", [*pictures[:2], *pictures[12:16]]), ("val", pictures[16:])):
        for number, picture in enumerate(own):
            (tmp_path / split / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            file = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            file.write_bytes(tf.io.encode_png(picture).numpy())
    return ["--data", tmp_path, "--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "32", "--smoke"]


@pytest.mark.parametrize(("options", "training"), [([], 12), (["--remove-duplicates"], 10)])
def test_copies_in_other_splits_are_removed_on_request(recipe, with_copies, tmp_path, capsys, options, training):
    out = tmp_path / "run"
    assert recipe(*with_copies, "--strategy", "linear_probe", *options, "--dry-run", "--out", out) == 0
    assert f"{training} training, 4 validation, 6 test" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_what_was_removed_is_in_the_report(recipe, with_copies, tmp_path):
    out = tmp_path / "run"
    assert recipe(*with_copies, "--strategy", "linear_probe", "--remove-duplicates", "--out", out, "--quiet") == 0
    report = json.loads((out / "report.json").read_text())
    assert [report["data"][split] for split in ("train", "validation", "test")] == [10, 4, 6]
    (found,) = (check for check in report["checks"] if check["name"] == "duplicates")
    assert (found["passed"], found["metrics"]["exact"], found["metrics"]["removed"]) == (True, 2, True)
    (found,) = (check for check in report["checks"] if check["name"] == "data_audit")
    assert "exact_copies" not in found["metrics"]
    assert any(table["title"] == "Pictures in two splits" for table in report["tables"])


def test_the_demo_prints_what_the_backbone_is_worth(finished):
    report = json.loads((finished / "report.json").read_text())
    table = next(table for table in report["tables"] if "embedded backbone" in table["title"])
    assert [row[0] for row in table["rows"]] == ["demo backbone", "random weights", "raw pixels"]


def test_the_report_says_what_trained_what_was_forgotten_and_how_far_it_overfits(finished):
    report = json.loads((finished / "report.json").read_text())
    tables = {table["title"]: table for table in report["tables"]}
    probe, tuned = (tables[f"What trained: {name}"] for name in ("probe", "fine-tune"))
    assert probe["columns"] == ["group", "layers", "parameters", "trainable", "learning rate", "BatchNorm statistics"]
    assert [row[4] for row in probe["rows"]] == ["frozen"] * (len(probe["rows"]) - 1) + ["0.009"]
    assert {row[5] for row in tuned["rows"][:-1]} == {"frozen"}
    assert tuned["rows"][-2][4] == "0.00045"  # a tenth below the head's
    kept = next(check for check in report["checks"] if check["name"] == "forgetting")
    assert kept["passed"] is None
    assert set(kept["metrics"]) == {"before", "after", "after_fitted_again"}
    assert kept["metrics"]["before"] > 0.3
    assert "What is left of the old task (generated signs)" in tables
    assert "Accuracy is" in tables["Seen and unseen examples"]["note"]
    page = (finished / "report.html").read_text()
    assert "What trained: probe" in page
    assert "What is left of the old task" in page


def test_another_strategy_is_refused(recipe, finished, capsys):
    assert recipe(*DEMO, "--quiet", "--strategy", "gradual", "--out", finished) == 2
    assert "holds another run (strategy" in capsys.readouterr().err


def test_a_finished_run_prints_its_report_and_changes_nothing(recipe, finished, capsys):
    before = (finished / "manifest.json").read_bytes()
    assert recipe(*DEMO, "--out", finished) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert (finished / "manifest.json").read_bytes() == before


def test_another_run_is_refused(recipe, finished, capsys):
    assert recipe(*DEMO, "--quiet", "--seed", 1, "--out", finished) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "holds another run (seed 0 there, 1 here)" in error


def test_the_run_predicts_evaluates_and_verifies(finished, tmp_path, capsys):
    picture = tmp_path / "digit.png"
    picture.write_bytes(tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy())
    assert cli.main(["predict", str(finished), str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"] in set("0123456789")
    assert cli.main(["predict", str(finished), str(picture), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "file,label,probability"
    assert cli.main(["evaluate", str(finished), "--data", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 360
    assert cli.main(["verify", str(finished), "--repeats", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.parametrize("name", ["missing.png", "page.png", "empty.png"])
def test_pictures_that_cannot_be_used_are_named(finished, tmp_path, capsys, name):
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.png").write_bytes(b"")
    assert cli.main(["predict", str(finished), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert name in error


def test_a_changed_file_fails_verification(recipe, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "history.csv").write_text("changed")
    assert cli.main(["verify", str(copy), "--repeats", "2"]) == 1
    assert "history.csv" in capsys.readouterr().out.replace("\n", "")


def test_export_publishes_the_next_version(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert cli.main(["export", str(copy), "--quiet"]) == 0
    assert (copy / "serving" / "2" / "saved_model.pb").is_file()
    assert bundles.read_manifest(copy)["current"] == "2"
    assert integrity.check_files(copy, bundles.read_manifest(copy)).passed


def test_dry_run_writes_nothing(recipe, tmp_path, capsys):
    assert recipe("--dry-run", *SMALL[:-1], "--out", tmp_path / "run") == 0
    assert "head" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(recipe, finished, tmp_path):
    assert recipe(*DEMO, "--quiet", "--out", tmp_path / "again") == 0
    one, two = (bundles.load(folder).model.get_weights() for folder in (finished, tmp_path / "again"))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", ["multi_label", pytest.param("regression", marks=pytest.mark.slow)])
def test_other_tasks_run_to_the_end(recipe, tmp_path, kind):
    photos = _photos(tmp_path / "photos", count=10)
    labels = {"multi_label": ("red|warm", "green"), "regression": ("1.5", "20")}[kind]
    rows = [
        f"{name}/{index}.png,{label}" for name, label in zip(("cat", "dog"), labels, strict=True) for index in range(10)
    ]
    (photos / "table.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    options = {
        "multi_label": [*OPTIONS, "--strategy", "surgical"],
        "regression": ["--task", "regression", "--strategy", "lora:rank=2"],
    }[kind]
    assert recipe("--data", photos / "table.csv", *SMALL, *options, "--smoke", "--out", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    expected = {"multi_label": "macro_f1", "regression": "mean_absolute_error"}[kind]
    assert expected in report["metrics"]
    run = bundles.load(tmp_path / "run")
    if kind == "multi_label":
        _check_options(run)
        _check_choice(run, report)
    else:
        _check_adapter(run)


def _check_choice(run: bundles.Bundle, report: dict) -> None:
    """What `surgical` chose is in report and manifest, with the reason."""
    trains = run.manifest["decisions"]["trains"]
    assert trains.startswith("groups:")
    assert report["strategy"][1]["selector"] == trains
    assert "the gradient is largest" in report["notes"][0]
    assert "Relative gradient norms after the probe" in [table["title"] for table in report["tables"]]


def _check_adapter(run: bundles.Bundle) -> None:
    """The adapter's file makes the tuned network of its base."""
    keras.utils.set_random_seed(0)
    base = builders.image_classifier("MobileNet-0.25", 1, image_size=32, weights=None)
    base = builders.in_units_of(base, np.array([1.5, 20.0]))
    adapters.Adapter.load(run.folder / "adapter.safetensors").merge_into(base)
    tuned = {weight.path: weight.numpy() for weight in run.model.weights}
    for weight in base.weights:
        if not weight.path.startswith(("to_units", "units")):
            np.testing.assert_array_equal(weight, tuned[weight.path], err_msg=weight.path)


OPTIONS = ["--hidden", "8", "--dropout", "0.4", "--label-smoothing", "0.1", "--balance", "--patience", "3"]


def _check_options(run: bundles.Bundle) -> None:
    """The recipe's options reach the network, the task and the phases."""
    assert run.model.get_layer("head_hidden_1").units == 8
    assert run.model.get_layer("head_dropout").rate == 0.4
    assert (run.task.label_smoothing, run.task.balance) == (0.1, True)
    assert [phase["patience"] for phase in run.manifest["strategy"]] == [3, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rate", "-1"], "learning_rate"),
        (["--checks", "label"], "`checks` must be a comma list of labels"),
        (["--cache-dir", __file__], "`cache_dir` must be a folder"),
        (["--strategy", "ful"], "Did you mean 'full'"),
        (["--strategy", "full:layer_decy=1"], "Did you mean 'layer_decay'"),
        (["--strategy", "partial:last=0"], "whole number from 1"),
        (["--strategy", "partial:last=99"], "Groups: "),
        (["--strategy", "partial:layers=re:conv_pw_99_x"], "Did you mean"),
        (["--strategy", "full:stochastic_depth=0.2"], "no residual branches"),
        (["--strategy", "lora:where=re:nothing"], "matches no kernel"),
        (["--backbone", "MobileNetV2-0.35", "--weights", "none", "--source", "demo"], "pretrained weights"),
    ],
)
def test_strategies_that_do_not_fit_are_refused_at_once(recipe, tmp_path, capsys, options, said):
    assert recipe("--smoke", "--quiet", "--image-size", 32, *options, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_look_at_the_data_settles_on_is_checked_before_a_folder_is_made(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(surgery, "probe_and_measure", lambda *_, **__: surgery.Probed({"stem": 0.1, "top": 1.0}))
    given = ["--backbone", "MobileNetV2-0.35", "--weights", "none", "--image-size", "32", "--smoke", "--quiet"]
    assert recipe(*given, "--strategy", "surgical:stochastic_depth=0.1", "--out", tmp_path / "run") == 2
    assert "no residual branches" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _bad(name, folder):
    """Make one kind of bad input; returns the arguments and what the message must say."""
    photos = folder / "photos"
    table = folder / "table.csv"
    if name == "missing folder":
        return ["--data", folder / "nowhere"], "nowhere"
    if name == "empty folder":
        photos.mkdir()
        return ["--data", photos], "photos"
    if name == "one class":
        return ["--data", _photos(photos, ("cat",))], "one class"
    if name == "empty class":
        _photos(photos)
        (photos / "cow").mkdir()
        return ["--data", photos], "cow"
    if name == "class of one":
        _photos(photos)
        _photos(photos, ("cow",), count=1)
        return ["--data", photos], "cow"
    if name == "labels that training lacks":
        _photos(photos / "train")
        _photos(photos / "validation", ("cat", "cow"))
        return ["--data", photos], "cow"
    if name == "missing column":
        table.write_text("picture,label\na.png,cat\n")
        return ["--data", table], "image"
    if name == "bad encoding":
        table.write_bytes(b"image,label\na.png,caf\xe9\n")
        return ["--data", table], "UTF-8"
    if name == "missing file":
        table.write_text("image,label\na.png,cat\nb.png,dog\n")
        return ["--data", table], "a.png"
    if name == "weights of another network":
        from tftransfer import backbones

        backbones.build("MobileNet-0.5", (32, 32)).save_weights(folder / "other.weights.h5")
        return ["--weights", folder / "other.weights.h5", "--backbone", "MobileNet-0.25"], "other.weights.h5"
    if name == "unwritable folder":
        (folder / "file").write_text("")
        return ["--out", folder / "file" / "run"], "is a file"
    if name == "another run":
        (folder / "run").mkdir()
        (folder / "run" / "manifest.json").write_text('{"configuration": {"seed": 5}}')
        return [], "holds another run"
    return {
        "unknown backbone": (["--backbone", "MobilNetV2"], "Did you mean 'MobileNetV2'"),
        "missing weights": (["--weights", folder / "none.h5"], "none.h5"),
        "image too small": (["--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "8"], "too small"),
        "zero epochs": (["--epochs", "0"], "`epochs`"),
        "unknown strategy": (["--strategy", "half"], "`strategy`"),
        "unknown option": (["--epoch", "3"], "--epoch"),
        "unknown devices": (["--devices", "tpus"], "`devices`"),
        "zero batch": (["--batch-size", "0"], "--batch-size"),
        "negative seed": (["--seed", "-1"], "--seed"),
        "seed too large": (["--seed", "4294967296"], "4294967295"),
        "more groups than there are": (["--strategy", "partial:last=50"], "last:50"),
        "path that is a pattern": (["--out", folder / "run[1]"], "pattern"),
    }[name]


def _contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        "missing folder", "class of one", "bad encoding", "unknown backbone", "weights of another network",
        "missing weights", "image too small", "zero epochs", "unwritable folder", "another run", "unknown strategy",
        "unknown option", "unknown devices", "zero batch", "negative seed",
        "seed too large", "more groups than there are", "path that is a pattern",
        # By default `tests/data/test_loading.py` and `test_tables.py` refuse these:
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("empty folder", "one class", "empty class",
          "labels that training lacks", "missing column", "missing file")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(recipe, tmp_path, capsys, name):
    arguments, said = _bad(name, tmp_path)
    given = _contents(tmp_path)
    out = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    assert recipe("--quiet", *arguments, *out) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err
    assert _contents(tmp_path) == given


def test_errors_of_a_real_process_are_one_line(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, "recipes/image_classification.py", "--data", "nowhere", "--out", tmp_path / "run"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_smoothing_is_refused_for_numbers(recipe, tmp_path, capsys):
    photos = _photos(tmp_path / "photos", classes=("1", "2"))
    code = recipe("--data", photos, *SMALL, "--task", "regression", "--balance", "--out", tmp_path / "out")
    assert code == 2
    assert "regression has none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_decided_stands_in_the_manifest(finished):
    decisions = bundles.read_manifest(finished)["decisions"]
    assert decisions["devices"]
    assert (decisions["replicas"], decisions["precision"]) == (1, "float32")
    assert (decisions["weights"], decisions["image_size"]) == ("demo", [64, 64])


def test_later_exports_are_verified_on_pictures_of_the_run(finished):
    kept = bundles.read_samples(finished)
    assert len(kept) >= 4
    assert all(tf.io.decode_png(picture).shape == (64, 64, 3) for picture in kept)
    assert "samples/0.png" in bundles.read_manifest(finished)["files"]


@pytest.mark.slow
def test_a_version_of_a_run_is_compared_with_the_runs_model(finished, capsys):
    assert cli.main(["verify", str(finished / "serving" / "1"), "--repeats", "2", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["graph session equals Keras"]["passed"] is True
    assert checks["files equal the manifest"]["passed"] is True
