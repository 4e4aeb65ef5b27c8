"""Where a path in a SavedModel's graph comes from: its own assets, the saver's argument, a constant, a request."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tftransfer.scanning.messages import FIELDS, message

ASSET, SAVER, SUFFIX = "an asset", "the saver's argument", "a suffix"

# What `tf.saved_model.save` appends to the saver's argument.
_SUFFIX = re.compile(rb"\.part|_temp(_[0-9a-f]{1,64})?/part")
# Operations whose output is made of (some of) their inputs, and which inputs those are.
_PASSING = {
    b"Identity": slice(0, 1),
    b"Pack": slice(None),
    b"Select": slice(1, None),
    b"SelectV2": slice(1, None),
    b"ShardedFilename": slice(0, 1),
    b"StringJoin": slice(None),
}
_CALLS = (b"PartitionedCall", b"StatefulPartitionedCall")
# What may take an asset's variable; anything else could put another path into it.
_ASSET_VARIABLE_USERS = frozenset({b"AssignVariableOp", b"ReadVariableOp", b"VarIsInitializedOp"})
_LONGEST_NAME = 300  # that is shown
_MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Body:
    """Nodes with one name space: those of the graph itself (no name), or of a function of its library."""

    name: str
    nodes: Sequence[Any]
    arguments: tuple[bytes, ...] = ()
    takes_lists: bool = False
    interface: bytes = b""  # TensorFlow may call another function of the same one instead

    def where(self, node: Any) -> str:
        """Name a node for a finding."""
        place = f"node {text(node.name[:_LONGEST_NAME])}"
        return f"function {self.name}, {place}" if self.name else place


def bodies_of(graph: Any) -> list[Body]:
    """Return the graph's own nodes, and those of each function of its library."""
    functions = graph.library.function
    return [Body("", graph.node)] + [
        Body(
            text(one.signature.name),
            one.node_def,
            tuple(arg.name for arg in one.signature.input_arg),
            any(arg.number_attr or arg.type_list_attr for arg in one.signature.input_arg),
            attribute(one, b"api_implements").s,
        )
        for one in functions
    ]


def text(name: bytes) -> str:
    """Return a name as text; what is not UTF-8 is shown escaped."""
    return name.decode("utf-8", "backslashreplace")


class Origins:
    """Answers where the inputs of a node come from, through calls of functions.

    Args:
        meta_graph: The graph, its saver, assets, signatures and objects.
        bodies: Its nodes, as `bodies_of` returns them.
    """

    def __init__(self, meta_graph: Any, bodies: Sequence[Body]) -> None:
        self._nodes = {body.name: {node.name: node for node in body.nodes} for body in bodies}
        self._main = bodies[0]
        self._callers = _callers(bodies)
        self._users = _users(bodies[0])
        self._handles = Counter(_shared_name(node) for body in bodies for node in body.nodes if _is_handle(node))
        self._steps = 0
        self._assets = {node_of(asset.tensor_info.name) for asset in meta_graph.asset_file_def}
        self._saver = node_of(meta_graph.saver_def.filename_tensor_name)
        self._requested = {node_of(name) for entry in meta_graph.signature_def for name in inputs_of(entry.value)}
        self._objects = meta_graph.object_graph_def.nodes
        self._bound = _bound_inputs(meta_graph.object_graph_def)

    def of(self, body: Body, node: Any, inputs: Sequence[int]) -> frozenset[str]:
        """Return the origins of some inputs of a node, in words; empty if nothing calls its function."""
        todo = [(body, name) for number in inputs for name in _data_inputs(node)[number : number + 1]]
        seen: set[tuple[str, bytes]] = set()
        found: set[str] = set()
        while todo:
            place, tensor = todo.pop()
            if (place.name, tensor) in seen:
                continue
            seen.add((place.name, tensor))
            self._steps += 1
            if self._steps > _MOST_STEPS:
                return frozenset({"more places than can be followed"})
            for step in self._before(place, tensor):
                if isinstance(step, str):
                    found.add(step)
                else:
                    todo.append(step)
        return frozenset(found)

    def _before(self, body: Body, tensor: bytes) -> Iterator[str | tuple[Body, bytes]]:
        """Yield what a tensor is made of: tensors before it, or an origin in words."""
        if tensor in body.arguments:
            yield from self._given(body, body.arguments.index(tensor))
            return
        node = self._nodes[body.name].get(node_of(tensor))
        if not body.name and node_of(tensor) in self._requested:
            yield "a request"  # which takes the place of what the graph computes there
        if node is None:
            yield "a node that is not there"
        elif node.op == b"StringJoin" and attribute(node, b"separator").s:
            yield f"the separator {text(attribute(node, b'separator').s[:80])!r}"
        elif node.op in _PASSING:
            yield from ((body, name) for name in _data_inputs(node)[_PASSING[node.op]])
        elif node.op == b"Placeholder" and not body.name:
            yield self._fed(node.name)
        elif node.op == b"ReadVariableOp" and not body.name:
            yield from self._assigned(node)
        elif node.op == b"Const":
            yield from (_constant(value) for value in strings(attribute(node, b"value").tensor))
        else:
            yield f"operation {text(node.op)}"

    def _fed(self, name: bytes) -> str:
        if name in self._assets:
            return ASSET
        return SAVER if name == self._saver else "a request"

    def _given(self, body: Body, number: int) -> Iterator[str | tuple[Body, bytes]]:
        """Yield what the callers of a function give as an argument, and what a loader in Python binds to it."""
        if body.takes_lists:
            yield "an argument beside lists, whose place a scan does not know"
            return
        for caller, node in self._callers.get(body.name, ()):
            inputs = _data_inputs(node)
            if node.op in _CALLS or text(node.op) == body.name:
                yield (caller, inputs[number]) if number < len(inputs) else "an argument that is missing"
            else:
                yield f"operation {text(node.op)}"
        if body.name in self._bound:
            bound = self._bound[body.name]
            first = len(body.arguments) - len(bound)
            yield from self._object(bound[number - first]) if number >= first else ("a request",)

    def _object(self, number: int) -> Iterator[str | tuple[Body, bytes]]:
        found = self._objects[number] if 0 <= number < len(self._objects) else message("SavedObject")()
        # Of several kinds TensorFlow takes the last one in the file, which is not known here.
        kinds = [kind for kind in FIELDS["SavedObject"] if found.HasField(kind)]
        if kinds == ["asset"]:
            yield ASSET
        elif kinds == ["constant"] and found.constant.operation:
            yield self._main, found.constant.operation
        else:
            yield "an object that is no asset"

    def _assigned(self, read: Any) -> Iterator[str | tuple[Body, bytes]]:
        """Yield what is assigned to a variable, where that is all that can be in it."""
        variable = node_of((_data_inputs(read) or [b""])[0])
        users = self._users.get(variable, [])
        handle = self._nodes[""].get(variable)
        if handle is None or not _is_handle(handle) or any(node.op not in _ASSET_VARIABLE_USERS for node in users):
            yield "a variable that others can change"
            return
        if self._handles[_shared_name(handle)] != 1:
            yield "a variable with several handles"
        for node in users:
            if node.op == b"AssignVariableOp":
                yield from ((self._main, name) for name in _data_inputs(node)[1:2])


def strings(tensor: Any) -> list[bytes]:
    """Return the texts of a string tensor, in either form in which TensorFlow reads them."""
    return [*tensor.string_val, *_packed_strings(tensor.tensor_content)]


def _packed_strings(content: bytes) -> list[bytes]:
    """Read lengths (varints) followed by as many texts; their number is found where both come out even."""
    lengths: list[int] = []
    position = total = 0
    while position < len(content):
        length = shift = 0
        while position < len(content):
            byte = content[position]
            position += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                break
        lengths.append(length)
        total += length
        if position + total >= len(content):
            break
    values, begin = [], position
    for length in lengths:
        values.append(content[begin : begin + length])
        begin += length
    return values


def _constant(value: bytes) -> str:
    return SUFFIX if _SUFFIX.fullmatch(value) else f"the constant {text(value[:80])!r}"


def _callers(bodies: Sequence[Body]) -> Mapping[str, list[tuple[Body, Any]]]:
    """Return for each function the nodes that call it, by its name as operation or in an attribute."""
    callers: dict[str, list[tuple[Body, Any]]] = {}
    called = _called_for(bodies)
    for body in bodies:
        for node in body.nodes:
            named = {text(node.op), *(text(name) for name in function_names(node.attr))}
            for name in {other for one in named & called.keys() for other in called[one]}:
                callers.setdefault(name, []).append((body, node))
    return callers


def _called_for(bodies: Sequence[Body]) -> Mapping[str, set[str]]:
    """Return for each function those that may run where it is called: itself, and others of its interface."""
    functions = [body for body in bodies if body.name]
    of_interface: dict[bytes, set[str]] = {}
    for body in functions:
        of_interface.setdefault(body.interface, set()).add(body.name)
    return {body.name: of_interface[body.interface] if body.interface else {body.name} for body in functions}


def function_names(attributes: Any) -> Iterator[bytes]:
    """Yield the functions that attributes name, those in attributes of functions too."""
    todo = [entry.value for entry in attributes]
    while todo:
        value = todo.pop()
        for function in (value.func, *value.list.func):
            if function.name:
                yield function.name
            todo.extend(entry.value for entry in function.attr)


def _bound_inputs(objects: Any) -> Mapping[str, list[int]]:
    return {text(entry.key): list(entry.value.bound_inputs) for entry in objects.concrete_functions}


def attribute(node: Any, name: bytes) -> Any:
    """Return an attribute of a node or function, an empty one if there is none; of several the last counts."""
    return next((entry.value for entry in reversed(node.attr) if entry.key == name), message("AttrValue")())


def _users(body: Body) -> Mapping[bytes, list[Any]]:
    """Return for each node those that take an output of it."""
    users: dict[bytes, list[Any]] = {}
    for node in body.nodes:
        for name in {node_of(tensor) for tensor in _data_inputs(node)}:
            users.setdefault(name, []).append(node)
    return users


def _is_handle(node: Any) -> bool:
    return node.op == b"VarHandleOp"


def _shared_name(node: Any) -> bytes:
    return attribute(node, b"shared_name").s  # whatever the container: none is another name for "localhost"


def inputs_of(signature: Any) -> Iterator[bytes]:
    """Yield the tensors that a request of a signature sets, the parts of sparse and ragged ones too."""
    todo = [entry.value for entry in signature.inputs]
    while todo:
        tensor = todo.pop()
        sparse = tensor.coo_sparse
        names = (tensor.name, sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name)
        yield from (name for name in names if name)
        todo.extend(tensor.composite_tensor.components)


def _data_inputs(node: Any) -> list[bytes]:
    return [name for name in node.input if not name.startswith(b"^")]


def node_of(tensor: bytes) -> bytes:
    """Return the name of the node whose output a tensor is."""
    return tensor.lstrip(b"^").partition(b":")[0]
