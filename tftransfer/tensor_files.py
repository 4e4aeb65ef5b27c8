"""Safetensors files with a description and a digest: written through to the disk in one step, checked when read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tftransfer.errors import InputError
from tftransfer.optimizers import Moment

Kinds = Mapping[str, Mapping[str, np.ndarray]]
"""Tensors by kind and name, such as `kinds["head"]["0.kernel"]`."""

_KEY = "tftransfer"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot sync folders


def write(path: Path, kinds: Kinds, format_name: str, **described: Any) -> None:
    """Write tensors and what describes them.

    Args:
        path: The file; its folder exists.
        kinds: The tensors.
        format_name: What the file is, see `read`.
        described: JSON to go with them.

    Raises:
        OSError: If it cannot be written.
    """
    tensors = {f"{kind}:{name}": np.asarray(t, order="C") for kind, part in kinds.items() for name, t in part.items()}
    text = json.dumps({**described, "format": format_name, "sha256": digest_of(tensors)}, allow_nan=False)
    staged = path.with_name(f".{path.name}.staged")
    try:
        save_file(tensors, staged, {_KEY: text})
    except SafetensorError as error:  # how it says that a disk is full
        raise OSError(f"{path.name} cannot be written: {error}") from None
    sync(staged)
    os.replace(staged, path)
    sync(path.parent)


def read(path: Path, format_name: str) -> tuple[dict[str, Any], Kinds]:
    """Read such a file: its description and its tensors.

    Raises:
        InputError: If it is missing, damaged, or something else.
    """
    try:
        with safe_open(path, "np") as file:
            described = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as {format_name!r}: {error}") from None
    if described.get("format") != format_name:
        raise InputError(f"{path} is no file of this kind: expected {format_name!r} in its metadata")
    if described["sha256"] != digest_of(tensors):
        raise InputError(f"{path} is damaged: its tensors are not those that were written")
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        kind, _, of = name.partition(":")
        kinds.setdefault(kind, {})[of] = value
    return described, kinds


def numbered(tensors: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Name tensors by their number."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def in_order(tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return the tensors that `numbered` named."""
    return tuple(tensors[str(number)] for number in range(len(tensors)))


def pack(moments: Mapping[str, Moment]) -> tuple[Kinds, dict[str, int]]:
    """Return moments as kinds of tensors, and their ages."""
    slots = max((len(moment.slots) for moment in moments.values()), default=0)
    kinds = {
        f"moment{number}": {name: moment.slots[number] for name, moment in moments.items()} for number in range(slots)
    }
    return kinds, {name: moment.age for name, moment in moments.items()}


def unpack(kinds: Kinds, ages: Mapping[str, int]) -> dict[str, Moment]:
    """Return the moments that `pack` took apart."""
    slots = [kinds[kind] for kind in sorted(kinds) if kind.startswith("moment")]
    return {name: Moment(tuple(slot[name] for slot in slots if name in slot), age) for name, age in ages.items()}


def to_json(value: Any) -> Any:
    """Return a number as JSON has it, which knows neither infinity nor NaN; `from_json` reads it.

    Example:
        >>> to_json(float("inf")), from_json(to_json(float("inf"))), to_json(np.float32(0.5))
        ({'float': 'inf'}, inf, 0.5)
    """
    value = value.item() if isinstance(value, np.generic) else value
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """Return the number that `to_json` wrote."""
    return float(value["float"]) if isinstance(value, dict) else value


def sync(path: Path) -> None:
    """Write a file or a folder through to the disk, where the system can."""
    with contextlib.suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not (path.is_dir() and error.errno in _NO_SYNC):
                raise
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write every file and folder below (and including) `folder` through to the disk."""
    for path, _, files in os.walk(folder, topdown=False):
        for file in files:
            sync(Path(path) / file)
        sync(Path(path))


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names, shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} {tensors[name].dtype};".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
