from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tftransfer.serving import capi, loaders, structure
from tftransfer.serving.loaders import Request

# Tensors go into the library's own memory and back; texts are held inline up to 22 bytes, and apart beyond.
ROUND_TRIP = """
import json, sys, numpy as np
from tftransfer.serving import capi
library = capi.load_library()
texts = [b"", b"a", b"end\\0", b"\\0" * 22, b"x" * 22, b"x" * 23, bytes(range(256)) * 50]
same = []
for shape in ((7,), (7, 1), (1, 7)):
    array = np.empty(7, object); array[:] = texts; array = array.reshape(shape)
    tensor = capi.to_tensor(library, array)
    back = capi.to_array(library, tensor)
    capi._delete_fed(library, tensor, array)
    same.append(back.shape == shape and back.ravel().tolist() == texts)
strided = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]
for array in (strided, np.array(7, np.int32), np.zeros((0, 3), np.uint8)):
    tensor = capi.to_tensor(library, array)
    back = capi.to_array(library, tensor)
    capi._delete_fed(library, tensor, array)
    same.append(back.dtype == array.dtype and back.shape == array.shape and back.tolist() == array.tolist())
print(json.dumps([same, "tensorflow" in sys.modules, "keras" in sys.modules]))
"""


def test_tensors_pass_through_the_library_unchanged(run_python):
    same, tensorflow, keras = run_python(ROUND_TRIP)
    assert same == [True] * 6
    assert not tensorflow, "tftransfer.serving.capi must work without Python's TensorFlow"
    assert not keras


@pytest.mark.parametrize(
    "array",
    [
        np.array([b"end\0", b""], object),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 4), np.uint8),
        np.array([np.nan, -0.0], np.float64),
    ],
    ids=["texts", "floats", "empty", "not a number"],
)
def test_json_keeps_every_bit(array):
    back = capi.from_json(json.loads(json.dumps(capi.to_json(array))))
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert back.tolist() == array.tolist() if array.dtype == object else back.tobytes() == array.tobytes()


def test_answers_and_errors_come_back(exported, pictures):
    signatures = structure.signatures(structure.read(exported))
    requests = [
        Request("serving_default", loaders.as_texts(pictures)),
        Request("serving_default", loaders.as_texts([b"no picture"])),
        Request("tensor", np.zeros((2, 5, 5, 3), np.float32)),
        Request("tensor", np.zeros((2, 16, 24, 3), np.float32)),
    ]
    with loaders.c_library(exported, signatures, requests) as wait:
        answers = wait()
    assert answers[0]["label"].shape == (len(pictures),)
    assert answers[1:3] == [3, 3], "InvalidArgument"
    assert answers[3]["probabilities"].dtype == np.float32


def test_a_savedmodel_that_cannot_be_loaded_is_an_error(tmp_path):
    with (
        loaders.c_library(tmp_path, {}, []) as wait,
        pytest.raises(loaders.LoaderError, match="Could not find SavedModel"),
    ):
        wait()


def test_a_process_that_dies_is_an_error(exported, monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('out of luck')")
    monkeypatch.setattr(capi, "__file__", str(broken))
    with loaders.c_library(exported, {}, []) as wait, pytest.raises(loaders.LoaderError, match="out of luck"):
        wait()


def test_a_process_that_imported_tensorflow_proves_nothing(exported, monkeypatch, tmp_path):
    cheating = tmp_path / "cheating.py"
    cheating.write_text("""print('{"answers": [], "imported_tensorflow": true}')""")
    monkeypatch.setattr(capi, "__file__", str(cheating))
    with (
        loaders.c_library(exported, {}, []) as wait,
        pytest.raises(loaders.LoaderError, match="prove nothing"),
    ):
        wait()


def test_the_surface_is_lazy():
    program = "import sys, tftransfer.serving.capi, tftransfer.serving; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
