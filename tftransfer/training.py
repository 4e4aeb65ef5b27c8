"""`fine_tune`: run a strategy's phases one after the other, and leave a plain trained model behind."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, checkpoints, distribution, mixing, penalties, prefix, schedules, trainable
from tftransfer.adapters import Adapter, Attached, Reached, adapter_of, base_digest
from tftransfer.averages import Ema, WiseFt
from tftransfer.callbacks import KeepBest, LearningRateLog, Progress, callback_list
from tftransfer.console import audit_table, literal_console, print_table
from tftransfer.data import Data, Examples, order
from tftransfer.errors import InputError, check
from tftransfer.history import History, PhaseRecord
from tftransfer.metrics import LossError
from tftransfer.optimizers import LayerwiseAdamW, LayerwiseSGD, Moment, renamed
from tftransfer.penalties import Source
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task
from tftransfer.trainee import Batch, Extras, Trainee


def fine_tune(
    model: keras.Model,
    task: Task,
    data: Data,
    strategy: Strategy,
    *,
    output: str | os.PathLike[str] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    seed: int = 0,
    batch_size: int = 32,
    max_steps: int | None = None,
    source: Source | None = None,
    adapter: Adapter | None = None,
    resume: bool = True,
    quiet: bool = True,
) -> History:
    """Train a model in place, phase by phase.

    Each phase sets what trains, cuts the network below it, runs the frozen part as a function of constants outside
    `fit`, compiles the rest once and trains it. At its end the best weights by validation loss are restored, the latest
    where chance can't tell epochs apart (`callbacks.KeepBest`); those that the phase began with count too, so that no
    phase ends worse on validation than it began by more than one standard error.

    Args:
        model: From a builder, or any functional model from pictures to the task's outputs; left uncompiled.
        task: What the outputs mean.
        data: Training and validation examples, from `data.load`.
        strategy: A tuple of phases, from `strategies`.
        output: A folder for `history.csv`, TensorBoard `logs/` and, after each phase, `checkpoints/`. Defaults to None:
            nothing is written.
        callbacks: Keras callbacks; each sees the whole model. Keras calls them once more per phase.
        seed: Decides the order of the examples, augmentation and dropout. Defaults to 0.
        batch_size: Examples per step over all devices, at least 1. Defaults to 32.
        max_steps: Steps per phase at the most, to try things out. Defaults to None: no bound.
        source: The old task, from `checks.forgetting.source_probe`; `EWC` and `DistillFromSource` use it. Defaults to
            None.
        adapter: A LoRA adapter to train on from; the model must be its base and the first phase its kind. Defaults to
            None.
        resume: Whether to go on after the last phase that `output` holds, if it is of the same strategy, data and
            seed. Defaults to True.
        quiet: Whether to print nothing. Defaults to True.

    Returns:
        The history: a dict of one list per metric over all phases, with `.phases` and `.adapter`.

    Raises:
        InputError: If the model's outputs do not fit the task, nothing would train, a phase asks for what the network
            does not have, or `output` holds phases of another call.

    Example:
        >>> import tftransfer as tft
        >>> data, task = tft.data.load("demo", image_size=(32, 32))
        >>> model = tft.builders.image_classifier("MobileNet-0.25", 10, image_size=32, weights=None)
        >>> history = tft.fine_tune(model, task, data, tft.strategies.linear_probe(epochs=1), max_steps=1)
        >>> len(history["loss"])
        1
    """
    model = _functional(model)
    _check(model, task, data, batch_size, callbacks)
    _check_strategy(model, strategy, adapter, task)
    folder = Path(output) if output else None
    run = _Run(model, task, data, tuple(callbacks), seed, batch_size, max_steps, source, quiet, folder, adapter)
    call = checkpoints.call_of(strategy, seed, batch_size, max_steps, data, task, source, adapter)
    kept = checkpoints.latest(folder, call) if folder and resume else None
    carried, history = _begin(run) if kept is None else _go_on(run, strategy, kept)
    for number in range(len(history.phases), len(strategy)):
        if number or adapter is None:
            carried = _continued(run, carried, strategy[number])
        carried = _run_phase(run, strategy, number, history, carried)
        if folder:
            moments = renamed(carried.moments, trainable.places(model))
            checkpoints.save(folder, call, model, history, carried.attached, carried.base, moments)
    history.adapter = _finish_adapter(run, carried, history)
    if folder:
        history.write_csv(folder / "history.csv")
    return history


@dataclass(frozen=True)
class _Carried:
    """What a phase leaves beside the weights: moments, an adapter with its base's digest, states of random layers."""

    moments: Mapping[str, Moment] = field(default_factory=dict)
    attached: Attached | None = None
    base: str = ""
    generators: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class _Run:
    """What all phases of one call share."""

    model: keras.Model
    task: Task
    data: Data
    callbacks: tuple[keras.callbacks.Callback, ...]
    seed: int
    batch_size: int
    max_steps: int | None
    source: Source | None
    quiet: bool
    output: Path | None
    adapter: Adapter | None

    def steps(self, phase: Phase) -> tuple[int, int]:
        """Return `(steps per epoch, epochs)` of a phase."""
        per_epoch = order.steps_per_epoch(len(self.data.train), self.batch_size)
        if self.max_steps is None:
            return per_epoch, phase.epochs
        return min(per_epoch, self.max_steps), 1

    def place(self, number: int) -> tuple[int, int]:
        """Return a phase's number for every seed, and how many steps of it an earlier call has done."""
        if self.adapter is None:
            return number, 0
        reached = self.adapter.reached
        return reached.phase + number, 0 if number else reached.steps


def _begin(run: _Run) -> tuple[_Carried, History]:
    if run.adapter is None:
        return _Carried(), History()
    with distribution.strategy_of(run.model).scope():
        attached = run.adapter.attach(run.model)
    moments = renamed(run.adapter.reached.moments, _paths(run.model))
    return _Carried(moments, attached, run.adapter.base), History()


def _go_on(run: _Run, strategy: Strategy, kept: checkpoints.Kept) -> tuple[_Carried, History]:
    """Set the model to where the last finished phase left it."""
    kept.restore(run.model)
    phase = strategy[len(kept.history.phases) - 1]
    attached = None
    if kept.factors and phase.adapter:
        with distribution.strategy_of(run.model).scope():
            attached = phase.adapter.prepare(run.model, run.seed)
        attached.set(kept.factors)
    return _Carried(renamed(kept.moments, _paths(run.model)), attached, kept.base), kept.history


def _paths(model: keras.Model) -> dict[str, str]:
    """Return each variable's path by its place."""
    return {place: path for path, place in trainable.places(model).items()}


def _continued(run: _Run, carried: _Carried, phase: Phase) -> _Carried:
    """Take along what the next phase goes on with: its own adapter, and moments if it says so."""
    moments = carried.moments if phase.carry_moments else {}
    if carried.attached and carried.attached.row == phase.adapter:
        return dataclasses.replace(carried, moments=moments)
    if carried.attached:
        carried.attached.merge()
    if phase.adapter is None:
        return _Carried(moments)
    with distribution.strategy_of(run.model).scope():
        attached = phase.adapter.prepare(run.model, run.seed)
    return _Carried(moments, attached, base_digest(run.model))


def _finish_adapter(run: _Run, carried: _Carried, history: History) -> Adapter | None:
    """Merge the last phase's factors into the model, which is plain from here on, and return them as an adapter."""
    if carried.attached is None:
        return None
    number = len(history.phases) - 1
    phase, steps = run.place(number)
    per_epoch = run.steps(history.phases[-1].phase)[0]
    reached = Reached(
        phase,
        steps + per_epoch * history.phases[-1].best_epoch,
        renamed(carried.moments, trainable.places(run.model)),
        carried.generators,
    )
    adapter = adapter_of(run.model, carried.attached, run.task.labels, carried.base, reached)
    carried.attached.merge()
    return adapter


def _run_phase(run: _Run, strategy: Strategy, number: int, history: History, carried: _Carried) -> _Carried:
    """Train one phase, add it to the history, and return what the next one may go on with."""
    began, phase = time.monotonic(), strategy[number]
    trainable.set_trainable(run.model, phase.selector, train_batch_norm=phase.train_batch_norm)
    parts = prefix.cut(run.model, carried.attached.kernels if carried.attached else ())
    audit = _audit(run, phase, carried.attached)
    _seed_generators(run, number)
    steps_per_epoch, epochs = run.steps(phase)
    below = prefix.as_constant_function(parts.frozen) if parts.frozen else None
    trainee = _compiled(run, phase, number, parts.trained, below, carried, steps_per_epoch * epochs)
    training, validation = _inputs(run, phase, number, below)
    matters = _moments_matter(strategy, number)
    keep = KeepBest(trainee, phase.patience, remember=lambda: _state(run, trainee) if matters else {"moments": {}})
    before = trainee.evaluate(validation, return_dict=True, verbose=0)
    keep.consider(0, before["loss"], before["loss_error"])
    start = trainee.get_weights()
    first_epoch = sum(record.epochs for record in history.phases)
    logs = trainee.fit(
        training,
        shuffle=False,  # the batches come in the order that the seed decides
        steps_per_epoch=steps_per_epoch,
        initial_epoch=first_epoch,
        epochs=first_epoch + epochs,
        validation_data=validation,
        callbacks=_callbacks(run, phase, keep, trainee, first_epoch + epochs, steps_per_epoch),
        verbose=0,
    ).history
    tuned_share = _interpolate(phase, trainee, start, validation)
    seconds = time.monotonic() - began
    record = PhaseRecord(
        phase,
        audit,
        parts.frozen_share,
        len(logs["loss"]),
        keep.kept_epoch,
        seconds,
        tuned_share,
        _penalty_basis(run, phase),
    )
    history.add(logs, record)
    return dataclasses.replace(carried, **keep.kept)


def _state(run: _Run, trainee: keras.Model) -> dict[str, Any]:
    """Return what there is beside the weights, for somebody who goes on from here."""
    generators = tuple(variable.numpy() for variable in _generators(run.model))
    return {"moments": _own(trainee.optimizer).moments(), "generators": generators}


def _own(optimizer: keras.optimizers.Optimizer) -> LayerwiseAdamW | LayerwiseSGD:
    """Return our optimizer; Keras wraps it for float16 models, to scale the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _moments_matter(strategy: Strategy, number: int) -> bool:
    """Whether somebody goes on with the optimizer's moments: the next phase, or a later call with the adapter."""
    last = number + 1 == len(strategy)
    return strategy[number].adapter is not None if last else strategy[number + 1].carry_moments


def plan(model: keras.Model, phase: Phase) -> tuple[tuple[trainable.AuditRow, ...], prefix.Cut]:
    """Set what a phase trains, and say what that is: the audit table, and the two parts of the network.

    An adapter is made for it and thrown away.

    Raises:
        InputError: If the network does not have what the phase asks for.
    """
    trainable.set_trainable(model, phase.selector, train_batch_norm=phase.train_batch_norm)
    attached = phase.adapter.prepare(model, 0) if phase.adapter else None
    rows = trainable.audit(
        model,
        learning_rate=phase.learning_rate,
        layer_decay=phase.layer_decay,
        added=attached.sizes() if attached else {},
    )
    parts = prefix.cut(model, attached.kernels if attached else ())
    _check_fits(model, phase, parts.trained)
    return rows, parts


def _check_strategy(model: keras.Model, strategy: Strategy, adapter: Adapter | None, task: Task) -> None:
    """Refuse a strategy before its first phase runs, if one of its phases could not."""
    check(len(strategy) > 0, "strategy", "a tuple of phases", strategy)
    if adapter and strategy[0].adapter != adapter.row:
        raise InputError(
            f"`adapter` goes on in a first phase with the same LoRA, {adapter.row}; this strategy begins with "
            f"{strategy[0].adapter}: leave out its probe, such as `strategies.lora()[1:]`"
        )
    if adapter and adapter.labels != tuple(task.labels):
        raise InputError(f"`adapter` answers with the labels {adapter.labels}, the task's are {tuple(task.labels)}")
    for number, phase in enumerate(strategy):
        plan(model, phase)
        others = (None, phase.adapter)
        changed = [one.name for one in strategy[:number] if one.selector != "head" or one.adapter not in others]
        if phase.adapter and changed:
            raise InputError(
                f"phase {phase.name!r} has an `adapter`, whose base must be the network as it was given, but phase "
                f"{changed[0]!r} before it changes that"
            )


def _check_fits(model: keras.Model, phase: Phase, part: keras.Model) -> None:
    """Refuse a phase that asks for what the part of the network that trains does not have."""
    if phase.cutmix and any(len(tensor.shape) != 4 for tensor in part.inputs):
        raise InputError(
            f"phase {phase.name!r} has `cutmix`, but what trains begins above pooling, where there are no pictures to "
            "cut: use `mixup`, or a wider `selector`"
        )
    if phase.penalty and not _below_the_head(model, part):
        raise InputError(
            f"phase {phase.name!r} has a `penalty`, but no weight below the head trains: choose a wider `selector`"
        )
    if phase.stochastic_depth and not mixing.residual_branches(part):
        raise InputError(
            f"phase {phase.name!r} has `stochastic_depth`, but what trains has no residual branches: leave it out"
        )


def _below_the_head(model: keras.Model, part: keras.Model) -> tuple[keras.Variable, ...]:
    """Return the variables of a part that train, but for those of the head."""
    head = {v.path for name in trainable.all_groups(model)[-1].layers for v in model.get_layer(name).weights}
    return tuple(variable for variable in part.trainable_variables if variable.path not in head)


def _audit(run: _Run, phase: Phase, attached: Attached | None) -> tuple[trainable.AuditRow, ...]:
    """Return what is about to train, and show it."""
    added = attached.sizes() if attached else {}
    rows = trainable.audit(run.model, learning_rate=phase.learning_rate, layer_decay=phase.layer_decay, added=added)
    if not run.quiet:
        print_table(literal_console(), audit_table(f"What trains: {phase.name}", rows, _penalty_basis(run, phase)))
    return rows


def _penalty_basis(run: _Run, phase: Phase) -> str:
    return phase.penalty.basis(run.source) if phase.penalty else ""


def _interpolate(
    phase: Phase, trainee: keras.Model, start: list[np.ndarray], validation: tf.data.Dataset
) -> float | None:
    if not isinstance(phase.average, WiseFt):
        return None

    def score() -> tuple[float, float]:
        measured = trainee.evaluate(validation, return_dict=True, verbose=0)
        return measured["loss"], measured["loss_error"]

    return phase.average.finish(trainee, start, score)


def _inputs(
    run: _Run, phase: Phase, number: int, below: Callable[[tf.Tensor], list[tf.Tensor]] | None
) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Return what goes into the trained part: the training batches of the whole phase, and the validation batches."""
    steps_per_epoch, epochs = run.steps(phase)
    place, start = run.place(number)
    training = order.batches(
        run.data.train,
        run.batch_size,
        seed=run.seed,
        phase=place,
        steps=steps_per_epoch * epochs,
        start=start,
        augmentation=phase.augmentation,
    )
    replicas = distribution.strategy_of(run.model).num_replicas_in_sync
    validation = order.in_order(run.data.validation, even_batch(len(run.data.validation), run.batch_size, replicas))
    if below is None:
        return training, validation
    return _through(below, training), _through(below, validation)


def _through(infer: Callable[[tf.Tensor], list[tf.Tensor]], batches: tf.data.Dataset) -> tf.data.Dataset:
    """Run batches through the frozen part in the input pipeline: outside `fit`, ahead of the training step.

    No Python runs there: a generator's thread would keep an interrupted process from ending. On a machine with GPUs
    the pipeline still runs on the processor.
    """

    def extract(pictures: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> Batch:
        return _unpacked(infer(pictures)), targets, weights

    return batches.map(extract, num_parallel_calls=1, deterministic=True).prefetch(tf.data.AUTOTUNE)


def _unpacked(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def even_batch(count: int, batch_size: int, replicas: int) -> int:
    """Return the largest batch size up to `batch_size` whose last batch leaves no device without an example.

    Example:
        >>> even_batch(33, 32, 2)
        31
    """
    sizes = range(min(batch_size, max(count, 1)), 0, -1)
    return next(size for size in sizes if size == 1 or count % size == 0 or count % size >= replicas)


def _compiled(
    run: _Run,
    phase: Phase,
    number: int,
    part: keras.Model,
    below: Callable[[tf.Tensor], list[tf.Tensor]] | None,
    carried: _Carried,
    steps: int,
) -> keras.Model:
    from_logits = builders.outputs_are_logits(run.model)
    loss = run.task.loss(from_logits, run.data.train.targets)
    with distribution.strategy_of(run.model).scope():
        trainee = Trainee(_unpacked(part.inputs), _unpacked(part.outputs), name="trainee")
        trainee.dtype_policy = run.model.dtype_policy  # Keras scales the loss of float16 models by this
    extras = _extras(run, phase, number, trainee, below, carried.attached)  # outside the scope: it runs the network
    with distribution.strategy_of(run.model).scope():
        trainee.add_extras(extras)
        optimizer = _optimizer(run, phase, carried.attached, steps)
        if phase.penalty and phase.penalty.replaces_decay:
            optimizer.exclude_from_weight_decay(list(_below_the_head(run.model, trainee)))
        trainee.compile(
            optimizer=optimizer,
            loss=loss,
            metrics=run.task.metrics(from_logits),
            weighted_metrics=[LossError(loss)],
        )
        optimizer.start_from(trainee.trainable_variables, carried.moments)
    return trainee


def _extras(
    run: _Run,
    phase: Phase,
    number: int,
    part: keras.Model,
    below: Callable[[tf.Tensor], list[tf.Tensor]] | None,
    attached: Attached | None,
) -> Extras:
    """Prepare what the phase adds to the step."""
    term, body = None, None
    if phase.penalty:
        subject, body = _subject(run, part, below)
        term = phase.penalty.prepare(subject)
    place, start = run.place(number)
    return Extras(
        (run.seed, place), start, phase.mixup, phase.cutmix, _branches(phase, part), attached, penalty=term, body=body
    )


def _subject(
    run: _Run, part: keras.Model, below: Callable[[tf.Tensor], list[tf.Tensor]] | None
) -> tuple[penalties.Subject, keras.Model]:
    """Return what a penalty is prepared for, and the network that gives outputs and features at once."""
    features = prefix.features(run.model, part)
    subject = penalties.Subject(
        body=keras.Model(part.inputs, features),
        below=_to_inputs(below),
        held=_below_the_head(run.model, part),
        examples=run.data.train,
        source=run.source,
        seed=run.seed,
    )
    return subject, keras.Model(part.inputs, [*part.outputs, features])


def _to_inputs(below: Callable[[tf.Tensor], list[tf.Tensor]] | None) -> Callable[[tf.Tensor], Any]:
    """Return the function from pictures to what the trained part takes."""

    def to_inputs(pictures: tf.Tensor) -> Any:
        return pictures if below is None else _unpacked(below(pictures))

    return to_inputs


def _branches(phase: Phase, part: keras.Model) -> dict[int, tuple[int, float]]:
    """Return which residual branches are left out, and how often: in proportion to their height."""
    if not phase.stochastic_depth:
        return {}
    found = mixing.residual_branches(part)
    return {
        key: (branch, phase.stochastic_depth * height / len(found))
        for height, (key, branch) in enumerate(found.items(), start=1)
    }


def _optimizer(run: _Run, phase: Phase, attached: Attached | None, steps: int) -> LayerwiseAdamW | LayerwiseSGD:
    multipliers = trainable.rate_multipliers(run.model, phase.layer_decay)
    averaged: dict[str, Any] = {}
    if isinstance(phase.average, Ema):
        averaged = {"use_ema": True, "ema_momentum": phase.average.momentum(run.steps(phase)[0])}
    optimizer = LayerwiseAdamW if phase.optimizer == "adamw" else LayerwiseSGD
    return optimizer(
        learning_rate=schedules.learning_rate(phase, steps),
        weight_decay=phase.weight_decay,
        multipliers={**multipliers, **(attached.multipliers(multipliers) if attached else {})},
        **averaged,
    )


def _callbacks(
    run: _Run, phase: Phase, keep: KeepBest, trainee: keras.Model, last_epoch: int, steps: int
) -> keras.callbacks.CallbackList:
    own: list[keras.callbacks.Callback] = [LearningRateLog(), keep]
    if isinstance(phase.average, Ema):
        own.insert(0, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    if run.output:
        own.append(keras.callbacks.TensorBoard(str(run.output / "logs"), write_graph=False))
    if not run.quiet:
        own.append(Progress(phase.name, last_epoch))
    return callback_list(own, run.callbacks, trainee, run.model, {"epochs": last_epoch, "steps": steps})


def _generators(model: keras.Model) -> list[keras.Variable]:
    return [variable for variable in model.variables if "seed_generator" in variable.path]


def _seed_generators(run: _Run, number: int) -> None:
    """Give every Dropout and random layer a state that depends on the seed and the phase alone.

    They are counters that no saver of Keras keeps; without this a phase's dropout would depend on what ran before. A
    phase that an earlier call began goes on with that call's states.
    """
    place, start = run.place(number)
    kept = run.adapter.reached.generators if run.adapter and start else ()
    for index, variable in enumerate(_generators(run.model)):
        words = np.random.SeedSequence((run.seed, place, index)).generate_state(2)
        variable.assign(kept[index] if index < len(kept) else np.array(words, variable.dtype))


def _functional(model: keras.Model) -> keras.Model:
    """Return a model whose graph is known; it shares its layers with the one that was given."""
    if isinstance(model, keras.Sequential) and model.built:
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if not hasattr(model, "_nodes_by_depth"):
        raise InputError(
            "`model` must be a functional model, `keras.Model(inputs, outputs)`, or a built Sequential one: others "
            f"can't be cut at the layers that train. Received: model={type(model).__name__}"
        )
    return model


# They set the rate of a compiled model; here it is the phase's, and the whole model is never compiled.
_RATE_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.TensorBoard,
)


def _check(
    model: keras.Model, task: Task, data: Data, batch_size: int, callbacks: Sequence[keras.callbacks.Callback]
) -> None:
    for callback in callbacks:
        if isinstance(callback, _RATE_CALLBACKS):
            raise InputError(
                f"`callbacks` can't hold {type(callback).__name__}, which needs the optimizer of a compiled model: use "
                "a phase's `learning_rate` and `schedule`, and `output` for TensorBoard's logs"
            )
    paths = [variable.path for variable in model.variables if "seed_generator" not in variable.path]
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


def predict(model: keras.Model, task: Task, examples: Examples, batch_size: int = 32) -> np.ndarray:
    """Return the task's probabilities (or numbers) for examples, in order, through the graph of constants.

    Args:
        model: A trained model.
        task: What its outputs mean.
        examples: Pictures with random access.
        batch_size: Pictures per batch. Defaults to 32.

    Returns:
        `(n, outputs)` float32.
    """
    infer = prefix.as_constant_function(model)
    from_logits = builders.outputs_are_logits(model)
    batches = order.in_order(examples, batch_size)
    return np.concatenate([task.probabilities(infer(batch[0])[0], from_logits).numpy() for batch in batches])
