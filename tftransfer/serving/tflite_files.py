"""Read, run and time `.tflite` files, in a process that need not import TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from tftransfer.errors import InputError, check

METADATA = "tftransfer"
"""The name of the description among a file's metadata."""

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # of buffers, as the schema asks (`force_align`)
_PACKAGE = "ai_edge_litert"
_MOST_SECONDS = 10.0  # that are spent on measuring once


def module(name: str) -> Any:
    """Return a module of LiteRT's package.

    Raises:
        InputError: If the package is missing.
    """
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _PACKAGE:
            raise
        raise InputError("LiteRT is not installed: pip install 'tftransfer[litert]'") from None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Turn standard error away: LiteRT's libraries write notes to it that no setting stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def unpacked(content: bytes) -> Any:
    """Return a file's content as objects of the schema."""
    return module("schema_py_generated").ModelT.InitFromPackedBuf(content)


def packed(model: Any, size: int = 1024) -> bytes:
    """Return the content of a file, each buffer at a multiple of 16 bytes as the schema asks.

    TensorFlow's converter leaves them anywhere.

    Args:
        model: From `unpacked`.
        size: About how many bytes it will be. Defaults to 1024.
    """
    builder = _AligningBuilder(size)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def operations(model: Any) -> list[tuple[str, Any]]:
    """Return the kind of each operation of a model, such as `"CONV_2D"`, and the operation."""
    kinds = {number: name for name, number in vars(module("schema_py_generated").BuiltinOperator).items()}
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]  # old ones, new ones
    return [(kinds[codes[operation.opcodeIndex]], operation) for operation in model.subgraphs[0].operators]


def with_metadata(content: bytes, described: Mapping[str, Any]) -> bytes:
    """Return a file's content with a description in it.

    Args:
        content: Of a `.tflite` file.
        described: JSON.
    """
    schema, model = module("schema_py_generated"), unpacked(content)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(json.dumps(described, allow_nan=False).encode(), np.uint8)
    entry.name, entry.buffer = METADATA, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]
    return packed(model, len(content))


class _AligningBuilder(flatbuffers.Builder):
    def CreateNumpyVector(self, x: np.ndarray) -> int:
        self.Prep(_ALIGNMENT, x.nbytes)
        return super().CreateNumpyVector(x)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description that `export_litert` put into a file: labels, task, input, outputs, quantization, source.

    Args:
        path: The `.tflite` file.

    Raises:
        InputError: If there is no such file, it is none of LiteRT's, or it holds no description.
    """
    content = _read(Path(path))
    schema = module("schema_py_generated")
    try:
        model = schema.Model.GetRootAs(content, 0)
        for number in range(model.MetadataLength()):
            if model.Metadata(number).Name() == METADATA.encode():
                buffer = model.Buffers(model.Metadata(number).Buffer())
                return json.loads(buffer.DataAsNumpy().tobytes())
    except (struct.error, IndexError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} is damaged: it cannot be read as a LiteRT file") from None
    raise InputError(f"{path} was not exported by tftransfer: it has no metadata {METADATA!r}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if content[4:8] != _IDENTIFIER:
        raise InputError(f"{path} is no LiteRT file: it does not begin with {_IDENTIFIER.decode()}")
    return content


Answer = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From pictures, `(batch, height, width, 3)` float32, to the named outputs."""


def open_file(path: str | os.PathLike[str], threads: int = 1) -> Answer:
    """Load a file and return the function that answers batches of any size.

    Args:
        path: The `.tflite` file.
        threads: How many threads compute, from 1. Defaults to 1.

    Raises:
        InputError: If there is no such file, it is none of LiteRT's, or it is damaged.
    """
    check(threads >= 1, "threads", "a whole number from 1", threads)
    content = _read(Path(path))
    make = module("interpreter").Interpreter
    try:
        with silenced():
            interpreter = make(model_content=content, num_threads=threads)
            interpreter.allocate_tensors()
            run = interpreter.get_signature_runner()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded by LiteRT: {str(error).splitlines()[0]}") from None
    (name,) = run.get_input_details()
    return lambda pictures: run(**{name: pictures})


def milliseconds(
    path: str | os.PathLike[str], batch_size: int = 1, *, threads: int = 1, rounds: int = 50, warm_up: int = 5
) -> float:
    """Measure how long a file takes to answer one batch.

    Args:
        path: The `.tflite` file, from `export_litert`.
        batch_size: Pictures in the batch, from 1. Defaults to 1.
        threads: How many threads compute, from 1. Defaults to 1.
        rounds: How many batches are measured, from 1; fewer if they take more than ten seconds. Defaults to 50.
        warm_up: How many go before and are not measured. Defaults to 5.

    Returns:
        The median over the batches, which are of random pixels.

    Raises:
        InputError: As for `open_file` and `read_metadata`.
    """
    check(batch_size >= 1, "batch_size", "a whole number from 1", batch_size)
    shape = read_metadata(path)["input"]["shape"]
    pictures = np.random.default_rng(0).integers(0, 256, (batch_size, *shape[1:])).astype(np.float32)
    answer = open_file(path, threads)
    return median_milliseconds(lambda: answer(pictures), rounds, warm_up)


def median_milliseconds(call: Callable[[], object], rounds: int = 50, warm_up: int = 5) -> float:
    """Return the median of what a call takes, in milliseconds.

    Args:
        call: What is measured.
        rounds: How often, from 1; less often if that takes more than ten seconds. Defaults to 50.
        warm_up: How often it is called before. Defaults to 5.
    """
    check(rounds >= 1, "rounds", "a whole number from 1", rounds)
    for _ in range(warm_up):
        call()
    seconds: list[float] = []
    while len(seconds) < rounds and sum(seconds) < _MOST_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds))
