"""Take back what the rounding of weights to 8 bits does to the mean of each channel, by its bias.

A filter's rounding errors do not cancel out on inputs that are positive on average, as they are after a ReLU: the
channel's outputs move, and so do all that follow. The move is the sum of the errors times the mean inputs, which
calibration knows, and the bias can take it back.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721,
section 4.2; here with means that are measured.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from tftransfer.serving import tflite_files

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
"""Operations with weights."""


def corrected(quantized: bytes, exact: bytes, pictures: Sequence[np.ndarray]) -> bytes:
    """Return a quantized file with biases that make up for the rounding of its weights.

    A layer that stayed in float keeps its bias, and so do all if the two files do not have the same layers.

    Args:
        quantized: Content of a `.tflite` file that computes in int8.
        exact: Content of the float32 file that it was made from, with the same layers in the same order.
        pictures: Those of calibration, `(height, width, 3)`.
    """
    model, original = (tflite_files.unpacked(content) for content in (quantized, exact))
    layers, originals = ([one for one in tflite_files.operations(m) if one[0] in WEIGHTED] for m in (model, original))
    if [kind for kind, _ in layers] != [kind for kind, _ in originals]:
        return quantized
    means = _mean_inputs(exact, [layer.inputs[0] for _, layer in originals], pictures)
    for (kind, layer), (_, exactly), mean in zip(layers, originals, means, strict=True):
        weights = _values(model, layer.inputs[1], np.int8)
        before = _values(original, exactly.inputs[1], np.float32)
        if weights is not None and before is not None and weights.shape == before.shape:
            _add_to_bias(model, layer, _move(kind, before - weights, mean))
    return tflite_files.packed(model, len(quantized))


def _values(model: Any, number: int, kind: type) -> np.ndarray | None:
    """Return what a constant tensor says in float64, or None if it is of another type, or no constant."""
    tensor = model.subgraphs[0].tensors[number]
    data, types = model.buffers[tensor.buffer].data, vars(tflite_files.module("schema_py_generated").TensorType)
    if data is None or tensor.type != types[np.dtype(kind).name.upper()]:
        return None
    values = np.asarray(data).view(kind).reshape(tensor.shape).astype(np.float64)
    return values * _scale(tensor) if kind is not np.float32 else values


def _scale(tensor: Any) -> np.ndarray:
    """Return the scale of an 8-bit or bias tensor, in a shape that multiplies it channel by channel."""
    scale = np.asarray(tensor.quantization.scale, np.float64)
    sides = np.ones(len(tensor.shape), int)
    sides[tensor.quantization.quantizedDimension] = len(scale)
    return scale.reshape(sides)


def _mean_inputs(content: bytes, tensors: Sequence[int], pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a float32 file over pictures and return the means of tensors, channel by channel."""
    make = tflite_files.module("interpreter").Interpreter
    interpreter = make(model_content=content, experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    (source,) = (found["index"] for found in interpreter.get_input_details())
    sums: list[Any] = [0.0] * len(tensors)
    for picture in pictures:
        interpreter.set_tensor(source, np.asarray(picture, np.float32)[None])
        interpreter.invoke()
        found = (interpreter.get_tensor(number) for number in tensors)
        sums = [
            total + values.reshape(-1, values.shape[-1]).mean(axis=0, dtype=np.float64)
            for total, values in zip(sums, found, strict=True)
        ]
    return [total / len(pictures) for total in sums]


def _move(kind: str, errors: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return how far the mean of each output channel moved: the errors of its weights times the mean inputs.

    Args:
        kind: The operation.
        errors: Of the weights: `(outputs, ..., inputs of a group)`, or `(1, height, width, outputs)` if depthwise.
        means: `(inputs,)`.

    Example:
        >>> _move("FULLY_CONNECTED", np.array([[0.5, 1.0]]), np.array([2.0, 3.0]))
        array([4.])
    """
    if kind == "DEPTHWISE_CONV_2D":
        summed = errors.sum(axis=(0, 1, 2))
        return summed * np.repeat(means, len(summed) // len(means))
    outputs, width = errors.shape[0], errors.shape[-1]
    groups = len(means) // width
    summed = errors.reshape(groups, outputs // groups, -1, width).sum(axis=2)
    return (summed * means.reshape(groups, 1, width)).sum(axis=-1).ravel()


def _add_to_bias(model: Any, layer: Any, values: np.ndarray) -> None:
    """Change the bias of a layer, which may have none, and of no other layer that shares it."""
    graph, number = model.subgraphs[0], layer.inputs[2] if len(layer.inputs) > 2 else -1
    tensor = graph.tensors[number] if number >= 0 else _no_bias(graph, layer, len(values))
    before = model.buffers[tensor.buffer].data.view(np.int32) if number >= 0 else 0
    stored = (before + np.round(values / _scale(tensor)).astype(np.int32)).view(np.uint8)
    uses = sum(list(operation.inputs).count(number) for operation in graph.operators)
    if number >= 0 and uses == sum(one.buffer == tensor.buffer for one in graph.tensors) == 1:
        model.buffers[tensor.buffer].data = stored
        return
    tensor, buffer = copy.copy(tensor), tflite_files.module("schema_py_generated").BufferT()
    tensor.buffer, buffer.data = len(model.buffers), stored
    layer.inputs = np.array([*layer.inputs[:2], len(graph.tensors)], np.int32)
    model.buffers.append(buffer)
    graph.tensors.append(tensor)


def _no_bias(graph: Any, layer: Any, outputs: int) -> Any:
    """Return the tensor of a bias for a layer without one: its scale is that of the input times the weights'."""
    source, weights = (graph.tensors[number] for number in layer.inputs[:2])
    tensor = copy.copy(weights)
    tensor.name, tensor.shape = weights.name + b"/bias", np.array([outputs], np.int32)
    tensor.type = tflite_files.module("schema_py_generated").TensorType.INT32
    tensor.quantization = copy.copy(weights.quantization)
    tensor.quantization.scale = np.asarray(weights.quantization.scale * source.quantization.scale[0], np.float32)
    tensor.quantization.quantizedDimension = 0
    return tensor
