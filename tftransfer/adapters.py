"""LoRA: train a low-rank change of some kernels, and keep it in a small file of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tftransfer.errors import InputError, check, nearest
from tftransfer.optimizers import Moment
from tftransfer.trainable import all_groups, weight_layers

KINDS = {
    "dense": (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding),
    "conv": (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
}
FORMAT = "tftransfer adapter 1"


@dataclass(frozen=True)
class Lora:
    """Train `kernel + alpha / rank * A @ B` with small A and B instead of the kernel.

    Use it for large networks, or where many tasks share one backbone: each keeps only its own small file. A
    kernel of more than two dimensions counts as a matrix with its last dimension as columns.

    Args:
        rank: Columns of A and rows of B, from 1. Defaults to 4.
        where: Which layers below the head: `"dense"` (Dense, EinsumDense, Embedding), `"conv"`, `"all"`, or
            `"re:PATTERN"` on the paths of kernels. Defaults to `"all"`.
        alpha: Scale of the change, above 0. Defaults to None: the rank.

    Example:
        >>> Lora(rank=8).scale
        1.0

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    rank: int = 4
    where: str = "all"
    alpha: float | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.rank, int) and self.rank >= 1, "rank", "a whole number from 1", self.rank)
        known = self.where in (*KINDS, "all") or self.where.startswith("re:")
        check(known, "where", f"one of {', '.join(KINDS)}, all, re:PATTERN", self.where)
        scales = self.alpha is None or (math.isfinite(self.alpha) and self.alpha > 0)
        check(scales, "alpha", "a number above 0", self.alpha)

    @property
    def scale(self) -> float:
        """The factor on `A @ B`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def prepare(self, model: keras.Model, seed: int) -> Attached:
        """Make the factors for a model: A random, B zero, so that nothing changes at first.

        Raises:
            InputError: If no layer matches.
        """
        kernels = self._kernels(model)
        return Attached(self, tuple(kernels), tuple(self._factors(kernel, seed, n) for n, kernel in enumerate(kernels)))

    def _kernels(self, model: keras.Model) -> list[keras.Variable]:
        head = set(all_groups(model)[-1].layers)
        inside = {id(leaf) for name in head for leaf in model.get_layer(name)._flatten_layers()}
        layers = [layer for layer in weight_layers(model) if id(layer) not in inside]
        found = [kernel for layer in layers for kernel in _kernels_of(layer, self.where)]
        if not found:
            names = [layer.name for layer in layers]
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            groups = ", ".join(group.name for group in all_groups(model))
            raise InputError(
                f"`where` of LoRA matches no kernel below the head of this network, whose layers are {kinds}."
                f"{nearest(self.where.removeprefix('re:'), names)} Groups: {groups}. Received: where={self.where!r}"
            )
        return found

    def _factors(self, kernel: keras.Variable, seed: int, number: int) -> tuple[keras.Variable, keras.Variable]:
        rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        bound = math.sqrt(6 / rows)  # He's, as Keras and the paper's code have it
        start = np.random.default_rng([seed, number]).uniform(-bound, bound, (rows, self.rank)).astype(np.float32)
        name = kernel.path.replace("/", ".")
        return (
            keras.Variable(start, name=f"{name}.lora_a", dtype="float32"),
            keras.Variable(np.zeros((self.rank, columns), np.float32), name=f"{name}.lora_b", dtype="float32"),
        )


@dataclass(frozen=True)
class Attached:
    """Factors beside a model: its own variables stay as they are until `merge`.

    Args:
        row: The phase's adapter.
        kernels: The kernels that are changed.
        factors: A and B of each.
    """

    row: Lora
    kernels: tuple[keras.Variable, ...]
    factors: tuple[tuple[keras.Variable, keras.Variable], ...]

    @property
    def variables(self) -> list[keras.Variable]:
        """Every A and B."""
        return [factor for pair in self.factors for factor in pair]

    def sizes(self) -> dict[str, int]:
        """Return how many numbers train beside each kernel, by its path."""
        return {name: a.size + b.size for name, (a, b) in self.arrays().items()}

    def multipliers(self, of_kernels: Mapping[str, float]) -> dict[str, float]:
        """Give each factor its kernel's multiplier on the learning rate."""
        pairs = zip(self.kernels, self.factors, strict=True)
        return {factor.path: of_kernels.get(kernel.path, 1.0) for kernel, pair in pairs for factor in pair}

    def effective(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        """Return each kernel with its changed value."""
        return [
            (kernel, tf.convert_to_tensor(kernel) + self.row.scale * tf.reshape(tf.matmul(a, b), kernel.shape))
            for kernel, (a, b) in zip(self.kernels, self.factors, strict=True)
        ]

    def call(self, network: Callable[[], Any], kept_up: Sequence[keras.Variable]) -> Any:
        """Run a network as if its kernels were changed.

        Args:
            network: Runs it.
            kept_up: Variables that it may assign to, such as states of random generators.
        """
        with keras.StatelessScope(self.effective()) as scope:
            outputs = network()
        for variable in kept_up:
            value = scope.get_current_value(variable)
            if value is not None:
                variable.assign(value)
        return outputs

    def merge(self) -> None:
        """Write the changed values into the kernels."""
        for kernel, value in self.effective():
            kernel.assign(value)

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return A and B of each kernel, by its path."""
        return {kernel.path: (a.numpy(), b.numpy()) for kernel, (a, b) in zip(self.kernels, self.factors, strict=True)}

    def set(self, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Go on from factors that were kept."""
        for kernel, pair in zip(self.kernels, self.factors, strict=True):
            for factor, value in zip(pair, arrays[kernel.path], strict=True):
                factor.assign(value)


@dataclass(frozen=True)
class Adapter:
    """What training with LoRA leaves behind: a small change of a base, to be kept in a file of its own.

    Args:
        row: Rank, scale and place.
        factors: From a kernel's path to A `(rows, rank)` and B `(rank, columns)`.
        head: The head's variables by path.
        labels: What the outputs mean, in order.
        base: Digest of the base, see `base_digest`.
        moments: What the optimizer remembered, to train on from here.
    """

    row: Lora
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    head: Mapping[str, np.ndarray] = field(repr=False)
    labels: tuple[str, ...]
    base: str
    moments: Mapping[str, Moment] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(a.size + b.size for a, b in self.factors.values())

    def attach(self, model: keras.Model) -> Attached:
        """Set the head and make the factors ready for training on from here; the base stays as it is.

        Raises:
            InputError: If the model is not the base that the adapter was trained on, or has another head.
        """
        found = base_digest(model)
        if found != self.base:
            raise InputError(
                f"the adapter belongs to another base: trained on {self.base[:16]}, this network is {found[:16]} "
                "(digests of all weights below the head); load the weights that training began with"
            )
        attached = self.row.prepare(model, seed=0)
        _set_head(model, self.head)
        attached.set(self.factors)
        return attached

    def merge_into(self, model: keras.Model) -> None:
        """Turn the base into the tuned network, a plain model that can be saved and exported.

        Raises:
            InputError: As for `attach`.
        """
        self.attach(model).merge()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter to a safetensors file, in one step.

        Example:
            `Adapter.load(path).merge_into(base)` gives the tuned network again.
        """
        target = Path(path)
        staged = target.with_name(f".{target.name}.staged")
        described = {
            "format": FORMAT,
            "rank": self.row.rank,
            "where": self.row.where,
            "alpha": self.row.alpha,
            "labels": self.labels,
            "base": self.base,
            "ages": {name: moment.age for name, moment in self.moments.items()},
        }
        save_file(dict(self._tensors()), staged, {"tftransfer": json.dumps(described)})
        os.replace(staged, target)

    def _tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, (a, b) in self.factors.items():
            yield f"a:{name}", np.ascontiguousarray(a)
            yield f"b:{name}", np.ascontiguousarray(b)
        for name, value in self.head.items():
            yield f"head:{name}", np.ascontiguousarray(value)
        for name, moment in self.moments.items():
            for number, slot in enumerate(moment.slots):
                yield f"moment{number}:{name}", np.ascontiguousarray(slot)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read an adapter's file.

        Raises:
            InputError: If there is none, or it is no adapter.
        """
        try:
            with safe_open(path, "np") as file:
                described = json.loads((file.metadata() or {}).get("tftransfer", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except FileNotFoundError:
            raise InputError(f"there is no adapter file {path}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as an adapter: {error}") from None
        if described.get("format") != FORMAT:
            raise InputError(f"{path} is no adapter of this toolkit: expected {FORMAT!r} in its metadata")
        kinds: dict[str, dict[str, np.ndarray]] = {}
        for name, value in tensors.items():
            kind, _, of = name.partition(":")
            kinds.setdefault(kind, {})[of] = value
        slots = [kinds[f"moment{number}"] for number in range(8) if f"moment{number}" in kinds]
        moments = {
            name: Moment(tuple(slot[name] for slot in slots if name in slot), age)
            for name, age in described["ages"].items()
        }
        factors = {name: (a, kinds["b"][name]) for name, a in kinds["a"].items()}
        row = Lora(described["rank"], described["where"], described["alpha"])
        return cls(row, factors, kinds["head"], tuple(described["labels"]), described["base"], moments)


def adapter_of(
    model: keras.Model,
    attached: Attached,
    labels: Sequence[str],
    base: str,
    moments: Mapping[str, Moment] | None = None,
) -> Adapter:
    """Collect what `Adapter` holds from a model with factors beside it."""
    return Adapter(attached.row, attached.arrays(), _head(model), tuple(labels), base, dict(moments or {}))


def base_digest(model: keras.Model) -> str:
    """Return the SHA-256 over paths and values of all variables below the head."""
    digest = hashlib.sha256()
    head = set(_head(model))
    for variable in sorted(model.variables, key=lambda variable: variable.path):
        if variable.path not in head and "seed_generator" not in variable.path:
            digest.update(variable.path.encode())
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def _head(model: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: variable.numpy() for variable in _head_variables(model)}


def _head_variables(model: keras.Model) -> list[keras.Variable]:
    return [
        variable
        for name in all_groups(model)[-1].layers
        for variable in model.get_layer(name).weights
        if "seed_generator" not in variable.path
    ]


def _set_head(model: keras.Model, values: Mapping[str, np.ndarray]) -> None:
    variables = _head_variables(model)
    differing = [v.path for v in variables if v.path not in values or values[v.path].shape != tuple(v.shape)]
    if differing or len(variables) != len(values):
        raise InputError(
            f"the adapter's head holds {', '.join(values)}, this network's {', '.join(v.path for v in variables)}: "
            "build it with as many classes and the same hidden layers"
        )
    for variable in variables:
        variable.assign(values[variable.path])


def _kernels_of(layer: keras.Layer, where: str) -> list[keras.Variable]:
    """Return the kernels of a layer that LoRA can change; those of depthwise convolutions are small already."""
    own = [variable for variable in layer._trainable_variables if variable.name in ("kernel", "embeddings")]
    if where.startswith("re:"):
        try:
            return [variable for variable in own if re.search(where[len("re:") :], variable.path)]
        except re.error as error:
            raise InputError(f"`where` holds no valid regular expression: {error}. Received: {where!r}") from None
    types = tuple(kind for name, some in KINDS.items() if where in (name, "all") for kind in some)
    return own if isinstance(layer, types) else []
