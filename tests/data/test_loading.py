"""Folders and the flow from a source to data: what is used, what is set aside, what is refused."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tftransfer import tasks
from tftransfer.data import audit, load, load_for, order, room
from tftransfer.data.images import decode_picture
from tftransfer.errors import InputError

SIZE = (8, 8)


def pictures_of(examples):
    return np.concatenate([batch[0] for batch in order.in_order(examples, 16)])


def test_demo():
    data, task = load("demo", image_size=SIZE, seed=0)
    other, _ = load("demo", image_size=SIZE, seed=1)
    assert isinstance(task, tasks.SingleLabel)
    assert task.labels == tuple("0123456789")
    assert (len(data.train), len(data.validation), len(data.test)) == (1295, 142, 360)
    assert data.test.names == other.test.names
    assert data.validation.names != other.validation.names
    assert data.fingerprint != other.fingerprint == load("demo", image_size=SIZE, seed=1)[0].fingerprint
    pixels = pictures_of(data.test)
    assert pixels.max() == 255
    assert pixels[..., 0].mean() < 100, "white on black"
    assert data.found == 1797


def test_class_folders(make_folder):
    root = make_folder({"cat": 10, "dog": 20})
    (root / ".hidden").mkdir()
    (root / "cat" / "notes.txt").write_text("no picture")
    data, task = load(root, image_size=SIZE)
    assert task.labels == data.labels == ("cat", "dog")
    assert (len(data.test), len(data.validation), len(data.train)) == (6, 3, 21)
    assert data.found == 30
    assert data.name == "photos"
    for examples in (data.train, data.validation, data.test):
        for number, name in enumerate(examples.names):
            assert name.startswith(data.labels[examples.targets[number]])
            expected = decode_picture(tf.constant((root / name).read_bytes()), SIZE)
            np.testing.assert_array_equal(examples.pictures.load(tf.constant(number, tf.int64)), expected)


def test_pictures_that_fit_neither_memory_nor_disk_are_decoded_again(make_folder, monkeypatch):
    monkeypatch.setattr(room, "is_memory", lambda _: True)
    root = make_folder({"cat": 5, "dog": 5})
    kept, _ = load(root, image_size=SIZE)
    again, _ = load(root, image_size=SIZE, memory_budget=0)
    assert kept.fingerprint == again.fingerprint
    np.testing.assert_array_equal(pictures_of(kept.train), pictures_of(again.train))


# Watches the resident size itself: the largest one that the system remembers may be that of the parent process.
_PEAK = """
import threading
import numpy as np, psutil
from tftransfer.data import load

def watch():
    while not done.wait(0.005):
        sizes.append(psutil.Process().memory_info().rss)

pictures, labels = np.zeros((1000, 8, 8, 3), np.uint8), np.arange(1000) % 2
load((pictures[:20], labels[:20]), image_size=(8, 8))
done, sizes = threading.Event(), [psutil.Process().memory_info().rss]
watcher = threading.Thread(target=watch)
watcher.start()
data, _ = load((pictures, labels), image_size=(320, 320), memory_budget=1000 * 320 * 320 * 3)
done.set()
watcher.join()
print((max(sizes) - sizes[0]) / (1000 * 320 * 320 * 3))
"""


@pytest.mark.slow
def test_decoded_pictures_are_held_once(repository):
    command = [sys.executable, "-c", _PEAK]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.4, "of the budget; a copy of the splits would be 2"


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_names_that_are_not_utf_8_leave_as_valid_text(make_folder, memory_budget):
    root = make_folder({"cat": 5, "dog": 5})
    os.rename(root / "cat" / "0.png", os.fsencode(root / "cat") + b"/caf\xe9.png")
    os.rename(root / "dog", os.fsencode(root) + b"/d\xf6g")
    data, task = load(root, image_size=SIZE, memory_budget=memory_budget)
    names = {name for part in (data.train, data.validation, data.test) for name in part.names}
    assert "cat/caf\\udce9.png" in names
    assert len(names) == 10
    assert task.labels == ("cat", "d\\udcf6g")
    assert all(len(pictures_of(part)) for part in (data.train, data.validation, data.test))


def test_a_changed_pixel_changes_the_fingerprint(make_folder):
    root = make_folder({"cat": 5, "dog": 5})
    before = load(root, image_size=SIZE)[0].fingerprint
    Image.new("RGB", (8, 8)).save(root / "cat" / "0.png")
    assert load(root, image_size=SIZE)[0].fingerprint != before


def test_split_folders_and_class_order(make_folder):
    root = make_folder({"train/b": 4, "train/a": 4, "val/a": 1, "val/b": 2, "dev/a": 1})
    (root / "classes.txt").write_text("b\na\n")
    data, task = load(root, image_size=SIZE)
    assert task.labels == ("b", "a")
    assert len(data.validation) == 4
    assert len(data.test) == 2
    assert data.splits["validation"]["from"] == "the source"
    assert data.splits["test"]["from"].startswith("20 % of train")


def test_a_folder_with_one_other_sub_folder_is_not_split_first(make_folder):
    _, task = load(make_folder({"train": 3, "boat": 3}), image_size=SIZE)
    assert task.labels == ("boat", "train")


def test_a_limit_keeps_every_class(make_folder):
    data, _ = load(make_folder({"a": 40, "b": 40, "c": 5}), image_size=SIZE, limit=24)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 6)
    assert set(data.train.targets) == {0, 1, 2}
    assert data.found == 24
    assert "limited to 24 of 85 examples" in data.splits["notes"]


BROKEN = {
    "truncated.jpg": "JPEG data ends early",
    "page.jpg": "not a picture: begins with '<!DOCTYPE html>'",
    "empty.jpg": "empty file",
    "bomb.png": "picture of 20000x20000 pixels is larger than the limit of 100 megapixels",
    "scan.tiff": "TIFF is not a picture format that TensorFlow decodes (JPEG, PNG, GIF, BMP, WebP)",
    "pipe.jpg": "cannot be read: not a regular file",
    "gone.jpg": "cannot be read: No such file or directory",
}
UNUSUAL = ("alpha.webp", "deep.png", "cmyk.jpg", "moving.gif", "moving.webp", "really_png.jpg")


@pytest.fixture
def broken_folder(make_folder, encoded, odd_files):
    root = make_folder({"cat": 15, "dog": 15})
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "TIFF")
    contents = {**odd_files, "scan.tiff": buffer.getvalue(), "moving.webp": encoded["webp_animated"]}
    for name, data in contents.items():
        (root / "cat" / name).write_bytes(data)
    os.mkfifo(root / "cat" / "pipe.jpg")
    (root / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "cat" / "loop").symlink_to(root)
    return root


@pytest.mark.parametrize("memory_budget", [None, pytest.param(0, marks=pytest.mark.slow)])
def test_broken_files_are_set_aside_with_their_reason(broken_folder, memory_budget):
    data, _ = load(broken_folder, image_size=SIZE, memory_budget=memory_budget)
    assert {item.file: item.reason for item in data.quarantined} == {f"cat/{n}": r for n, r in BROKEN.items()}
    used = [name for examples in (data.train, data.validation, data.test) for name in examples.names]
    assert {f"cat/{name}" for name in UNUSUAL} <= set(used)
    assert len(used) + len(data.quarantined) == data.found
    assert len(set(used)) == len(used)
    notes = " ".join(data.splits["notes"])
    assert "really_png.jpg" in notes
    assert "1 folders inside a class folder" in notes
    for examples in (data.train, data.validation, data.test):
        assert len(pictures_of(examples)) == len(examples)


def test_why_unusable_reads_the_header(bomb, encoded):
    assert audit.why_unusable(bomb) == BROKEN["bomb.png"]
    assert audit.why_unusable(encoded["jpeg"]) is None
    assert audit.why_unusable(b"") == "empty file"


def refused(source, message, **options):
    with pytest.raises(InputError, match=message) as caught:
        load(source, image_size=SIZE, **options)
    assert "\n" not in str(caught.value)


def test_bad_folders(make_folder, tmp_path):
    refused(tmp_path / "missing", "no such folder or table: .*missing")
    refused("x" * 300, "no such folder or table: xxx")
    refused("~nouser/x", "no such folder or table: ~nouser/x")
    refused("dmeo", "Did you mean 'demo'")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "nothing is empty")
    (tmp_path / "nothing" / "loose.png").write_bytes(b"")
    refused(tmp_path / "nothing", "no class folders")
    refused(make_folder({"cat": 5}, "one"), "one class only \\('cat'\\)")
    refused(make_folder({"cat": 5, "dog": 5, "owl": 0}, "empty"), "class folder .*owl holds no pictures")
    refused(make_folder({"cat": 5, "dog": 1}, "few"), "at least 3 .* 'dog' with 1")
    splits = {"train/a": 5, "train/b": 5, "validation/a": 1, "validation/c": 1}
    refused(make_folder(splits, "unseen"), "validation .* train lacks: 'c'")
    refused(make_folder({"val/a": 3, "val/b": 3}, "untrained"), "no usable training examples")


def test_a_class_whose_pictures_are_all_broken(make_folder):
    root = make_folder({"cat": 5, "dog": 3})
    for file in (root / "dog").iterdir():
        file.write_bytes(b"<html>")
    refused(root, "one class only")


def test_a_given_split_without_a_usable_picture_is_not_replaced(make_folder):
    root = make_folder({"train/cat": 9, "train/dog": 9, "test/cat": 2, "test/dog": 2})
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"<html>")
    refused(root, "test of .*4 were found.*test/cat/0.png: not a picture: begins with '<html>'")


def test_a_limit_that_leaves_a_split_empty(make_folder):
    refused(make_folder({"cat": 9, "dog": 9}), "would be empty: take more examples", limit=2)


def test_bad_class_lists(make_folder):
    root = make_folder({"cat": 5, "dog": 5})
    (root / "classes.txt").write_text("cat\n")
    refused(root, "lacks classes that occur: 'dog'")
    (root / "classes.txt").write_text("cat\ndog\nowl\n")
    refused(root, "without a picture: 'owl'")
    (root / "classes.txt").write_text("cat\ncat\ndog\n")
    refused(root, "twice: 'cat'")


def test_bad_options(make_folder):
    root = make_folder({"cat": 5, "dog": 5})
    refused(root, "task_kind", task_kind="detection")
    with pytest.raises(InputError, match="image_size"):
        load(root, image_size=(0, 8))


def test_a_label_that_training_lacks_is_refused_for_several_labels_too(tmp_path):
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy())
    rows = [f"a.png,{labels},{split}" for split in ("train", "validation", "test") for labels in ("red|round", "round")]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *rows, "a.png,green,validation"]))
    refused(tmp_path / "table.csv", "validation split has the label 'green'")


def test_data_for_a_task_that_exists_says_what_was_set_aside(make_folder):
    folder = make_folder({"cat": 3, "dog": 1}, "broken")
    (folder / "cat" / "0.png").write_bytes(b"")
    found = load_for(tasks.SingleLabel(("dog", "cat")), folder, image_size=SIZE)
    assert (len(found.examples), found.split) == (3, "all")
    assert [item.file for item in found.quarantined] == ["cat/0.png"]


def test_data_for_a_task_that_exists(make_folder):
    task = tasks.SingleLabel(("dog", "cat", "owl"))
    whole = load_for(task, make_folder({"cat": 3, "dog": 1}, "whole"), image_size=SIZE).examples
    assert whole.targets.tolist() == [1, 1, 1, 0]
    split = make_folder({"train/cat": 3, "test/dog": 2}, "split")
    assert load_for(task, split, image_size=SIZE).examples.targets.tolist() == [0, 0]
    assert load_for(task, split, image_size=SIZE).split == "test"
    with pytest.raises(InputError, match="other, cow/0.png: label 'cow' is not a class"):
        load_for(task, make_folder({"cow": 3}, "other"), image_size=SIZE)


def test_what_was_seen_of_each_picture_is_kept(tmp_path):
    flat = np.full((40, 30, 3), 200, np.uint8)
    dotted = flat.copy()
    dotted[7, 9] = 0  # between the rows and columns that are looked at first
    noise = np.random.default_rng(0).integers(0, 256, (50, 20, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for label in "ab":
        (tmp_path / label).mkdir()
        for name, pixels in (("flat", flat), ("dotted", dotted), ("noise", noise), ("more", noise[:25])):
            Image.fromarray(pixels).save(tmp_path / label / f"{name}.png")
        Image.fromarray(noise).save(tmp_path / label / "turned.jpg", exif=turned)
        (tmp_path / label / "broken.png").write_bytes(b"<html>")
    data, _ = load(tmp_path, image_size=(96, 96))
    seen = {one.name: one for one in data.seen if one.label == "a"}
    assert len(data.seen) == data.found == 12
    sizes = {"flat.png": (40, 30), "noise.png": (50, 20), "more.png": (25, 20), "turned.jpg": (20, 50)}
    assert {name: seen[f"a/{name}"].size for name in sizes} == sizes
    assert seen["a/flat.png"].spread == 0
    assert 0 < seen["a/dotted.png"].spread < 8
    assert seen["a/noise.png"].spread > 30
    assert "not a picture" in seen["a/broken.png"].reason
    for split in ("train", "validation", "test"):
        own = getattr(data, split)
        assert set(own.names) == {one.name for one in data.seen if one.split == split and one.reason is None}
    assert [one.spread for one in load(tmp_path, image_size=(96, 96), memory_budget=0)[0].seen] == [
        one.spread for one in data.seen
    ]
