"""Judge a SavedModel: its protocol buffer, its assets and variables, and what else lies in its folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.message import DecodeError

from tftransfer.scanning.files import code_problem, files_below
from tftransfer.scanning.finding import Damage, Problem, Problems, described
from tftransfer.scanning.graphs import meta_graph_problems
from tftransfer.scanning.messages import message
from tftransfer.scanning.paths import bodies_of, inputs_of, node_of, text

MODEL = "saved_model.pb"
LARGEST_MODEL = 2**31 - 1
"""Bytes of `saved_model.pb`, in which weights may be constants; protobuf reads no more."""

OTHER_FORMS = ("saved_model.pbtxt", "saved_model.cpb")
"""Forms of a SavedModel that TensorFlow reads too and that are not judged."""

_KERAS_METADATA = "keras_metadata.pb"
_DATA = ("variables/", "assets.extra/")  # numbers and records, which may begin with any byte
_SHARD = re.compile(r"variables\.data-(\d{5})-of-(\d{5})")
_LEGACY_CODE = (b'"Lambda"', b'"TFOpLambda"', b'"SlicingOpLambda"', b"__lambda__", b'"function_type"')


def is_savedmodel(folder: Path) -> bool:
    """Tell whether a folder holds a SavedModel in any form."""
    return any(os.path.lexists(folder / name) for name in (MODEL, *OTHER_FORMS))


def savedmodel_problems(folder: Path) -> Problems:
    """Yield what is wrong with a SavedModel."""
    for name in OTHER_FORMS:
        if os.path.lexists(folder / name):
            yield name, f"a form of SavedModel that is not judged: only {MODEL} is"
    yield from _folder_problems(folder)
    saved_model = _read(folder / MODEL)
    if isinstance(saved_model, str):
        yield MODEL, saved_model
        return
    if not saved_model.meta_graphs:
        yield MODEL, Damage("holds no graph")
    for number, meta_graph in enumerate(saved_model.meta_graphs):
        place = f"graph {number}" if len(saved_model.meta_graphs) > 1 else ""
        yield from described(_meta_problems(folder, meta_graph), place)


def _read(file: Path) -> Any:
    """Return the parsed message, or what is wrong with the file."""
    if not file.is_file() or file.is_symlink():
        return "is not there, or is a link"
    size = file.stat().st_size
    if size > LARGEST_MODEL:
        return f"{size} bytes: more than {LARGEST_MODEL}"
    try:
        return message("SavedModel").FromString(file.read_bytes())
    except DecodeError:
        return Damage("is damaged, cut short or no SavedModel")


def _meta_problems(folder: Path, meta_graph: Any) -> Problems:
    yield from meta_graph_problems(meta_graph)
    assets = list(meta_graph.asset_file_def)
    for entry in meta_graph.collection_def:
        for one in entry.value.any_list.value:
            if one.type_url.endswith(b"AssetFileDef"):
                assets.append(message("AssetFileDef").FromString(one.value))
    for asset in assets:
        yield from _asset_problems(folder, text(asset.filename))
    paths = {
        node_of(meta_graph.saver_def.filename_tensor_name),
        *(node_of(asset.tensor_info.name) for asset in meta_graph.asset_file_def),
    }
    for entry in meta_graph.signature_def:
        if any(node_of(name) in paths for name in inputs_of(entry.value)):
            yield f"signature {text(entry.key)}", "takes the path of a checkpoint or an asset as an input"
    if _has_variables(meta_graph):
        yield from _variable_problems(folder / "variables")


def _asset_problems(folder: Path, name: str) -> Problems:
    where = f"asset {name!r}"
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        yield where, "is not the name of a file in assets/"
    elif not (folder / "assets" / name).is_file():
        yield where, "is not there"


def _has_variables(meta_graph: Any) -> bool:
    bodies = bodies_of(meta_graph.graph_def)
    return any(node.op in (b"VarHandleOp", b"VariableV2", b"Variable") for body in bodies for node in body.nodes)


def _variable_problems(folder: Path) -> Problems:
    if not (folder / "variables.index").is_file():
        yield "variables/variables.index", Damage("is not there, though the graph has variables")
        return
    shards = [match for name in sorted(os.listdir(folder)) if (match := _SHARD.fullmatch(name))]
    counts = {match[2] for match in shards}
    if len(counts) != 1 or len(shards) != int(counts.pop()):
        yield "variables", Damage(f"{len(shards)} files of variables: some are missing or of another set")


def _folder_problems(folder: Path) -> Problems:
    for file in files_below(folder):
        yield from _file_problems(file, file.relative_to(folder).as_posix())


def _file_problems(file: Path, name: str) -> Iterator[Problem]:
    if file.is_symlink():
        yield name, "is a link to elsewhere"
    elif not file.is_file():
        yield name, "is no ordinary file"
    elif problem := code_problem(name, b"" if name.startswith(_DATA) else _head(file)):
        yield name, problem
    elif file.name == _KERAS_METADATA and _contains(file, _LEGACY_CODE):
        yield name, "holds layers with code of their own, which Keras 2 would run"


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(8)


def _contains(file: Path, parts: Iterable[bytes]) -> bool:
    with file.open("rb") as opened:
        content = opened.read(LARGEST_MODEL)
    return any(part in content for part in parts)
