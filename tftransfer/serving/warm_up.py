"""Requests that a model server answers before any other, so that nobody waits for what is set up by the first.

TF Serving reads them from `assets.extra/tf_serving_warmup_requests` of a version, up to 1,000, and answers them before
it serves that version.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tftransfer.errors import check
from tftransfer.serving import loaders, structure
from tftransfer.serving.loaders import Request
from tftransfer.serving.structure import BYTES, CLASSIFY, PIXELS

FILE = Path("assets.extra") / "tf_serving_warmup_requests"
BATCH_SIZES = (1, 8)
_MOST = 1000


def write(version_dir: Path, samples: Sequence[bytes], batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
    """Put requests into a SavedModel's folder.

    Args:
        version_dir: The folder that holds `saved_model.pb`.
        samples: Encoded pictures, at least one; they are repeated until a batch is full.
        batch_sizes: One request of encoded pictures for each; pixels, which are much larger, come one by one. The
            network itself is set up by either. Defaults to 1 and 8.

    Raises:
        InputError: If a size is below 1, or there are too many.
    """
    wanted = f"from 1 to {_MOST - 1} whole numbers from 1"
    fit = 1 <= len(batch_sizes) < _MOST and all(isinstance(size, int) and size >= 1 for size in batch_sizes)
    check(fit, "batch_sizes", wanted, tuple(batch_sizes))
    encoded = loaders.as_texts(samples)
    pixels = loaders.decode(samples[:1], structure.image_size(structure.read(version_dir)))
    has = structure.signatures(structure.read(version_dir))
    requests = [
        Request(signature, encoded[np.arange(size) % len(encoded)])
        for signature in (BYTES, CLASSIFY)
        for size in sorted(set(batch_sizes))
        if signature in has
    ]
    (version_dir / FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(version_dir / FILE)) as writer:
        for request in (*requests, Request(PIXELS, pixels)):
            writer.write(_record(request).SerializeToString())


def read(version_dir: Path) -> list[Request] | None:
    """Return the requests in a SavedModel's folder; None if it has none.

    Raises:
        ValueError: If the file is damaged or holds requests for signatures that the SavedModel does not have.
    """
    if not (version_dir / FILE).is_file():
        return None
    has = structure.signatures(structure.read(version_dir))
    try:
        return [_request(log, has) for log in _records(version_dir / FILE)]
    except (tf.errors.OpError, DecodeError, TypeError) as error:
        raise ValueError(f"{FILE} is damaged or cannot be read: {error}") from None


def _records(file: Path) -> Iterator[PredictionLog]:
    for record in tf.data.TFRecordDataset(str(file)):
        yield PredictionLog.FromString(record.numpy())


def _record(request: Request) -> PredictionLog:
    log = PredictionLog()
    asked = log.predict_log.request
    asked.model_spec.signature_name = request.signature
    name = structure.input_name(request.signature)
    asked.inputs[name].CopyFrom(tf.make_tensor_proto(request.values))
    return log


def _request(log: PredictionLog, has: Collection[str]) -> Request:
    asked = log.predict_log.request
    signature = asked.model_spec.signature_name
    if signature not in has or set(asked.inputs) != {structure.input_name(signature)}:
        raise ValueError(f"{FILE} asks for signature {signature!r} with {sorted(asked.inputs)}")
    return Request(signature, tf.make_ndarray(asked.inputs[structure.input_name(signature)]))
