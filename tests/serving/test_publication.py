from __future__ import annotations

import os
import platform
import shutil

import psutil
import pytest
import tensorflow as tf

from tftransfer import InputError, constants, serving, tasks
from tftransfer.serving import publication

PASSED = serving.Verification(()).with_check("look", True)
FAILED = serving.Verification(()).with_check("look", False)


def build(folder):
    (folder / "variables").mkdir()
    (folder / "saved_model.pb").write_text("graph")
    (folder / "variables" / "variables.index").write_text("index")


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_versions_are_counted_from_one(tmp_path):
    parent = tmp_path / "run" / "serving"
    first, verification = publication.publish_directory(build, parent, lambda _: PASSED)
    second, _ = publication.publish_directory(build, parent, lambda _: PASSED)
    assert (first, second) == (parent / "1", parent / "2")
    assert verification is PASSED
    assert contents(parent / "2") == ["saved_model.pb", "variables", "variables/variables.index"]
    assert sorted(os.listdir(parent)) == ["1", "2"]


def test_the_next_version_follows_the_highest_number(tmp_path):
    for name in ("2", "10", ".new-7", "notes", "11.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "12").write_text("a file is no version")
    assert serving.next_version(tmp_path) == tmp_path / "11"
    assert serving.newest_version(tmp_path) == tmp_path / "10"
    assert serving.newest_version(tmp_path / "missing") is None


def test_nothing_is_visible_before_it_is_checked_and_on_the_disk(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (events.append("rename"), rename(*names)))

    def check(folder):
        assert serving.newest_version(tmp_path) is None
        assert folder.parent == tmp_path, "a rename from another file system would be a copy"
        assert folder.name.startswith(".")
        events.append("check")
        return PASSED

    publication.publish_directory(build, tmp_path, check)
    assert events[0] == "check"
    before = events[1 : events.index("rename")]
    assert [path.rsplit("/", 1)[-1] for path in before[:2]] == ["variables.index", "variables"]
    assert len(before) == 4
    assert events[events.index("rename") + 1] == str(tmp_path)


def test_what_fails_is_not_published_and_leaves_nothing(tmp_path):
    version, verification = publication.publish_directory(build, tmp_path / "run" / "serving", lambda _: FAILED)
    assert version is None
    assert verification is FAILED
    assert contents(tmp_path) == []


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_older_versions_alone(problem, tmp_path):
    publication.publish_directory(build, tmp_path, lambda _: PASSED)

    def stop(folder):
        build(folder)
        raise problem("stopped")

    with pytest.raises(problem):
        publication.publish_directory(stop, tmp_path, lambda _: PASSED)
    with pytest.raises(problem):
        publication.publish_directory(build, tmp_path, lambda folder: stop(folder / "variables"))
    assert sorted(os.listdir(tmp_path)) == ["1"]


def test_what_ended_processes_left_is_gone_after_the_next_and_nothing_else(tmp_path):
    node = platform.node()
    processes = (f"{node}-4194305", f"{node}-1", "x-4194305", "x-7", f"{node}-{os.getpid()}")
    ended, alive, elsewhere, old, of_our_number = (f".new-{one}-0" for one in processes)
    for name in (ended, alive, elsewhere, old, of_our_number):
        build_in(tmp_path / name)
    os.utime(tmp_path / old, (0, 0))
    before_we_began = psutil.Process().create_time() - 60
    os.utime(tmp_path / of_our_number, (before_we_began, before_we_began))
    publication.publish_directory(build, tmp_path, lambda _: PASSED)
    assert sorted(os.listdir(tmp_path)) == sorted([alive, elsewhere, "1"])


def build_in(folder):
    folder.mkdir(parents=True)
    build(folder)


def test_the_newest_versions_are_kept(tmp_path, monkeypatch):
    seen = []
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **given: (seen.append(path.name), remove(path, **given)))
    for _ in range(4):
        publication.publish_directory(build, tmp_path, lambda _: PASSED, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]
    assert all(name.startswith(".new-") for name in seen), "half of a version must never bear a number"


def test_two_that_publish_at_the_same_time_get_two_numbers(tmp_path):
    def meanwhile(folder):
        build(folder)
        if not (tmp_path / "1").exists():
            publication.publish_directory(build, tmp_path, lambda _: PASSED)
        return PASSED

    version, _ = publication.publish_directory(lambda _: None, tmp_path, meanwhile)
    assert version == tmp_path / "2"
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_number_that_is_taken_in_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):
        if target == tmp_path / "1" and not target.exists():
            build_in(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    version, _ = publication.publish_directory(build, tmp_path, lambda _: PASSED)
    assert version == tmp_path / "2"


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_to_keep_no_version_is_bad_input(keep, tmp_path):
    with pytest.raises(InputError, match="keep"):
        publication.publish_directory(build, tmp_path / "serving", lambda _: PASSED, keep=keep)
    assert not (tmp_path / "serving").exists()


def test_an_old_version_that_cannot_be_removed_stays(tmp_path, monkeypatch):
    for _ in range(2):
        publication.publish_directory(build, tmp_path, lambda _: PASSED)
    rename = os.rename

    def refused(source, target):
        if source.name == "1":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    version, _ = publication.publish_directory(build, tmp_path, lambda _: PASSED, keep=1)
    assert version == tmp_path / "3"
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
def test_what_answers_otherwise_as_constants_is_published_with_its_variables(
    model, task, pictures, tmp_path, monkeypatch
):
    infer = constants.as_portable_function(model)
    monkeypatch.setattr(constants, "as_portable_function", lambda _: lambda image: [infer(image)[0] + [1, 0, 0]])
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2)
    assert version == tmp_path / "1"
    reason = verification.checks[-1].metrics["reason"]
    assert reason == "with constants graph session equals Keras failed, so variables are kept"


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
def test_a_fault_of_the_optimiser_keeps_the_variables(model, task, pictures, tmp_path, monkeypatch):
    def fails(*_):
        raise tf.errors.InternalError(None, None, "fault")

    monkeypatch.setattr(constants, "as_portable_function", fails)
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2)
    assert version
    assert "optimiser failed (InternalError)" in verification.checks[-1].metrics["reason"]
    again, found = serving.publish(model, task, tmp_path, pictures, repeats=2, reuse=True)
    assert again == version
    assert found.checks[-1] == verification.checks[-1]


def test_the_server_may_be_another_user(tmp_path):
    version, _ = publication.publish_directory(build, tmp_path / "serving", lambda _: PASSED)
    mask = os.umask(0)
    os.umask(mask)
    assert version.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "serving").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        publication.publish_directory(build, tmp_path / "serving", lambda _: PASSED)


@pytest.mark.slow
def test_publish_exports_and_verifies(model, task, pictures, tmp_path):
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2)
    assert version == tmp_path / "1"
    assert verification.passed
    assert (version / "saved_model.pb").is_file()
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.slow
def test_the_same_network_is_verified_and_not_published_again(network, task, pictures, tmp_path):
    first, found = serving.publish(network(), task, tmp_path, pictures, repeats=2, reuse=True)
    again, found_again = serving.publish(network(), task, tmp_path, pictures, repeats=2, reuse=True)
    assert again == first
    assert [check.name for check in found_again.checks] == [check.name for check in found.checks]
    assert found_again.passed


@pytest.fixture
def publish_quickly(monkeypatch, tmp_path):
    """Return a function that publishes what is no SavedModel and is not verified."""
    monkeypatch.setattr(publication, "export_savedmodel", lambda model, task, folder, **_: build(folder) or "")
    monkeypatch.setattr(publication, "prove", lambda *_: PASSED)
    monkeypatch.setattr(publication.scanning, "check", lambda _: None)

    def publish(model, task, samples=(b"picture",), *, reuse=True, top_k=0):
        return serving.publish(model, task, tmp_path, samples, warm_up_sizes=(), reuse=reuse, top_k=top_k)[0].name

    return publish


def test_what_the_newest_version_was_exported_from_is_no_version_more(publish_quickly, network, task, tmp_path):
    assert publish_quickly(network(), task) == "1"
    (tmp_path / f".new-{platform.node()}-4194305-0").mkdir()
    assert publish_quickly(network(), task) == "1"
    assert os.listdir(tmp_path) == ["1"]
    assert publish_quickly(network(seed=1), task) == "2"
    assert publish_quickly(network(seed=1), task) == "2"
    assert publish_quickly(network(), task) == "3", "a server answers with the newest"


@pytest.mark.parametrize("change", ["task", "samples", "top_k", "file", "missing", "unscanned", "failed", "reuse"])
def test_what_differs_is_the_next_version(publish_quickly, network, task, tmp_path, flip_a_bit, monkeypatch, change):
    def refuse(folder):
        raise InputError("no SavedModel")

    publish_quickly(network(), task)
    given = {"top_k": {"top_k": 2}, "samples": {"samples": (b"another",)}, "reuse": {"reuse": False}}
    if change == "task":
        task = tasks.SingleLabel(tuple(reversed(task.labels)))
    if change == "file":
        flip_a_bit(tmp_path / "1" / "saved_model.pb")
    if change == "missing":
        (tmp_path / "1" / "variables" / "variables.index").unlink()
    if change == "unscanned":
        monkeypatch.setattr(publication.scanning, "check", refuse)
    if change == "failed":
        monkeypatch.setattr(publication, "prove", lambda folder, *_: FAILED if folder.name == "1" else PASSED)
    assert publish_quickly(network(), task, **given.get(change, {})) == "2"


@pytest.mark.usefixtures("without_c_library")
@pytest.mark.parametrize("optimise", [pytest.param(True, marks=pytest.mark.slow), False])
def test_publish_refuses_an_export_that_answers_otherwise(
    optimise, model, network, task, pictures, tmp_path, monkeypatch
):
    export = publication.export_savedmodel
    monkeypatch.setattr(
        publication,
        "export_savedmodel",
        lambda _, *arguments, **options: export(network(seed=1), *arguments, **options),
    )
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2, optimise=optimise)
    assert version is None
    assert verification.failed == ("graph session equals Keras",)
    assert os.listdir(tmp_path) == []
