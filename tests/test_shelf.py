import errno
import os
import subprocess
import sys
import time
import types

import pytest

from tftransfer import shelf as shelves
from tftransfer.errors import InputError
from tftransfer.shelf import Shelf


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "cache")


def test_items_come_back_as_they_were(shelf):
    assert shelf.get("key", "name") is None
    assert shelf.put("key", "name", b"one")
    assert shelf.put("key", "other", b"")
    assert shelf.get("key", "name") == b"one"
    assert shelf.get("key", "other") == b""
    assert shelf.get("another", "name") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: contents[:-1],
        lambda contents: contents + b"x",
        lambda contents: b"",
        lambda contents: contents[:50] + bytes([contents[50] ^ 1]) + contents[51:],
        lambda contents: bytes([contents[0] ^ 128]) + contents[1:],
        lambda contents: contents[:20] + bytes([contents[20] ^ 4]) + contents[21:],
    ],
    ids=["cut short", "too long", "empty", "a bit of the payload", "a bit of the kind", "a bit of the length"],
)
def test_a_damaged_item_is_no_item(shelf, damage):
    shelf.put("key", "name", bytes(range(100)))
    path = shelf.path("key", "name")
    path.write_bytes(damage(path.read_bytes()))
    assert shelf.get("key", "name") is None
    assert "damaged" in shelf.notes[0]
    assert not path.exists()
    assert shelf.put("key", "name", b"again")
    assert shelf.get("key", "name") == b"again"


def test_every_flipped_bit_is_noticed(shelf):
    shelf.put("key", "name", b"payload")
    path = shelf.path("key", "name")
    whole = path.read_bytes()
    for place in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert shelf.get("key", "name") is None


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_so_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    shelf = Shelf(tmp_path / "file" / "cache")
    assert not shelf.put("key", "one", b"1")
    assert not shelf.put("key", "two", b"2")
    assert shelf.get("key", "one") is None
    assert sum("cannot be written" in note for note in shelf.notes) == 1


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
def test_a_write_that_fails_leaves_nothing_behind(shelf, monkeypatch, fault):
    assert shelf.put("key", "before", b"1")

    def fail(*given):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "replace", fail)
    assert not shelf.put("key", "name", b"2")
    monkeypatch.undo()
    assert os.strerror(fault) in shelf.notes[0]
    assert [path.name for path in shelf.folder.rglob("*") if path.is_file()] == ["before"]
    assert shelf.get("key", "before") == b"1"


def _names(shelf):
    return sorted(path.name for path in shelf.folder.rglob("*") if path.is_file())


def _age(shelf, key, name, seconds):
    moment = time.time() - seconds
    os.utime(shelf.path(key, name), (moment, moment))


def test_the_items_used_longest_ago_go_first(tmp_path):
    shelf = Shelf(tmp_path, limit=4 * 4096)
    for age, name in enumerate(("new", "middle", "old")):
        shelf.put("key", name, bytes(1000))
        _age(shelf, "key", name, 1000 * (age + 1))
    assert shelf.make_room(2, 1000)  # a file takes a block of the disk, however short it is
    assert _names(shelf) == ["middle", "new"]
    assert shelf.get("key", "middle")  # used now
    assert shelf.make_room(3, 4000)
    assert _names(shelf) == ["middle"]
    assert shelf.make_room(3, 4000, [shelf.path("key", "middle")])
    assert not shelf.make_room(4, 4000, [shelf.path("key", "middle")])
    assert "no room" in shelf.notes[0]
    assert _names(shelf) == ["middle"]


def test_what_can_never_fit_drives_nothing_out(tmp_path):
    shelf = Shelf(tmp_path, limit=2 * 4096)
    shelf.put("key", "name", bytes(1000))
    assert not shelf.make_room(3, 1000)
    assert _names(shelf) == ["name"]


def test_nothing_to_come_needs_no_room(tmp_path):
    shelf = Shelf(tmp_path, limit=1)
    shelf.put("key", "name", bytes(1000))
    assert shelf.make_room(0, 1000)
    assert _names(shelf) == ["name"]


def test_what_ended_processes_left_half_written_goes(tmp_path):
    shelf = Shelf(tmp_path, limit=4096)
    shelf.put("theirs", "name", bytes(1000))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    half = tmp_path / "theirs" / "na" / f".half.{other.pid}"
    try:
        half.touch()
        assert not shelf.make_room(2, 1500)
        assert half.exists()
    finally:
        other.communicate(b"\n")
    assert shelf.make_room(1, 1500)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_comes_beside_needs_room_on_the_disk_alone(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path, limit=4096)
    shelf.put("key", "name", bytes(1000))
    monkeypatch.setattr(Shelf, "_free", lambda self: shelves._SPARE + 8192)
    assert shelf.make_room(0, 1000, beside=8192)
    assert shelf.make_room(1, 1000, beside=4096)  # in the place of the other
    assert _names(shelf) == []
    assert not shelf.make_room(1, 1000, beside=8192)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_temporary_folder_that_takes_memory_is_none(tmp_path, monkeypatch, kind):
    disks = [types.SimpleNamespace(mountpoint="/", fstype="ext4")]
    disks += [types.SimpleNamespace(mountpoint=place, fstype=kind) for place in (str(tmp_path), "/var/tmp")]
    monkeypatch.setattr(shelves.psutil, "disk_partitions", lambda all: disks)
    monkeypatch.setattr(shelves.tempfile, "tempdir", str(tmp_path))
    with shelves.folder_or_temporary(None, needed=True) as folder:
        assert (folder is None) == (kind == "tmpfs")
        assert folder is None or os.path.isdir(folder)
    assert not list(tmp_path.iterdir())


HOLDS = """
import sys, tempfile, time
from tftransfer import shelf
tempfile.tempdir, shelf.is_memory = sys.argv[1], lambda folder: False
with shelf.folder_or_temporary(None, needed=True) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_temporary_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shelves.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shelves, "is_memory", lambda folder: False)
    (tmp_path / "tftransfer-notes").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        left = other.stdout.readline().strip()
        os.utime(left, (0, 0))
        with shelves.folder_or_temporary(None, needed=True):
            assert os.path.isdir(left), "its process is running"
        other.kill()
    os.utime(left)
    with shelves.folder_or_temporary(None, needed=True):
        assert os.path.isdir(left), "it may have been made just now"
    os.utime(left, (0, 0))
    with shelves.folder_or_temporary(None, needed=True):
        assert not os.path.exists(left)
    assert [path.name for path in tmp_path.iterdir()] == ["tftransfer-notes"]


def test_only_a_folder_of_its_own_is_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(bytes(10_000))
    shelf = shelves.shelf_at(tmp_path, limit=4096)
    shelf.put("key", "name", b"1")
    assert shelf.make_room(1, 100)
    assert _names(shelf) == []
    assert (tmp_path / "photos" / "one.jpg").exists()


def test_a_cache_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="must be a folder"):
        shelves.shelf_at(tmp_path / "file")
    assert shelves.shelf_at(None) is None


def test_a_cache_that_nobody_may_look_into_keeps_nothing(tmp_path, monkeypatch):
    """Root may look into everything, so the refusal is made here."""

    def refuse(*given, **named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for function in ("stat", "mkdir", "utime", "scandir", "listdir"):
        monkeypatch.setattr(os, function, refuse)
    shelf = shelves.shelf_at(tmp_path / "theirs")
    assert not shelf.put("key", "name", b"1")
    assert not shelf.make_room(1, 1)
    assert "cannot be written (Permission denied)" in shelf.notes[0]
