import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

from tftransfer import bundles, integrity
from tftransfer.errors import InputError
from tftransfer.report import Number, Report

CONFIGURATION = {"recipe": "image_classification", "seed": 0, "epochs": None}


def _report() -> Report:
    data = {"name": "colours", "train": 24, "validation": 12, "test": 12, "quarantined": []}
    strategy = [{"name": "probe", "selector": "head", "epochs": 1}]
    return Report("image_classification", "small", strategy, True, data, {"accuracy": Number(0.5, 0.2, 0.8, "wilson")})


def _saved(folder, model, task):
    bundles.begin(folder, CONFIGURATION, again=True)
    bundles.save(folder, model, task, _report(), configuration=CONFIGURATION, provenance={"data": {}})


def test_a_run_is_read_back(tmp_path, small_network, small_task):
    model = small_network()
    _saved(tmp_path, model, small_task)
    bundle = bundles.load(tmp_path)
    assert bundle.task == small_task
    assert bundle.image_size == (32, 32)
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(bundle.model(pictures), model(pictures))


def test_every_file_of_the_contract_is_written(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model.keras",
        "manifest.json",
        "manifest.sha256",
        "report.json",
        "report.html",
        "MODEL_CARD.md",
    }
    assert not [name for name in names if name.startswith(".")]


def test_model_is_saved_uncompiled(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    assert not keras.saving.load_model(tmp_path / "model.keras").compiled


def test_a_changed_file_is_named(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    (tmp_path / "report.json").write_text("{}")
    assert integrity.changed_files(tmp_path, bundles.read_manifest(tmp_path)) == ["report.json"]


def test_what_a_process_that_was_killed_before_its_manifest_left_is_no_other_run(tmp_path):
    (tmp_path / ".probe").mkdir()
    for name in (".lock", ".manifest.json.staged"):
        (tmp_path / name).touch()
    assert not bundles.claim(tmp_path, CONFIGURATION)
    bundles.begin(tmp_path, CONFIGURATION)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


class _Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_killed_while_its_manifest_is_written_is_sealed_or_written_again(tmp_path, monkeypatch, complete):
    def dying_at(place):
        calls = iter(range(place))

        def dying(function):
            def call(*given, **named):
                if next(calls, None) is None:
                    raise _Killed
                return function(*given, **named)

            return call

        for module, name in ((Path, "write_text"), (Path, "unlink"), (os, "replace"), (os, "fsync")):
            monkeypatch.setattr(module, name, dying(getattr(module, name)))

    for place in range(20):
        folder = tmp_path / str(place)
        bundles.begin(folder, CONFIGURATION)
        bundles.finish(folder, CONFIGURATION, complete=False, current="1")
        dying_at(place)
        try:
            bundles.finish(folder, CONFIGURATION, complete=complete, current="2")
        except _Killed:
            monkeypatch.undo()
        else:
            break
        bundles.read_manifest(folder)  # which refuses one with a wrong seal
        if bundles.claim(folder, CONFIGURATION):
            bundles.settle(folder)
        else:
            bundles.finish(folder, CONFIGURATION, complete=complete, current="2")
        assert {path.name for path in folder.iterdir()} == {"manifest.json", "manifest.sha256"}
        assert integrity.check_seal(folder).passed
        assert bundles.read_manifest(folder)["current"] == "2"
    assert place >= 9


def test_an_export_killed_while_the_manifest_is_written_is_noted_by_the_next_call(written_run, monkeypatch):
    def killed(path):
        raise _Killed

    _publish(written_run, "3")
    monkeypatch.setattr(bundles, "_put_in_place", killed)
    with pytest.raises(_Killed):
        bundles.refresh(written_run, "serving/3")
    monkeypatch.undo()
    assert not (written_run / "manifest.sha256").exists()
    bundles.settle(written_run)
    assert integrity.check_seal(written_run).passed
    assert bundles.read_manifest(written_run)["current"] == "3"
    assert not list(written_run.glob(".*"))


def test_a_seal_that_somebody_removed_is_not_put_back(written_run):
    (written_run / "manifest.sha256").unlink()
    bundles.settle(written_run)
    assert not (written_run / "manifest.sha256").exists()


def test_leftovers_of_an_interrupted_export_are_not_part_of_a_run(tmp_path):
    for name in ("serving/.new-1f/saved_model.pb", "serving/1/saved_model.pb", "logs/events", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(integrity.digests(tmp_path)) == {"serving/1/saved_model.pb", "logs/events"}


def _publish(folder, version):
    (folder / "serving" / version).mkdir()
    (folder / "serving" / version / "saved_model.pb").write_text(f"graph {version}")


def test_after_an_export_the_manifest_knows_the_new_version_and_is_sealed(written_run):
    _publish(written_run, "10")
    bundles.refresh(written_run, "serving/10")
    manifest = bundles.read_manifest(written_run)
    assert manifest["current"] == "10"
    assert integrity.check_seal(written_run).passed
    assert integrity.check_files(written_run, manifest).passed


def test_versions_that_publishing_removed_leave_the_manifest(written_run):
    shutil.rmtree(written_run / "serving" / "1")
    _publish(written_run, "3")
    bundles.refresh(written_run, "serving/3")
    manifest = bundles.read_manifest(written_run)
    assert {name.split("/")[1] for name in manifest["files"] if name.startswith("serving/")} == {"2", "3"}
    assert integrity.check_files(written_run, manifest).passed


def test_an_export_does_not_cover_up_what_somebody_changed(written_run, flip_a_bit):
    changed = ["report.html", "serving/1/saved_model.pb"]
    for name in changed:
        flip_a_bit(written_run / name)
    (written_run / "history.csv").unlink()
    _publish(written_run, "3")
    bundles.refresh(written_run, "serving/3")
    found = integrity.check_files(written_run, bundles.read_manifest(written_run))
    assert found.metrics == {"changed": changed, "missing": ["history.csv"]}


def test_what_a_command_writes_again_is_known_as_it_is_now(written_run):
    (written_run / "extra").mkdir()
    for names in (("a", "b"), ("b", "c")):
        shutil.rmtree(written_run / "extra")
        (written_run / "extra").mkdir()
        for name in names:
            (written_run / "extra" / name).write_text(f"{name} of {names}")
        bundles.refresh(written_run, "extra")
    manifest = bundles.read_manifest(written_run)
    assert [name for name in manifest["files"] if name.startswith("extra/")] == ["extra/b", "extra/c"]
    assert manifest["current"] == "2"
    assert integrity.check_files(written_run, manifest).passed


def test_several_exports_at_the_same_time_are_all_noted(written_run):
    numbers = list(map(str, range(3, 9)))
    for version in numbers:
        _publish(written_run, version)
    threads = [threading.Thread(target=bundles.refresh, args=(written_run, f"serving/{n}")) for n in numbers]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    manifest = bundles.read_manifest(written_run)
    assert manifest["current"] == "8"
    assert integrity.check_files(written_run, manifest).passed


def test_samples_that_somebody_changed_are_not_used(written_run, flip_a_bit):
    assert len(bundles.read_samples(written_run)) == 2
    flip_a_bit(written_run / "samples" / "0.png")
    (written_run / "samples" / "7.png").write_text("added")
    assert bundles.read_samples(written_run) == [(written_run / "samples" / "1.png").read_bytes()]


def test_a_damaged_model_is_refused(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    contents = bytearray((tmp_path / "model.keras").read_bytes())
    contents[len(contents) // 2] ^= 1
    (tmp_path / "model.keras").write_bytes(contents)
    with pytest.raises(InputError, match=r"model\.keras"):
        bundles.load(tmp_path)


def test_a_folder_is_claimed_by_one_run(tmp_path, small_network, small_task):
    folder = tmp_path / "run"
    assert not bundles.claim(folder, CONFIGURATION)
    assert not folder.exists()
    bundles.begin(folder, CONFIGURATION)
    assert not bundles.claim(folder, CONFIGURATION)
    with pytest.raises(InputError, match="seed 0 there, 1 here"):
        bundles.claim(folder, {**CONFIGURATION, "seed": 1})
    _saved(folder, small_network(), small_task)
    assert bundles.claim(folder, CONFIGURATION)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("existing", [False, True])
def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path, seed, existing):
    folder = tmp_path if existing else tmp_path / "run"
    second = {**CONFIGURATION, "seed": seed}
    assert not bundles.claim(folder, CONFIGURATION)
    assert not bundles.claim(folder, second)
    bundles.begin(folder, CONFIGURATION)
    with pytest.raises(InputError, match="another run"):
        bundles.begin(folder, second)
    assert bundles.read_manifest(folder)["configuration"] == CONFIGURATION


def test_an_interrupted_run_begins_again_unless_it_was_finished_since(tmp_path, small_network, small_task):
    bundles.begin(tmp_path, CONFIGURATION)
    bundles.begin(tmp_path, CONFIGURATION, again=True)
    _saved(tmp_path, small_network(), small_task)
    with pytest.raises(InputError, match="another run"):
        bundles.begin(tmp_path, CONFIGURATION, again=True)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        bundles.claim(tmp_path, CONFIGURATION)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        bundles.claim(tmp_path / "file" / "run", CONFIGURATION)


@pytest.mark.parametrize("name", ["a[b", "a]b", "a*b", "a?b", "a\\b", "caf\udce9", "[ab]/run"])
def test_a_path_that_tensorflow_cannot_read_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="must be a path"):
        bundles.claim(tmp_path / name, CONFIGURATION)
    assert not list(tmp_path.iterdir())


def test_the_whole_path_counts_not_only_what_was_given(tmp_path, monkeypatch):
    (tmp_path / "[old]").mkdir()
    monkeypatch.chdir(tmp_path / "[old]")
    with pytest.raises(InputError, match="pattern"):
        bundles.claim(Path("run"), CONFIGURATION)


def test_numbers_count_up(tmp_path):
    assert bundles.next_folder(tmp_path, "run").name == "run-001"
    (tmp_path / "run-007").mkdir()
    for name in ("old", "²"):
        (tmp_path / f"run-{name}").mkdir()
    assert bundles.next_folder(tmp_path, "run").name == "run-008"


@pytest.mark.parametrize("content", [None, "{", "[]", "5", '{"files": []}', '{"configuration": 1}'])
def test_folders_without_a_manifest_are_refused(tmp_path, content):
    if content:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        bundles.load(tmp_path)


@pytest.mark.parametrize("manifest", [{}, {"task": None}, {"task": {"kind": "single_label"}}, {"task": {"kind": "?"}}])
def test_a_manifest_without_a_task_is_refused(tmp_path, manifest):
    with pytest.raises(InputError, match="task"):
        bundles.task_of(tmp_path, manifest)


def test_an_unfinished_run_is_refused(tmp_path):
    bundles.begin(tmp_path, CONFIGURATION)
    with pytest.raises(InputError, match="not finished"):
        bundles.load(tmp_path)


def test_the_manifest_is_sealed(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    expected = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert (tmp_path / "manifest.sha256").read_text() == f"{expected}  manifest.json\n"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.keras", "report.json", "report.html", "MODEL_CARD.md"}


def test_a_changed_manifest_is_refused(tmp_path, small_network, small_task):
    _saved(tmp_path, small_network(), small_task)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"red"', '"rot"'))
    for use in (bundles.load, bundles.read_manifest, lambda folder: bundles.claim(folder, CONFIGURATION)):
        with pytest.raises(InputError, match=r"was changed.*manifest\.sha256"):
            use(tmp_path)
    (tmp_path / "manifest.sha256").unlink()
    assert bundles.read_manifest(tmp_path)["labels"] == ["rot", "green", "blue"]


def test_names_that_are_not_utf8_are_written_and_read_back(tmp_path):
    content = {"file": "caf\udce9.png", "escaped": "a\\\udce9", "plain": "café ,"}
    bundles.write_json(tmp_path / "report.json", content)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == content
    bundles.write_text(tmp_path / "report.html", "caf\udce9")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "caf\\udce9"
    configuration = {**CONFIGURATION, "data": "caf\udce9"}
    bundles.begin(tmp_path / "run", configuration)
    assert not bundles.claim(tmp_path / "run", configuration)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.keras").write_text("not a model")
    with pytest.raises(InputError, match="cannot be loaded"):
        bundles.load_model(tmp_path / "model.keras")
