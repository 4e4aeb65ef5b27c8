"""Frozen networks as graphs of constants: BatchNorm folds into convolutions, and each example gives the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
from tensorflow.python.eager import context
from tensorflow.python.grappler.tf_optimizer import OptimizeGraph

from tftransfer import features

_ON, _OFF = rewriter_config_pb2.RewriterConfig.ON, rewriter_config_pb2.RewriterConfig.OFF
_PROCESSOR = "/job:localhost/replica:0/task:0/device:CPU:0"
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")  # of processors that multiply such numbers
_COMPILED = "_XlaMustCompile"
_MOST_BYTES = 2**30  # of constants in a graph; Protocol Buffers end at 2 GiB
Run = Callable[..., list[tf.Tensor]]


def has_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 numbers, and no GPU takes its place."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return any(flag in flags for flag in _BFLOAT16_FLAGS) and not tf.config.list_physical_devices("GPU")


def as_constant_function(network: keras.Model, chunk: int | None = None, *, bfloat16: bool = False) -> Run:
    """Turn a network in inference mode into a graph of constants, in which BatchNorm folds into convolutions.

    Args:
        network: A functional model.
        chunk: Run so many examples at a time, whatever the batch, and optimise the graph once for every use. The last
            bits of a sum depend on how it is shared out over threads, and so on the batch size, and on what Grappler
            makes of the graph around it; with a chunk each example's outputs are the same bits in whatever batch and
            graph they are computed. Defaults to None: each batch as it is.
        bfloat16: Whether to multiply in bfloat16, which `has_bfloat16` and a chunk must allow. Defaults to False.

    Returns:
        A function from a batch of inputs (any numeric type; one argument for each input) to the list of outputs. It is
        about one and a half times as fast as the same network with variables, because Grappler can fold constants only.
    """
    signature = [tf.TensorSpec((chunk, *source.shape[1:]), source.dtype) for source in network.inputs]
    graph = _graph_of_constants(network, signature)
    if chunk is not None and not tf.config.list_physical_devices("GPU"):
        graph = _optimised(graph)
        graph = _in_bfloat16(graph) if bfloat16 else graph
    infer = _function_of(graph, signature)

    def run(*batch: tf.Tensor) -> list[tf.Tensor]:
        return list(infer(*(tf.cast(part, spec.dtype) for part, spec in zip(batch, signature, strict=True))))

    outputs = [tf.TensorSpec(output.shape, output.dtype) for output in infer.outputs]
    return run if chunk is None else _in_chunks(run, chunk, outputs)


class NotConstant(Exception):
    """A network that cannot be a graph of constants; the message says why, as the end of a sentence."""


def as_portable_function(network: keras.Model) -> Run:
    """Turn a network in inference mode into a graph of constants for a file, which another machine may read.

    BatchNorm is folded into the convolutions, as in `as_constant_function`, but every operation stays one that any
    device has: what reads the graph fuses them for its own.

    Args:
        network: A functional model.

    Returns:
        A function from a batch of inputs, of any size, to the list of outputs.

    Raises:
        NotConstant: If the network holds lookup tables or the like, or its numbers are more than a graph may hold.
    """
    signature = _any_batch(network)
    graph = _graph_of_constants(network, signature)
    folded = _with_biases(_with_scaled_filters(_rewritten(graph, device="", remapping=_OFF)))
    tidied = _rewritten(replace(graph, definition=folded), device="", remapping=_OFF)  # without what is left over
    infer = _function_of(replace(graph, definition=tidied), signature)
    return lambda *batch: list(infer(*(tf.cast(part, spec.dtype) for part, spec in zip(batch, signature, strict=True))))


def as_convertible_function(network: keras.Model, *, simple: bool = False) -> Run:
    """Turn a network in inference mode into a graph of constants for a converter, which folds and fuses by itself.

    Nothing in it depends on how large the batch is: a converter would keep what computes shapes, and split the graph
    there.

    Args:
        network: A functional model.
        simple: Whether nothing may be left that few converters know: functions to be compiled, and Erfc. Defaults to
            False.

    Returns:
        A function from a batch of inputs, of any size, to the list of outputs.

    Raises:
        NotConstant: As for `as_portable_function`.
    """
    signature = _any_batch(network)
    graph = _graph_of_constants(network, signature)
    definition = _without_sizes(graph, signature)
    definition = _without_erfc(_without_compiling(definition)) if simple else definition
    infer = _function_of(replace(graph, definition=definition), signature)
    return lambda *batch: list(infer(*batch))


class Constants:
    """What `as_constant_function` gives, made when it is first called: a run that finds all it needs never makes it.

    Args:
        network, chunk: As there; the network's weights must not change before the first call.
        narrow: Whether float32 outputs are rounded to float16, which takes half the room. Defaults to False.
        lower: What gives the network its inputs. Defaults to None: they are pictures.
        bfloat16: As for `as_constant_function`. Defaults to False.

    Attributes:
        outputs: Shape and type of each output for one example.
    """

    def __init__(
        self,
        network: keras.Model,
        chunk: int | None = None,
        narrow: bool = False,
        lower: Constants | None = None,
        bfloat16: bool = False,
    ) -> None:
        self._network, self._chunk, self.lower, self.bfloat16 = network, chunk, lower, bfloat16
        types = ("float16" if narrow and output.dtype == "float32" else output.dtype for output in network.outputs)
        self.outputs = tuple(
            tf.TensorSpec(output.shape[1:], kind) for output, kind in zip(network.outputs, types, strict=True)
        )

    def __call__(self, batch: tf.Tensor) -> list[tf.Tensor]:
        """Compute the outputs for a batch of pictures."""
        return self.after([batch] if self.lower is None else self.lower(batch))

    def after(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Compute the outputs from what `lower` gave."""
        return [tf.cast(tensor, spec.dtype) for tensor, spec in zip(self._made(*inputs), self.outputs, strict=True)]

    def make(self) -> None:
        """Make the functions now, and not while something else is traced."""
        _ = self._made
        if self.lower:
            self.lower.make()

    @cached_property
    def _made(self) -> Run:
        with tf.init_scope():
            if not self.bfloat16:
                return as_constant_function(self._network, self._chunk)
            return as_constant_function(self._network, self._chunk, bfloat16=True)

    def bfloat16_error(self, pictures: tf.Tensor) -> float:
        """Return how far the outputs for some pictures are from those in float32, relative in norm."""
        lower = self.lower and Constants(self.lower._network, self._chunk)
        exact = Constants(self._network, self._chunk, lower=lower)(pictures)
        pairs = [(tf.cast(a, tf.float32), tf.cast(b, tf.float32)) for a, b in zip(self(pictures), exact, strict=True)]
        return float(tf.norm([tf.norm(a - b) for a, b in pairs]) / tf.norm([tf.norm(b) for _, b in pairs]))

    @cached_property
    def digest(self) -> str:
        """Which outputs these are: `features.digest_of`, with that of `lower`; "" if one of them is not known."""
        parts = [
            *([self.lower.digest] if self.lower else ()),
            features.digest_of(self._network, self._chunk or features.BATCH),
        ]
        return "-".join([*parts, *(["bfloat16"] if self.bfloat16 else ())]) if all(parts) else ""


@dataclass(frozen=True)
class _Graph:
    """A graph with the names of its inputs and outputs, and the functions that it calls."""

    definition: GraphDef
    sources: tuple[str, ...]
    ends: tuple[str, ...]
    functions: tuple[Any, ...]


def _any_batch(network: keras.Model) -> list[tf.TensorSpec]:
    """Return what a network takes, in batches of any size, unless it is too large for a graph of constants."""
    size = sum(variable.numpy().nbytes for variable in network.variables)
    if size > _MOST_BYTES:
        raise NotConstant(f"its variables take {size / 2**30:.1f} GiB, and a graph holds {_MOST_BYTES / 2**30:.0f}")
    return [tf.TensorSpec((None, *source.shape[1:]), source.dtype) for source in network.inputs]


def _graph_of_constants(network: keras.Model, signature: list[tf.TensorSpec]) -> _Graph:
    """Trace a network in inference mode with the numbers of its variables in their place."""
    values = [(variable, variable.numpy()) for variable in network.variables]

    @tf.function(input_signature=signature, autograph=False)
    def infer(*batch: tf.Tensor) -> list[tf.Tensor]:
        constants = [(variable, tf.constant(value)) for variable, value in values]
        with keras.StatelessScope(state_mapping=constants):
            outputs = network(batch[0] if len(batch) == 1 else list(batch), training=False)
        return [tf.identity(output) for output in tf.nest.flatten(outputs)]

    traced = infer.get_concrete_function()
    definition = traced.graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    for held, placeholder in traced.graph.captures:  # tensors that layers hold beside their variables
        node = nodes[placeholder.op.name]
        if held.dtype in (tf.resource, tf.variant):
            raise NotConstant(f"it holds a {held.dtype.name} that is no variable, such as a lookup table")
        node.Clear()
        node.name, node.op = placeholder.op.name, "Const"
        node.attr["dtype"].type = held.dtype.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(held))
    ends = tuple(tensor.name for tensor in traced.outputs)
    sources = tuple(tensor.name for tensor in traced.inputs[: len(signature)])
    return _Graph(definition, sources, ends, tuple(traced.graph._functions.values()))


def _function_of(graph: _Graph, signature: list[tf.TensorSpec]) -> Any:
    """Return a graph as a concrete function."""

    @tf.function(input_signature=signature, autograph=False)
    def infer(*batch: tf.Tensor) -> list[tf.Tensor]:
        inputs = dict(zip(graph.sources, batch, strict=True))
        return tf.graph_util.import_graph_def(graph.definition, input_map=inputs, return_elements=graph.ends, name="")

    known = context.context()
    for function in graph.definition.library.function:  # eager calls look for them there
        if not known.has_function(function.signature.name):
            known.add_function_def(function)
    made = infer.get_concrete_function()
    made.calls = graph.functions  # which TensorFlow forgets with the last reference to them
    return made


def _optimised(graph: _Graph) -> _Graph:
    """Let Grappler fold and fuse a graph of constants once, for the processor.

    Left to itself it does so anew wherever the function is used, and in `tf.data` without fusing anything, which there
    is half as fast.
    """
    return replace(graph, definition=_with_scaled_filters(_rewritten(graph)))


def _in_bfloat16(graph: _Graph) -> _Graph:
    """Let Grappler put casts around what oneDNN multiplies in bfloat16; the outputs stay float32."""
    return replace(graph, definition=_rewritten(graph, auto_mixed_precision_onednn_bfloat16=_ON))


def _rewritten(graph: _Graph, device: str = _PROCESSOR, **rewrites: int) -> GraphDef:
    described = MetaGraphDef(graph_def=graph.definition)
    for node in described.graph_def.node:
        node.device = device  # fusing is for known devices
    described.collection_def["train_op"].node_list.value.extend([*graph.sources, *graph.ends])
    configuration = config_pb2.ConfigProto()
    configuration.graph_options.rewrite_options.remapping = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    if _has_loops(graph.definition):  # taken apart, their parts could not be a function again
        rewrites["function_optimization"] = _OFF
    for name, value in rewrites.items():
        setattr(configuration.graph_options.rewrite_options, name, value)
    return _with_own_functions(OptimizeGraph(configuration, described))


def _with_own_functions(graph: GraphDef) -> GraphDef:
    """Give the functions of a graph that was rewritten names of their own: they are not what was traced any more."""
    names = {one.signature.name: f"{one.signature.name}_rewritten" for one in graph.library.function}
    for one in graph.library.function:
        one.signature.name = names[one.signature.name]
    for gradient in graph.library.gradient:
        gradient.function_name = names.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = names.get(gradient.gradient_func, gradient.gradient_func)
    for node in (node for body in (graph, *graph.library.function) for node in _nodes_of(body)):
        node.op = names.get(node.op, node.op)
        for attribute in node.attr.values():
            called = [attribute.func] if attribute.HasField("func") else attribute.list.func
            for one in called:
                one.name = names.get(one.name, one.name)
    return graph


def _nodes_of(body: Any) -> Any:
    """Return the nodes of a graph or of a function."""
    return body.node if isinstance(body, GraphDef) else body.node_def


def _has_loops(graph: GraphDef) -> bool:
    nodes = (node for body in (graph, *graph.library.function) for node in _nodes_of(body))
    return any(node.op.removeprefix("Stateless") in ("While", "If", "Case") for node in nodes)


def _without_sizes(graph: _Graph, signature: list[tf.TensorSpec]) -> GraphDef:
    """Write -1 where a tensor is reshaped to a size that only the batch decides, and forget how to differentiate."""
    definition = GraphDef.FromString(graph.definition.SerializeToString())
    for node, sizes in _sizes_of_reshapes(graph, signature).items():
        definition.node.add(name=f"{node}/sizes", op="Const")
        constant = definition.node[-1]
        constant.attr["dtype"].type = tf.int32.as_datatype_enum
        constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(sizes))
        reshape = next(one for one in definition.node if one.name == node)
        reshape.input[1], reshape.attr["Tshape"].type = constant.name, tf.int32.as_datatype_enum
    for one in definition.node:
        one.attr.pop("_gradient_op_type", None)  # of swish; a SavedModel would look for it in vain
    return definition


def _without_compiling(graph: GraphDef) -> GraphDef:
    """Let functions that TensorFlow was to compile, as Keras' grouped convolutions, be taken apart like others."""
    for one in (
        *graph.library.function,
        *(node for body in (graph, *graph.library.function) for node in _nodes_of(body)),
    ):
        one.attr.pop(_COMPILED, None)
    return _with_own_functions(graph)


def _without_erfc(graph: GraphDef) -> GraphDef:
    """Write 1 - Erf(x) for Erfc(x), which GELU needs near 0 only."""
    for node in [node for node in graph.node if node.op == "Erfc"]:
        one, erf = (
            graph.node.add(name=f"{node.name}/one", op="Const"),
            graph.node.add(name=f"{node.name}/erf", op="Erf"),
        )
        one.attr["dtype"].type = erf.attr["T"].type = node.attr["T"].type
        one.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1, tf.as_dtype(node.attr["T"].type)))
        erf.input.extend(node.input)
        node.op, node.input[:] = "Sub", [one.name, erf.name]
    return graph


def _sizes_of_reshapes(graph: _Graph, signature: list[tf.TensorSpec]) -> dict[str, np.ndarray]:
    """Return what to reshape to, by the names of nodes whose sizes for two and for three examples differ in one."""
    inputs = {node.name: node.input[1] for node in graph.definition.node if node.op == "Reshape"}
    if not inputs:
        return {}
    ends = tuple(name if ":" in name else f"{name}:0" for name in inputs.values())
    infer = _function_of(replace(graph, ends=ends), signature)
    two, three = (
        [sizes.numpy() for sizes in infer(*(tf.zeros((batch, *spec.shape[1:]), spec.dtype) for spec in signature))]
        for batch in (2, 3)
    )
    pairs = zip(inputs, two, three, strict=True)
    return {
        node: np.where(one == other, one, -1).astype(np.int32) for node, one, other in pairs if (one != other).sum() < 2
    }


def _with_scaled_filters(graph: GraphDef) -> GraphDef:
    """Take BatchNorm's factors into filters, and into a bias before it; Grappler does so for full ones without bias."""
    found = _Nodes(graph)
    for node in graph.node:
        factor, added = found.constant_and_other(node, ("Mul",))
        bias, convolution = found.constant_and_other(added, ("Add", "AddV2", "BiasAdd"))
        convolution = convolution or added
        channels, scaled = found.channels(convolution), [found.filters(convolution), *([bias] if bias else ())]
        if not channels or not all(_is_per_channel(part, channels) for part in (factor, *scaled[1:])):
            continue
        if any(found.uses[part.name] > 1 for part in (convolution, added, *scaled)):
            continue
        for part in scaled:
            values = tf.make_ndarray(part.attr["value"].tensor)
            rows = values.reshape(-1, channels)  # a depthwise filter's output channels are its last two axes
            rows = rows * tf.make_ndarray(factor.attr["value"].tensor).ravel()
            part.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(rows.reshape(values.shape)))
        node.ClearField("input")
        node.input.append(added.name)
        node.op = "Identity"
    return graph


def _with_biases(graph: GraphDef) -> GraphDef:
    """Call a constant that is added to each channel of a convolution its bias: only so is it fused on any device."""
    found = _Nodes(graph)
    for node in list(graph.node):
        added, other = found.constant_and_other(node, ("Add", "AddV2"), behind=True)
        before, convolution = found.constant_and_other(other, ("BiasAdd",), behind=True)
        convolution, added = convolution or other, [one for one in (added, before) if one]
        channels = found.channels(convolution)
        # Fused, numbers of half precision are rounded once less.
        if not channels or node.attr["T"].type != tf.float32.as_datatype_enum:
            continue
        if not all(_is_per_channel(one, channels) for one in added):
            continue
        bias = graph.node.add(name=f"{node.name}/bias", op="Const")
        bias.attr["dtype"].CopyFrom(node.attr["T"])
        values = sum(tf.make_ndarray(one.attr["value"].tensor).ravel() for one in added)
        bias.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values))
        node.op = "BiasAdd"
        node.attr["data_format"].s = b"NHWC"
        node.ClearField("input")
        node.input.extend([convolution.name, bias.name])
    return graph


def _is_per_channel(constant: Any, channels: int) -> bool:
    """Whether a constant holds one number for each channel, the last axis, and adds no axis of its own."""
    values = tf.make_ndarray(constant.attr["value"].tensor)
    return values.ndim <= 4 and values.size == channels and values.shape[-1:] == (channels,)


class _Nodes:
    """The nodes of a graph by name, and how often each is used."""

    def __init__(self, graph: GraphDef) -> None:
        self._named = {node.name: node for node in graph.node}
        self.uses = Counter(name for node in graph.node for name in node.input)

    def constant_and_other(self, node: Any, operations: Sequence[str], behind: bool = False) -> tuple[Any, Any]:
        """Return the constant and the other node that one of some operations has as inputs; else None, None.

        Args:
            node: Any, or None.
            operations: Which it may be.
            behind: Whether to look through nodes that hand on what they get. Defaults to False.
        """
        if node is None or node.op not in operations or len(node.input) != 2:
            return None, None
        first, second = (self._behind(name) if behind else self._named.get(name) for name in node.input)
        for constant, other in ((first, second), (second, first)):
            if constant is not None and other is not None and constant.op == "Const" != other.op:
                return constant, other
        return None, None

    def filters(self, convolution: Any) -> Any:
        """Return the constant filters of a convolution with channels last; None of anything else."""
        if convolution is None or convolution.op not in ("Conv2D", "DepthwiseConv2dNative"):
            return None
        filters = self._named.get(convolution.input[1])
        fits = filters is not None and filters.op == "Const" and convolution.attr["data_format"].s == b"NHWC"
        return filters if fits else None

    def channels(self, convolution: Any) -> int:
        """Return how many channels such a convolution gives; 0 for anything else."""
        filters = self.filters(convolution)
        if filters is None:
            return 0
        sizes = [dim.size for dim in filters.attr["value"].tensor.tensor_shape.dim]
        return sizes[3] if convolution.op == "Conv2D" else sizes[2] * sizes[3]

    def _behind(self, name: str) -> Any:
        node = self._named.get(name)
        return self._behind(node.input[0]) if node is not None and node.op == "Identity" else node


def _in_chunks(infer: Run, size: int, outputs: list[tf.TensorSpec]) -> Run:
    """Run batches of any size as batches of one size, the last one filled up with zeros."""

    def chunks(part: tf.Tensor, spare: tf.Tensor) -> tf.Tensor:
        sides = part.shape[1:]
        return tf.reshape(tf.pad(part, [[0, spare], *[[0, 0]] * len(sides)]), (-1, size, *sides))

    def run(*batch: tf.Tensor) -> list[tf.Tensor]:
        if batch[0].shape[0] == size:
            return infer(*batch)
        count = tf.shape(batch[0])[0]
        parts = tuple(chunks(part, -count % size) for part in batch)
        found = tf.map_fn(lambda part: infer(*part), parts, fn_output_signature=outputs, parallel_iterations=1)
        return [tf.reshape(tensor, (-1, *tensor.shape[2:]))[:count] for tensor in found]

    return run
