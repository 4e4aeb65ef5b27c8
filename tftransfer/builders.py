"""Builders: one call from a backbone's name to an uncompiled `keras.Model` with a head for the task."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import keras
import numpy as np

from tftransfer import backbones, heads
from tftransfer.errors import InputError


def image_classifier(
    backbone: str = "MobileNetV2",
    num_classes: int = 2,
    *,
    image_size: tuple[int, int] | int | None = None,
    weights: str | os.PathLike[str] | None = "imagenet",
    weights_kind: str | None = None,
    hidden: Sequence[int] = (),
    dropout: float = 0.2,
    activation: str | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    trust: bool = False,
) -> keras.Model:
    """Build a network that takes pictures and gives one number per class.

    Use it for single-label and multi-label classification and, with one output per number, for regression. Pixels
    go in as they are, RGB in [0, 255]: the backbone's preprocessing is inside.

    Args:
        backbone: A row of `backbones.names()`; width variants follow a dash, `"MobileNetV2-0.35"`.
        num_classes: Number of outputs, also for two classes; at least 1.
        image_size: `(height, width)` in pixels, or one number for both. Defaults to the backbone's natural size.
        weights: `"imagenet"`, `"demo"`, `None` (random) or a weights file. Defaults to `"imagenet"`.
        weights_kind: `"imagenet"` if a file holds Keras' own ImageNet weights and cannot be told by its digest
            (this matters for EfficientNet V1, whose ImageNet weights expect one more rescaling). Defaults to None.
        hidden: Sizes of hidden Dense layers (ReLU) between pooling and output. Defaults to none.
        dropout: Share of features dropped after each hidden layer and before the output while training, in [0, 1).
        activation: Activation of the last layer. Defaults to None: the outputs are logits.
        l1: L1 penalty on the kernels of the head. Defaults to 0.
        l2: L2 penalty on the kernels of the head. Defaults to 0.
        trust: Load a weights file without a scan. Defaults to False.

    Returns:
        An uncompiled model from `image` `(batch, height, width, 3)` to `(batch, num_classes)` float32. Backbone
        layers have Keras' own names; head layers are `head_pool`, `head_dropout`, `head_hidden_I` and `logits`.

    Raises:
        InputError: If an argument is out of its range, the backbone is not known, or the weights do not fit.
        ScanError: If a scan finds something in the weights file.

    Example:
        The textbooks' ResNet50 with a hidden layer of 1024 and ten classes:

        >>> model = image_classifier("ResNet50", 10, image_size=32, weights=None, hidden=(1024,))
        >>> [layer.name for layer in model.layers[-4:]]
        ['head_pool', 'head_hidden_1', 'head_dropout', 'logits']
    """
    size = _image_size(backbone, image_size)
    _check_head(num_classes, hidden, dropout, l1, l2)
    base = backbones.build(backbone, size, weights, weights_kind, trust=trust)
    head = heads.Dense(num_classes, tuple(hidden), dropout, activation, l1, l2)
    return keras.Model(base.input, head(base.output), name="image_classifier")


def in_units_of(model: keras.Model, targets: np.ndarray) -> keras.Model:
    """Let a regression network begin at the mean of the targets and step in units of their deviation.

    Args:
        model: A network whose outputs are about standard normal, `(batch, numbers)`.
        targets: Training targets, `(n, numbers)`.

    Returns:
        The network followed by `head_units`, a Rescaling layer: a plain model with outputs in the targets' units.

    Example:
        >>> in_units_of(image_classifier("MobileNet-0.25", 1, image_size=32, weights=None),
        ...             np.array([[10.0], [30.0]])).layers[-1].offset
        [20.0]
    """
    deviation = np.where(targets.std(axis=0) > 0, targets.std(axis=0), 1.0)
    units = keras.layers.Rescaling(
        scale=deviation.tolist(), offset=targets.mean(axis=0).tolist(), dtype="float32", name="head_units"
    )
    return keras.Model(model.input, units(model.output), name=model.name)


def outputs_are_logits(model: keras.Model) -> bool:
    """Tell from its last layer whether a network gives logits.

    Args:
        model: Any functional model with one output.

    Returns:
        True if the last layer applies no activation.
    """
    return _is_plain(model.output)


# Operations after which outputs are what they were: reshaped, renamed or of another type.
_PASSING = (keras.layers.Reshape, keras.layers.Flatten, keras.layers.Identity)
_PASSING_OPERATIONS = ("Cast", "Copy", "Identity", "Reshape", "Squeeze")
_ACTIVATIONS = ("Exp", "HardSigmoid", "LogSigmoid", "LogSoftmax", "Relu", "Sigmoid", "Softmax", "Softplus", "Tanh")


def _is_plain(output: keras.KerasTensor) -> bool:
    """Tell whether no activation was applied to an output, looking through what does not change it."""
    last, node, index = output._keras_history  # the operation that made it, whatever its place in `layers`
    if isinstance(last, keras.Model):
        return _is_plain(last.outputs[index])
    if isinstance(last, keras.layers.Softmax) or type(last).__name__ in _ACTIVATIONS:
        return False
    if getattr(last, "activation", keras.activations.linear) is not keras.activations.linear:
        return False
    passes = isinstance(last, (*_PASSING, keras.layers.Activation)) or type(last).__name__ in _PASSING_OPERATIONS
    before = last._inbound_nodes[node].input_tensors if passes else []
    return _is_plain(before[0]) if before else True


def _image_size(backbone: str, image_size: tuple[int, int] | int | None) -> tuple[int, int]:
    if image_size is None:
        natural = backbones.backbone(backbone).natural_size
        return natural, natural
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) == 3:
        backbones.check_channels(pair[2])  # Keras' `input_shape`: say first what is wrong with its last number
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(
            f"`image_size` must be a positive whole number or (height, width). Received: image_size={image_size!r}"
        )
    return pair[0], pair[1]


def _check_head(num_classes: int, hidden: Sequence[int], dropout: float, l1: float, l2: float) -> None:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"`num_classes` must be a whole number from 1. Received: num_classes={num_classes!r}")
    if not all(isinstance(units, int) and units > 0 for units in hidden):
        raise InputError(f"`hidden` must hold positive whole numbers. Received: hidden={hidden!r}")
    if not 0 <= dropout < 1:
        raise InputError(f"`dropout` must be in [0, 1). Received: dropout={dropout!r}")
    for name, penalty in (("l1", l1), ("l2", l2)):
        if not (math.isfinite(penalty) and penalty >= 0):
            raise InputError(f"`{name}` must be a number from 0. Received: {name}={penalty!r}")
