"""Readers: what a graph gets from them, and how."""

import numpy as np
import pytest
import tensorflow as tf

from tftransfer.data.listing import Arrays, Encoded, Files


def readers(tmp_path):
    path = tmp_path / "one.bin"
    path.write_bytes(b"x" * 50_000)
    return Files((str(path),) * 3), Encoded((b"y" * 50_000,) * 3), Arrays(np.zeros((3, 100, 100, 3), np.uint8))


@pytest.mark.parametrize("place", range(3))
def test_graphs_hold_no_pictures(tmp_path, place):
    """A graph may not exceed 2 GiB, and what it holds it would hold once per split."""
    reader = readers(tmp_path)[place]
    function = tf.function(reader.fetch, input_signature=[tf.TensorSpec((), tf.int64)], autograph=False)
    concrete = function.get_concrete_function()
    assert concrete.graph.as_graph_def().ByteSize() < 10_000
    assert concrete.captured_inputs
    fetched = concrete(tf.constant(2, tf.int64)).numpy()
    np.testing.assert_array_equal(np.frombuffer(fetched, np.uint8) if place < 2 else fetched, _stored(reader))


def _stored(reader):
    stored = reader.read(2)
    return np.frombuffer(stored, np.uint8) if isinstance(stored, bytes) else stored
