"""LoRA: train a low-rank change of some kernels, and keep it in a small file of its own."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import scanning, tensor_files
from tftransfer.errors import InputError, check, is_number, nearest
from tftransfer.optimizers import Moment
from tftransfer.trainable import all_groups, is_generator, own_name, weight_layers

KINDS = {
    "dense": (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding),
    "conv": (
        keras.layers.Conv1D,
        keras.layers.Conv2D,
        keras.layers.Conv3D,
        keras.layers.SeparableConv1D,
        keras.layers.SeparableConv2D,
    ),
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
        known = self.where in (*KINDS, "all") or str(self.where).startswith("re:")
        check(known, "where", f"one of {', '.join(KINDS)}, all, re:PATTERN", self.where)
        scales = self.alpha is None or (is_number(self.alpha) and self.alpha > 0)
        check(scales, "alpha", "a number above 0", self.alpha)

    @property
    def scale(self) -> float:
        """The factor on `A @ B`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def prepare(self, model: keras.Model, seed: int) -> Attached:
        """Make the factors for a model: A random, B zero, so that nothing changes at first.

        Raises:
            InputError: If no layer matches, or the rank is larger than that of every kernel.
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
        largest = max(min(math.prod(kernel.shape[:-1]), kernel.shape[-1]) for kernel in found)
        check(self.rank <= largest, "rank", f"at most {largest} here, the rank of the largest kernel", self.rank)
        return found

    def _factors(self, kernel: keras.Variable, seed: int, number: int) -> tuple[keras.Variable, keras.Variable]:
        rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        bound = math.sqrt(6 / rows)  # He's, as Keras' own LoRA has it
        start = np.random.default_rng([seed, number]).uniform(-bound, bound, (rows, self.rank)).astype(np.float32)
        return (
            keras.Variable(start, name=f"lora_a_{number}", dtype="float32"),
            keras.Variable(np.zeros((self.rank, columns), np.float32), name=f"lora_b_{number}", dtype="float32"),
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
        pairs = zip(self.kernels, self.factors, strict=True)
        return {kernel.path: math.prod(a.shape) + math.prod(b.shape) for kernel, (a, b) in pairs}

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

    def arrays(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return A and B of each kernel, in order."""
        return tuple((a.numpy(), b.numpy()) for a, b in self.factors)

    def set(self, arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Go on from factors that were kept.

        Raises:
            InputError: If they are of other kernels.
        """
        given, here = ([(a.shape, b.shape) for a, b in pairs] for pairs in (arrays, self.arrays()))
        if given != here:
            raise InputError(f"the adapter's factors have the shapes {given}, those of this network {here}")
        for pair, values in zip(self.factors, arrays, strict=True):
            for factor, value in zip(pair, values, strict=True):
                factor.assign(value)


@dataclass(frozen=True)
class Reached:
    """How far training with an adapter came, so that more of it goes on.

    As if it had not stopped where the rate is constant and weights are not averaged; a schedule and an average (`lora`
    has both) begin again with each call.

    Args:
        phase: Number of the phase in its call, which is a part of every seed.
        steps: How many steps of it the factors have seen.
        moments: What the optimizer remembers, by place of the variable or name of the factor.
        generators: States of the network's random layers, in order.
    """

    phase: int = 0
    steps: int = 0
    moments: Mapping[str, Moment] = field(default_factory=dict, repr=False)
    generators: tuple[np.ndarray, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Adapter:
    """What training with LoRA leaves behind: a small change of a base, to be kept in a file of its own.

    Args:
        row: Rank, scale and place.
        factors: A `(rows, rank)` and B `(rank, columns)` of each kernel, in the network's order.
        head: The head's variables, in order.
        labels: What the outputs mean, in order.
        base: Digest of the base, see `base_digest`.
        reached: To train on from here. Defaults to a new start.
    """

    row: Lora
    factors: tuple[tuple[np.ndarray, np.ndarray], ...] = field(repr=False)
    head: tuple[np.ndarray, ...] = field(repr=False)
    labels: tuple[str, ...]
    base: str
    reached: Reached = field(default_factory=Reached, repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(a.size + b.size for a, b in self.factors)

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
        attached.set(self.factors)
        _set_head(model, self.head)
        return attached

    def merge_into(self, model: keras.Model) -> None:
        """Turn the base into the tuned network, a plain model that can be saved and exported.

        Raises:
            InputError: As for `attach`.
        """
        self.attach(model).merge()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter to a safetensors file, in one step; `Adapter.load(path)` reads it."""
        moments, ages = tensor_files.pack(self.reached.moments)
        kinds = {
            "a": tensor_files.numbered(a for a, _ in self.factors),
            "b": tensor_files.numbered(b for _, b in self.factors),
            "head": tensor_files.numbered(self.head),
            "generator": tensor_files.numbered(self.reached.generators),
            **moments,
        }
        tensor_files.write(
            Path(path),
            kinds,
            FORMAT,
            **asdict(self.row),
            labels=self.labels,
            base=self.base,
            ages=ages,
            phase=self.reached.phase,
            steps=self.reached.steps,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: bool = False) -> Adapter:
        """Read an adapter's file.

        Args:
            path: The file.
            trust: Read it without a scan. Defaults to False.

        Raises:
            InputError: If there is none, it is damaged, or it is no adapter.
            ScanError: If a scan finds something in it.
        """
        scanning.check(path, trust=trust, kind=".safetensors")
        described, kinds = tensor_files.read(Path(path), FORMAT)
        a, b, head, generators = (
            tensor_files.in_order(kinds.get(kind, {})) for kind in ("a", "b", "head", "generator")
        )
        return cls(
            Lora(described["rank"], described["where"], described["alpha"]),
            tuple(zip(a, b, strict=True)),
            head,
            tuple(described["labels"]),
            described["base"],
            Reached(described["phase"], described["steps"], tensor_files.unpack(kinds, described["ages"]), generators),
        )


def adapter_of(
    model: keras.Model, attached: Attached, labels: Sequence[str], base: str, reached: Reached | None = None
) -> Adapter:
    """Collect what `Adapter` holds from a model with factors beside it."""
    head = tuple(variable.numpy() for variable in _head_variables(model))
    return Adapter(attached.row, attached.arrays(), head, tuple(labels), base, reached or Reached())


def base_digest(model: keras.Model) -> str:
    """Return the SHA-256 over shapes and values of all variables below the head, in the network's order."""
    digest = hashlib.sha256()
    head = {id(variable) for variable in _head_variables(model)}
    for variable in model.variables:
        if id(variable) not in head and not is_generator(variable):
            digest.update(f"{own_name(variable)} {tuple(variable.shape)};".encode())
            digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def _head_variables(model: keras.Model) -> list[keras.Variable]:
    return [
        variable
        for name in all_groups(model)[-1].layers
        for variable in model.get_layer(name).weights
        if not is_generator(variable)
    ]


def _set_head(model: keras.Model, values: Sequence[np.ndarray]) -> None:
    variables = _head_variables(model)
    given, here = [value.shape for value in values], [tuple(variable.shape) for variable in variables]
    if given != here:
        raise InputError(
            f"the adapter's head has the shapes {given}, this network's {here}: build it with as many classes and the "
            "same hidden layers"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _kernels_of(layer: keras.Layer, where: str) -> list[keras.Variable]:
    """Return the kernels of a layer that LoRA can change; those of depthwise convolutions are small already."""
    names = ("kernel", "embeddings", "pointwise_kernel")
    own = [variable for variable in layer._trainable_variables if variable.name in names]
    if where.startswith("re:"):
        try:
            return [variable for variable in own if re.search(where[len("re:") :], variable.path)]
        except re.error as error:
            raise InputError(f"`where` holds no valid regular expression: {error}. Received: {where!r}") from None
    types = tuple(kind for name, some in KINDS.items() if where in (name, "all") for kind in some)
    return own if isinstance(layer, types) else []
