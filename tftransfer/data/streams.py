"""Streams as a source: a `tf.data.Dataset` or TensorFlow Datasets, read once into a copy in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tftransfer.data import arrays, records, splits
from tftransfer.data.examples import Quarantined
from tftransfer.data.listing import Encoded, Listing
from tftransfer.errors import InputError

_EXPECTED = "Expected unbatched (picture, label) pairs"

_Row = tuple[int, bytes, np.ndarray]
"""An example's number in its split, its encoded picture and its label."""


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
    decoded as everywhere else; the names of the classes are its own. The examples are counted against its metadata:
    records that are damaged or missing are set aside by file and number, and what follows them is read.

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
        parts = {key: (split, _Prepared(builder, key, image, label, decoders)) for key, split in known.items() if split}
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
    listing = _copied(parts, name, memory_budget, tuple(getattr(feature, "names", None) or ()), tuple(left_out))
    read = [part for _, part in parts.values()]
    lost, notes = (tuple(item for part in read for item in getattr(part, own)) for own in ("lost", "notes"))
    unread = [f"{file} was not read: the metadata have no such file" for part in read for file in part.unread()]
    return replace(listing, lost=lost, notes=(*listing.notes, *notes, *unread))


@dataclass
class _Prepared:
    """A split that TensorFlow Datasets has prepared, as `(picture, label)` pairs.

    Its own reader, which counts them, is used as long as that finds what the metadata promise; else the files are read
    record by record, and what is damaged or missing is in `lost`.
    """

    builder: Any
    key: str
    image: str
    label: str
    decoders: Mapping[str, Any]
    lost: list[Quarantined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return map(self._pair, self.builder.as_dataset(split=self.key, decoders=self.decoders))

    def record_by_record(self) -> Iterator[tuple[Any, Any]]:
        """Give what can be read, and remember what cannot.

        Raises:
            InputError: If the files are no TFRecord files.
        """
        info = self.builder.info
        if info.file_format.value != "tfrecord":
            raise InputError(f"split {self.key!r} of {self.builder.name} is damaged, in {info.file_format.value} files")
        own = info.splits[self.key]
        for file, length in zip(own.filepaths, own.shard_lengths, strict=True):
            for record in self._records(Path(file), length):
                try:
                    if record.data is None:
                        self._lose(file, record, record.problem)
                    else:
                        yield self._pair(info.features.deserialize_example(record.data, decoders=self.decoders))
                except tf.errors.OpError as error:
                    self._lose(file, record, f"no example of this data set: {_line(error).partition(', value:')[0]}")
                if record.number == length:
                    self.notes.append(f"{file.name} holds more than the {length} records that its metadata say")

    def _lose(self, file: Path, record: records.Record, problem: str) -> None:
        self.lost.append(Quarantined(f"{file.name}, record {record.number}", problem))

    def unread(self) -> list[str]:
        """Return the names of files that look like this split's, and that the metadata do not have."""
        own = [Path(file) for file in self.builder.info.splits[self.key].filepaths]
        beside = own[0].parent.glob(f"*-{self.key}.*-of-*") if own else ()
        return sorted(file.name for file in beside if file not in own)

    def _records(self, path: Path, length: int) -> Iterator[records.Record]:
        try:
            yield from records.records(path, length)
        except OSError as error:
            yield from (records.Record(n, None, f"the file cannot be read: {error.strerror}") for n in range(length))

    def _pair(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        return row[self.image], row[self.label]


def _line(error: tf.errors.OpError) -> str:
    """Return the first line of what TensorFlow says, without the names of its operations."""
    words = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message).strip()
    return (words.splitlines() or [type(error).__name__])[0].strip()


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
    rows = {key: _rows(elements, key, budget) for key, (_, elements) in parts.items()}
    for key, own in rows.items():
        if not own:
            lost = getattr(parts[key][1], "lost", [])
            first = f": {lost[0].file}: {lost[0].reason}" if lost else ""
            raise InputError(f"split {key} of {name} is empty, or none of its records can be read{first}")
    if classes:
        rows, unlabelled = _with_label(rows, classes)
        notes = (*notes, *unlabelled)
    if not rows:
        raise InputError(f"no example of {name} has a label")
    labels = {key: _stacked([label for _, _, label in own], key) for key, own in rows.items()}
    texts, found_classes, several = arrays.texts_of(labels)
    if classes and not several:
        texts = {key: [classes[int(text)] for text in own] for key, own in texts.items()}
    return Listing(
        name=name,
        names=tuple(f"{key}[{number}]" for key, own in rows.items() for number, _, _ in own),
        labels=tuple(text for key in rows for text in texts[key]),
        given=tuple(parts[key][0] for key in rows for _ in texts[key]),
        reader=Encoded(tuple(contents for own in rows.values() for _, contents, _ in own)),
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
        if not isinstance(spec, tuple) or len(spec) != 2 or not all(isinstance(part, tf.TensorSpec) for part in spec):
            raise InputError(f"elements of {key} are no pairs of tensors. {_EXPECTED}. Received: element_spec={spec!r}")
        if spec[0].shape.rank not in (None, 0 if spec[0].dtype == tf.string else 3):
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


def _rows(elements: Iterable[Any], key: str, budget: _Budget) -> list[_Row]:
    """Read a split; what of TensorFlow Datasets is damaged is left out by record, of others its element is named."""
    rows: list[_Row] = []
    used = budget.used
    try:
        _read_into(rows, elements, key, budget)
    except tf.errors.OpError as error:
        if not isinstance(elements, _Prepared):
            raise InputError(
                f"element {len(rows)} of {key} (the first is 0) cannot be read: {_line(error)}. Mend it; "
                "ignore_errors() would drop what follows it in silence"
            ) from None
        rows.clear()
        budget.used = used
        _read_into(rows, elements.record_by_record(), key, budget)
    return rows


def _read_into(rows: list[_Row], elements: Iterable[Any], key: str, budget: _Budget) -> None:
    """Read a split; whether its floats are in [0, 255] only all of its pictures tell."""
    brightest = 0.0
    for number, (picture, label) in enumerate(elements):
        if picture.dtype.is_floating:
            brightest = max(brightest, float(tf.reduce_max(picture)))
        contents = picture.numpy() if picture.dtype == tf.string else _as_png(picture)
        budget.take(len(contents))
        rows.append((number, contents, label.numpy()))
    arrays.check_scale(brightest, f"pictures of {key}")


def _with_label(rows: dict[str, list[_Row]], classes: tuple[str, ...]) -> tuple[dict[str, list[_Row]], tuple[str, ...]]:
    """Leave out what has no label, which TensorFlow Datasets marks with -1, and count it in notes."""
    kept, notes = {}, []
    for key, own in rows.items():
        kept[key] = [row for row in own if np.min(row[2], initial=0) >= 0]
        if len(kept[key]) < len(own):
            notes.append(f"{len(own) - len(kept[key])} examples of split {key!r} have no label and were left out")
        above = [row for row in kept[key] if np.max(row[2], initial=0) >= len(classes)]
        if above:
            raise InputError(
                f"label {above[0][2]} of {key}[{above[0][0]}] is none of the {len(classes)} classes, 0 to "
                f"{len(classes) - 1}"
            )
    return {key: own for key, own in kept.items() if own}, tuple(notes)


def _stacked(labels: list[np.ndarray], key: str) -> np.ndarray:
    shapes = {np.shape(label) for label in labels}
    if len(shapes) > 1:
        raise InputError(f"labels of {key} must all have one shape. Received: shapes {sorted(shapes)}")
    return np.array(labels)


def _as_png(picture: tf.Tensor) -> bytes:
    pixels = arrays.check_pictures(picture.numpy()[None], "pictures of the stream", whole=False)[0]
    # Fast and larger: the copy lives for one run.
    return tf.image.encode_png(pixels, compression=1).numpy()
