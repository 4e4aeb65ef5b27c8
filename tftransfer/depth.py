"""A network's depth: groups of layers from stem to top, and the layer that ends each feature level."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

LEVELS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Group:
    """One depth group: a residual, dense or inception block, a stage of VGG, the stem, or the top.

    Attributes:
        name: A word a person can say, such as `"stem"` or `"conv4_block2"`.
        layers: Names of its layers that hold weights, in order.
    """

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Naming:
    """How a family names its layers.

    Attributes:
        landmarks: Patterns which together tell the family from its lowest layers.
        rules: (pattern of a layer's whole name, group) pairs; the first that matches holds.
    """

    landmarks: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]


_NAMINGS = (
    _Naming(  # MobileNet
        ("conv_dw_1", "conv_pw_1"),
        (("conv1(_bn)?", "stem"), (r"conv_[dp]w_(\d+)(_bn)?", r"block_\1")),
    ),
    _Naming(  # MobileNetV2
        ("Conv1", "expanded_conv_depthwise"),
        (
            ("(bn_)?Conv1", "stem"),
            ("expanded_conv_.*", "block_0"),
            (r"block_(\d+)_.*", r"block_\1"),
            ("Conv_1(_bn)?", "top"),
        ),
    ),
    _Naming(  # MobileNetV3
        ("conv", "expanded_conv_depthwise"),
        (
            ("conv(_bn)?", "stem"),
            (r"expanded_conv_(\d+)_.*", r"block_\1"),
            ("expanded_conv_.*", "block_0"),
            ("conv_1(_bn)?", "top"),
        ),
    ),
    _Naming(("block1_conv1", "block1_pool"), ((r"block(\d)_conv\d", r"stage_\1"),)),  # VGG
    _Naming(  # ResNet, ResNetV2
        ("conv1_conv", "conv2_block1_3_conv"),
        (("conv1_(conv|bn)", "stem"), (r"(conv\d_block\d+)_.*", r"\1"), ("post_bn", "top")),
    ),
    _Naming(  # DenseNet
        ("conv1_conv", "conv2_block1_concat"),
        (
            ("conv1_(conv|bn)", "stem"),
            (r"conv(\d)_block\d+_.*", r"dense_block_\1"),
            (r"pool(\d)_.*", r"dense_block_\1"),  # the transition above a dense block goes with it
            ("bn", "top"),
        ),
    ),
    _Naming(("mixed0", "mixed1"), ((r"(mixed\d+)", r"\1"),)),  # InceptionV3
    _Naming(  # InceptionResNetV2
        ("mixed_5b", "block35_1_conv"),
        ((r"(mixed_\d[ab])", r"\1"), (r"(block\d+_\d+)_.*", r"\1"), ("conv_7b(_bn)?", "top")),
    ),
    _Naming(  # Xception
        ("block1_conv1", "block2_sepconv1"),
        (("block1_.*", "stem"), (r"(block\d+)_.*", r"\1")),
    ),
    _Naming(  # NASNet
        ("stem_conv1", "reduction_conv_1_stem_1"),
        (
            ("stem_(conv|bn)1", "stem"),
            (r".*_(stem_\d)", r"\1"),
            (r".*_reduce_(\d+)", r"reduction_\1"),
            (r"(?:normal|separable|adjust)_.*_(\d+)", r"cell_\1"),
        ),
    ),
    _Naming(  # EfficientNet, EfficientNetV2
        ("stem_conv", "block1a_project_conv"),
        (
            (r"stem_(conv|bn)|normalization(_\d+)?", "stem"),
            (r"(block\d+[^_]+)_.*", r"\1"),
            ("top_(conv|bn)", "top"),
        ),
    ),
    _Naming(  # ConvNeXt
        (r"convnext_\w+_stem", r"convnext_\w+_stage_0_block_0_depthwise_conv"),
        (
            (r"convnext_\w+_stem", "stem"),
            (r"convnext_\w+_stage_(\d_block_\d+)_.*", r"stage_\1"),
            # Between two stages stands a Sequential: it goes with the block above it.
            (r"convnext_\w+_downsampling_block_0", "stage_1_block_0"),
            (r"convnext_\w+_downsampling_block_1", "stage_2_block_0"),
            (r"convnext_\w+_downsampling_block_2", "stage_3_block_0"),
            (r"layer_normalization(_\d+)?", "top"),
        ),
    ),
)


def is_head(layer_name: str) -> bool:
    """Tell whether a layer belongs to the head that a builder put on a backbone.

    Args:
        layer_name: Name of a top-level layer.

    Returns:
        True for `logits` and for names that begin with `head_`.

    Example:
        >>> is_head("head_pool"), is_head("conv1")
        (True, False)
    """
    return layer_name == "logits" or layer_name.startswith("head_")


def depth_groups(model: keras.Model) -> tuple[Group, ...]:
    """Divide a network into groups from stem to top.

    The groups are found from layer names and the graph alone, so a loaded model gives the same ones. Names
    that Keras numbers by session (`conv2d_17`) are never read: such a layer goes with the block it stands in.

    Args:
        model: A backbone of this package, with or without a head, or any other Keras model. For a network
            that is not recognised each top-level layer that has weights is a group.

    Returns:
        Groups in order. Each layer that has weights is in exactly one of them, but for the head's (see
        `is_head`).

    Example:
        >>> from tftransfer import backbones
        >>> [group.name for group in depth_groups(backbones.build("VGG16", (32, 32)))]
        ['stage_1', 'stage_2', 'stage_3', 'stage_4', 'stage_5']
    """
    layers = [layer.name for layer in model.layers if layer.weights and not is_head(layer.name)]
    naming = _naming(model)
    labels = _labels(model, naming) if naming else {name: name for name in layers}
    last = {labels[name]: position for position, name in enumerate(layers)}
    # By its last layer: NASNet's cells begin before the cell below them ends.
    ordered = sorted(last, key=lambda label: last[label])
    return tuple(Group(label, tuple(name for name in layers if labels[name] == label)) for label in ordered)


def _naming(model: keras.Model) -> _Naming | None:
    """Recognise the family that a functional network is of."""
    if not hasattr(model, "_nodes_by_depth"):
        return None
    names = [layer.name for layer in model.layers]
    for naming in _NAMINGS:
        if all(any(re.fullmatch(landmark, name) for name in names) for landmark in naming.landmarks):
            return naming
    return None


def _labels(model: keras.Model, naming: _Naming) -> dict[str, str]:
    """Give each operation the name of its group: by its own name, its block's, or that of the one below."""
    segments = [[(name, _label(name, naming)) for name in segment] for segment in _segments(model)]
    known = [next((label for _, label in segment if label), None) for segment in segments]
    top = max(index for index, label in enumerate(known) if label)
    labels, below = {}, "stem"
    for index, segment in enumerate(segments):
        below = known[index] or below
        for name, label in segment:
            # What a user put on top of the network, under names that no rule knows, is a group each.
            labels[name] = label or (below if index <= top else name)
    return labels


def _label(name: str, naming: _Naming) -> str | None:
    for pattern, group in naming.rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(group)
    return None


def feature_levels(model: keras.Model) -> dict[int, str]:
    """Find the operation that ends each feature level, for networks that read several scales.

    A level ends at the last tensor of its stride through which everything above passes, padding aside;
    NASNet, whose cells always read two tensors, has no such tensors and ends its levels at a cell's output.

    Args:
        model: A functional network over pictures `(batch, height, width, channels)`.

    Returns:
        From the stride (4, 8, 16 and 32, where the network has them) to the name of a layer, for ConvNeXt of
        an operation; `level_output` gives its tensor.

    Example:
        >>> from tftransfer import backbones
        >>> feature_levels(backbones.build("ResNet50", (64, 64)))[8]
        'conv3_block4_out'
    """
    nodes = nodes_in_order(model)
    strides = _strides(nodes)
    ends = {nodes[position].operation.name for position in _cuts(model, nodes)}
    levels: dict[int, str] = {}
    for node in nodes:
        operation, stride = node.operation, strides[id(node.outputs[0])]
        cell = re.fullmatch(r"(normal|reduction)_concat_.*", operation.name)
        if stride in LEVELS and (operation.name in ends or cell) and _is_feature_map(node):
            levels[int(stride)] = operation.name
    return dict(sorted(levels.items()))


def level_output(model: keras.Model, name: str) -> keras.KerasTensor:
    """Return the tensor of a name from `feature_levels`.

    `model.get_layer` does not find ConvNeXt's: they are sums, not layers.

    Args:
        model: The network that the levels were found in.
        name: Name of a layer or operation.

    Returns:
        Its output, `(batch, rows, columns, channels)`.
    """
    return next(node.outputs[0] for node in nodes_in_order(model) if node.operation.name == name)


def _is_feature_map(node: Any) -> bool:
    padded = isinstance(node.operation, keras.layers.ZeroPadding2D)
    return len(node.outputs[0].shape) == 4 and not padded and not is_head(node.operation.name)


def _strides(nodes: list) -> dict[int, float | None]:
    """Return each tensor's stride; None for what is pooled over the whole picture."""
    strides: dict[int, float | None] = {}
    for node in nodes:
        before = [strides[id(tensor)] for tensor in node.input_tensors]
        known = [stride for stride in before if stride is not None]
        own = _stride(node.operation)
        stride = 1.0 if node.is_input else max(known) * own if known and own else None
        strides.update((id(tensor), stride) for tensor in node.outputs)
    return strides


def _stride(operation: keras.Operation) -> float:
    """Return the factor by which an operation shrinks a picture; 0 for what pools the whole of it."""
    if isinstance(operation, keras.Sequential):
        factor = 1.0
        for layer in operation.layers:
            factor *= _stride(layer)
        return factor
    if isinstance(operation, (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)):
        return 0.0
    if isinstance(operation, keras.layers.UpSampling2D):
        return 1 / operation.size[0]
    strides = getattr(operation, "strides", 1)
    factor = float(strides if isinstance(strides, int) else strides[0])
    return 1 / factor if isinstance(operation, keras.layers.Conv2DTranspose) else factor


def nodes_in_order(model: keras.Model) -> list:
    """Return the graph's nodes in topological order; layers shared with other models have more nodes."""
    by_depth = model._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def _cuts(model: keras.Model, nodes: list) -> Iterator[int]:
    """Yield the positions of nodes whose one output is all that the nodes above read."""
    needed_until: dict[int, int] = {}
    for position, node in enumerate(nodes):
        needed_until.update((id(tensor), position) for tensor in node.input_tensors)
    needed_until.update((id(tensor), len(nodes)) for tensor in model.outputs)
    open_tensors: set[int] = set()
    for position, node in enumerate(nodes):
        open_tensors = {tensor for tensor in open_tensors if needed_until[tensor] > position}
        open_tensors.update(id(tensor) for tensor in node.outputs if needed_until.get(id(tensor), -1) > position)
        if open_tensors == {id(node.outputs[0])}:
            yield position


def _segments(model: keras.Model) -> list[list[str]]:
    """Divide the operations at the cuts: a chain's steps are alone, a block with branches stays together."""
    nodes = nodes_in_order(model)
    segments, start = [], 0
    for position in _cuts(model, nodes):
        segments.append([node.operation.name for node in nodes[start : position + 1]])
        start = position + 1
    rest = [node.operation.name for node in nodes[start:]]
    return [*segments, rest] if rest else segments
