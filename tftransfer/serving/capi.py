"""Run a SavedModel through TensorFlow's C library, in a process that never imports TensorFlow.

This is the loader that the C++ model server uses. `loaders.c_library` starts this file as its own program,
hands it requests on standard input and reads the answers from standard output, both JSON. Only the standard
library and NumPy are imported.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Codes of TF_DataType (tensorflow/c/tf_datatype.h) for every type that our signatures may hold.
_STRING = 7
_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 9: np.int64, 10: np.bool_}
_CODES = {np.dtype(kind): code for code, kind in _TYPES.items()}
# sizeof(TF_TString), tensorflow/core/platform/ctstring_internal.h; TF_String* functions reach its content.
_STRING_BYTES = 24

_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class _Output(ctypes.Structure):
    """TF_Output: one output of one operation of the graph."""

    _fields_ = (("operation", _POINTER), ("index", _INT))


# Name -> (result, arguments), from tensorflow/c/c_api.h, tf_tensor.h, tf_status.h and tf_tstring.h.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "TF_NewStatus": (_POINTER, ()),
    "TF_DeleteStatus": (None, (_POINTER,)),
    "TF_GetCode": (_INT, (_POINTER,)),
    "TF_Message": (ctypes.c_char_p, (_POINTER,)),
    "TF_NewGraph": (_POINTER, ()),
    "TF_DeleteGraph": (None, (_POINTER,)),
    "TF_NewSessionOptions": (_POINTER, ()),
    "TF_DeleteSessionOptions": (None, (_POINTER,)),
    "TF_LoadSessionFromSavedModel": (
        _POINTER,
        (
            _POINTER,
            _POINTER,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            _INT,
            _POINTER,
            _POINTER,
            _POINTER,
        ),
    ),
    "TF_CloseSession": (None, (_POINTER, _POINTER)),
    "TF_DeleteSession": (None, (_POINTER, _POINTER)),
    "TF_GraphOperationByName": (_POINTER, (_POINTER, ctypes.c_char_p)),
    "TF_SessionRun": (
        None,
        (
            *(_POINTER, _POINTER),
            *(ctypes.POINTER(_Output), ctypes.POINTER(_POINTER), _INT),
            *(ctypes.POINTER(_Output), ctypes.POINTER(_POINTER), _INT),
            *(_POINTER, _INT, _POINTER, _POINTER),
        ),
    ),
    "TF_AllocateTensor": (_POINTER, (_INT, ctypes.POINTER(_LONG), _INT, _SIZE)),
    "TF_DeleteTensor": (None, (_POINTER,)),
    "TF_TensorType": (_INT, (_POINTER,)),
    "TF_NumDims": (_INT, (_POINTER,)),
    "TF_Dim": (_LONG, (_POINTER, _INT)),
    "TF_TensorData": (_POINTER, (_POINTER,)),
    "TF_TensorByteSize": (_SIZE, (_POINTER,)),
    "TF_StringInit": (None, (_POINTER,)),
    "TF_StringCopy": (None, (_POINTER, ctypes.c_char_p, _SIZE)),
    "TF_StringDealloc": (None, (_POINTER,)),
    "TF_StringGetDataPointer": (_POINTER, (_POINTER,)),
    "TF_StringGetSize": (_SIZE, (_POINTER,)),
}


class RequestFailed(Exception):
    """The library refused something; `code` is its TF_Code (3 is InvalidArgument)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def load_library() -> ctypes.CDLL:
    """Load the C library from the installed wheel, found without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package tensorflow is not installed")
    folder = Path(spec.submodule_search_locations[0])
    library = ctypes.CDLL(str(next(folder.glob("libtensorflow_cc.so*"))))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@contextlib.contextmanager
def status_of(library: ctypes.CDLL) -> Iterator[int]:
    """Give a status to fill, and raise `RequestFailed` afterwards if it is not OK."""
    status = library.TF_NewStatus()
    try:
        yield status
        code = library.TF_GetCode(status)
        if code:
            raise RequestFailed(code, library.TF_Message(status).decode(errors="replace"))
    finally:
        library.TF_DeleteStatus(status)


class Session:
    """One SavedModel, loaded with the tag `serve`.

    Args:
        library: From `load_library`.
        directory: The folder with `saved_model.pb`.
    """

    def __init__(self, library: ctypes.CDLL, directory: str) -> None:
        self._library = library
        self._graph = library.TF_NewGraph()
        options = library.TF_NewSessionOptions()
        tags = (ctypes.c_char_p * 1)(b"serve")
        try:
            with status_of(library) as status:
                self._session = library.TF_LoadSessionFromSavedModel(
                    options, None, os.fsencode(directory), tags, 1, self._graph, None, status
                )
        finally:
            library.TF_DeleteSessionOptions(options)

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Answer one request.

        Args:
            inputs: The value for each tensor of the graph, such as `"serving_default_image:0"`.
            outputs: The tensor of the graph for each name of an answer.
        """
        library = self._library
        fed = [to_tensor(library, value) for value in inputs.values()]
        values, fetched = (_POINTER * len(fed))(*fed), (_POINTER * len(outputs))()
        try:
            # The tuples are bound to names: the arrays must outlive the call.
            sources, targets = self._outputs(inputs), self._outputs(outputs.values())
            with status_of(library) as status:
                library.TF_SessionRun(
                    *(self._session, None),
                    *(sources, values, len(fed)),
                    *(targets, fetched, len(outputs)),
                    *(None, 0, None, status),
                )
            return {name: to_array(library, tensor) for name, tensor in zip(outputs, fetched, strict=True)}
        finally:
            for tensor, value in zip(fed, inputs.values(), strict=True):
                _delete_fed(library, tensor, value)
            for tensor in filter(None, fetched):
                library.TF_DeleteTensor(tensor)

    def close(self) -> None:
        """Give the memory back."""
        with status_of(self._library) as status:
            self._library.TF_CloseSession(self._session, status)
            self._library.TF_DeleteSession(self._session, status)
        self._library.TF_DeleteGraph(self._graph)

    def _outputs(self, names: Any) -> Any:
        return (_Output * len(names))(*map(self._output, names))

    def _output(self, name: str) -> _Output:
        operation, index = name.rsplit(":", 1)
        found = self._library.TF_GraphOperationByName(self._graph, operation.encode())
        if not found:
            raise RequestFailed(5, f"the graph has no operation {operation!r}")
        return _Output(found, int(index))


def to_tensor(library: ctypes.CDLL, value: np.ndarray) -> int:
    """Copy an array into a new TF_Tensor; an object array holds bytes and becomes a string tensor."""
    shape = (_LONG * value.ndim)(*value.shape)
    if value.dtype != object:
        content = np.ascontiguousarray(value)
        tensor = library.TF_AllocateTensor(_CODES[value.dtype], shape, value.ndim, content.nbytes)
        ctypes.memmove(library.TF_TensorData(tensor), content.ctypes.data, content.nbytes)
        return tensor
    tensor = library.TF_AllocateTensor(_STRING, shape, value.ndim, value.size * _STRING_BYTES)
    for place, text in zip(_string_places(library, tensor, value.size), value.flat, strict=True):
        library.TF_StringInit(place)
        library.TF_StringCopy(place, text, len(text))
    return tensor


def to_array(library: ctypes.CDLL, tensor: int) -> np.ndarray:
    """Copy a TF_Tensor into an array; strings become an object array of bytes."""
    shape = tuple(library.TF_Dim(tensor, axis) for axis in range(library.TF_NumDims(tensor)))
    kind = library.TF_TensorType(tensor)
    if kind != _STRING:
        content = ctypes.string_at(library.TF_TensorData(tensor), library.TF_TensorByteSize(tensor))
        return np.frombuffer(content, _TYPES[kind]).reshape(shape)
    array = np.empty(math.prod(shape), object)
    for number, place in enumerate(_string_places(library, tensor, array.size)):
        array[number] = ctypes.string_at(library.TF_StringGetDataPointer(place), library.TF_StringGetSize(place))
    return array.reshape(shape)


def _string_places(library: ctypes.CDLL, tensor: int, count: int) -> list[int]:
    if not count:
        return []  # an empty tensor may have no memory at all
    begin = library.TF_TensorData(tensor)
    return [begin + number * _STRING_BYTES for number in range(count)]


def _delete_fed(library: ctypes.CDLL, tensor: int, value: np.ndarray) -> None:
    # TF_DeleteTensor frees the memory of the strings' headers, but not the strings that we copied in.
    if value.dtype == object:
        for place in _string_places(library, tensor, value.size):
            library.TF_StringDealloc(place)
    library.TF_DeleteTensor(tensor)


def to_json(value: np.ndarray) -> dict[str, Any]:
    """Write an array as JSON; `from_json` reads it back, bit for bit."""
    if value.dtype == object:
        texts = [base64.b64encode(text).decode() for text in value.flat]
        return {"shape": value.shape, "texts": texts}
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"shape": value.shape, "dtype": value.dtype.name, "content": content}


def from_json(description: Mapping[str, Any]) -> np.ndarray:
    """Read an array that `to_json` wrote.

    Example:
        >>> from_json(to_json(np.array([b"a", b""], object))).tolist()
        [b'a', b'']
    """
    shape = description["shape"]
    if "texts" in description:
        array = np.empty(len(description["texts"]), object)
        array[:] = [base64.b64decode(text) for text in description["texts"]]
        return array.reshape(shape)
    content = base64.b64decode(description["content"])
    return np.frombuffer(content, description["dtype"]).reshape(shape)


def answer_all(directory: str, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Load a SavedModel and answer requests, each `{"inputs": {tensor: value}, "outputs": {name: tensor}}`.

    Returns:
        For each request `{"answers": {name: value}}` or `{"code": TF_Code, "message": text}`.

    Raises:
        RequestFailed: If the SavedModel cannot be loaded.
    """
    session = Session(load_library(), directory)
    answers = [_answer(session, request) for request in requests]
    session.close()
    return answers


def _answer(session: Session, request: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: from_json(value) for name, value in request["inputs"].items()}
    try:
        answers = session.run(inputs, request["outputs"])
    except RequestFailed as error:
        return {"code": error.code, "message": str(error)}
    return {"answers": {name: to_json(value) for name, value in answers.items()}}


def main() -> None:
    """Read `{"directory": ..., "requests": [...]}` from standard input and print the answers."""
    task = json.load(sys.stdin)
    try:
        result: dict[str, Any] = {"answers": answer_all(task["directory"], task["requests"])}
    except RequestFailed as error:
        result = {"code": error.code, "message": str(error)}
    result["imported_tensorflow"] = "tensorflow" in sys.modules
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
