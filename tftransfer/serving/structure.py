"""Read what a SavedModel promises: its tag, its signatures and the labels in its graph. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from tftransfer.errors import InputError
from tftransfer.report import Check
from tftransfer.tasks import Task

BYTES, PIXELS, CLASSIFY = "serving_default", "tensor", "classify"
# Name of the input, its type and its shape; -1 is any size, None is the network's own.
_INPUTS: dict[str, tuple[str, tf.DType, tuple[int | None, ...]]] = {
    BYTES: ("image_bytes", tf.string, (-1,)),
    PIXELS: ("image", tf.float32, (-1, None, None, 3)),
}
_UNNAMED = re.compile(r"output_\d+")
_Spec = tuple[tf.DType, tuple[int, ...] | None]


@dataclass(frozen=True)
class Signature:
    """The graph's tensors behind one signature: `input`, and one per name in `outputs`."""

    input: str
    outputs: Mapping[str, str]


def read(directory: Path) -> Any:
    """Read a SavedModel's protocol buffer.

    Raises:
        InputError: If the folder holds none.
    """
    file = directory / "saved_model.pb"
    try:
        return saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except OSError as error:
        raise InputError(f"{directory} is no SavedModel: {file.name} cannot be read ({error.strerror})") from None
    except DecodeError:
        raise InputError(f"{directory} is no SavedModel: {file.name} is damaged") from None


def check_structure(saved_model: Any, task: Task | None) -> Check:
    """Compare tag, signatures, names, types and shapes with the contract (DESIGN section 4)."""
    problems = list(_problems(saved_model, task))
    graphs = saved_model.meta_graphs
    names = sorted(graphs[0].signature_def[PIXELS].outputs) if not problems else []
    found = {"problems": problems} if problems else {"outputs": ", ".join(names)}
    return Check("SavedModel structure", not problems, found)


def check_labels(saved_model: Any, task: Task) -> Check | None:
    """Look for the task's labels, in their order, among the constants of the graph.

    Answers to a few pictures show the order only of the classes that occur in them.

    Returns:
        None if the task's answers hold no label.
    """
    if not any(kind == tf.string for kind, _ in _expected_outputs(task).values()):
        return None
    labels = tuple(label.encode() for label in task.labels)
    found = any(texts == labels for texts in _text_constants(saved_model.meta_graphs[0].graph_def))
    detail = {"labels": len(labels)} if found else {"problem": "the labels are not in the graph in this order"}
    return Check("labels in the graph", found, detail)


def signatures(saved_model: Any) -> dict[str, Signature]:
    """Return the signatures of a SavedModel whose structure has been checked: two, and `classify` if it has that."""
    definitions = saved_model.meta_graphs[0].signature_def
    return {
        name: _signature(definitions[name], input_name(name)) for name in (*_INPUTS, CLASSIFY) if name in definitions
    }


def input_name(signature: str) -> str:
    """Return what a signature's input is called."""
    return _INPUTS[BYTES if signature == CLASSIFY else signature][0]


def image_size(saved_model: Any) -> tuple[int, int]:
    """Return `(height, width)` of the `tensor` signature."""
    shape = saved_model.meta_graphs[0].signature_def[PIXELS].inputs[_INPUTS[PIXELS][0]].tensor_shape
    return shape.dim[1].size, shape.dim[2].size


def _signature(definition: Any, name: str) -> Signature:
    outputs = {output: info.name for output, info in definition.outputs.items()}
    return Signature(definition.inputs[name].name, outputs)


def _problems(saved_model: Any, task: Task | None) -> Iterator[str]:
    tags = [sorted(graph.meta_info_def.tags) for graph in saved_model.meta_graphs]
    if tags != [["serve"]]:
        yield f"expected one graph with the tag `serve`, found tags {tags}"
        return
    definitions = saved_model.meta_graphs[0].signature_def
    for name in (BYTES, PIXELS):
        if name not in definitions:
            yield f"signature `{name}` is missing"
            continue
        yield from (f"{name}: {problem}" for problem in _input_problems(definitions[name], *_INPUTS[name]))
        yield from (f"{name}: {problem}" for problem in _output_problems(definitions[name], task))
    if CLASSIFY in definitions:
        yield from (f"{CLASSIFY}: {problem}" for problem in _classify_problems(definitions[CLASSIFY]))


def _input_problems(definition: Any, name: str, kind: tf.DType, shape: tuple[int | None, ...]) -> Iterator[str]:
    if list(definition.inputs) != [name]:
        yield f"expected the input `{name}`, found {sorted(definition.inputs)}"
        return
    found_kind, found = _spec(definition.inputs[name])
    if found_kind != kind:
        yield f"input `{name}` must be {kind.name}, found {found_kind.name}"
    if found is None or len(found) != len(shape) or not all(map(_fits, found, shape)):
        wanted = ["any" if size == -1 else size or "fixed" for size in shape]
        yield f"input `{name}` must have the shape {wanted}, found {found}"


def _fits(found: int, wanted: int | None) -> bool:
    return found > 0 if wanted is None else found == wanted


def _output_problems(definition: Any, task: Task | None) -> Iterator[str]:
    found = {name: _spec(info) for name, info in definition.outputs.items()}
    unnamed = sorted(filter(_UNNAMED.fullmatch, found))
    if unnamed or not found:
        yield f"outputs without a name of their own: {unnamed}"
    expected = _expected_outputs(task) if task else {name: (kind, None) for name, (kind, _) in found.items()}
    if sorted(found) != sorted(expected):
        yield f"expected the outputs {sorted(expected)}, found {sorted(found)}"
        return
    for name, (kind, shape) in found.items():
        if kind not in (tf.float32, tf.string) or kind != expected[name][0]:
            yield f"output `{name}` must be {expected[name][0].name} (float32 or string), found {kind.name}"
        if shape is not None and (not shape or shape[0] != -1):
            yield f"output `{name}` must have a batch of any size, found the shape {list(shape)}"
        wanted = expected[name][1]
        if not _sizes_agree(shape, wanted):
            yield f"output `{name}` must have the shape {list(wanted or ())}, found {list(shape or ())}"


def _classify_problems(definition: Any) -> Iterator[str]:
    yield from _input_problems(definition, *_INPUTS[BYTES])
    found = {name: _spec(info) for name, info in definition.outputs.items()}
    kinds = {name: kind for name, (kind, _) in found.items()}
    if kinds != {"classes": tf.string, "scores": tf.float32}:
        yield f"expected the outputs classes (string) and scores (float32), found {sorted(found)}"
    elif any(shape is None or len(shape) != 2 or shape[0] != -1 for _, shape in found.values()):
        yield "outputs must have the shape [any, K]"


def _sizes_agree(found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> bool:
    """Compare shapes where both are known, apart from the batch."""
    if found is None or expected is None:
        return True
    pairs = zip(found[1:], expected[1:], strict=False)
    return len(found) == len(expected) and all(a == b or -1 in (a, b) for a, b in pairs)


def _expected_outputs(task: Task) -> dict[str, _Spec]:
    answers = task.answers(tf.zeros((1, task.num_outputs)), True)
    return {name: (answer.dtype, (-1, *answer.shape[1:])) for name, answer in answers.items()}


def _spec(info: Any) -> _Spec:
    shape = None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim)
    return tf.dtypes.as_dtype(info.dtype), shape


def _text_constants(graph: Any) -> Iterator[tuple[bytes, ...]]:
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    for node in (node for body in bodies for node in body if node.op == "Const"):
        tensor = node.attr["value"].tensor
        if tensor.dtype == tf.string.as_datatype_enum:
            yield tuple(tf.make_ndarray(tensor).ravel())
