"""What a strategy will do to a network, and what is refused before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from tftransfer import mixing, prefix, soundness, trainable
from tftransfer.adapters import Adapter, Attached
from tftransfer.data import Data
from tftransfer.errors import InputError, check
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task


def plan(
    model: keras.Model, phase: Phase, attached: Attached | None = None, later: Sequence[keras.Variable] = ()
) -> tuple[tuple[trainable.AuditRow, ...], prefix.Cut]:
    """Set what a phase trains, and say what that is: the audit table, and the two parts of the network.

    Args:
        model: A functional model.
        phase: What is about to run.
        attached: The phase's adapter, if it is beside the model already. Defaults to None: one is made for the
            question and thrown away.
        later: Variables that train in phases to come, see `feeding.still_frozen`. Defaults to none.

    Raises:
        InputError: If the network does not have what the phase asks for.
    """
    trainable.set_trainable(model, phase.selector, train_batch_norm=phase.train_batch_norm)
    if attached is None and phase.adapter:
        attached = phase.adapter.prepare(model, 0)
    rows = trainable.audit(
        model,
        learning_rate=phase.learning_rate,
        layer_decay=phase.layer_decay,
        added=attached.sizes() if attached else {},
    )
    parts = prefix.cut(model, attached.kernels if attached else (), later)
    _check_fits(model, phase, parts.trained)
    return rows, parts


def check_strategy(model: keras.Model, strategy: Strategy, task: Task, adapter: Adapter | None = None) -> None:
    """Refuse a strategy before its first phase runs, if one of its phases could not.

    What trains is set as the last phase sets it; `fine_tune` sets it anew.

    Raises:
        InputError: If it is no tuple of phases, or one asks for what the network or the adapter does not have.
    """
    phases = isinstance(strategy, (tuple, list)) and all(isinstance(phase, Phase) for phase in strategy)
    expected = "a tuple of Phases, such as `strategies.full()`; `strategies.parse` makes one of text"
    check(phases and len(strategy) > 0, "strategy", expected, strategy)
    if adapter and strategy[0].adapter != adapter.row:
        raise InputError(
            f"`adapter` goes on in a first phase with the same LoRA, {adapter.row}; this strategy begins with "
            f"{strategy[0].adapter}: leave out its probe, such as `strategies.lora()[1:]`"
        )
    if adapter and adapter.labels != tuple(task.labels):
        raise InputError(f"`adapter` answers with the labels {adapter.labels}, the task's are {tuple(task.labels)}")
    for number, phase in enumerate(strategy):
        with prefix.nodes_as_they_were(model):
            plan(model, phase)
        others = (None, phase.adapter)
        changed = [one.name for one in strategy[:number] if one.selector != "head" or one.adapter not in others]
        if phase.adapter and changed:
            raise InputError(
                f"phase {phase.name!r} has an `adapter`, whose base must be the network as it was given, but phase "
                f"{changed[0]!r} before it changes that"
            )


def check_call(
    model: keras.Model, task: Task, data: Data, batch_size: int, callbacks: Sequence[keras.callbacks.Callback]
) -> None:
    """Refuse what `fine_tune` was given, if its parts do not fit each other."""
    for callback in callbacks:
        if isinstance(callback, _RATE_CALLBACKS):
            raise InputError(
                f"`callbacks` can't hold {type(callback).__name__}, which needs the optimizer of a compiled model: use "
                "a phase's `learning_rate` and `schedule`, and `output` for TensorBoard's logs"
            )
    paths = [variable.path for variable in model.variables if not trainable.is_generator(variable)]
    twice = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if twice:
        raise InputError(f"two variables of the model have the path {twice[0]!r}: give its layers different names")
    if model.output_shape[-1] != task.num_outputs:
        raise InputError(
            f"the model gives {model.output_shape[-1]} outputs, but the task has {task.num_outputs}: "
            f"build it with num_classes={task.num_outputs}"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"`batch_size` must be a whole number from 1. Received: batch_size={batch_size!r}")
    expected, given = model.input_shape[1:3], data.train.pictures.image_size
    if expected != (None, None) and tuple(expected) != tuple(given):
        raise InputError(
            f"the model takes pictures of {expected[0]}x{expected[1]}, but the data was loaded at "
            f"{given[0]}x{given[1]}: give both the same `image_size`"
        )
    soundness.check_weights(model)
    for split, examples in (("training", data.train), ("validation", data.validation)):
        soundness.check_examples(task, examples, split)


# They set the rate of a compiled model; here it is the phase's, and the whole model is never compiled.
_RATE_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.TensorBoard,
)


def functional(model: keras.Model) -> keras.Model:
    """Return a model whose graph is known; it shares its layers with the one that was given."""
    if isinstance(model, keras.Sequential) and model.built:
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if not hasattr(model, "_nodes_by_depth"):
        raise InputError(
            "`model` must be a functional model, `keras.Model(inputs, outputs)`, or a built Sequential one: others "
            f"can't be cut at the layers that train. Received: model={type(model).__name__}"
        )
    return model


def _check_fits(model: keras.Model, phase: Phase, part: keras.Model) -> None:
    """Refuse a phase that asks for what the part of the network that trains does not have."""
    if phase.cutmix and any(len(tensor.shape) != 4 for tensor in part.inputs):
        raise InputError(
            f"phase {phase.name!r} has `cutmix`, but what trains begins above pooling, where there are no pictures to "
            "cut: use `mixup`, or a wider `selector`"
        )
    if phase.penalty and not below_the_head(model, part):
        raise InputError(
            f"phase {phase.name!r} has a `penalty`, but no weight below the head trains: choose a wider `selector`"
        )
    if phase.stochastic_depth and not mixing.residual_branches(part):
        raise InputError(
            f"phase {phase.name!r} has `stochastic_depth`, but what trains has no residual branches: leave it out"
        )


def below_the_head(model: keras.Model, part: keras.Model) -> tuple[keras.Variable, ...]:
    """Return the variables of a part that train, but for those of the head."""
    head = {v.path for name in trainable.all_groups(model)[-1].layers for v in model.get_layer(name).weights}
    return tuple(variable for variable in part.trainable_variables if variable.path not in head)
