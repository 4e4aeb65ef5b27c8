"""Judge the operations of a SavedModel's graphs: those of the graph, of its functions, and of graphs kept as texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from tftransfer.scanning.finding import Problems
from tftransfer.scanning.lists import allowed_operations, known_operations, why_refused
from tftransfer.scanning.messages import message
from tftransfer.scanning.paths import ASSET, SAVER, SUFFIX, Body, Origins, attribute, bodies_of, strings, text

MOST_NODES = 2_000_000
"""Nodes, functions or objects of a graph."""

MOST_PARTS = 100_000
"""Inputs or attributes of a node, and texts in an attribute."""

MOST_TEXTS = 5_000_000
"""Texts in a constant, such as the words of a vocabulary."""

MOST_DIMENSIONS = 254
"""TensorFlow's own limit."""

MOST_NESTED = 4
"""Graphs in texts of graphs in texts."""

BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 1000
"""A constant is a bomb if it claims more than so many bytes, and more than so many times what is there."""

_DT_STRING = 7
_DT_HANDLES = {20: "resource", 21: "variant"}
# Bytes per number of the types that are not four bytes wide, tensorflow/core/framework/types.proto.
_WIDTHS = {2: 8, 4: 1, 5: 2, 6: 1, 8: 8, 9: 8, 10: 1, 11: 1, 12: 1, 14: 2, 17: 2, 18: 16, 19: 2, 23: 8}
_PRINTS_TO = frozenset({b"", b"stdout", b"stderr", b"log(info)", b"log(warning)", b"log(error)"})
# Which inputs of an operation are paths, and what they may be made of.
_PATHS: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {
    "InitializeTableFromTextFile": ((1,), frozenset({ASSET})),
    "InitializeTableFromTextFileV2": ((1,), frozenset({ASSET})),
    "MergeV2Checkpoints": ((0, 1), frozenset({SAVER, SUFFIX})),
    "RestoreV2": ((0,), frozenset({SAVER})),
    "SaveV2": ((0,), frozenset({SAVER, SUFFIX})),
}
# Operations that make tensors of what is data to a scan; of handles they would be keys to any variable.
_MAKERS = frozenset({"DeserializeManySparse", "DeserializeSparse", "ParseTensor", "RestoreV2"})
_FED = frozenset({"Placeholder", "PlaceholderV2", "PlaceholderWithDefault"})
# Messages that hold nodes, and the way to the nodes.
_HOLDERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "SavedModel": lambda found: (node for meta in found.meta_graphs for node in _nodes_of(meta.graph_def)),
    "MetaGraphDef": lambda found: _nodes_of(found.graph_def),
    "GraphDef": lambda found: _nodes_of(found),
    "FunctionDefLibrary": lambda found: (node for function in found.function for node in function.node_def),
    "FunctionDef": lambda found: iter(found.node_def),
    "NodeDef": lambda found: iter((found,)),
}
_NODE_NAME = re.compile(rb"[A-Za-z0-9._][\w.\\/>-]{0,1000}")


def meta_graph_problems(meta_graph: Any) -> Problems:
    """Yield what is wrong with the graph, the functions, the texts and the collections of a MetaGraphDef."""
    graph, objects = meta_graph.graph_def, meta_graph.object_graph_def
    bodies = bodies_of(graph)
    counts = (sum(len(body.nodes) for body in bodies), len(bodies), len(objects.nodes), len(objects.concrete_functions))
    if max(counts) > MOST_NODES:
        yield "", f"{max(counts)} nodes, functions or objects: more than {MOST_NODES}"
        return
    functions = {body.name for body in bodies[1:]}
    yield from _name_problems(bodies, functions)
    origins = Origins(meta_graph, bodies)
    for body in bodies:
        for node in body.nodes:
            yield from _node_problems(node, body, functions, origins)
    for function in graph.library.function:
        where = f"function {text(function.signature.name)}"
        attributes = [*function.attr, *(entry for one in function.arg_attr for entry in one.value.attr)]
        yield from _attribute_problems(attributes, where, 0)
    for entry in meta_graph.collection_def:
        for value in entry.value.bytes_list.value:
            yield from _hidden_problems(value, f"collection {text(entry.key)}", 0)


def _name_problems(bodies: Sequence[Body], functions: set[str]) -> Problems:
    """Names tell what is called: each must be there once, and be no operation's."""
    if len(functions) != len(bodies) - 1 or "" in functions:
        yield "", "functions without a name, or several of one name"
    for name in functions & known_operations():
        yield "", f"a function with the name of the operation {name}"
    for body in bodies:
        if len({node.name for node in body.nodes}) != len(body.nodes):
            yield f"function {body.name}" if body.name else "", "several nodes of one name"


def _node_problems(node: Any, body: Body, functions: set[str], origins: Origins) -> Problems:
    operation, where = text(node.op), body.where(node)
    if len(node.input) > MOST_PARTS:
        yield where, f"{len(node.input)} inputs: more than {MOST_PARTS}"
    elif operation in _PATHS:
        yield from _path_problems(node, body, origins)
    elif operation not in functions:
        yield from _operation_problems(node, where)
    if operation in _MAKERS or (operation in _FED and not body.name):
        yield from ((where, problem) for problem in _type_problems(node))
    for entry in node.attr:
        if entry.value.placeholder:
            yield where, f"attribute {text(entry.key[:80])} is left to the callers, which no exported graph does"
    yield from _attribute_problems(node.attr, where, 0)


def _type_problems(node: Any) -> Iterator[str]:
    types = {number for entry in node.attr for number in (entry.value.type, *entry.value.list.type)}
    for number in sorted(types & _DT_HANDLES.keys()):
        yield f"operation {text(node.op)} makes a {_DT_HANDLES[number]} of data, which no exported graph does"


def _operation_problems(node: Any, where: str) -> Problems:
    operation = text(node.op)
    if operation not in allowed_operations():
        yield where, f"operation {operation} {why_refused(operation)}"
    elif operation == "PrintV2" and attribute(node, b"output_stream").s not in _PRINTS_TO:
        stream = text(attribute(node, b"output_stream").s)
        yield where, f"operation PrintV2 writes to the file {stream!r}"


def _path_problems(node: Any, body: Body, origins: Origins) -> Problems:
    """Files may be read and written by the saver and the initializers of tables only, where these say."""
    operation = text(node.op)
    inputs, allowed = _PATHS[operation]
    for number in inputs:
        found = origins.of(body, node, (number,))
        foreign = sorted(found - allowed)
        if foreign:
            yield body.where(node), f"operation {operation} takes its path from {', '.join(foreign[:3])}"
        elif not found - {SUFFIX}:
            yield body.where(node), f"operation {operation} takes its path from where a scan cannot follow"


def _attribute_problems(attributes: Sequence[Any], where: str, depth: int) -> Problems:
    if len(attributes) > MOST_PARTS:
        yield where, f"{len(attributes)} attributes: more than {MOST_PARTS}"
        return
    todo = [entry.value for entry in attributes]
    while todo:
        value = todo.pop()
        parts = len(value.list.s) + len(value.list.func) + len(value.list.tensor)
        if parts > MOST_PARTS or len(value.func.attr) > MOST_PARTS:
            yield where, f"an attribute of {parts} parts: more than {MOST_PARTS}"
            continue
        for data in (value.s, *value.list.s):
            yield from _hidden_problems(data, where, depth)
        for function in (value.func, *value.list.func):
            todo.extend(entry.value for entry in function.attr)
        if value.HasField("tensor"):
            yield from _tensor_problems(value.tensor, where, depth)
        for tensor in value.list.tensor:
            yield from _tensor_problems(tensor, where, depth)


def _tensor_problems(tensor: Any, where: str, depth: int) -> Problems:
    dimensions = tensor.tensor_shape.dim
    if len(dimensions) > MOST_DIMENSIONS or len(tensor.string_val) > MOST_TEXTS:
        yield where, f"a constant of {len(dimensions)} dimensions and {len(tensor.string_val)} texts, which is too much"
        return
    if tensor.dtype in _DT_HANDLES:
        yield where, f"a constant of type {_DT_HANDLES[tensor.dtype]}, which no exported graph holds"
    sizes = [dimension.size for dimension in dimensions]
    if any(size < 0 for size in sizes):
        yield where, f"a constant of the impossible shape {sizes}"
    claimed = math.prod(sizes) * _WIDTHS.get(tensor.dtype, 4)
    if claimed > BOMB_BYTES and claimed > BOMB_RATIO * tensor.ByteSize():
        yield where, f"a constant that claims {claimed} bytes and holds {tensor.ByteSize()}"
    if tensor.dtype == _DT_STRING:
        for value in strings(tensor):
            yield from _hidden_problems(value, where, depth)


def _hidden_problems(data: bytes, where: str, depth: int) -> Problems:
    """Judge a text that is a graph: some operations run what they are given as a text."""
    nodes = _hidden_nodes(data)
    if not nodes:
        return
    where = f"graph in a text of {where}" if depth == 0 else where
    if depth >= MOST_NESTED:
        yield where, f"graphs in texts of graphs, more than {MOST_NESTED} deep"
        return
    for node in nodes:
        operation = text(node.op)
        if operation in _PATHS:
            yield where, f"operation {operation} reads or writes files"
        elif _is_operation(operation):
            yield from _operation_problems(node, where)
        yield from _attribute_problems(node.attr, where, depth + 1)


def _is_operation(name: str) -> bool:
    # In a text there is no telling an operation from a call of a function, whose names begin like this.
    return name in known_operations() or not name.startswith("__")


def _hidden_nodes(data: bytes) -> list[Any]:
    """Return the nodes of a text that is a graph, a function or a node in TensorFlow's own encoding."""
    if len(data) < 5:
        return []
    for name, nodes_of in _HOLDERS.items():
        try:
            nodes = list(nodes_of(message(name).FromString(data)))
        except DecodeError:
            continue
        if any(_is_node(node) for node in nodes):
            return nodes
    return []


def _is_node(node: Any) -> bool:
    return text(node.op) in known_operations() and _NODE_NAME.fullmatch(node.name) is not None


def _nodes_of(graph: Any) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def
