"""The frozen prefix: cut a network below the lowest layer that trains."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras

from tftransfer.depth import nodes_in_order
from tftransfer.errors import InputError
from tftransfer.trainable import all_groups

_STOCHASTIC = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


@dataclass(frozen=True)
class Cut:
    """A network in two parts that share its layers.

    Args:
        frozen: From the network's input to the tensors that cross the cut; None if everything trains.
        trained: From those tensors to the network's output. It shares layers with the whole network, so the whole
            network is trained when this part is.
        stages: The frozen part again, in one piece, or in two where a later phase trains more: the first is what that
            phase leaves frozen too. Defaults to none.
    """

    frozen: keras.Model | None
    trained: keras.Model
    stages: tuple[keras.Model, ...] = ()

    @property
    def frozen_share(self) -> float:
        """Share of the network's parameters that lie below the cut, in [0, 1]."""
        if self.frozen is None:
            return 0.0
        below = self.frozen.count_params()
        return below / max(below + self.trained.count_params(), 1)

    @cached_property
    def work_share(self) -> float:
        """Share of the network's multiplications that lie below the cut, in [0, 1], by its layers' own sizes."""
        if self.frozen is None:
            return 0.0
        below = _work(nodes_in_order(self.frozen))
        return below / max(below + _work(nodes_in_order(self.trained)), 1)


def cut(model: keras.Model, adapted: Sequence[keras.Variable] = (), later: Sequence[keras.Variable] = ()) -> Cut:
    """Cut a functional network at the lowest point below which nothing trains.

    Dropout that only the trained part follows (such as the head's) belongs to the trained part and stays active;
    dropout and stochastic depth below the cut are off, as they should be in a frozen network.

    Args:
        model: A functional model whose `trainable` flags are set.
        adapted: Frozen variables that something else changes, such as kernels under LoRA. Defaults to none.
        later: Variables that train in phases to come. Defaults to none.

    Returns:
        The two parts. The cut is a list of tensors: some networks (NASNet) cross it with several.

    Raises:
        InputError: If nothing trains.

    Example:
        >>> from tftransfer import builders, trainable
        >>> model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)
        >>> _ = trainable.set_trainable(model, "head")
        >>> [layer.name for layer in cut(model).trained.layers][1:]
        ['head_dropout', 'logits']
    """
    changed = {id(variable) for variable in adapted}
    model = _inlined(model, changed)
    above = _operations_above(model, changed)
    if not above:
        names = ", ".join(group.name for group in all_groups(model))
        raise InputError(
            "nothing trains: every variable of the network is frozen; choose another `selector`, such as 'head', "
            f"'last:1' or 'all'. Groups: {names}"
        )
    crossing = _crossing_tensors(model, above)
    frozen = _network(model.inputs, crossing) if crossing else None
    if frozen is None or not any(_could_train(layer) for layer in frozen.layers):
        return Cut(None, _network(model.inputs, model.outputs))  # below the cut is nothing but preprocessing
    lower = _crossing_tensors(model, _operations_above(model, changed | {id(variable) for variable in later}))
    below = _network(model.inputs, lower) if lower else None
    apart = below and list(map(id, lower)) != list(map(id, crossing)) and any(map(_could_train, below.layers))
    stages = (below, _network(lower, crossing)) if apart else (frozen,)
    return Cut(frozen, _network(crossing, model.outputs), stages)


def of_shapes(network: keras.Model, shapes: Sequence[tuple[int | None, ...]]) -> keras.Model:
    """Return a network for inputs of known shapes: itself, unless it takes others too; it shares the layers.

    Args:
        network: A functional model.
        shapes: One for each input, without the batch.

    Example:
        >>> anything = keras.Input((None, None, 3))
        >>> of_shapes(keras.Model(anything, keras.layers.Identity()(anything)), [(8, 9, 3)]).output_shape
        (None, 8, 9, 3)
    """
    if all(None not in source.shape[1:] for source in network.inputs):
        return network
    inputs = [keras.Input(shape, dtype=one.dtype) for shape, one in zip(shapes, network.inputs, strict=True)]
    return keras.Model(inputs, network(inputs[0] if len(inputs) == 1 else inputs))


def work_below(model: keras.Model, changed: Sequence[keras.Variable] = ()) -> float:
    """Return the share of a network's multiplications that come before all that trains, in [0, 1], without cutting it.

    Args:
        model: A functional model whose `trainable` flags are set.
        changed: Variables that count as if they trained too. Defaults to none.
    """
    ids = {id(variable) for variable in changed}
    model = _inlined(model, ids)
    nodes, above = nodes_in_order(model), _operations_above(model, ids)
    return _work(node for node in nodes if id(node.operation) not in above) / max(_work(nodes), 1)


def features(model: keras.Model, part: keras.Model | None = None) -> keras.KerasTensor:
    """Return the tensor that the head reads: pooled features, before the head's dropout.

    Args:
        model: From a builder, or the user's own; then the head is its last layer with weights.
        part: A part of it, whose graph has tensors of its own, to find the features there. Defaults to the whole.
    """
    head = set(all_groups(model)[-1].layers)
    first = next(node for node in nodes_in_order(part or model) if node.operation.name in head)
    tensor = first.input_tensors[0]
    while isinstance(tensor._keras_history.operation, _STOCHASTIC):
        operation, number, _ = tensor._keras_history
        tensor = operation._inbound_nodes[number].input_tensors[0]
    return tensor


def body(model: keras.Model) -> keras.Model:
    """Return the part of a model that gives features to its head; it shares the layers.

    Args:
        model: From a builder, or the user's own; then the head is its last layer with weights.
    """
    return keras.Model(model.inputs, features(model))


@contextlib.contextmanager
def nodes_as_they_were(model: keras.Model) -> Iterator[None]:
    """Take from a model's operations what cuts that are made inside leave on them, whatever happens.

    Keras notes on each operation every graph that it is part of, and would keep all of them as long as the model. Parts
    that were made inside still run afterwards, but no graph can be built from them any more.
    """
    operations = list(_operations(model))
    noted = [nodes for one in operations for nodes in (one._inbound_nodes, one._outbound_nodes)]
    lengths = list(map(len, noted))
    tensors = [tensor for one in operations for node in one._inbound_nodes for tensor in node.outputs]
    histories = [tensor._keras_history for tensor in tensors]
    try:
        yield
    finally:
        for nodes, length in zip(noted, lengths, strict=True):
            del nodes[length:]
        # Where an input itself crosses a cut, Keras counts it to the newer graph (`clone_graph_nodes`).
        for tensor, history in zip(tensors, histories, strict=True):
            tensor._keras_history = history


def _operations(model: Any) -> Iterator[keras.Operation]:
    """Yield a network's operations, layers or not, and those of the networks in it."""
    for operation in model.operations:
        yield operation
        inner = _graph_of(operation)
        if hasattr(inner, "_nodes_by_depth"):
            yield from _operations(inner)


def _inlined(model: keras.Model, adapted: set[int]) -> keras.Model:
    """Return a network in which the layers of nested models that train in part stand among all others."""
    if not any(_trains_in_part(node.operation, adapted) for node in nodes_in_order(model)):
        return model

    def inside(operation: keras.Operation) -> Any:
        if not _trains_in_part(operation, adapted):
            return operation
        inner = _graph_of(operation)

        def run(inputs: Any, **_: Any) -> Any:  # of `training`, `fit` makes what it wants whatever a call says
            outputs = inner._run_through_graph(keras.tree.flatten(inputs), operation_fn=inside)
            return outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs

        return run

    return _network(model.inputs, keras.tree.flatten(model._run_through_graph(model.inputs, operation_fn=inside)))


def _trains_in_part(operation: keras.Operation, adapted: set[int]) -> bool:
    """Whether an operation is a network of its own, of which one part trains and one is frozen."""
    if not hasattr(_graph_of(operation), "_nodes_by_depth"):
        return False
    could = [variable for layer in operation._flatten_layers() for variable in layer._trainable_variables]
    trains = [variable.trainable or id(variable) in adapted for variable in could]
    return any(trains) and not all(trains)


def _graph_of(operation: keras.Operation) -> Any:
    """Return what has an operation's graph, if it has one: a Sequential keeps it inside."""
    return getattr(operation, "_functional", operation)


def _operations_above(model: keras.Model, adapted: set[int]) -> set[int]:
    """Return the ids of the operations that train, and of all that come after one of them."""
    frozen_below = _operations_with_frozen_weights_after(model, adapted)
    above: set[int] = set()
    for node in nodes_in_order(model):
        operation = node.operation
        active = isinstance(operation, _STOCHASTIC) and id(operation) not in frozen_below
        follows = any(id(parent.operation) in above for parent in node.parent_nodes)
        if active or follows or _trains(operation, adapted):
            above.add(id(operation))
    return above


def _operations_with_frozen_weights_after(model: keras.Model, adapted: set[int]) -> set[int]:
    """Return the ids of the operations after which, somewhere, a layer comes whose weights are all frozen."""
    before_frozen: set[int] = set()
    for node in reversed(nodes_in_order(model)):
        operation = node.operation
        frozen = bool(getattr(operation, "weights", [])) and not _trains(operation, adapted)
        if id(operation) in before_frozen or frozen:
            before_frozen.update(id(parent.operation) for parent in node.parent_nodes)
    return before_frozen


def _network(inputs: list[keras.KerasTensor], outputs: list[keras.KerasTensor]) -> keras.Model:
    """Return the part of a graph between tensors; a single one is not wrapped in a list."""
    return keras.Model(*(tensors[0] if len(tensors) == 1 else tensors for tensors in (inputs, outputs)))


def _work(nodes: Iterable[Any]) -> int:
    """Estimate multiplications per example: each kernel's size times the places that it is applied at."""
    total = 0
    for node in nodes:
        operation = node.operation
        inner = _graph_of(operation)
        if hasattr(inner, "_nodes_by_depth"):
            total += _work(nodes_in_order(inner))
        elif isinstance(operation, keras.Layer):
            places = math.prod(side or 1 for side in node.output_tensors[0].shape[1:-1])
            kernels = (variable for variable in operation.weights if len(variable.shape) > 1)
            total += places * sum(math.prod(kernel.shape) for kernel in kernels)
    return total


def _could_train(layer: keras.Layer) -> bool:
    return any(inner._trainable_variables for inner in layer._flatten_layers())


def _trains(operation: keras.Operation, adapted: set[int]) -> bool:
    if not isinstance(operation, keras.Layer):
        return False
    return any(variable.trainable or id(variable) in adapted for variable in operation.weights)


def _crossing_tensors(model: keras.Model, above: set[int]) -> list[keras.KerasTensor]:
    """Return the tensors that the upper part takes from below, each once, in order."""
    crossing: dict[int, keras.KerasTensor] = {}
    for node in nodes_in_order(model):
        if id(node.operation) in above:
            for tensor in node.input_tensors:
                if id(tensor._keras_history.operation) not in above:
                    crossing.setdefault(id(tensor), tensor)
    return list(crossing.values())
