"""Pictures that occur in two splits, also as a resized, re-encoded, cropped, mirrored or gray copy.

Such a picture is answered from memory, and what is measured with it is too good. Copies are compared as small gray
pictures without their coarse light and shade, by normalised correlation: first all pairs at a few crops, then the
likeliest at many. A copy must also stand out from the next likeliest pictures, because some data sets (spectrograms,
cells under a microscope) consist of pictures that are alike.

Source: Barz and Denzler 2020, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", arXiv:1902.00423 (why);
Lewis 1995, "Fast Normalized Cross-Correlation" (the measure); Lowe 2004, "Distinctive Image Features from
Scale-Invariant Keypoints" (a match must stand out from the next ones).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import tensorflow as tf
from scipy.ndimage import gaussian_filter1d

from tftransfer.checks.gallery import gallery
from tftransfer.data import Data, Examples, order
from tftransfer.data.examples import Quarantined
from tftransfer.errors import InputError
from tftransfer.report import DATA, Check, Findings, Table

_SIDE = 64  # pixels of a thumbnail
_COARSE = 32  # pixels at which all pairs are compared
_BLUR = 3.0  # pixels of 32 beyond which light and shade do not count
_CANDIDATES = 6  # per picture that are looked at closely
_ALIKE = 0.72  # correlation that makes a copy
SURE = 0.92
"""Correlation above which a copy is one beyond doubt, even among pictures that are much alike. Of photographs all
resized, re-encoded, mirrored and gray copies lie above it, of cropped ones a sixth."""

# How far, in Fisher's z, it must lie above what the picture, and above what 99 % of all pictures, have in common with
# others: the correlation with the one that so many, or this share of all, are more like.
_STANDS_OUT, _ABOVE_ALL = 0.35, 0.1
_COPIES, _SHARE_OF_COPIES = 3, 0.01
_CHUNK = 512
_LISTED, _DRAWN = 50, 6

Crop = tuple[float, float, float]
"""Share of each side that is seen, and where, as shares of what is left: down and across."""


def _crops(scales: dict[float, int]) -> tuple[Crop, ...]:
    """Return crops of some scales, each at so many places along either side."""
    return tuple(
        (scale, float(down), float(across))
        for scale, places in scales.items()
        for down in np.linspace(0, 1, places)
        for across in np.linspace(0, 1, places)
    )


_WHOLE: Crop = (1.0, 0.0, 0.0)
_FEW = _crops({1.0: 1, 0.95: 2, 0.9: 3})
_MANY = _crops({1.0: 1, 0.975: 3, 0.95: 4, 0.925: 5, 0.9: 6, 0.875: 7})


@dataclass(frozen=True)
class Copy:
    """A picture of one split that lies in another one too.

    Args:
        split, index: The picture.
        other, other_index: What it is a copy of.
        likeness: Correlation after they were laid upon each other, at most 1.
        exact: Whether the files are the same, byte for byte.
        mirrored: Whether one is the other's mirror image.
    """

    split: str
    index: int
    other: str
    other_index: int
    likeness: float
    exact: bool = False
    mirrored: bool = False


@dataclass(frozen=True)
class _Match:
    index: int
    other_index: int
    likeness: float
    mirrored: bool = False


def copies(data: Data) -> tuple[Copy, ...]:
    """Find pictures of test and validation in training, and of test in validation.

    The work grows with the product of the splits' sizes: a second for hundreds of pictures, minutes for 20,000
    against 5,000.

    Args:
        data: The splits.

    Returns:
        The exact copies first, then the most alike.

    Example:
        >>> from tftransfer.data import load
        >>> pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
        >>> labels = list("abababab")
        >>> splits = {"train": (pictures, labels), "test": (pictures[:2], labels[:2])}
        >>> [(copy.split, copy.index, copy.other) for copy in copies(load(splits, image_size=(16, 16))[0])][0]
        ('test', 0, 'train')
    """
    splits = {name: getattr(data, name) for name in ("test", "validation", "train")}
    thumbnails = {name: _thumbnails(examples) for name, examples in splits.items()}
    found = []
    for split, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        same = set(_same_files(splits[split], splits[other]))
        found += [Copy(split, index, other, other_index, 1.0, exact=True) for index, other_index in sorted(same)]
        found += [
            Copy(split, match.index, other, match.other_index, match.likeness, mirrored=match.mirrored)
            for match in _alike(thumbnails[split], thumbnails[other])
            if (match.index, match.other_index) not in same
        ]
    return tuple(sorted(found, key=lambda copy: (not copy.exact, -copy.likeness)))


def copies_within(examples: Examples) -> tuple[Copy, ...]:
    """Find pictures that are copies of others of the same split.

    Args:
        examples: Pictures, with labels or without.

    Returns:
        Each pair once, with empty names of splits: the exact copies first, then the most alike.
    """
    digests, thumbnails = examples.pictures.digests, _thumbnails(examples)
    pairs: dict[tuple[int, int], _Match] = {}
    for match in _alike(thumbnails, thumbnails, apart=True):
        pair = min(match.index, match.other_index), max(match.index, match.other_index)
        if pair not in pairs or pairs[pair].likeness < match.likeness:
            pairs[pair] = match
    found = [
        Copy("", one, "", other, match.likeness, bool(digests) and digests[one] == digests[other], match.mirrored)
        for (one, other), match in pairs.items()
    ]
    return tuple(sorted(found, key=lambda copy: (not copy.exact, -copy.likeness)))


def without_copies(data: Data, found: tuple[Copy, ...]) -> Data:
    """Remove copies, so that test stays whole: from training, and from validation what is in test.

    Args:
        data: As for `copies`.
        found: From `copies`.

    Raises:
        InputError: If training or validation would lose a class, or all examples.
    """
    parts, gone = {}, []
    for name in ("train", "validation"):
        examples = getattr(data, name)
        drop = {copy.other_index: copy for copy in found if copy.other == name}
        left = examples.subset(np.array([number for number in range(len(examples)) if number not in drop], int))
        lost = examples.targets.ndim == 1 and len(np.unique(left.targets)) < len(np.unique(examples.targets))
        if lost or not len(left):
            raise InputError(
                f"`remove_duplicates`: {name} would lose {'a class' if len(left) else 'every picture'}, so many of its "
                "pictures are in other splits too: divide the data anew"
            )
        parts[name] = left
        for number, copy in drop.items():
            original = getattr(data, copy.split).names[copy.index]
            gone.append(Quarantined(examples.names[number], f"a copy of {original} of the {copy.split} split"))
    removed = {(copy.other, getattr(data, copy.other).names[copy.other_index]) for copy in found}
    said = [*data.splits.get("notes", []), f"{len(gone)} copies of pictures of other splits were removed"]
    fingerprint = hashlib.sha256(f"{data.fingerprint} without {sorted(one.file for one in gone)}".encode()).hexdigest()
    return replace(
        data,
        **parts,
        quarantined=(*data.quarantined, *gone),
        splits={**data.splits, "notes": said},
        fingerprint=fingerprint,
        seen=tuple(one for one in data.seen if (one.split, one.name) not in removed),
    )


def duplicates(data: Data, found: tuple[Copy, ...], *, removed: bool = False) -> Findings:
    """Report copies, with their pictures.

    Args:
        data: As for `copies`.
        found: From `copies`.
        removed: Whether training goes on without them. Defaults to False.

    Returns:
        A check, passed if there are none or they were removed; a table and a picture of the first.
    """
    counts = {
        "exact": sum(copy.exact for copy in found),
        "alike": sum(not copy.exact for copy in found),
        "of_test_in_training": len({copy.index for copy in found if (copy.split, copy.other) == ("test", "train")}),
        "removed": removed,
    }
    checks = (Check("duplicates", removed or not found, counts),)
    if not found:
        return Findings(checks=checks)
    names = {split: getattr(data, split).names for split in ("train", "validation", "test")}
    rows = tuple(
        (names[copy.split][copy.index], copy.split, names[copy.other][copy.other_index], copy.other, _kind(copy))
        for copy in found[:_LISTED]
    )
    done = "Training went on without them" if removed else "--remove-duplicates trains without them"
    note = f"{len(found)} pairs of pictures lie in two splits, so that what is measured is too good. {done}."
    table = Table(
        "Pictures in two splits", ("picture", "split", "is a copy of", "of split", "likeness"), rows, note, DATA
    )
    drawn = found[:_DRAWN]
    starts = {"test": 0, "validation": len(data.test), "train": len(data.test) + len(data.validation)}
    everything = data.test.joined(data.validation).joined(data.train)
    entries = []
    for copy in drawn:
        entries.append((starts[copy.split] + copy.index, (copy.split, _kind(copy))))
        entries.append((starts[copy.other] + copy.other_index, (copy.other, "")))
    told = "; ".join(f"{row[0]} and {row[2]}" for row in rows[:_DRAWN])
    caption = "Pictures in two splits, side by side."
    picture = gallery(everything, entries, "Pictures in two splits", caption, DATA, told, columns=4)
    return Findings(tables=(table,), pictures=(picture,), checks=checks)


def _kind(copy: Copy) -> str:
    if copy.exact:
        return "the same file"
    return f"{copy.likeness:.2f}{', mirrored' if copy.mirrored else ''}"


def _same_files(some: Examples, others: Examples) -> Iterator[tuple[int, int]]:
    places: dict[str, list[int]] = {}
    for place, digest in enumerate(others.pictures.digests):
        places.setdefault(digest, []).append(place)
    for index, digest in enumerate(some.pictures.digests):
        yield from ((index, place) for place in places.get(digest, ()))


# --- likeness -----------------------------------------------------------------------------------------------


def _thumbnails(examples: Examples) -> np.ndarray:
    """Return gray pictures `(n, 64, 64)` uint8: 4 KB for each."""
    return np.concatenate([_small(batch[0]).numpy() for batch in order.in_order(examples, 64)])


@tf.function(autograph=False, input_signature=[tf.TensorSpec((None, None, None, 3))])
def _small(pictures: tf.Tensor) -> tf.Tensor:
    gray = tf.image.rgb_to_grayscale(pictures)
    return tf.cast(tf.round(tf.image.resize(gray, (_SIDE, _SIDE), method="area")[..., 0]), tf.uint8)


def _alike(some: np.ndarray, others: np.ndarray, apart: bool = False) -> Iterator[_Match]:
    """Find copies of some thumbnails among others; `apart` if they are the same, and none is a copy of itself."""
    parts = []
    for start in range(0, len(some), _CHUNK):
        own = some[start : start + _CHUNK].astype(np.float32)
        columns, ways = _candidates(own, others, start if apart else None)
        parts.append((columns, ways, _closely(own, others, columns, ways)))
    columns, ways, likeness = map(np.concatenate, zip(*parts, strict=True))
    common = np.zeros(len(some)) if likeness.shape[1] <= _CANDIDATES else _fisher(likeness[:, -1])
    least = np.maximum(common + _STANDS_OUT, np.quantile(common, 0.99) + _ABOVE_ALL)[:, None]
    candidates = likeness[:, :_CANDIDATES]
    for row, place in zip(*np.nonzero((candidates > _ALIKE) & (_fisher(candidates) > least)), strict=True):
        score = min(float(candidates[row, place]), 1.0)
        yield _Match(int(row), int(columns[row, place]), score, bool(ways[row, place] % 2))


def _candidates(own: np.ndarray, others: np.ndarray, start: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the others may be copies of each picture, and how they may lie upon each other.

    Args:
        own, others: Thumbnails.
        start: Where they begin among the others, if they are some of these.

    Returns:
        The numbers of the likeliest, and last, if there are so many, of one that is too far down to be a copy: how much
        it is alike is what the picture has in common with the others. And per pair 0 or 1 if the picture lies in a
        whole other one, 2 or 3 if that lies in it; odd if mirrored.
    """
    best = np.full((len(own), len(others)), -1.0, np.float32)
    way = np.zeros(best.shape, np.int8)
    whole_own = _description(own, _WHOLE, _COARSE)
    cropped_own = [_description(own, crop, _COARSE) for crop in _FEW]
    for begin in range(0, len(others), 4 * _CHUNK):
        upright = others[begin : begin + 4 * _CHUNK].astype(np.float32)
        here = slice(begin, begin + len(upright))
        for mirrored, other in enumerate((upright, upright[:, :, ::-1])):
            whole_other = _description(other, _WHOLE, _COARSE)
            pairs = [(mirrored, whole_own, _description(other, crop, _COARSE)) for crop in _FEW]
            pairs += [(2 + mirrored, cropped, whole_other) for cropped in cropped_own[1:]]
            for kind, mine, theirs in pairs:
                found = mine @ theirs.T
                better = found > best[:, here]
                best[:, here][better] = found[better]
                way[:, here][better] = kind
    if start is not None:
        best[np.arange(len(own)), start + np.arange(len(own))] = -2  # below all others
    order_of_likeness = np.argsort(-best, axis=1, kind="stable")
    columns = order_of_likeness[:, :_CANDIDATES]
    if len(others) > _CANDIDATES:
        beyond = max(_COPIES, round(_SHARE_OF_COPIES * len(others)))
        columns = np.concatenate([columns, order_of_likeness[:, [min(beyond, len(others) - 1)]]], axis=1)
    return columns, np.take_along_axis(way, columns, axis=1)


def _closely(own: np.ndarray, others: np.ndarray, columns: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """Return the best correlation of each pair over many crops of the one that shows more."""
    rows = np.repeat(np.arange(len(own)), columns.shape[1])
    flat, way = columns.ravel(), ways.ravel()
    found = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        here = slice(start, start + _CHUNK)
        mine, theirs = own[rows[here]], others[flat[here]].astype(np.float32)
        mirrored, inside = (way[here] % 2 == 1)[:, None, None], (way[here] < 2)[:, None, None]
        theirs = np.where(mirrored, theirs[:, :, ::-1], theirs)
        whole = _description(np.where(inside, mine, theirs), _WHOLE, _SIDE)
        wider = np.where(inside, theirs, mine)
        scores = [np.sum(whole * _description(wider, crop, _SIDE), axis=1) for crop in _MANY]
        found[here] = np.max(scores, axis=0)
    return found.reshape(columns.shape)


def _description(pictures: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    """Return one vector of length 1 per picture: a crop at `side` pixels, without what is coarser than the blur."""
    scale, down, across = crop
    seen = _averaging(side, scale, down) @ pictures @ _averaging(side, scale, across).T
    blur = _blurring(side)
    detail = (seen - blur @ seen @ blur.T).reshape(len(seen), -1)
    detail -= detail.mean(axis=1, keepdims=True)
    return detail / (np.linalg.norm(detail, axis=1, keepdims=True) + 1e-3)


@cache
def _averaging(side: int, scale: float, place: float) -> np.ndarray:
    """Return the `(side, 64)` matrix that takes means over equal parts of a share of 64 pixels."""
    begin = place * (1 - scale) * _SIDE
    edges = begin + np.arange(side + 1) * scale * _SIDE / side
    pixels = np.arange(_SIDE)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(overlap, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@cache
def _blurring(side: int) -> np.ndarray:
    # At 64 pixels a blur of 4 instead of 6: fine detail tells pictures apart, coarse detail finds them.
    width = _BLUR if side == _COARSE else _BLUR * side / _COARSE / 1.5
    return gaussian_filter1d(np.eye(side), width, axis=0, mode="nearest").astype(np.float32)


def _fisher(correlation: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(correlation, -0.99, 0.995))
