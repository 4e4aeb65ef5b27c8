"""Memory that NumPy and TensorFlow share, so that what is large lies there once."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import tensorflow as tf

_ALIGNED = 64  # bytes at a multiple of which TensorFlow takes over memory


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return an uninitialised array that `tensor` need not copy.

    Example:
        >>> empty((2, 3), np.float32).shape
        (2, 3)
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held = np.empty(size + _ALIGNED, np.uint8)
    start = -held.ctypes.data % _ALIGNED
    return held[start : start + size].view(dtype).reshape(shape)


def tensor(array: np.ndarray) -> tf.Tensor:
    """Return an array from `empty` as a tensor in the same memory; write to neither from here on.

    Example:
        >>> array = empty((2,), np.float32)
        >>> array[:] = 1, 2
        >>> tensor(array).numpy().tolist()
        [1.0, 2.0]
    """
    with tf.init_scope():
        if array.dtype == bool or not array.size:  # which DLPack does not take
            return tf.constant(array)
        if array.dtype == tf.bfloat16.as_numpy_dtype:  # nor this, by name
            return tf.bitcast(tensor(array.view(np.int16)), tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
