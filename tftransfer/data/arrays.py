"""NumPy arrays as a source: pictures that are decoded already, with labels as numbers or names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tftransfer.data import splits
from tftransfer.data.listing import Arrays, Listing
from tftransfer.errors import InputError


def listed(parts: Mapping[str, Any]) -> Listing:
    """List `(pictures, labels)` per split.

    Args:
        parts: By split, `(pictures, labels)`: pictures `(n, height, width, 1 or 3)` or `(n, height, width)`,
        uint8 or
            float in [0, 255]; labels `(n,)` integers or names, `(n, classes)` zeros and ones, or numbers.

    Raises:
        InputError: If shapes, types or ranges are others.
    """
    names = split_names(parts)
    pairs = {name: _pair(parts[name], name) for name in names}
    pictures = {name: check_pictures(pair[0], f"pictures of {name}") for name, pair in pairs.items()}
    sizes = {part.shape[1:] for part in pictures.values()}
    if len(sizes) > 1:
        raise InputError(f"pictures of all splits must have one size. Received: {sorted(sizes)}")
    labels, classes, several = texts_of({name: _array(pair[1], f"labels of {name}") for name, pair in pairs.items()})
    for name in names:
        if len(pictures[name]) != len(labels[name]):
            raise InputError(
                f"{name} must have one label per picture. Received: {len(pictures[name])} pictures, "
                f"{len(labels[name])} labels"
            )
    return Listing(
        name="arrays",
        names=tuple(f"{name}[{number}]" for name in names for number in range(len(pictures[name]))),
        labels=tuple(text for name in names for text in labels[name]),
        given=tuple(names[name] for name in names for _ in labels[name]),
        reader=Arrays(np.concatenate(list(pictures.values()))),
        classes=classes,
        several=several,
    )


def split_names(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return, for each key of a dict of splits, the split that it names.

    Raises:
        InputError: If one is no split, or train is not among them.
    """
    names = {key: splits.canonical(str(key)) for key in parts}
    known = {key: name for key, name in names.items() if name}
    if len(known) < len(names) or "train" not in known.values():
        raise InputError(
            f"the keys of a dict of splits must be train and optionally validation and test. Received: {list(parts)!r}"
        )
    return known


def _array(values: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # NumPy's own words speak of inhomogeneous parts
        raise InputError(f"{what} must all have one shape") from None


def check_pictures(pictures: Any, what: str, whole: bool = True) -> np.ndarray:
    """Return pictures as uint8 `(n, height, width, 3)`; floats are rounded, gray is repeated.

    Args:
        pictures: `(n, height, width, 1 or 3)` or `(n, height, width)`, integers or floats in [0, 255].
        what: Their name in messages.
        whole: Whether these are all pictures of a split, so that `check_scale` can tell. Defaults to True.

    Raises:
        InputError: If the shape, type or range is another.
    """
    array = _array(pictures, what)
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        hint = " Composite the alpha channel on a background first." if array.shape[3:] == (4,) else ""
        raise InputError(
            f"{what} must be RGB or gray, (n, height, width, 3 or 1) or (n, height, width).{hint} "
            f"Received: shape={np.shape(pictures)}"
        )
    _check_values(array, what)
    if whole and array.dtype.kind == "f" and array.size:
        check_scale(float(array.max()), what)
    values = array if array.dtype == np.uint8 else np.round(array).astype(np.uint8)
    return np.repeat(values, 3, axis=3) if values.shape[3] == 1 else values


def _check_values(array: np.ndarray, what: str) -> None:
    if array.dtype == np.uint8 or not array.size:
        return
    if array.dtype.kind not in "iuf":
        raise InputError(f"{what} must be uint8 or float in [0, 255]. Received: dtype={array.dtype}")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{what} hold NaN or infinity. Expected numbers in [0, 255]")
    if low < 0 or high > 255:
        raise InputError(f"{what} must be in [0, 255]. Received: values from {low:g} to {high:g}")


def check_scale(high: float, what: str) -> None:
    """Refuse pictures in [0, 1] where [0, 255] is expected.

    Args:
        high: The largest value of all pictures of a split, as floats; one picture alone may be dark.
        what: Their name in messages.

    Raises:
        InputError: If it is above 0 and at most 1.
    """
    if 0 < high <= 1:
        raise InputError(
            f"{what} look like [0, 1], but [0, 255] is expected: multiply by 255. Received: largest value {high:g}"
        )


def texts_of(labels: Mapping[str, np.ndarray]) -> tuple[dict[str, list[str]], tuple[str, ...], bool]:
    """Turn arrays of labels into texts, as a table would hold them.

    Returns:
        The texts by split; the classes in the order of their numbers, or empty; whether a text names several
        classes.

    Raises:
        InputError: If the labels are neither `(n,)` nor `(n, k)`.
    """
    if any(array.ndim not in (1, 2) for array in labels.values()):
        shapes = [array.shape for array in labels.values()]
        raise InputError(f"labels must be (n,) or (n, classes). Received: shapes {shapes}")
    rows = {name: array.reshape(len(array), -1) for name, array in labels.items()}
    if len({part.shape[1] for part in rows.values()}) > 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in labels.items())
        raise InputError(f"labels of all splits must have the same number of columns. Received: shapes {found}")
    rows = _as_integers(rows)
    whole = np.concatenate(list(rows.values()))
    is_table = any(array.ndim == 2 and array.shape[1] > 1 for array in labels.values())
    if is_table and np.isin(whole, (0, 1)).all():
        classes = tuple(map(str, range(whole.shape[1])))
        texts = {n: ["|".join(map(str, np.flatnonzero(row))) for row in part] for n, part in rows.items()}
        return texts, classes, True
    texts = {name: ["|".join(map(_text, row)) for row in part] for name, part in rows.items()}
    is_number = whole.dtype.kind in "iuf" and not is_table
    return texts, tuple(map(_text, np.unique(whole))) if is_number else (), False


def _as_integers(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return floats as integers if all of them are whole, so that 1.0 is the class 1."""
    if any(part.dtype.kind != "f" or not _is_whole(part) for part in rows.values()):
        return rows
    return {name: part.astype(np.int64) for name, part in rows.items()}


def _is_whole(numbers: np.ndarray) -> bool:
    return bool((np.isfinite(numbers) & (np.abs(numbers) < 2**53) & (np.round(numbers) == numbers)).all())


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value).strip()


def _pair(part: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise InputError(f"{name} must be a pair (pictures, labels). Received: {type(part).__name__}")
    return part[0], part[1]
