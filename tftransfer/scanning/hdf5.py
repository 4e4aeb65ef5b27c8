"""Judge HDF5 files: links, data kept elsewhere, filters, claims and the network that old files describe.

Nothing is followed and no tensor is read. The structure itself is read by the HDF5 library, as Keras would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import h5py

from tftransfer.scanning.configs import config_text_problems
from tftransfer.scanning.finding import Problems, described

MOST_OBJECTS, DEEPEST = 200_000, 64
MOST_ATTRIBUTES = 10_000
LARGEST_ATTRIBUTE = 64 * 2**20

BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 1000
"""A tensor is a bomb if it claims more than so many bytes, and more than so many times what is stored of it."""

_FILTERS = frozenset({1, 2, 3, 32000})  # gzip, shuffle, Fletcher's checksum, LZF
_CONFIGS = ("model_config", "training_config")


def hdf5_problems(source: Path | IO[bytes], size: int) -> Problems:
    """Yield what is wrong with an HDF5 file.

    Args:
        source: The file.
        size: Its bytes.
    """
    with h5py.File(source, "r") as file:
        yield from _attribute_problems(file, "/")
        for name in _CONFIGS:
            if name in file.attrs:
                yield from described(_config_problems(file, name), name)
        yield from _group_problems(file, size)


def _group_problems(file: h5py.File, size: int) -> Problems:
    seen = {_address(file)}
    todo = [(file, "", 0)]
    total = 0
    while todo:
        group, path, depth = todo.pop()
        for name in group:
            place = f"{path}/{name}"
            if len(seen) > MOST_OBJECTS or depth > DEEPEST:
                yield place, f"more than {MOST_OBJECTS} objects, or groups more than {DEEPEST} deep"
                return
            kind = group.get(name, getlink=True, getclass=True)
            if kind is not h5py.HardLink:
                yield place, f"is a link ({getattr(kind, '__name__', kind)}) to another place or file"
                continue
            found = group.get(name)
            if _address(found) in seen:
                yield place, "is there under a second name"
                continue
            seen.add(_address(found))
            yield from _attribute_problems(found, place)
            if isinstance(found, h5py.Group):
                todo.append((found, place, depth + 1))
            elif isinstance(found, h5py.Dataset):
                problems = list(_dataset_problems(found))
                yield from ((place, problem) for problem in problems)
                total += 0 if problems else _claimed(found)
            else:
                yield place, f"is neither a group nor a tensor ({type(found).__name__})"
    if total > BOMB_BYTES and total > BOMB_RATIO * size:
        yield "", f"claims {total} bytes of tensors in a file of {size}"


def _dataset_problems(dataset: h5py.Dataset) -> Iterator[str]:
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual:
        yield "is a virtual tensor: its data lie in other files"
        return
    if plan.get_external_count():
        yield f"keeps its data in another file ({plan.get_external(0)[0]!r})"
        return
    if dataset.dtype.hasobject and h5py.check_string_dtype(dataset.dtype) is None:
        yield "holds references to other objects"
    for number in range(plan.get_nfilters()):
        code = plan.get_filter(number)[0]
        if code not in _FILTERS:
            yield f"needs the filter {code}, which is loaded from a library"
    stored = dataset.id.get_storage_size()
    if _claimed(dataset) > BOMB_BYTES and _claimed(dataset) > BOMB_RATIO * stored:
        yield f"claims {_claimed(dataset)} bytes and holds {stored}"


def _claimed(dataset: h5py.Dataset) -> int:
    """Return what reading takes: a tensor, and at least one of its chunks, which may be larger."""
    numbers = max(math.prod(dataset.shape or ()), math.prod(dataset.chunks or ()))
    return numbers * dataset.dtype.itemsize


def _attribute_problems(found: h5py.HLObject, place: str) -> Problems:
    count = h5py.h5a.get_num_attrs(found.id)
    if count > MOST_ATTRIBUTES:
        yield place, f"{count} attributes: more than {MOST_ATTRIBUTES}"
        return
    for number in range(count):
        attribute = h5py.h5a.open(found.id, index=number)
        name = attribute.name.decode("utf-8", "backslashreplace")
        if _attribute_claim(attribute) > LARGEST_ATTRIBUTE:
            yield place, f"attribute {name!r} claims {_attribute_claim(attribute)} bytes"
        elif attribute.get_type().get_class() == h5py.h5t.REFERENCE:
            yield place, f"attribute {name!r} refers to other objects"


def _attribute_claim(attribute: Any) -> int:
    return math.prod(attribute.shape) * attribute.get_type().get_size()


def _config_problems(file: h5py.File, name: str) -> Problems:
    """Judge the description of a network, or of its training, in a file of `model.save("x.h5")`."""
    if _attribute_claim(h5py.h5a.open(file.id, name.encode())) > LARGEST_ATTRIBUTE:
        return  # said already
    value = file.attrs[name]
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        yield "", "is no text"
        return
    yield from config_text_problems(text, modules_needed=False)


def _address(found: h5py.HLObject) -> tuple[int, int]:
    info = h5py.h5o.get_info(found.id)
    return info.fileno, info.addr
