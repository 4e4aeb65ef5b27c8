"""Read a file of weights into a backbone: every tensor, or an error that says which do not fit."""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import keras

from tftransfer.errors import InputError
from tftransfer.weights import rows_of_size, verify

SHOWN = 3  # differences that a message spells out


@dataclass(frozen=True)
class _Stored:
    """One layer's tensors in a file: the layer's name as saved, its place in the file, the tensors."""

    name: str
    place: str
    tensors: tuple[h5py.Dataset, ...]


def load_weights(model: keras.Model, path: str | os.PathLike[str], name: str) -> None:
    """Load a file into a backbone: every tensor of the backbone, or an error that says which do not fit.

    Tensors are assigned here and not by `model.load_weights`, which wants the top to be there as in the
    file, leaves out without a word what a Keras 3 file has besides, and says little of what differs. Of a
    `.keras` file only the weights are read, so no code in it can run.

    Args:
        model: A backbone, without a head.
        path: A file in the layout of Keras 1 and 2 (`.h5`), of Keras 3 (`.weights.h5`) or a `.keras`
            archive, of the same network with or without its top.
        name: Name of the row, for messages.

    Raises:
        InputError: If the file is damaged, is none of these, or is of another network.
    """
    path = Path(path)
    verify(path)
    try:
        with h5py.File(_hdf5(path), "r") as file:
            _assign(model, _pairs(model, file, path, name))
    except (OSError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"`weights` holds no weights that can be read: {path.name} is damaged, cut short or of another "
            f"kind ({' '.join(str(error).split())})"
        ) from error


def _hdf5(path: Path) -> Path | io.BytesIO:
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read("model.weights.h5"))


_Pair = tuple[keras.Layer, str, list[keras.Variable], _Stored]


def _pairs(model: keras.Model, file: h5py.File, path: Path, name: str) -> list[_Pair]:
    """Match the model's layers with the file's; raise if one is missing, left over or of another shape."""
    group = file.get("model_weights", file)
    if "layer_names" in group.attrs:
        stored, wanted = list(_legacy_layers(group)), _by_position(model)
        wanted, stored = _align(wanted, stored)
    elif "layers" in group:
        stored, wanted = list(_keras3_layers(group)), list(_by_class(model.layers, "layers"))
    else:
        raise InputError(f"`weights` is an HDF5 file but not one that Keras wrote: {path.name}")
    by_place = {layer.place: layer for layer in stored}
    differences = list(_differences(wanted, by_place))
    places = {place for _, place, _ in wanted}
    left_over = [layer for layer in stored if layer.place not in places]
    differences += [f"{layer.name}: not in {name}" for layer in left_over if not _is_top(layer)]
    if differences:
        raise InputError(_misfit(path, name, differences, stored))
    return [(layer, place, variables, by_place[place]) for layer, place, variables in wanted]


_Wanted = tuple[keras.Layer, str, list[keras.Variable]]


def _by_position(model: keras.Model) -> list[_Wanted]:
    layers = [layer for layer in model.layers if layer.weights]
    # The old layout has a layer's trainable weights first; they are all trainable here, as built.
    return [
        (layer, str(position), layer.trainable_weights + layer.non_trainable_weights)
        for position, layer in enumerate(layers)
    ]


def _align(wanted: list[_Wanted], stored: list[_Stored]) -> tuple[list[_Wanted], list[_Stored]]:
    """Match by names where they agree, else by order, as Keras does: it numbers `conv2d_17` by session."""
    position_of = {layer.name: layer.place for layer in stored}
    if all(layer.name in position_of for layer, _, _ in wanted):
        return [(layer, position_of[layer.name], variables) for layer, _, variables in wanted], stored
    return wanted, stored


def _by_class(layers: Iterable[keras.Layer], prefix: str) -> Iterator[_Wanted]:
    """Yield each innermost layer and its place in a Keras 3 file: its class's name, numbered in order."""
    used: dict[str, int] = {}
    for layer in layers:
        kind = _snake_case(type(layer).__name__)
        number = used[kind] = used.get(kind, -1) + 1
        place = f"{prefix}/{kind}_{number}" if number else f"{prefix}/{kind}"
        if isinstance(layer, keras.Model):
            yield from _by_class(layer.layers, f"{place}/layers")
        elif layer.weights:
            yield layer, place, layer.trainable_weights + layer.non_trainable_weights


def _snake_case(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _legacy_layers(group: h5py.Group) -> Iterator[_Stored]:
    """Yield the layers with weights of a file of Keras 1 or 2, in its order."""
    position = 0
    for name in _texts(group, "layer_names"):
        tensors = tuple(group[name][tensor] for tensor in _texts(group[name], "weight_names"))
        if tensors:
            yield _Stored(name, str(position), tensors)
            position += 1


def _texts(group: h5py.Group, attribute: str) -> list[str]:
    """Read a list of names; a long one is kept in several attributes, `layer_names0`, `layer_names1`."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    texts = [text for part in parts for text in group.attrs[part]]
    return [text.decode() if isinstance(text, bytes) else text for text in texts]


def _keras3_layers(group: h5py.Group) -> Iterator[_Stored]:
    """Yield the layers with weights of a Keras 3 file, in the order of their names."""
    places: list[str] = []
    group["layers"].visit(lambda place: places.append(f"layers/{place}") if place.endswith("vars") else None)
    for place in sorted(places, key=_natural_order):
        variables, owner = group[place], place.removesuffix("/vars")
        tensors = tuple(variables[key] for key in sorted(variables, key=int))
        if tensors and "seed_generator" not in owner:
            yield _Stored(variables.attrs.get("name", owner), owner, tensors)


def _natural_order(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _differences(wanted: list[_Wanted], stored: dict[str, _Stored]) -> Iterator[str]:
    for layer, place, variables in wanted:
        found = stored[place].tensors if place in stored else ()
        if len(found) != len(variables):
            yield f"{layer.name}: {len(variables)} tensors expected, {len(found)} found"
            continue
        for variable, tensor in zip(variables, found, strict=True):
            if tuple(variable.shape) != tensor.shape:
                shapes = f"shape {tuple(variable.shape)} expected, {tensor.shape} found"
                yield f"{layer.name}/{variable.name}: {shapes}"


def _is_top(layer: _Stored) -> bool:
    """Tell whether a layer can be a classifier's: a matrix, or a 1x1 convolution, with its bias."""
    kernel = layer.tensors[0].shape
    dense = len(kernel) == 2 or (len(kernel) == 4 and kernel[:2] == (1, 1) and len(layer.tensors) == 2)
    return dense or layer.name.endswith("_head_layernorm")


def _misfit(path: Path, name: str, differences: list[str], stored: list[_Stored]) -> str:
    shown = "; ".join(differences[:SHOWN])
    rows = [row for row in _likely_rows(stored) if row != name]
    guess = f" The file has the size of {' or '.join(rows)}." if rows else ""
    more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    count = f"{len(differences)} places" if len(differences) > 1 else "one place"
    return f"`weights` does not fit {name}: {path.name} differs in {count}: {shown}{more}.{guess}"


def _likely_rows(stored: list[_Stored]) -> list[str]:
    """Name the rows that have as many parameters as the file, less none or some of its last layers."""
    sizes = [sum(math.prod(tensor.shape) for tensor in layer.tensors) for layer in stored]
    tops = [size for size, layer in zip(sizes, stored, strict=True) if _is_top(layer)]
    totals = {sum(sizes) - sum(tops[len(tops) - count :]) for count in range(min(len(tops), 4) + 1)}
    return rows_of_size(totals)


def _assign(model: keras.Model, pairs: list[_Pair]) -> None:
    values = [(variables, [tensor[()] for tensor in found.tensors]) for _, _, variables, found in pairs]
    for variables, arrays in values:  # all are read before the first is assigned
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization keeps what it computes from its variables
