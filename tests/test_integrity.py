"""A flipped bit is named, and so is what is missing and what nobody knows."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tftransfer import bundles, integrity

# Every kind of file that a run writes.
FILES = (
    "MODEL_CARD.md", "checkpoints/001-000000000/state.safetensors", "history.csv", "logs/train/events.out.v2",
    "model.keras",
    "report.html", "report.json", "samples/0.png", "samples/1.png", "serving/1/fingerprint.pb",
    "serving/1/saved_model.pb", "serving/1/variables/variables.data-00000", "serving/1/variables/variables.index",
    "serving/2/fingerprint.pb", "serving/2/saved_model.pb", "serving/2/variables/variables.data-00000",
    "serving/2/variables/variables.index",
)  # fmt: skip


def _found(run):
    return integrity.check_files(run, bundles.read_manifest(run))


def test_every_file_is_covered(written_run):
    everything = {path.relative_to(written_run).as_posix() for path in written_run.rglob("*") if path.is_file()}
    assert set(FILES) == everything - {"manifest.json", "manifest.sha256"}
    assert set(bundles.read_manifest(written_run)["files"]) == set(FILES)
    found = _found(written_run)
    assert found.passed
    assert found.metrics == {"files": len(FILES)}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_a_shorter_and_a_missing_file_is_named(written_run, flip_a_bit, name):
    file = written_run / name
    whole = file.read_bytes()
    flip_a_bit(file)
    assert _found(written_run).metrics == {"changed": [name]}
    file.write_bytes(whole[:-1])
    assert _found(written_run).metrics == {"changed": [name]}
    file.write_bytes(whole)
    assert _found(written_run).passed
    file.unlink()
    assert _found(written_run).metrics == {"missing": [name]}
    file.mkdir()
    assert _found(written_run).metrics == {"missing": [name]}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_of_manifest_and_seal_the_changed_one_is_named(written_run, flip_a_bit, name, seed):
    assert integrity.check_seal(written_run).passed
    flip_a_bit(written_run / name, seed)
    found = integrity.check_seal(written_run)
    assert found.passed is False
    assert found.metrics == {"changed": [name]}


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_missing_manifest_or_seal_is_named(written_run, name):
    (written_run / name).unlink()
    assert integrity.check_seal(written_run).metrics == {"missing": [name]}


def test_the_seal_is_read_by_sha256sum(written_run, flip_a_bit):
    command = ["sha256sum", "--check", "--strict", "manifest.sha256"]
    assert subprocess.run(command, cwd=written_run, capture_output=True, check=False).returncode == 0
    flip_a_bit(written_run / "manifest.json")
    assert subprocess.run(command, cwd=written_run, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("name", ["serving/2/assets.extra/more", "serving/2/.hidden", "serving/1/link"])
def test_a_file_more_in_a_version_is_named(written_run, name):
    (written_run / name).parent.mkdir(exist_ok=True)
    if name.endswith("link"):
        (written_run / name).symlink_to("nowhere")
    else:
        (written_run / name).write_text("more")
    assert _found(written_run).metrics == {"unknown": [name]}


@pytest.mark.parametrize("content", ["saved_model.pb", None])
def test_a_version_that_nobody_published_is_named(written_run, content):
    (written_run / "serving" / "10").mkdir()
    if content:
        (written_run / "serving" / "10" / content).write_text("another graph")
    assert _found(written_run).metrics == {"unknown": ["serving/10"]}


@pytest.mark.parametrize("name", ["notes.txt", "serving/models.config", "serving/.new-1f/saved_model.pb", "logs/more"])
def test_files_elsewhere_are_let_be(written_run, name):
    (written_run / name).parent.mkdir(exist_ok=True)
    (written_run / name).write_text("mine")
    assert _found(written_run).passed


def test_whole_versions_before_the_current_one_may_be_gone(written_run):
    (written_run / "serving" / "1" / "fingerprint.pb").unlink()
    assert _found(written_run).metrics == {"missing": ["serving/1/fingerprint.pb"]}, "half a version is none"
    shutil.rmtree(written_run / "serving" / "1")
    assert _found(written_run).passed
    shutil.rmtree(written_run / "serving" / "2")
    assert len(_found(written_run).metrics["missing"]) == 4


def test_a_manifest_says_what_went_in_and_what_came_out(written_run):
    manifest, report = bundles.read_manifest(written_run), json.loads((written_run / "report.json").read_text())
    for part in ("metrics", "intervals", "seed", "strategy", "versions"):
        assert manifest[part] == report[part]
    assert manifest["weights"]["sha256"] == "ab" * 32
    assert manifest["data"]["fingerprint"] == "cd" * 32
    assert str(written_run.parent) not in (written_run / "manifest.json").read_text()
