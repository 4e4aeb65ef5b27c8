"""Decoded pictures in memory and in files: the same bits, and a file only where the disk has room."""

import errno
import os
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import fine_tune, shelf, strategies
from tftransfer.data import load, room

SIZE = (6, 5)


def _pictures(count=7):
    return np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), np.uint8)


@pytest.fixture(params=["memory", "file"])
def kept(request, tmp_path):
    """Some pictures, and where they were put."""
    pictures = _pictures()
    place = room.room(7, SIZE, 10**6 if request.param == "memory" else 0, tmp_path)
    assert type(place) is (room.InMemory if request.param == "memory" else room.InFile)
    for number, picture in enumerate(pictures):
        place.put(number, picture)
    return pictures, place


def test_what_is_put_is_read_one_and_several_with_and_without_a_graph(kept):
    pictures, place = kept
    for numbers in (3, [6, 0, 6], []):
        given = tf.constant(numbers, tf.int64)
        np.testing.assert_array_equal(place.read(given), pictures[np.array(numbers, int)])
        traced = tf.function(place.read, input_signature=[tf.TensorSpec(given.shape, tf.int64)])
        np.testing.assert_array_equal(traced(given), pictures[np.array(numbers, int)])
        assert traced.get_concrete_function().structured_outputs.shape == (*given.shape, *SIZE, 3)


def test_several_threads_read_in_a_pipeline(kept):
    pictures, place = kept
    numbers = tf.data.Dataset.range(7).repeat(20).batch(4)
    read = numbers.map(place.read, num_parallel_calls=4)
    np.testing.assert_array_equal(np.concatenate(list(read)), np.concatenate([pictures] * 20))


def test_a_file_has_no_name_and_is_gone_afterwards(tmp_path):
    place = room.room(7, SIZE, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(place._rows._file.fileno()).st_size == 7 * 90


def test_no_room_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert room.room(7, SIZE, 0, tmp_path / "file" / "folder") is None
    with monkeypatch.context() as full:
        full.setattr(room.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=room._SPARE))
        assert room.room(7, SIZE, 0, tmp_path) is None

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room.os, "posix_fallocate", fill)
    assert room.room(7, SIZE, 0, tmp_path) is None


def test_files_in_memory_are_not_taken_for_a_disk(tmp_path, monkeypatch):
    partitions = [
        types.SimpleNamespace(mountpoint="/", fstype="ext4"),
        types.SimpleNamespace(mountpoint=str(tmp_path.resolve()), fstype="tmpfs"),
    ]
    monkeypatch.setattr(shelf.psutil, "disk_partitions", lambda all: partitions)
    assert room.room(7, SIZE, 0, tmp_path / "deeper") is None
    monkeypatch.setattr(shelf.psutil, "disk_partitions", lambda all: partitions[:1])
    assert isinstance(room.room(7, SIZE, 0, tmp_path / "deeper"), room.InFile)


def test_data_on_the_disk_are_those_in_memory(tmp_path, monkeypatch):
    source = (_pictures(40), list("ab" * 20))
    memory, _ = load(source, image_size=(8, 8))
    disk, _ = load(source, image_size=(8, 8), memory_budget=0, cache_dir=tmp_path)
    monkeypatch.setattr(room, "is_memory", lambda _: True)
    neither, _ = load(source, image_size=(8, 8), memory_budget=0)
    assert [data.train.pictures.at_once for data in (memory, disk, neither)] == [True, True, False]
    assert memory.fingerprint == disk.fingerprint == neither.fingerprint
    for number in range(len(memory.train)):
        own = [data.train.pictures.load(tf.constant(number, tf.int64)) for data in (memory, disk, neither)]
        np.testing.assert_array_equal(own[0], own[1])
        np.testing.assert_array_equal(own[0], own[2])


def test_training_from_the_disk_gives_the_same_bits(tmp_path, small_network):
    generator = np.random.default_rng(1)
    source = (generator.integers(0, 256, (40, 32, 32, 3), np.uint8), list("ab" * 20))
    weights = []
    for options in ({}, {"memory_budget": 0, "cache_dir": tmp_path}):
        data, task = load(source, image_size=(32, 32), **options)
        keras.utils.set_random_seed(0)
        model = small_network(2)
        fine_tune(model, task, data, strategies.full(epochs=2), batch_size=8, quiet=True)
        weights.append([variable.numpy() for variable in model.variables])
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)
