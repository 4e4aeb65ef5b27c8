"""Files are moved only where nothing can be lost."""

import errno
import os

import pytest

from tftransfer.audits import moving
from tftransfer.data.examples import Seen
from tftransfer.errors import InputError
from tftransfer.weights import digest


@pytest.fixture
def data(tmp_path):
    """A folder of three good and three broken files; what was seen of them, and their paths."""
    root = tmp_path / "data"
    names = [f"train/{label}/{number}.jpg" for label in "ab" for number in range(3)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    seen = [Seen(name, "a", "train", digest(root / name), "damaged" if "0" in name or "a/1" in name else None)
            for name in names]  # fmt: skip
    return root, seen, [str(root / name) for name in names]


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_broken_files_go_to_the_same_path_and_others_stay(data, tmp_path):
    root, seen, files = data
    before = _files(root)
    moved = moving.move(seen, files, root, tmp_path / "set aside")
    broken = [one.name for one in seen if one.reason]
    assert [(one.file, one.reason, one.stays) for one in moved] == [(name, "damaged", None) for name in broken]
    assert _files(tmp_path / "set aside") == {name: before[name] for name in broken}
    assert _files(root) == {name: text for name, text in before.items() if name not in broken}


@pytest.mark.parametrize("place", ["data", "data/quarantine", "data/train/a", ".", "data/../data/x", "link/x"])
def test_a_folder_in_the_data_or_around_them_is_refused(data, tmp_path, place):
    root, seen, files = data
    (tmp_path / "link").symlink_to(root)
    before = _files(root)
    with pytest.raises(InputError, match="`quarantine` must be a folder apart from the data"):
        moving.move(seen, files, root, tmp_path / place)
    assert _files(root) == before


def test_nothing_is_overwritten_and_then_nothing_moves(data, tmp_path):
    root, seen, files = data
    there = tmp_path / "q" / "train" / "b" / "0.jpg"
    there.parent.mkdir(parents=True)
    there.write_text("another")
    before = _files(root)
    with pytest.raises(InputError, match="has another train/b/0.jpg already: nothing was moved"):
        moving.move(seen, files, root, tmp_path / "q")
    assert (_files(root), _files(tmp_path / "q")) == (before, {"train/b/0.jpg": "another"})


def test_a_move_that_was_interrupted_goes_on(data, tmp_path):
    root, seen, files = data
    there = tmp_path / "q" / "train" / "a" / "0.jpg"
    there.parent.mkdir(parents=True)
    os.link(files[0], there)
    assert all(one.stays is None for one in moving.move(seen, files, root, tmp_path / "q"))
    assert len(_files(root)) == 3


def test_links_changed_unreadable_and_outer_files_stay(data, tmp_path):
    root, seen, files = data
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "0.jpg").write_text("train/a/0.jpg")
    os.unlink(files[0])
    os.symlink(outside / "0.jpg", files[0])
    with open(files[1], "a") as file:
        file.write("changed")
    seen[3] = Seen(seen[3].name, "b", "train", "", "cannot be read: Permission denied")
    moved = moving.move(seen, files, root, tmp_path / "q")
    assert [one.stays for one in moved] == [
        "it is a link or no regular file", "it has changed since it was read", "it cannot be read"]  # fmt: skip
    assert not (tmp_path / "q").exists()
    (root / "linked").symlink_to(outside)
    far = Seen("linked/0.jpg", "linked", "train", digest(outside / "0.jpg"), "damaged")
    (stayed,) = moving.move([far], [str(root / "linked" / "0.jpg")], root, tmp_path / "q")
    assert stayed.stays == "it lies outside the data"
    assert (outside / "0.jpg").is_file()


def test_another_file_system_gets_a_copy(data, tmp_path, monkeypatch):
    def link(*paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    root, seen, files = data
    monkeypatch.setattr(os, "link", link)
    moving.move(seen, files, root, tmp_path / "q")
    assert set(_files(tmp_path / "q")) == {one.name for one in seen if one.reason}
    assert len(_files(root)) == 3


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path):
    root, seen, files = data
    (tmp_path / "q").write_text("a file")
    with pytest.raises(InputError, match=r"0\.jpg cannot be moved to .*: Not a directory|File exists"):
        moving.move(seen, files, root, tmp_path / "q")
    assert len(_files(root)) == 6
