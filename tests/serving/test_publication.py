from __future__ import annotations

import os
import shutil
import threading

import pytest

from tftransfer import InputError, serving
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


def test_what_a_killed_process_left_is_gone_after_the_next(tmp_path):
    build_in(tmp_path / ".new-0123")
    publication.publish_directory(build, tmp_path, lambda _: PASSED)
    assert sorted(os.listdir(tmp_path)) == ["1"]


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


def test_one_process_publishes_at_a_time(tmp_path):
    began, released, order = threading.Event(), threading.Event(), []

    def slow(folder):
        began.set()
        released.wait(10)
        order.append("first")
        build(folder)

    first = threading.Thread(target=publication.publish_directory, args=(slow, tmp_path, lambda _: PASSED))
    first.start()
    began.wait(10)
    second = threading.Thread(
        target=publication.publish_directory,
        args=(lambda folder: (order.append("second"), build(folder)), tmp_path, lambda _: PASSED),
    )
    second.start()
    second.join(0.2)
    assert second.is_alive()
    released.set()
    first.join()
    second.join()
    assert order == ["first", "second"]
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_the_server_may_be_another_user(tmp_path):
    version, _ = publication.publish_directory(build, tmp_path / "serving", lambda _: PASSED)
    mask = os.umask(0)
    os.umask(mask)
    assert version.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "serving").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        publication.publish_directory(build, tmp_path / "serving", lambda _: PASSED)


def test_publish_exports_and_verifies(model, task, pictures, tmp_path):
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2)
    assert version == tmp_path / "1"
    assert verification.passed
    assert (version / "saved_model.pb").is_file()
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.usefixtures("without_c_library")
def test_publish_refuses_an_export_that_answers_otherwise(model, network, task, pictures, tmp_path, monkeypatch):
    export = publication.export_savedmodel
    monkeypatch.setattr(
        publication,
        "export_savedmodel",
        lambda _, *arguments, **options: export(network(seed=1), *arguments, **options),
    )
    version, verification = serving.publish(model, task, tmp_path, pictures, repeats=2)
    assert version is None
    assert verification.failed == ("graph session equals Keras",)
    assert os.listdir(tmp_path) == []
