"""Write `.tflite` files for LiteRT: in float32, with weights in float16, or computing in int8."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import convert

from tftransfer.errors import InputError, check
from tftransfer.serving import portable, tflite_files
from tftransfer.serving.bias_correction import WEIGHTED, corrected
from tftransfer.serving.export import quiet
from tftransfer.serving.files import Runtime
from tftransfer.tasks import Task

FILES = {"none": "model.tflite", "float16": "model_float16.tflite", "int8": "model_int8.tflite"}
"""The kinds of quantization, and the file of each in a run's `litert/`."""


def export_litert(
    model: keras.Model,
    task: Task,
    path: str | os.PathLike[str],
    *,
    quantize: str = "none",
    calibration: Iterable[np.ndarray] = (),
    from_logits: bool | None = None,
    source: str = "",
) -> None:
    """Write a network and its task as a `.tflite` file for LiteRT (TensorFlow Lite).

    Preprocessing and softmax are inside, augmentation and dropout are off, BatchNorm is folded. What is written is not
    compared with the network; `publish_litert` does both.

    Args:
        model: The trained network, from pixels in [0, 255], `(batch, height, width, 3)`, to numbers.
        task: What its outputs mean.
        path: The file; its folder exists.
        quantize: `"none"` (float32), `"float16"` (weights of half the size, which a processor turns back into float32)
            or `"int8"` (weights of a quarter, layers that compute in int8). Defaults to `"none"`.
        calibration: For int8, pictures `(height, width, 3)` in [0, 255] as in training; their smallest and largest
            activations become the ends of what 8 bits can say. Two hundred are enough. Defaults to none.
        from_logits: Whether the network gives logits. Defaults to what its last layer says.
        source: SHA-256 of the file that the network comes from, for the description. Defaults to "".

    Raises:
        InputError: If LiteRT is not installed, an argument is out of its range, the network takes pictures of no fixed
            size or does not fit the task, or it cannot be converted.

    The file has one signature, `serving_default`, for batches of any size: from `image`, `(batch, height, width, 3)`
    float32 in [0, 255], to `probabilities` (for regression `values`), `(batch, outputs)` float32, also in int8, so that
    callers need no scales. Labels are in the description, see `read_metadata`.
    """
    with _converters(model, task, from_logits, source) as write:
        write(Path(path), quantize, list(calibration))


def _write_kinds(
    model: keras.Model, task: Task, folder: Path, kinds: Sequence[str], calibration: Sequence[np.ndarray], source: str
) -> None:
    with _converters(model, task, None, source) as write:
        for kind in kinds:
            write(folder / FILES[kind], kind, calibration)
    if task.kind != "regression":
        lines = (" ".join(label.splitlines()) for label in task.labels)
        (folder / "labels.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")


def _require() -> None:
    tflite_files.module("interpreter")


RUNTIME = Runtime("LiteRT", "litert", FILES, _write_kinds, tflite_files.open_file, _require)
Write = Callable[[Path, str, Sequence[np.ndarray]], None]


@contextlib.contextmanager
def _converters(model: keras.Model, task: Task, from_logits: bool | None, source: str) -> Iterator[Write]:
    """Give the function that writes a file of one kind; the network is traced once for all of them."""
    tflite_files.module("schema_py_generated")
    network = portable.in_float32(model)
    module = tf.Module()
    module.answer = portable.graph_of(network, task, from_logits)
    with tempfile.TemporaryDirectory() as directory:
        with quiet():
            tf.saved_model.save(module, directory, signatures=module.answer.get_concrete_function())

        def write(path: Path, quantize: str, calibration: Sequence[np.ndarray]) -> None:
            check(quantize in FILES, "quantize", f"one of {', '.join(FILES)}", quantize)
            check(quantize != "int8" or len(calibration) > 0, "calibration", "pictures, for int8", calibration)
            content = _converted(directory, quantize, calibration)
            about: dict[str, Any] = {"quantization": quantize, "source_sha256": source}
            if quantize == "int8":
                about["calibration_pictures"] = len(calibration)
            portable.write(path, tflite_files.with_metadata(content, portable.describe(network, task, **about)))

        yield write


def _converted(directory: str, quantize: str, calibration: Sequence[np.ndarray]) -> bytes:
    """Convert a SavedModel."""
    converter = tf.lite.TFLiteConverter.from_saved_model(directory)
    if quantize != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.representative_dataset = lambda: (
            {portable.INPUT: np.asarray(picture, np.float32)[None]} for picture in calibration
        )
        converter._experimental_calibrate_only = True  # it quantizes everything; what it may not is said below
    # It calibrates with an interpreter that announces its own end, whichever one is used afterwards.
    with warnings.catch_warnings(), tflite_files.silenced(), quiet():
        warnings.simplefilter("ignore")
        try:
            content = bytes(converter.convert())
            if quantize != "int8":
                return content
            quantized = bytes(convert.mlir_quantize(content, denylisted_nodes=_unweighted_ends(content)))
        except (convert.ConverterError, RuntimeError, ValueError) as error:
            raise InputError(f"the network cannot be converted to LiteRT: {_first_line(error)}") from None
        return corrected(quantized, content, calibration)


def _unweighted_ends(content: bytes) -> list[str]:
    """Name what is computed before the first layer with weights and after the last one: it stays in float.

    That is the normalisation of the pixels, and softmax, sigmoid or the units of numbers, which in int8 would give
    probabilities in steps of 1/256, with ties.
    """
    model = tflite_files.unpacked(content)
    kinds, operations = zip(*tflite_files.operations(model), strict=True)
    weighted = [number for number, kind in enumerate(kinds) if kind in WEIGHTED]
    ends = [*operations[: weighted[0]], *operations[weighted[-1] + 1 :]] if weighted else operations
    return [model.subgraphs[0].tensors[output].name.decode() for end in ends for output in end.outputs]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
