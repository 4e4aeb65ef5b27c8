"""Streams as a source: a `tf.data.Dataset` or TensorFlow Datasets, read once into a copy in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tftransfer.data import arrays, splits
from tftransfer.data.listing import Encoded, Listing
from tftransfer.errors import InputError

_EXPECTED = "Expected unbatched (picture, label) pairs"


def listed(parts: Mapping[str, Any], memory_budget: int) -> Listing:
    """Read data sets of single `(picture, label)` pairs.

    Args:
        parts: By split, a `tf.data.Dataset`. Pictures are encoded (a scalar string) or `(height, width, 1 or
        3)` in
            [0, 255]; the latter are kept as PNG.
        memory_budget: Bytes that the encoded copy may take.

    Raises:
        InputError: If elements are no such pairs, or the copy would be larger.
    """
    names = arrays.split_names(parts)
    _check_elements({key: parts[key] for key in names})
    return _copied({key: (names[key], parts[key]) for key in names}, "stream", memory_budget)


def listed_tfds(name: str, memory_budget: int) -> Listing:
    """Read a data set of TensorFlow Datasets, `NAME` or `NAME/CONFIG`, downloading it if need be.

    Its splits train, validation and test are used where it has them; pictures stay encoded, so that they are
    decoded as everywhere else; the names of the classes are its own.

    Args:
        name: The data set's name in the catalogue.
        memory_budget: Bytes that the encoded copy may take.

    Raises:
        InputError: If it is not known or cannot be had, holds no pictures with labels, or is too large.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
        builder.download_and_prepare()
        image, label = _keys(builder.info)
        decoders = {image: tfds.decode.SkipDecoding()}
        known = {key: splits.canonical(key) for key in builder.info.splits}
        parts = {
            key: (
                split,
                builder.as_dataset(split=key, decoders=decoders).map(lambda row: (row[image], row[label])),
            )
            for key, split in known.items()
            if split
        }
    except InputError:
        raise
    except Exception as error:  # TFDS raises whatever its download, disk and checks raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"data set {name!r} of TensorFlow Datasets cannot be had: {reason[0]} Check the name at "
            f"tensorflow.org/datasets and the network. Received: data='tfds:{name}'"
        ) from None
    left_out = [f"split {key!r} was left out" for key, split in known.items() if not split]
    feature = builder.info.features[label]
    return _copied(parts, name, memory_budget, tuple(getattr(feature, "names", None) or ()), tuple(left_out))


def _keys(info: Any) -> tuple[str, str]:
    """Return the names of the picture and of the label among a data set's features."""
    keys = info.supervised_keys or ("image", "label")
    features = info.features or {}
    if not all(isinstance(key, str) and key in features for key in keys[:2]):
        raise InputError(
            f"data set {info.name!r} has no pair of one picture and one label. Received: features {sorted(features)}"
        )
    return keys[0], keys[1]


def _copied(
    parts: Mapping[str, tuple[str, Iterable[Any]]],
    name: str,
    memory_budget: int,
    classes: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Listing:
    """Copy every element into memory; integer labels index `classes` where those are given."""
    budget = _Budget(memory_budget)
    pairs = {key: [_pair(element, budget) for element in elements] for key, (_, elements) in parts.items()}
    for key, own in pairs.items():
        if not own:
            raise InputError(f"split {key} of {name} is empty")
    labels = {key: np.array([label for _, label in own]) for key, own in pairs.items()}
    texts, found_classes, several = arrays.texts_of(labels)
    if classes and not several:
        texts = {key: [classes[int(text)] for text in own] for key, own in texts.items()}
    return Listing(
        name=name,
        names=tuple(f"{key}[{number}]" for key in parts for number in range(len(pairs[key]))),
        labels=tuple(text for key in parts for text in texts[key]),
        given=tuple(split for key, (split, _) in parts.items() for _ in texts[key]),
        reader=Encoded(tuple(contents for own in pairs.values() for contents, _ in own)),
        classes=classes or found_classes,
        several=several,
        notes=notes,
    )


def _check_elements(parts: Mapping[str, Any]) -> None:
    for key, dataset in parts.items():
        if not isinstance(dataset, tf.data.Dataset):
            raise InputError(
                f"{key} must be a tf.data.Dataset like the other splits. Received: {type(dataset).__name__}"
            )
        spec = dataset.element_spec
        if not isinstance(spec, tuple) or len(spec) != 2:
            raise InputError(f"elements of {key} are no pairs. {_EXPECTED}. Received: element_spec={spec!r}")
        if spec[0].dtype != tf.string and spec[0].shape.rank not in (None, 3):
            raise InputError(
                f"pictures of {key} must be (height, width, channels) or encoded. {_EXPECTED}: call "
                f".unbatch() if "
                f"there are batches. Received: shape={spec[0].shape}"
            )
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise InputError(f"the data set of {key} is infinite: remove .repeat()")


class _Budget:
    """Counts the bytes of a copy and refuses those above a bound."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def take(self, count: int) -> None:
        self.used += count
        if self.used > self.limit:
            raise InputError(
                f"the stream does not fit the bound of {self.limit / 2**20:.0f} MiB for its copy in memory: "
                f"write it "
                "to files in class folders, take fewer examples, or raise `memory_budget`"
            )


def _pair(element: Any, budget: _Budget) -> tuple[bytes, np.ndarray]:
    picture, label = element
    contents = picture.numpy() if picture.dtype == tf.string else _as_png(picture)
    budget.take(len(contents))
    return contents, label.numpy()


def _as_png(picture: tf.Tensor) -> bytes:
    pixels = arrays.check_pictures(picture.numpy()[None], "pictures of the stream")[0]
    # Fast and larger: the copy lives for one run.
    return tf.image.encode_png(pixels, compression=1).numpy()
