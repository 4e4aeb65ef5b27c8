"""Judge files of arrays without reading the arrays: NumPy's `.npz` and `.safetensors`."""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from tftransfer.scanning.archives import Archive, archive_problems
from tftransfer.scanning.finding import Advised, Damage, Problems

LARGEST_HEADER = 100 * 2**20
"""Bytes of a safetensors header, as in the format's own readers."""

LARGEST_NPY_HEADER = 2**20

MOST_DIMENSIONS = 64

REFUSED = "trusted or not, the library of the format refuses it"

_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
}
_READERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}


def npz_problems(file: BinaryIO) -> Problems:
    """Yield what is wrong with an open `.npz` file."""
    try:
        archive = Archive(file)
    except zipfile.BadZipFile:
        yield "", Damage("is no .npz archive: damaged, cut short or of another kind")
        return
    problems = list(archive_problems(archive))
    yield from problems
    for member in [] if problems else archive.members:
        if not member.filename.endswith(".npy"):
            yield member.filename, "is no array"
            continue
        with archive.open(member.filename, LARGEST_NPY_HEADER) as opened:
            yield from ((member.filename, problem) for problem in _npy_problems(opened, member.file_size))


def _npy_problems(file: BinaryIO, size: int) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):
            version = np.lib.format.read_magic(file)
            shape, _, dtype = _READERS[min(version[0], 2)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, MemoryError, RecursionError):
        yield "is no array: its header is damaged"
        return
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        yield "is an array of Python objects: reading it runs code that is in it"
    elif any(length < 0 for length in shape) or claimed > size:
        yield f"claims {claimed} bytes and holds {size}"


def safetensors_problems(path: Path) -> Problems:
    """Yield what is wrong with a `.safetensors` file, from its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            yield "header", Damage(f"claims {length} bytes in a file of {size}")
            return
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            yield "header", Damage("is no JSON")
            return
    if not isinstance(header, dict):
        yield "header", Advised("is no JSON object", REFUSED)
        return
    for where, problem in _tensor_problems(header, size - 8 - length):
        yield where, Advised(problem, REFUSED)


def _tensor_problems(header: dict[str, Any], size: int) -> Problems:
    """Check that the tensors lie side by side in the data and fill it, as the format demands."""
    spans = []
    for name, tensor in header.items():
        if name == "__metadata__":
            if not isinstance(tensor, dict) or not all(isinstance(value, str) for value in tensor.values()):
                yield name, "holds something else than texts"
        elif (span := _span(tensor)) is None:
            yield name, "has no type, shape and place that fit each other"
        else:
            spans.append((span, name))
    end = 0
    for (begin, stop), name in sorted(spans):
        if begin != end:
            yield name, "does not begin where the tensor before it ends"
        end = stop
    if end != size:
        yield "", f"tensors of {end} bytes in data of {size}"


def _span(tensor: Any) -> tuple[int, int] | None:
    """Return where a tensor begins and ends, or None if its description contradicts itself."""
    if not isinstance(tensor, dict):
        return None
    shape, offsets = tensor.get("shape"), tensor.get("data_offsets")
    width = _WIDTHS.get(str(tensor.get("dtype")))
    if width is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        return None
    begin, end = offsets
    return (begin, end) if begin <= end and math.prod(shape) * width == end - begin else None


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= MOST_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
