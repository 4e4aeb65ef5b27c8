"""What files for other runtimes hold: one graph from pixels to named numbers, and a description of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import tftransfer
from tftransfer import builders, constants, tensor_files
from tftransfer.errors import InputError
from tftransfer.serving.export import check_outputs, image_size
from tftransfer.tasks import Task

INPUT = "image"
_HALF = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


def output_name(task: Task) -> str:
    """Name what such a file gives: `probabilities`, or `values` for regression.

    It holds no text, so labels are in its description.
    """
    return "values" if task.kind == "regression" else "probabilities"


def graph_of(model: keras.Model, task: Task, from_logits: bool | None = None, *, simple: bool = False) -> Any:
    """Return the network as a `tf.function` of constants that a converter can read.

    Args:
        model: The trained network, from pixels in [0, 255] to numbers, computing in float32.
        task: What the outputs mean.
        from_logits: Whether the network gives logits. Defaults to what its last layer says.
        simple: As for `constants.as_convertible_function`. Defaults to False.

    Returns:
        From `image`, `(batch, height, width, 3)` float32, to a dict with the one output that `output_name` says,
        `(batch, outputs)` float32.

    Raises:
        InputError: If the network takes pictures of no fixed size, its outputs do not fit the task, or no graph can
            hold it.
    """
    check_outputs(model, task)
    pictures = tf.TensorSpec((None, *image_size(model), 3), tf.float32, name=INPUT)
    logits = builders.outputs_are_logits(model) if from_logits is None else from_logits
    try:
        infer = constants.as_convertible_function(model, simple=simple)
    except constants.NotConstant as why:
        raise InputError(f"the network cannot be converted: {why}") from None

    def answer(image: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = tf.nest.pack_sequence_as(model.output, infer(image))
        return {output_name(task): task.probabilities(outputs, logits)}

    return tf.function(answer, input_signature=[pictures], autograph=False)


def in_float32(model: keras.Model) -> keras.Model:
    """Return a network that computes in float32 with the same weights, which are float32 in mixed precision too.

    Half precision is for the device that trained it: LiteRT and ONNX Runtime lack its convolutions on a processor.

    Args:
        model: The trained network; returned as it is where every layer computes in float32.

    Raises:
        InputError: If a network in half precision cannot be built again from its configuration.
    """
    if all(layer.compute_dtype == "float32" for layer in model._flatten_layers() if layer.weights):
        return model
    try:
        same = type(model).from_config(_with_full_precision(model.get_config()))
        same.set_weights(model.get_weights())
    except (NotImplementedError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"the network computes in half precision and cannot be built in float32: {error}") from None
    return same


def _with_full_precision(config: Any) -> Any:
    """Replace half precision in a configuration, wherever a layer names it."""
    if isinstance(config, dict):
        return {key: _with_full_precision(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(map(_with_full_precision, config))
    return "float32" if isinstance(config, str) and config in _HALF else config


def describe(model: keras.Model, task: Task, **more: Any) -> dict[str, Any]:
    """Describe a file for whoever runs it: what goes in, what comes out, and where it comes from.

    Args:
        model: The network in the file.
        task: What its outputs mean.
        more: Whatever else is to be said, such as `quantization`.

    Returns:
        JSON.
    """
    height, width = image_size(model)
    described: dict[str, Any] = {
        "task": task.kind,
        "labels": list(task.labels),
        "input": {
            "name": INPUT,
            "shape": [None, height, width, 3],
            "type": "float32",
            "colours": "RGB",
            "range": [0, 255],
            "normalisation": {"mean": 0.0, "deviation": 1.0},  # the network's own is inside
            "resize": "to the whole size, bilinear with antialiasing",
        },
        "outputs": {output_name(task): {"shape": [None, task.num_outputs], "type": "float32"}},
        "versions": {"tftransfer": tftransfer.__version__, "tensorflow": tf.__version__, "keras": keras.__version__},
        **more,
    }
    if hasattr(task, "threshold"):
        described["threshold"] = task.threshold
    return described


def write(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one.

    Raises:
        InputError: If it cannot be written.
    """
    staged = path.with_name(f".{path.name}.staged")
    try:
        staged.write_bytes(content)
        tensor_files.sync(staged)
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
