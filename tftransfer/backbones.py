"""Backbones: a table row per `keras.applications` network, and `build`, which puts preprocessing inside."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import keras

from tftransfer import scanning
from tftransfer.depth import Group, depth_groups, feature_levels, is_head, level_output
from tftransfer.errors import InputError, nearest
from tftransfer.weight_files import load_weights
from tftransfer.weights import (
    check_demo,
    check_weights,
    demo_weights_path,
    describe_weights,
    digest,
    has_imagenet_rescaling,
)

__all__ = [
    "Backbone",
    "Group",
    "backbone",
    "build",
    "check_channels",
    "demo_weights_path",
    "depth_groups",
    "describe_weights",
    "digest",
    "feature_levels",
    "is_head",
    "level_output",
    "names",
]

LEVELS = (4, 8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of pixels in [0, 1]
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
CAFFE_MEAN = (103.939, 116.779, 123.68)  # BGR, of pixels in [0, 255]


@dataclass(frozen=True)
class Family:
    """The networks of one architecture: what they share, and each one's name and natural size.

    Attributes:
        name: The module of `keras.applications` that holds the family's `preprocess_input`.
        sizes: From a network's name to the side in pixels of the pictures it was trained on.
        preprocessing: `"tf"` ([-1, 1]), `"torch"` (mean and deviation), `"caffe"` (BGR less the mean) or
            `"inside"`.
        smallest_size: Shortest side in pixels that Keras accepts.
        widths: Width multipliers besides 1.0 for which Keras publishes ImageNet weights.
    """

    name: str
    sizes: dict[str, int]
    preprocessing: str
    smallest_size: int = 32
    widths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Backbone:
    """One row of the table: a pretrained network and what travels with it.

    Attributes:
        name: Its name, with the width multiplier after a dash where it is not 1.
        function: The name of the function in `keras.applications`.
        family: The module of `keras.applications` that holds the family's `preprocess_input`.
        preprocessing: `"tf"`, `"torch"`, `"caffe"`, or `"inside"` where Keras has it in the network.
        natural_size: Side in pixels of the pictures it was trained on.
        smallest_size: Shortest side in pixels that it takes.
        width: Width multiplier; 1.0 but for the MobileNets.
        levels: Strides at which it has feature maps; see `feature_levels`.
    """

    name: str
    function: str
    family: str
    preprocessing: str
    natural_size: int
    smallest_size: int
    width: float = 1.0
    levels: tuple[int, ...] = LEVELS


def _at(size: int, *networks: str) -> dict[str, int]:
    return dict.fromkeys(networks, size)


FAMILIES = (
    Family("mobilenet", _at(224, "MobileNet"), "tf", widths=(0.25, 0.5, 0.75)),
    Family("mobilenet_v2", _at(224, "MobileNetV2"), "tf", widths=(0.35, 0.5, 0.75, 1.3, 1.4)),
    Family("mobilenet_v3", _at(224, "MobileNetV3Small", "MobileNetV3Large"), "inside", widths=(0.75,)),
    Family("vgg16", _at(224, "VGG16"), "caffe"),
    Family("vgg19", _at(224, "VGG19"), "caffe"),
    Family("resnet", _at(224, "ResNet50", "ResNet101", "ResNet152"), "caffe"),
    Family("resnet_v2", _at(224, "ResNet50V2", "ResNet101V2", "ResNet152V2"), "tf"),
    Family("densenet", _at(224, "DenseNet121", "DenseNet169", "DenseNet201"), "torch"),
    Family("inception_v3", _at(299, "InceptionV3"), "tf", smallest_size=75),
    Family("inception_resnet_v2", _at(299, "InceptionResNetV2"), "tf", smallest_size=75),
    Family("xception", _at(299, "Xception"), "tf", smallest_size=71),
    Family("nasnet", {"NASNetMobile": 224, "NASNetLarge": 331}, "tf"),
    Family(
        "efficientnet",
        {f"EfficientNetB{i}": size for i, size in enumerate((224, 240, 260, 300, 380, 456, 528, 600))},
        "inside",
    ),
    Family(
        "efficientnet_v2",
        {
            **{f"EfficientNetV2B{i}": size for i, size in enumerate((224, 240, 260, 300))},
            "EfficientNetV2S": 384,
            **_at(480, "EfficientNetV2M", "EfficientNetV2L"),
        },
        "inside",
    ),
    Family(
        "convnext",
        _at(224, *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge"))),
        "inside",
    ),
)


def names(variants: bool = True) -> tuple[str, ...]:
    """List the backbones that `build` knows.

    Args:
        variants: Whether to list the width variants of the MobileNets too. Defaults to True.

    Returns:
        Keras' own names, family by family, each followed by its variants.

    Example:
        >>> len(names(variants=False)), names()[:4]
        (40, ('MobileNet', 'MobileNet-0.25', 'MobileNet-0.5', 'MobileNet-0.75'))
    """
    return tuple(
        name
        for family in FAMILIES
        for function in family.sizes
        for name in (function, *(f"{function}-{width}" for width in family.widths if variants))
    )


def backbone(name: str) -> Backbone:
    """Look up one row of the table.

    Args:
        name: A name of `names()`, such as `"ResNet50"` or `"MobileNetV2-0.35"`.

    Returns:
        The row.

    Raises:
        InputError: If there is no such row; the message names the nearest ones.

    Example:
        >>> backbone("EfficientNetB3").natural_size
        300
    """
    function, _, width = str(name).partition("-")
    for family in FAMILIES:
        if function in family.sizes:
            return _row(family, function, width, name)
    raise InputError(f"`backbone` is not known.{nearest(str(name), names())} Received: backbone={name!r}")


def _row(family: Family, function: str, width: str, name: str) -> Backbone:
    multiplier = _width(family, width, name)
    size = family.sizes[function]
    full_name = function if multiplier == 1.0 else f"{function}-{multiplier}"
    return Backbone(full_name, function, family.name, family.preprocessing, size, family.smallest_size, multiplier)


def _width(family: Family, width: str, name: str) -> float:
    known = sorted((*family.widths, 1.0))
    try:
        multiplier = float(width or 1.0)
    except ValueError:
        multiplier = math.nan
    if multiplier not in known or (width and not family.widths):
        choice = f"one of the widths {known}" if family.widths else "no width"
        raise InputError(f"`backbone` takes {choice} after the dash. Received: backbone={name!r}")
    return multiplier


def check_channels(channels: int) -> None:
    """Refuse pictures that are not RGB.

    Args:
        channels: Last number of the pictures' shape.

    Raises:
        InputError: If it is not 3.

    Example:
        >>> check_channels(3)
    """
    if channels == 1:
        raise InputError(
            "Backbones take RGB pictures (batch, height, width, 3). The decoder repeats grayscale files to "
            "RGB; repeat an array yourself: `np.repeat(images, 3, axis=-1)`. Received: channels=1"
        )
    if channels != 3:
        raise InputError(
            "Backbones take RGB pictures (batch, height, width, 3): pretrained weights exist for three "
            f"channels only. Choose or combine three. Received: channels={channels!r}"
        )


def build(
    name: str,
    image_size: tuple[int, int],
    weights: str | os.PathLike[str] | None = None,
    weights_kind: str | None = None,
    *,
    trust: bool = False,
) -> keras.Model:
    """Build a backbone that takes pixels and gives feature maps.

    The result is a flat functional model: the preprocessing is built-in layers in float32, also under a
    policy of mixed precision, and the layers after it are Keras' own under Keras' own names. It saves and
    loads without tftransfer.

    Args:
        name: A row of `names()`.
        image_size: `(height, width)` in pixels.
        weights: `"imagenet"` (downloaded by Keras), `"demo"` (the embedded weights; one row only), None
            (random; BatchNorm's momentum is then 0.9 at the most) or a file: `.h5`, `.weights.h5` or
            `.keras`. Defaults to None.
        weights_kind: `"imagenet"` says that a file holds Keras' ImageNet weights. It matters for
            EfficientNet V1, whose ImageNet weights expect one more rescaling (tensorflow#49930, #62193);
            files with Keras' own digest and `.keras` files are told without it. Defaults to None.
        trust: Load a file without a scan. Defaults to False.

    Returns:
        A model from `image` `(batch, height, width, 3)`, RGB in [0, 255], to `(batch, rows, columns,
        channels)`.

    Raises:
        InputError: If the name is not known, the size is too small or the weights do not fit.
        ScanError: If a scan finds something in the file.

    Example:
        >>> model = build("MobileNet-0.25", (64, 64))
        >>> model.input_shape, model.output_shape
        ((None, 64, 64, 3), (None, 2, 2, 256))
    """
    row = backbone(name)
    _check_image_size(row, image_size)
    weights = check_weights(weights, weights_kind)
    if weights == "demo":
        check_demo(row.name)
    elif weights not in (None, "imagenet"):
        scanning.check(weights, trust=trust, weights_only=True)
    rescaling = row.family == "efficientnet" and has_imagenet_rescaling(weights, weights_kind)
    image = keras.Input((*image_size, 3), dtype="float32", name="image")
    network = _network(row, _preprocess(image, row.preprocessing), weights)
    network = _faithful(keras.Model(image, network.output, name=network.name), rescaling, weights == "imagenet")
    if weights is None:
        _quicken_batch_norm(network)
    elif weights != "imagenet":
        load_weights(network, demo_weights_path() if weights == "demo" else weights, row.name)
    return network


def _quicken_batch_norm(network: keras.Model) -> None:
    """Let statistics follow within tens of steps, as PyTorch's do: random weights give features of a tiny variance, and
    what is left of the first value, 1, makes nothing of them in layer after layer; 0.99 takes a thousand steps.
    """
    for layer in network._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, 0.9)


def _check_image_size(row: Backbone, image_size: tuple[int, int]) -> None:
    if keras.config.image_data_format() != "channels_last":
        raise InputError("Keras' `image_data_format` must be 'channels_last'. Received: 'channels_first'")
    if len(image_size) != 2 or not all(isinstance(side, int) for side in image_size):
        raise InputError(f"`image_size` must be (height, width) in pixels. Received: image_size={image_size!r}")
    if min(image_size) < row.smallest_size:
        raise InputError(
            f"`image_size` is too small for {row.name}: at least {row.smallest_size} pixels a side, "
            f"naturally {row.natural_size}. Received: image_size={tuple(image_size)}"
        )


def _preprocess(image: keras.KerasTensor, kind: str) -> keras.KerasTensor:
    """Do what the family's `preprocess_input` does, in built-in layers that hold no variables."""
    # float32 whatever the policy: bfloat16 keeps eight bits, which the mean's subtraction would eat.
    if kind == "tf":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="preprocessing")(image)
    if kind == "torch":
        mean = [255 * value for value in IMAGENET_MEAN]
        return _normalization(mean, [(255 * value) ** 2 for value in IMAGENET_DEVIATION])(image)
    if kind == "caffe":
        # An operation, not a Lambda: it is saved as `Flip` and loads anywhere.
        return _normalization(list(CAFFE_MEAN), [1.0, 1.0, 1.0])(keras.ops.flip(image, axis=-1))
    return image


def _normalization(mean: list[float], variance: list[float]) -> keras.layers.Normalization:
    return keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="preprocessing")


def _network(row: Backbone, pixels: keras.KerasTensor, weights: object) -> keras.Model:
    function = getattr(keras.applications, row.function)
    width = {"alpha": row.width} if row.width != 1.0 else {}
    kept = "imagenet" if weights == "imagenet" else None
    try:
        with warnings.catch_warnings():
            # Keras warns that it takes the weights of 224 pixels for another size: that is what is wanted.
            warnings.filterwarnings("ignore", message=".*Weights for input shape", category=UserWarning)
            return function(
                input_tensor=pixels,
                input_shape=tuple(pixels.shape[1:]),
                include_top=False,
                weights=kept,
                **width,
            )
    except Exception as error:  # `keras.utils.get_file` raises a bare Exception where a download fails
        if kept is None:
            raise
        raise InputError(
            f"`weights='imagenet'` of {row.name} could not be downloaded: {' '.join(str(error).split())} "
            "Give a file instead: `weights=PATH`, `--weights PATH`"
        ) from error


def _faithful(network: keras.Model, rescaling: bool, copy_weights: bool) -> keras.Model:
    """Add EfficientNet's ImageNet rescaling, and put Keras' own preprocessing into float32."""
    rescaling = rescaling and not copy_weights  # Keras adds it itself where it downloads the weights
    inside = [layer for layer in network.layers if _is_preprocessing(layer)]
    if not rescaling and all(layer.compute_dtype == "float32" for layer in inside):
        return network
    clone = keras.models.clone_model(
        network, clone_function=_in_float32, call_function=_with_rescaling if rescaling else None
    )
    if copy_weights:
        clone.set_weights(network.get_weights())
    return clone


def _is_preprocessing(layer: keras.Layer) -> bool:
    return isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization))


def _in_float32(layer: keras.Layer) -> keras.Layer:
    config = layer.get_config()
    if _is_preprocessing(layer):
        config["dtype"] = "float32"
    return layer.__class__.from_config(config)


def _with_rescaling(layer: Callable, *args: object, **kwargs: object) -> keras.KerasTensor:
    """Call a layer; after the normalization, rescale as Keras does for `weights="imagenet"` alone."""
    outputs = layer(*args, **kwargs)
    if not isinstance(layer, keras.layers.Normalization):
        return outputs
    # The weights were trained with (x - mean) / variance, not deviation (tensorflow#49930).
    scale = [1.0 / math.sqrt(deviation) for deviation in IMAGENET_DEVIATION]
    return keras.layers.Rescaling(scale, dtype=layer.dtype_policy)(outputs)
