"""The frozen prefix: cut a network below the lowest layer that trains, and run what is below as constants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.python.grappler.tf_optimizer import OptimizeGraph

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
    """

    frozen: keras.Model | None
    trained: keras.Model

    @property
    def frozen_share(self) -> float:
        """Share of the network's parameters that lie below the cut, in [0, 1]."""
        if self.frozen is None:
            return 0.0
        below = self.frozen.count_params()
        return below / max(below + self.trained.count_params(), 1)

    @property
    def work_share(self) -> float:
        """Share of the network's multiplications that lie below the cut, in [0, 1], by its layers' own sizes."""
        if self.frozen is None:
            return 0.0
        below = _work(self.frozen)
        return below / max(below + _work(self.trained), 1)


def cut(model: keras.Model, adapted: Sequence[keras.Variable] = ()) -> Cut:
    """Cut a functional network at the lowest point below which nothing trains.

    Dropout that only the trained part follows (such as the head's) belongs to the trained part and stays active;
    dropout and stochastic depth below the cut are off, as they should be in a frozen network.

    Args:
        model: A functional model whose `trainable` flags are set.
        adapted: Frozen variables that something else changes, such as kernels under LoRA. Defaults to none.

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
    above = _operations_above(model, {id(variable) for variable in adapted})
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
    return Cut(frozen, _network(crossing, model.outputs))


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


def as_constant_function(network: keras.Model, chunk: int | None = None) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """Turn a network in inference mode into a graph of constants, in which BatchNorm folds into convolutions.

    Args:
        network: A functional model with one input.
        chunk: Run so many examples at a time, whatever the batch, and optimise the graph once for every use. The last
            bits of a sum depend on how it is shared out over threads, and so on the batch size, and on what Grappler
            makes of the graph around it; with a chunk each example's outputs are the same bits in whatever batch and
            graph they are computed. Defaults to None: each batch as it is.

    Returns:
        A function from a batch of inputs (any numeric type) to the list of outputs. It is about one and a half times
        as fast as the same network with variables, because Grappler can fold constants only.
    """
    source = network.inputs[0]
    signature = tf.TensorSpec((chunk, *source.shape[1:]), source.dtype)
    graph = _graph_of_constants(network, signature)
    if chunk is not None and not tf.config.list_physical_devices("GPU"):
        graph = _optimised(graph)
    infer = _function_of(graph, signature)

    def run(batch: tf.Tensor) -> list[tf.Tensor]:
        return list(infer(tf.cast(batch, signature.dtype)))

    outputs = [tf.TensorSpec(output.shape, output.dtype) for output in infer.outputs]
    return run if chunk is None else _in_chunks(run, chunk, outputs)


class Constants:
    """What `as_constant_function` gives, made when it is first called: a run that finds all it needs never makes it.

    Args:
        network, chunk: As there; the network's weights must not change before the first call.
        narrow: Whether float32 outputs are rounded to float16, which takes half the room. Defaults to False.

    Attributes:
        outputs: Shape and type of each output for one example.
    """

    def __init__(self, network: keras.Model, chunk: int | None = None, narrow: bool = False) -> None:
        self._network, self._chunk = network, chunk
        types = ("float16" if narrow and output.dtype == "float32" else output.dtype for output in network.outputs)
        self.outputs = tuple(
            tf.TensorSpec(output.shape[1:], kind) for output, kind in zip(network.outputs, types, strict=True)
        )

    def __call__(self, batch: tf.Tensor) -> list[tf.Tensor]:
        return [tf.cast(tensor, spec.dtype) for tensor, spec in zip(self.made(batch), self.outputs, strict=True)]

    @cached_property
    def made(self) -> Callable[[tf.Tensor], list[tf.Tensor]]:
        """The function itself."""
        with tf.init_scope():
            return as_constant_function(self._network, self._chunk)


@dataclass(frozen=True)
class _Graph:
    """A graph with the names of its one input and of its outputs, and the functions that it calls."""

    definition: GraphDef
    source: str
    ends: tuple[str, ...]
    functions: tuple[Any, ...]


def _graph_of_constants(network: keras.Model, signature: tf.TensorSpec) -> _Graph:
    """Trace a network in inference mode with the numbers of its variables in their place."""
    values = [(variable, variable.numpy()) for variable in network.variables]

    @tf.function(input_signature=[signature], autograph=False)
    def infer(batch: tf.Tensor) -> list[tf.Tensor]:
        constants = [(variable, tf.constant(value)) for variable, value in values]
        with keras.StatelessScope(state_mapping=constants):
            outputs = network(batch, training=False)
        return [tf.identity(output) for output in tf.nest.flatten(outputs)]

    traced = infer.get_concrete_function()
    definition = traced.graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    for held, placeholder in traced.graph.captures:  # tensors that layers hold beside their variables
        node = nodes[placeholder.op.name]
        node.Clear()
        node.name, node.op = placeholder.op.name, "Const"
        node.attr["dtype"].type = held.dtype.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(held))
    ends = tuple(tensor.name for tensor in traced.outputs)
    return _Graph(definition, traced.inputs[0].name, ends, tuple(traced.graph._functions.values()))


def _function_of(graph: _Graph, signature: tf.TensorSpec) -> Any:
    """Return a graph as a concrete function."""

    @tf.function(input_signature=[signature], autograph=False)
    def infer(batch: tf.Tensor) -> list[tf.Tensor]:
        return tf.graph_util.import_graph_def(
            graph.definition, input_map={graph.source: batch}, return_elements=graph.ends, name=""
        )

    made = infer.get_concrete_function()
    made.calls = graph.functions  # which TensorFlow forgets with the last reference to them
    return made


def _optimised(graph: _Graph) -> _Graph:
    """Let Grappler fold and fuse a graph of constants once, for the processor.

    Left to itself it does so anew wherever the function is used, and in `tf.data` without fusing anything, which there
    is half as fast.
    """
    described = MetaGraphDef(graph_def=graph.definition)
    for node in described.graph_def.node:
        node.device = "/job:localhost/replica:0/task:0/device:CPU:0"  # fusing is for known devices
    described.collection_def["train_op"].node_list.value.extend([graph.source, *graph.ends])
    configuration = config_pb2.ConfigProto()
    configuration.graph_options.rewrite_options.remapping = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return replace(graph, definition=_with_scaled_filters(OptimizeGraph(configuration, described)))


def _with_scaled_filters(graph: GraphDef) -> GraphDef:
    """Take BatchNorm's factors into the filters of depthwise convolutions, which Grappler does for full ones only."""
    nodes = {node.name: node for node in graph.node}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op != "Mul" or len(node.input) != 2:
            continue
        pair = sorted(node.input, key=lambda name: nodes[name].op if name in nodes else "")
        factor, convolution = (nodes.get(name) for name in pair)  # "Const" comes before "Depthwise..."
        if not (factor and convolution and factor.op == "Const" and convolution.op == "DepthwiseConv2dNative"):
            continue
        filters = nodes[convolution.input[1]]
        if filters.op != "Const" or uses[filters.name] > 1 or uses[convolution.name] > 1:
            continue
        kernel, scale = (tf.make_ndarray(part.attr["value"].tensor) for part in (filters, factor))
        if scale.size != kernel.shape[2] * kernel.shape[3] or convolution.attr["data_format"].s != b"NHWC":
            continue
        filters.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(kernel * scale.reshape(kernel.shape[2:])))
        node.ClearField("input")
        node.input.append(convolution.name)
        node.op = "Identity"
    return graph


def _in_chunks(
    infer: Callable[[tf.Tensor], list[tf.Tensor]], size: int, outputs: list[tf.TensorSpec]
) -> Callable[[tf.Tensor], list[tf.Tensor]]:
    """Run batches of any size as batches of one size, the last one filled up with zeros."""

    def run(batch: tf.Tensor) -> list[tf.Tensor]:
        if batch.shape[0] == size:
            return infer(batch)
        count, sides = tf.shape(batch)[0], batch.shape[1:]
        filled = tf.pad(batch, [[0, -count % size], *[[0, 0]] * len(sides)])
        chunks = tf.reshape(filled, (-1, size, *sides))
        found = tf.map_fn(infer, chunks, fn_output_signature=outputs, parallel_iterations=1)
        return [tf.reshape(tensor, (-1, *tensor.shape[2:]))[:count] for tensor in found]

    return run


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


def _work(network: keras.Model) -> int:
    """Estimate a network's multiplications per example: each kernel's size times the places that it is applied at."""
    total = 0
    for node in nodes_in_order(network):
        operation = node.operation
        inner = getattr(operation, "_functional", operation)  # a Sequential has its graph inside
        if hasattr(inner, "_nodes_by_depth"):
            total += _work(inner)
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
