"""Three ways to the same answers: Keras, a graph session (the path of the C++ server) and the C library."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer.serving import capi
from tftransfer.serving.comparison import Answers
from tftransfer.serving.export import answers_of, batch_decoder, quiet
from tftransfer.serving.structure import Signature
from tftransfer.tasks import Task

# Loading takes seconds; a library that hangs must not hang the run.
_SECONDS = 900


@dataclass(frozen=True)
class Request:
    """A batch for one signature: encoded pictures (an object array of bytes) or float32 pixels."""

    signature: str
    values: np.ndarray


class LoaderError(Exception):
    """The C library could not load or run a SavedModel."""


def as_texts(values: Sequence[bytes]) -> np.ndarray:
    """Put bytes into an object array; NumPy's own text type would drop zeros at their end."""
    array = np.empty(len(values), object)
    array[:] = list(values)
    return array


def decode(samples: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Return `(n, height, width, 3)` float32 pixels, decoded as in training."""
    return batch_decoder(size)(tf.constant(as_texts(samples), tf.string)).numpy().astype(np.float32)


def keras_answers(
    model: keras.Model, task: Task, from_logits: bool | None, batches: Sequence[np.ndarray]
) -> list[Answers]:
    """Answer batches of float32 pixels with the Keras model."""
    answer = answers_of(model, task, from_logits)
    return [{name: value.numpy() for name, value in answer(tf.constant(batch)).items()} for batch in batches]


@contextlib.contextmanager
def graph_session(directory: Path, signatures: Mapping[str, Signature]) -> Iterator[Callable[[Request], Answers]]:
    """Load a SavedModel into a graph session and give the function that answers requests."""
    with quiet(), tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.saved_model.load(session, ["serve"], os.fspath(directory))

        def answer(request: Request) -> Answers:
            signature = signatures[request.signature]
            return session.run(dict(signature.outputs), {signature.input: request.values})

        yield answer


@contextlib.contextmanager
def c_library(
    directory: Path, signatures: Mapping[str, Signature], requests: Sequence[Request]
) -> Iterator[Callable[[], list[Answers | int]]]:
    """Start answering requests in a process without Python's TensorFlow, beside what this process does.

    Yields:
        A function that waits for the answers: for each request the answers, or the error's TF_Code. It raises
        `LoaderError` if the library cannot load the SavedModel.
    """
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as answered:
        json.dump({"directory": os.fspath(directory), "requests": _as_json(signatures, requests)}, given)
        given.seek(0)
        # By file path, with its folder not on the search path: wherever this package was imported from.
        command = [sys.executable, "-P", capi.__file__]
        with subprocess.Popen(
            command, stdin=given, stdout=answered, stderr=subprocess.PIPE, text=True, env=_environment()
        ) as process:
            try:
                yield lambda: _collect(process, answered)
            finally:
                process.kill()


def _environment() -> dict[str, str]:
    # The notes of the C library go unread, and on a GPU it must leave room for this process.
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def _as_json(signatures: Mapping[str, Signature], requests: Sequence[Request]) -> list[dict[str, Any]]:
    return [
        {
            "inputs": {signatures[request.signature].input: capi.to_json(request.values)},
            "outputs": dict(signatures[request.signature].outputs),
        }
        for request in requests
    ]


def _collect(process: subprocess.Popen[str], answered: IO[str]) -> list[Answers | int]:
    try:
        _, complaints = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise LoaderError(f"no answer within {_SECONDS} seconds") from None
    if process.returncode:
        raise LoaderError(f"the process ended with {process.returncode}: {complaints.strip()[-500:]}")
    answered.seek(0)
    result = json.load(answered)
    if "code" in result:
        raise LoaderError(result["message"])
    if result["imported_tensorflow"]:
        raise LoaderError("the process imported Python's TensorFlow, so this would prove nothing")
    return [_answer(item) for item in result["answers"]]


def _answer(item: Mapping[str, Any]) -> Answers | int:
    if "code" in item:
        return int(item["code"])
    return {name: capi.from_json(value) for name, value in item["answers"].items()}
