"""TFRecord files: equal to what TensorFlow writes and reads, and each damaged record has its number."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tftransfer.data import records

SIZES = (0, 1, 3, 4, 47, 48, 49, 1000, 10_007)


@pytest.fixture
def written(tmp_path):
    """A file of nine records, as TensorFlow writes it, and what they hold."""
    generator = np.random.default_rng(0)
    contents = [generator.bytes(size) for size in SIZES]
    path = tmp_path / "some.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for content in contents:
            writer.write(content)
    return path, contents


def _starts(contents):
    return np.cumsum([0, *(len(content) + 16 for content in contents)])


def test_a_file_of_tensorflow_is_read_and_written_as_it_is(written):
    path, contents = written
    assert list(records.records(path)) == [records.Record(n, content) for n, content in enumerate(contents)]
    assert b"".join(map(records.framed, contents)) == path.read_bytes()


@given(st.binary(max_size=300))
def test_the_checksum_in_lanes_is_the_one_byte_by_byte(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert records.crc32c(data) == crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("seed", range(40))
def test_every_flipped_bit_is_noticed_at_its_record(written, seed):
    path, contents = written
    whole = bytearray(path.read_bytes())
    place = int(np.random.default_rng(seed).integers(len(whole)))
    whole[place] ^= 1 << seed % 8
    path.write_bytes(whole)
    number = int(np.searchsorted(_starts(contents), place, side="right")) - 1
    in_length = place - _starts(contents)[number] < 12
    found = list(records.records(path, expected=len(contents)))
    damaged = range(number, len(contents)) if in_length else [number]
    assert [record.number for record in found] == list(range(len(contents)))
    assert [record.number for record in found if record.problem] == list(damaged)
    assert all((record.data is None) == bool(record.problem) for record in found)
    assert "damaged" in found[number].problem


@pytest.mark.parametrize("cut", [1, 4, 9, 17, 2000])
def test_a_file_that_ends_early(written, cut):
    path, contents = written
    path.write_bytes(path.read_bytes()[:-cut])
    found = list(records.records(path, expected=len(contents)))
    assert found[-1].problem == "the file ends within this record"
    assert [record.data for record in found[:-1]] == contents[:-1]


def test_a_file_that_lacks_records_or_has_more(written):
    path, contents = written
    start = int(_starts(contents)[6])
    path.write_bytes(path.read_bytes()[:start])
    found = list(records.records(path, expected=8))
    assert [record.problem for record in found[6:]] == ["missing: the file ends before it"] * 2
    assert len(list(records.records(path, expected=2))) == 6
