"""Write `.onnx` files for ONNX Runtime, and read and run them."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tftransfer.errors import InputError, check
from tftransfer.serving import portable
from tftransfer.serving.files import Runtime
from tftransfer.serving.tflite_files import METADATA, Answer
from tftransfer.tasks import Task

FILES = {"none": "model.onnx"}
OPSET = 18  # the newest that tf2onnx 1.17 knows


def export_onnx(
    model: keras.Model,
    task: Task,
    path: str | os.PathLike[str],
    *,
    from_logits: bool | None = None,
    source: str = "",
) -> None:
    """Write a network and its task as an `.onnx` file.

    Preprocessing and softmax are inside, augmentation and dropout are off. What is written is not compared with the
    network; `publish_files` does both.

    Args:
        model: The trained network, from pixels in [0, 255], `(batch, height, width, 3)`, to numbers.
        task: What its outputs mean.
        path: The file; its folder exists.
        from_logits: Whether the network gives logits. Defaults to what its last layer says.
        source: SHA-256 of the file that the network comes from, for the description. Defaults to "".

    Raises:
        InputError: If tf2onnx is not installed, the network takes pictures of no fixed size or does not fit the task,
            or it cannot be converted.

    The file takes `image`, `(batch, height, width, 3)` float32 in [0, 255], in batches of any size, and gives
    `probabilities` (for regression `values`), `(batch, outputs)` float32. Labels are in the description, see
    `read_metadata`.
    """
    converter, checker = _module("tf2onnx"), _module("onnx.checker")
    network = portable.in_float32(model)
    answer = portable.graph_of(network, task, from_logits, simple=True)
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    try:
        content, _ = converter.convert.from_function(answer, input_signature=answer.input_signature, opset=OPSET)
        checker.check_model(content)  # what has no translation is passed on as it is
    except (checker.ValidationError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"the network cannot be converted to ONNX: {_first_line(error)}") from None
    entry = content.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(portable.describe(network, task, source_sha256=source))
    portable.write(Path(path), content.SerializeToString())


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description that `export_onnx` put into a file: labels, task, input, outputs, source.

    Args:
        path: The `.onnx` file.

    Raises:
        InputError: If there is no such file, it is none of ONNX's, or it holds no description.
    """
    text = _session(Path(path)).get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise InputError(f"{path} was not exported by tftransfer: it has no metadata {METADATA!r}")
    return json.loads(text)


def open_file(path: str | os.PathLike[str], threads: int = 1) -> Answer:
    """Load a file and return the function that answers batches of any size.

    Args:
        path: The `.onnx` file.
        threads: How many threads compute, from 1. Defaults to 1.

    Raises:
        InputError: If ONNX Runtime is not installed, there is no such file, or it is none of ONNX's.
    """
    check(threads >= 1, "threads", "a whole number from 1", threads)
    session = _session(Path(path), threads)
    (source,), names = session.get_inputs(), [output.name for output in session.get_outputs()]

    def answer(pictures: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, {source.name: pictures}), strict=True))
        except Exception as error:  # its own classes share no other base
            raise InputError(f"{path} cannot be run by ONNX Runtime: {_first_line(error)}") from None

    return answer


def _session(path: Path, threads: int = 1) -> Any:
    runtime = _module("onnxruntime")
    if not path.is_file():
        raise InputError(f"{path} cannot be read: there is no such file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors only
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no other base
        raise InputError(f"{path} cannot be loaded by ONNX Runtime: {_first_line(error)}") from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "") not in name:
            raise
        raise InputError(f"{name} is not installed: pip install 'tftransfer[onnx]'") from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _write_kinds(
    model: keras.Model, task: Task, folder: Path, kinds: Sequence[str], _calibration: Sequence[np.ndarray], source: str
) -> None:
    for kind in kinds:
        export_onnx(model, task, folder / FILES[kind], source=source)


def _require() -> None:
    for name in ("tf2onnx", "onnxruntime"):
        _module(name)


RUNTIME = Runtime("ONNX", "onnx", FILES, _write_kinds, open_file, _require)
