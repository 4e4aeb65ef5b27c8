from __future__ import annotations

import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tftransfer import InputError, serving
from tftransfer.data.images import decode_picture
from tftransfer.serving import warm_up


@pytest.fixture
def version(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "1")


def test_requests_are_what_a_model_server_reads(version, pictures):
    """Read with TF Serving's own messages, as the server does."""
    warm_up.write(version, pictures, (8, 1))
    file = version / "assets.extra" / "tf_serving_warmup_requests"
    logs = [PredictionLog.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]
    assert [log.WhichOneof("log_type") for log in logs] == ["predict_log"] * 3
    requests = [log.predict_log.request for log in logs]
    assert [one.model_spec.signature_name for one in requests] == ["serving_default", "serving_default", "tensor"]
    given = [tf.make_ndarray(one.inputs["image_bytes"]) for one in requests[:2]]
    assert given[0].tolist() == pictures[:1]
    assert given[1].tolist() == [*pictures, *pictures[:3]]
    (pixels,) = tf.make_ndarray(requests[2].inputs["image"])
    np.testing.assert_array_equal(pixels, decode_picture(tf.constant(pictures[0]), (16, 24)))


def test_what_is_written_is_read(version, pictures):
    assert warm_up.read(version) is None
    warm_up.write(version, pictures, (3,))
    first, second = warm_up.read(version)
    assert (first.signature, first.values.tolist()) == ("serving_default", pictures[:3])
    assert (second.signature, second.values.shape) == ("tensor", (1, 16, 24, 3))


@pytest.mark.parametrize("sizes", [(), (0,), (1.5,), tuple(range(1, 1001))])
def test_sizes_that_no_server_takes_are_bad_input(version, pictures, sizes):
    with pytest.raises(InputError, match="batch_sizes"):
        warm_up.write(version, pictures, sizes)
    assert not (version / warm_up.FILE).exists()


@pytest.mark.usefixtures("without_c_library")
def test_verification_answers_them(version, pictures):
    """`test_verification.py` shows that the check decides nothing where there are none."""
    warm_up.write(version, pictures)
    found = _warm_up_check(version, pictures)
    assert (found.passed, found.metrics) == (True, {"requests": 3, "batch sizes": [1, 8, 1]})


@pytest.mark.usefixtures("without_c_library")
@pytest.mark.parametrize(
    "fault",
    [
        "broken picture",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("cut short", "another signature", "no message")),
    ],
)
def test_verification_refuses_what_a_server_could_not_answer(version, pictures, fault):
    warm_up.write(version, pictures)
    file, log = version / warm_up.FILE, PredictionLog()
    if fault == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    elif fault == "no message":
        _write(file, b"\xff\xff")
    else:
        log.predict_log.request.model_spec.signature_name = "classify" if "signature" in fault else "serving_default"
        log.predict_log.request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([b"no picture"]))
        _write(file, log.SerializeToString())
    found = _warm_up_check(version, pictures)
    assert found.passed is False
    assert found.metrics["problem"]


def _write(file, record):
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(record)


def _warm_up_check(version, pictures):
    checks = serving.verify(version, pictures, repeats=2).checks
    return next(one for one in checks if one.name == "warm-up requests are answered")


@pytest.mark.usefixtures("without_c_library")
def test_what_is_published_has_them(model, task, pictures, tmp_path):
    version, _ = serving.publish(model, task, tmp_path, pictures, repeats=2, warm_up_sizes=(2,))
    assert [len(request.values) for request in warm_up.read(version)] == [2, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("without_c_library")
def test_what_is_published_has_none_where_none_are_asked_for(model, task, pictures, tmp_path):
    version, _ = serving.publish(model, task, tmp_path, pictures, repeats=2, warm_up_sizes=())
    assert warm_up.read(version) is None
