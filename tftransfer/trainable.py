"""What trains: selectors that set `trainable` on layers and variables, and a table that shows the result."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import keras

from tftransfer import backbones
from tftransfer.errors import InputError, check, nearest

HEAD = "head"
FIXED_SELECTORS = ("none", "head", "all", "attention", "norm", "bias")

_NORMALISATION = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.UnitNormalization,
    keras.layers.RMSNormalization,
)
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention)
# Squeeze-and-excitation is the attention of convolutional networks; keras.applications names its layers so.
_ATTENTION_NAME = re.compile(r"attention|squeeze_excite|(^|_)se_|_attn|query|key_dense|value_dense")


@dataclass(frozen=True)
class AuditRow:
    """One depth group (or the head): how much of it trains, how fast, and whether its BatchNorm statistics can move.

    Args:
        group: Its name.
        layers: How many of its layers hold weights.
        parameters: How many numbers they hold.
        trainable: How many numbers train, those of an adapter beside them included.
        batch_norm: What its BatchNorm statistics do; empty where there are none.
        learning_rate: The peak, None where nothing trains or the phase is not known.
    """

    group: str
    layers: int
    parameters: int
    trainable: int
    batch_norm: str
    learning_rate: float | None = None


def set_trainable(
    model: keras.Model, selector: str = "head", *, train_batch_norm: bool = False
) -> tuple[AuditRow, ...]:
    """Choose what trains. Compile afterwards: Keras ignores changes made after `compile`.

    Args:
        model: A functional model, from a builder or the user's own.
        selector: One of
            `"none"`; `"head"`; `"all"`;
            `"last:N"`, the head and the N topmost depth groups; `"last:K/N"`, the K topmost of N even parts of them;
            `"groups:A+B"`, the depth groups of these names;
            `"from:LAYER"`, that layer and all that come after it;
            `"LAYER_A:LAYER_B"`, the layers from A to B; a depth group's name stands for all of its layers;
            `"attention"`, `"norm"`, `"bias"`, the variables of that kind;
            `"re:PATTERN"`, the variables whose path the regular expression matches.
            The head trains in every case but `"none"`. Defaults to `"head"`.
        train_batch_norm: Whether BatchNorm layers that train also move their statistics. Defaults to False: they
            run on the stored statistics, also inside `fit`, and only their scale and offset may train.

    Returns:
        The audit table: a row per depth group from stem to top, the head last.

    Raises:
        InputError: If the selector is not known or matches nothing in the model.

    Example:
        >>> from tftransfer import builders
        >>> model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)
        >>> set_trainable(model, "last:1")[-1].group
        'head'
    """
    check(isinstance(selector, str), "selector", "text, such as 'head', 'last:2' or 'all'", selector)
    groups = all_groups(model)
    wanted = _wanted(model, selector, groups)
    model.trainable = False
    model.trainable = True  # reaches every layer, which it would not if it was True before; the loop closes some again
    for layer in weight_layers(model):
        _open_layer(layer, wanted, train_batch_norm)
    return audit(model, groups)


def all_groups(model: keras.Model) -> tuple[backbones.Group, ...]:
    """Return the depth groups from stem to top with the head as the last group.

    For a network that no builder made, the head is its last layer with weights.
    """
    groups = list(backbones.depth_groups(model))
    grouped = {name for group in groups for name in group.layers}
    rest = tuple(layer.name for layer in model.layers if layer.weights and layer.name not in grouped)
    if not rest and groups:
        rest = groups.pop().layers
    return (*groups, backbones.Group(HEAD, rest))


def weight_layers(model: keras.Model) -> list[keras.Layer]:
    """Return the innermost layers that hold weights, in order, through nested models."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer._trainable_variables or layer._non_trainable_variables
    ]


def places(model: keras.Model) -> dict[str, str]:
    """Name each variable by its place in the network, such as `"12.kernel"`, by its path.

    Keras numbers layers without a name of their own anew in each session, so files name variables by place. States of
    random layers are left out: each phase sets them.

    Example:
        >>> inputs = keras.Input((2,))
        >>> places(keras.Model(inputs, keras.layers.Dense(1, name="logits")(inputs)))
        {'logits/kernel': '0.kernel', 'logits/bias': '1.bias'}
    """
    kept = (variable for variable in model.variables if not is_generator(variable))
    return {variable.path: f"{number}.{own_name(variable)}" for number, variable in enumerate(kept)}


def own_name(variable: keras.Variable) -> str:
    """Return a variable's name; without the number that Keras gives in each session to those that have none.

    Example:
        >>> own_name(keras.Variable(1.0, name="gamma")), own_name(keras.Variable(1.0))
        ('gamma', 'variable')
    """
    return re.sub(r"^variable_\d+$", "variable", variable.name)


def is_generator(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random layer, such as Dropout's, which each phase sets."""
    return "seed_generator" in variable.path


def generators(model: keras.Model) -> list[keras.Variable]:
    """Return the states of a network's random layers, in order."""
    return [variable for variable in model.variables if is_generator(variable)]


def trained_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables of a layer that train.

    Keras' own `trainable_variables` is empty for a layer whose `trainable` is False, also where its scale and offset
    train, as those of a frozen BatchNorm layer do.
    """
    return [variable for variable in layer.weights if variable.trainable]


def audit(
    model: keras.Model,
    groups: tuple[backbones.Group, ...] | None = None,
    *,
    learning_rate: float | None = None,
    layer_decay: float = 1.0,
    added: Mapping[str, int] | None = None,
) -> tuple[AuditRow, ...]:
    """Return the audit table of a model as it stands.

    Args:
        model: A model whose `trainable` flags are set.
        groups: From `all_groups`. Defaults to the model's.
        learning_rate: The phase's peak. Defaults to None: not known.
        layer_decay: Factor on it per depth group below the head. Defaults to 1.
        added: How many numbers train beside a variable, by its path. Defaults to none.
    """
    groups, layers = groups or all_groups(model), _by_name(model)
    return tuple(
        _audit_row(layers, group, learning_rate and learning_rate * layer_decay**below, added or {})
        for group, below in zip(groups, range(len(groups) - 1, -1, -1), strict=True)
    )


def rate_multipliers(model: keras.Model, layer_decay: float) -> dict[str, float]:
    """Return each variable's factor on the learning rate: `layer_decay` per group below the head.

    Args:
        model: A model whose `trainable` flags are set.
        layer_decay: Factor per depth group, in (0, 1]; the head has the factor 1.

    Returns:
        From `variable.path` to the factor.
    """
    groups, layers = all_groups(model), _by_name(model)
    return {
        variable.path: layer_decay ** (len(groups) - 1 - depth)
        for depth, group in enumerate(groups)
        for name in group.layers
        for leaf in _leaves(layers[name])
        for variable in leaf._trainable_variables  # also where `trainable` is False: adapters train beside them
    }


def _by_name(model: keras.Model) -> dict[str, keras.Layer]:
    """Return a model's layers by name; `get_layer` goes through all of them for each."""
    return {layer.name: layer for layer in model.layers}


def _audit_row(
    by_name: Mapping[str, keras.Layer],
    group: backbones.Group,
    learning_rate: float | None,
    added: Mapping[str, int],
) -> AuditRow:
    layers = [by_name[name] for name in group.layers]
    count = sum(layer.count_params() for layer in layers)
    open_count = sum(math.prod(variable.shape) for layer in layers for variable in trained_variables(layer))
    open_count += sum(added.get(variable.path, 0) for layer in layers for variable in layer.weights)
    norms = [inner for layer in layers for inner in _leaves(layer) if _is_batch_norm(inner)]
    moving = sum(norm.trainable for norm in norms)
    state = "" if not norms else f"{moving} of {len(norms)} move" if moving else "frozen"
    return AuditRow(group.name, len(layers), count, open_count, state, learning_rate if open_count else None)


def _leaves(layer: keras.Layer) -> list[keras.Layer]:
    return list(layer._flatten_layers(include_self=True))


def _is_batch_norm(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _open_layer(layer: keras.Layer, wanted: Callable[[keras.Layer, keras.Variable], bool], move: bool) -> None:
    chosen = [variable for variable in layer._trainable_variables if wanted(layer, variable)]
    # A BatchNorm layer whose own `trainable` is False runs in inference mode, whatever `fit` says (keras#20285);
    # its scale and offset can train all the same.
    layer.trainable = bool(chosen) and (move or not _is_batch_norm(layer))
    for variable in layer._trainable_variables:
        variable.trainable = any(variable is kept for kept in chosen)


def _wanted(
    model: keras.Model, selector: str, groups: tuple[backbones.Group, ...]
) -> Callable[[keras.Layer, keras.Variable], bool]:
    """Return a function of layer and variable that tells whether the variable trains."""
    if selector == "none":
        return lambda layer, variable: False
    head = _inner(model, groups[-1].layers)
    matches = _matcher(model, selector, groups)
    _refuse_empty(model, selector, matches, head)
    return lambda layer, variable: id(layer) in head or matches(layer, variable)


def _inner(model: keras.Model, names: tuple[str, ...]) -> set[int]:
    return {id(inner) for name in names for inner in _leaves(model.get_layer(name))}


def _matcher(
    model: keras.Model, selector: str, groups: tuple[backbones.Group, ...]
) -> Callable[[keras.Layer, keras.Variable], bool]:
    if selector == "head":
        return lambda layer, variable: False
    if selector == "all":
        return lambda layer, variable: True
    if selector == "attention":
        return lambda layer, variable: isinstance(layer, _ATTENTION) or bool(_ATTENTION_NAME.search(variable.path))
    if selector == "norm":
        return lambda layer, variable: isinstance(layer, _NORMALISATION)
    if selector == "bias":
        return lambda layer, variable: variable.name in ("bias", "beta")
    if selector.startswith("re:"):
        pattern = _pattern(selector)
        return lambda layer, variable: bool(pattern.search(variable.path))
    chosen = _inner(model, _layer_names(model, selector, groups))
    return lambda layer, variable: id(layer) in chosen


def _pattern(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector[len("re:") :])
    except re.error as error:
        raise InputError(f"`selector` holds no valid regular expression: {error}. Received: {selector!r}") from None


def _layer_names(model: keras.Model, selector: str, groups: tuple[backbones.Group, ...]) -> tuple[str, ...]:
    first, colon, second = selector.partition(":")
    if not colon:
        known = (*FIXED_SELECTORS, "last:N", "last:K/N", "groups:A+B", "from:LAYER", "LAYER_A:LAYER_B", "re:PATTERN")
        raise InputError(
            f"`selector` must be one of {', '.join(known)}.{nearest(selector, FIXED_SELECTORS)} Received: {selector!r}"
        )
    if first == "last":
        return _last_groups(second, groups[:-1])
    if first == "groups":
        return _named_groups(second.split("+"), groups)
    names = [layer.name for layer in model.layers]
    start = min(_positions(second if first == "from" else first, names, groups))
    stop = len(names) - 1 if first == "from" else max(_positions(second, names, groups))
    if stop < start:
        raise InputError(
            f"`selector` must go from stem to top: {second!r} comes before {first!r}. Received: {selector!r}"
        )
    return tuple(names[start : stop + 1])


def _last_groups(count: str, groups: tuple[backbones.Group, ...]) -> tuple[str, ...]:
    parts, slash, of = count.partition("/")
    given = [int(number) if number.isdecimal() else 0 for number in (parts, of if slash else parts)]
    if not 1 <= given[0] <= given[1] <= len(groups):
        raise InputError(
            f"`selector` last:N takes a whole number from 1 to {len(groups)}, the depth groups of this network, and "
            f"last:K/N takes K of N parts of them. Groups: {', '.join(group.name for group in groups)}. "
            f"Received: 'last:{count}'"
        )
    number = round(len(groups) * given[0] / given[1]) if slash else given[0]
    return tuple(name for group in groups[len(groups) - number :] for name in group.layers)


def _named_groups(names: list[str], groups: tuple[backbones.Group, ...]) -> tuple[str, ...]:
    by_name = {group.name: group.layers for group in groups}
    for name in names:
        if name not in by_name:
            raise InputError(
                f"`selector` names no depth group of this network: {name!r}.{nearest(name, by_name)} "
                f"Groups: {', '.join(by_name)}"
            )
    return tuple(layer for name in names for layer in by_name[name])


def _positions(name: str, names: list[str], groups: tuple[backbones.Group, ...]) -> list[int]:
    """Return the place of a layer in the network, or those of a depth group's layers."""
    by_group = {group.name: group.layers for group in groups if group.layers}
    layers = by_group.get(name, (name,))
    if layers[0] not in names:
        raise InputError(
            f"`selector` names no layer or group of this network: {name!r}.{nearest(name, [*names, *by_group])} "
            f"Groups: {', '.join(by_group)}"
        )
    return [names.index(layer) for layer in layers]


def _refuse_empty(
    model: keras.Model, selector: str, matches: Callable[[keras.Layer, keras.Variable], bool], head: set[int]
) -> None:
    if selector in ("head", "all"):
        return
    for layer in weight_layers(model):
        if id(layer) not in head and any(matches(layer, variable) for variable in layer._trainable_variables):
            return
    raise InputError(
        f"`selector` matches nothing below the head of this network.{_nearest_names(model, selector)} Groups: "
        f"{', '.join(group.name for group in all_groups(model))}. Received: {selector!r}"
    )


def _nearest_names(model: keras.Model, selector: str) -> str:
    """Suggest layers below the head that a pattern may have meant."""
    words = re.findall(r"\w{3,}", selector.removeprefix("re:"))
    head = all_groups(model)[-1].layers
    names = [layer.name for layer in model.layers if layer.weights and layer.name not in head]
    return next((said for said in (nearest(word, names) for word in words) if said), "")


@contextlib.contextmanager
def as_it_was(model: keras.Model) -> Iterator[None]:
    """Give a model its weights and `trainable` flags back, whatever happens inside."""
    weights = model.get_weights()
    # Each after what holds it, which sets the flags of what it holds; a variable's can differ from its layer's.
    flags = [(part, part.trainable) for part in (*model._flatten_layers(), *model.variables)]
    try:
        yield
    finally:
        model.set_weights(weights)
        for part, flag in flags:
            part.trainable = flag
