"""What a run remembers of its pictures for later ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import training
from tftransfer.data import load, reading, room
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(generator.integers(0, 256, (9, 7, 3), np.uint8)).numpy())
    (tmp_path / "pictures" / "a" / "broken.png").write_bytes(path.read_bytes()[:-20])
    (tmp_path / "pictures" / "a" / "wrong.jpg").write_bytes(path.read_bytes())
    return tmp_path / "pictures"


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of pictures that were decoded."""
    numbers, read_one = [], reading._read_one
    monkeypatch.setattr(reading, "_read_one", lambda *given: numbers.append(given[1]) or read_one(*given))
    return numbers


def _pixels(data):
    every = (data.train, data.validation, data.test)
    return np.concatenate([np.stack([one.pictures.load(i) for i in range(len(one))]) for one in every])


def test_a_second_run_decodes_when_it_is_asked_for_pictures(folder, tmp_path, decoded):
    first, _ = load(folder, image_size=(6, 8), cache_dir=tmp_path / "kept")
    assert sorted(decoded) == list(range(26))
    decoded.clear()
    second, _ = load(folder, image_size=(6, 8), cache_dir=tmp_path / "kept")
    assert decoded == []
    for name in ("fingerprint", "quarantined", "splits"):
        assert getattr(first, name) == getattr(second, name)
    assert [item.file for item in second.quarantined] == ["a/broken.png"]
    assert any("wrong.jpg" in note for note in second.splits["notes"])
    np.testing.assert_array_equal(_pixels(first), _pixels(second))
    assert sorted(decoded) == list(range(26))


def test_a_second_run_that_finds_all_features_decodes_nothing(folder, tmp_path, decoded, small_network):
    for expected in (26, 0):
        decoded.clear()
        keras.utils.set_random_seed(0)
        kept = {"cache_dir": tmp_path / "kept"}
        data, task = load(folder, image_size=(32, 32), **kept)
        history = training.fine_tune(small_network(2), task, data, (Phase("probe", "head", 3, 1e-3),), **kept)
        assert history.phases[0].store.startswith("kept")
        assert len(decoded) == expected


def test_another_content_name_or_damage_is_a_miss(folder, tmp_path, decoded):
    def count(cache_dir=tmp_path / "kept"):
        decoded.clear()
        load(folder, image_size=(6, 8), cache_dir=cache_dir)
        return len(decoded)

    assert (count(), count()) == (26, 0)
    changed = folder / "a" / "00.png"
    changed.write_bytes(tf.io.encode_png(np.zeros((9, 7, 3), np.uint8)).numpy())
    assert (count(), count()) == (26, 0)
    changed.rename(folder / "a" / "new.png")
    assert (count(), count()) == (26, 0)
    for item in (tmp_path / "kept").rglob("*"):
        if item.is_file():
            item.write_bytes(item.read_bytes()[:-1])
    assert (count(), count()) == (26, 0)
    assert count(None) == 26


def test_pictures_that_change_behind_a_second_run_are_refused(folder, tmp_path):
    load(folder, image_size=(6, 8), cache_dir=tmp_path / "kept")
    data, _ = load(folder, image_size=(6, 8), cache_dir=tmp_path / "kept")
    (folder / "b" / "01.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="01.png has changed since the run began"):
        data.train.pictures.load(0)


def test_what_fits_neither_memory_nor_disk_is_remembered_too(folder, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(room, "is_memory", lambda _: True)
    for expected in (26, 0):
        decoded.clear()
        data, _ = load(folder, image_size=(6, 8), cache_dir=tmp_path / "kept", memory_budget=0)
        assert len(decoded) == expected
        assert not data.train.pictures.at_once
        assert data.train.pictures.load(tf.constant(0, tf.int64)).shape == (6, 8, 3)


def test_a_folder_that_cannot_be_written_changes_nothing(folder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cache_dir"):
        load(folder, image_size=(6, 8), cache_dir=tmp_path / "file")
    data, _ = load(folder, image_size=(6, 8), cache_dir=tmp_path / "file" / "below")
    assert len(data.train) + len(data.validation) + len(data.test) == 25
