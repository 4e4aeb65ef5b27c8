"""Stateless augmentation on TensorFlow's image operations: the same picture and seed give the same bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tftransfer.errors import InputError, nearest


@dataclass(frozen=True)
class Augmentation:
    """How much pictures are changed at random; every amount is the largest, drawn evenly up to it.

    Args:
        name: What the strategy and the manifest call it.
        flip: Whether half of the pictures are mirrored left to right; wrong for letters, digits and signs.
        zoom: Up to which share a side is cropped (and, at random places, the crop stretched back), in [0, 1).
        shrink: Up to which share more than a side is seen, the picture mirrored at its edges, in [0, 1); with it, half
            of the pictures are cropped and half are shrunk, so that things keep their size on average.
        aspect: Up to which share height and width are cropped differently, in [0, 1).
        rotation: Up to how many degrees a picture is turned, to either side.
        shift: Up to which share of a side a picture is moved in either direction, in [0, 1).
        brightness: Up to which share of 255 is added or taken away, in [0, 1].
        contrast, saturation: Up to which share they grow or shrink, in [0, 1).
        cutout: Side of a gray square that hides a part, as a share of the picture's sides, in [0, 1).
    """

    name: str = "none"
    flip: bool = False
    zoom: float = 0.0
    shrink: float = 0.0
    aspect: float = 0.0
    rotation: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: float = 0.0

    @property
    def crops(self) -> bool:
        """Whether a part of the picture is cut out and stretched, mirrored or not."""
        return bool(self.flip or self.zoom or self.aspect)

    @property
    def turns(self) -> bool:
        """Whether pictures are turned, or seen beyond their edges, which costs more than to crop them."""
        return bool(self.rotation or self.shift or self.shrink)


_LIGHT: dict[str, Any] = {"zoom": 0.15, "brightness": 0.05, "contrast": 0.1}
_STRONG: dict[str, Any] = {
    "zoom": 0.4,
    "shrink": 0.3,
    "aspect": 0.2,
    "shift": 0.1,
    "rotation": 15.0,
    "brightness": 0.2,
    "contrast": 0.3,
    "saturation": 0.3,
    "cutout": 0.3,
}
NAMED = {
    augmentation.name: augmentation
    for augmentation in (
        Augmentation(),
        Augmentation("light", flip=True, **_LIGHT),
        Augmentation("strong", flip=True, **_STRONG),
        Augmentation("light_no_flip", **_LIGHT),
        Augmentation("strong_no_flip", **_STRONG),
    )
}


def named(augmentation: str | Augmentation) -> Augmentation:
    """Return an augmentation by its name; an `Augmentation` passes unchanged.

    Raises:
        InputError: If the name is not known.

    Example:
        >>> named("light").flip, named("light_no_flip").flip
        (True, False)
    """
    if isinstance(augmentation, Augmentation):
        return augmentation
    if augmentation not in NAMED:
        raise InputError(
            f"`augmentation` must be one of {', '.join(NAMED)}.{nearest(str(augmentation), NAMED)} "
            f"Received: augmentation={augmentation!r}"
        )
    return NAMED[augmentation]


def augment(picture: tf.Tensor, strength: str | Augmentation, seed: tf.Tensor) -> tf.Tensor:
    """Change a picture at random, decided by the seed alone.

    All geometry is one resampling (bilinear, mirrored at the edges), so that nothing is blurred twice. Never
    part of a saved graph.

    Args:
        picture: `(height, width, 3)` uint8 or float in [0, 255].
        strength: An `Augmentation` or the name of one.
        seed: `(2,)` integers.

    Returns:
        float32 `(height, width, 3)` in [0, 255].

    Example:
        >>> augment(tf.fill((2, 2, 3), tf.constant(9, tf.uint8)), "none", [0, 0])[0, 0].numpy().tolist()
        [9.0, 9.0, 9.0]
    """
    policy, draws = named(strength), _draws(seed)
    changed = tf.cast(picture, tf.float32)
    if policy.turns:
        changed = _turn(changed, policy, draws)
    elif policy.crops:
        changed = _crop(changed, policy, draws)
    if policy.brightness or policy.contrast or policy.saturation:
        changed = tf.clip_by_value(_recolour(changed, policy, draws), 0.0, 255.0)
    if policy.cutout:
        changed = _cut_out(changed, policy.cutout, draws[8:10])
    return changed


def geometry(strength: str | Augmentation, seed: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Return where `augment` takes each pixel from, so that boxes and masks can follow a picture.

    Args:
        strength, seed: As for `augment`.
        image_size: `(height, width)` of the picture.

    Returns:
        `(8,)` float32, a projective transform as `ImageProjectiveTransformV3` takes it: the pixel at column x and row y
        shows what was at `(a0 x + a1 y + a2, a3 x + a4 y + a5)`. Beyond its edges the picture is mirrored.

    Example:
        >>> geometry("none", [0, 0], (4, 6)).numpy().tolist()
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    policy, draws = named(strength), _draws(seed)
    if policy.turns:
        return _turned(policy, draws, image_size)
    if not policy.crops:
        return tf.constant([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    top, left, bottom, right = tf.unstack(_box(policy, draws))
    height, width = image_size
    return tf.stack([right - left, 0.0, left * (width - 1), 0.0, bottom - top, top * (height - 1), 0.0, 0.0])


def _draws(seed: tf.Tensor) -> tf.Tensor:
    """Return the random numbers that decide all about one picture, in [-1, 1)."""
    return tf.random.stateless_uniform((11,), seed, -1.0, 1.0)


def _scales(policy: Augmentation, draws: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return which share of width and height is seen; a negative width is mirrored."""
    seen = 1 - policy.zoom * tf.abs(draws[0])
    if policy.shrink:
        seen = tf.where(draws[0] < 0, seen, 1 + policy.shrink * draws[0])
    across = seen * (1 - policy.aspect * tf.nn.relu(draws[1]))
    mirror = tf.where((draws[2] < 0) & policy.flip, -1.0, 1.0)
    return mirror * across, seen * (1 - policy.aspect * tf.nn.relu(-draws[1]))


def _crop(picture: tf.Tensor, policy: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """Cut out a part that lies anywhere inside the picture and stretch it, bilinear."""
    return tf.image.crop_and_resize(picture[None], _box(policy, draws)[None], [0], picture.shape[:2])[0]


def _box(policy: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """Return `(top, left, bottom, right)` of the part that is cut out, in [0, 1]; mirrored, left is above right."""
    width, height = _scales(policy, draws)
    x, y = 0.5 + draws[3] * (1 - tf.abs(width)) / 2, 0.5 + draws[4] * (1 - height) / 2
    box = tf.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2])
    return tf.clip_by_value(box, 0.0, 1.0)  # rounding may leave the picture, where all is black


def _turn(picture: tf.Tensor, policy: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """Crop, mirror, turn and shift in one projective transform."""
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=picture[None],
        transforms=_turned(policy, draws, picture.shape[:2])[None],
        output_shape=picture.shape[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )[0]
    return tf.clip_by_value(moved, 0.0, 255.0)


def _turned(policy: Augmentation, draws: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Return the projective transform of `_turn`, from places of the result."""
    scale_x, scale_y = _scales(policy, draws)
    # A crop lies anywhere inside the picture, a shrunk picture anywhere inside the view; a shift may leave either.
    free_x, free_y = tf.abs(1 - tf.abs(scale_x)) / 2 + policy.shift, tf.abs(1 - scale_y) / 2 + policy.shift
    height, width = image_size
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    to_x, to_y = middle_x + draws[3] * free_x * width, middle_y + draws[4] * free_y * height
    angle = draws[5] * math.radians(policy.rotation)
    a, b = scale_x * tf.cos(angle), -scale_y * tf.sin(angle)
    c, d = scale_x * tf.sin(angle), scale_y * tf.cos(angle)
    return tf.stack([a, b, to_x - a * middle_x - b * middle_y, c, d, to_y - c * middle_x - d * middle_y, 0.0, 0.0])


def _recolour(picture: tf.Tensor, policy: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """Change saturation, then contrast about the mean and brightness in one multiplication."""
    if policy.saturation:
        gray = tf.reduce_mean(picture, axis=2, keepdims=True)
        picture = gray + (picture - gray) * (1 + policy.saturation * draws[7])
    contrast = 1 + policy.contrast * draws[6]
    shift = 255 * policy.brightness * draws[10] + (1 - contrast) * tf.reduce_mean(picture)
    return picture * contrast + shift


def _cut_out(picture: tf.Tensor, side: float, draws: tf.Tensor) -> tf.Tensor:
    """Hide a rectangle behind mid-gray (DeVries and Taylor 2017, arXiv:1708.04552)."""
    height, width = picture.shape[0], picture.shape[1]
    rows = tf.abs(tf.range(height, dtype=tf.float32) / height - (draws[0] + 1) / 2) < side / 2
    columns = tf.abs(tf.range(width, dtype=tf.float32) / width - (draws[1] + 1) / 2) < side / 2
    hidden = rows[:, None, None] & columns[None, :, None]
    return tf.where(hidden, 127.5, picture)
