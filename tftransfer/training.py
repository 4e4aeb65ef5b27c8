"""`fine_tune`: run a strategy's phases one after the other, and leave a plain trained model behind."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import builders, distribution, prefix, trainable
from tftransfer.callbacks import KeepBest, LearningRateLog, Progress, callback_list
from tftransfer.data import Data, Examples, order
from tftransfer.errors import InputError
from tftransfer.metrics import LossError
from tftransfer.optimizers import LayerwiseAdamW
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task

Batch = tuple[Any, tf.Tensor, tf.Tensor]


@dataclass(frozen=True)
class PhaseRecord:
    """What happened in one phase.

    Args:
        phase: The row of the strategy.
        audit: What trained, per depth group.
        frozen_share: Share of the parameters that ran as constants, in [0, 1].
        epochs: Epochs that were run.
        best_epoch: The epoch of the phase whose weights were kept; 0 if those it began with were better.
        seconds: What the phase took.
    """

    phase: Phase
    audit: tuple[trainable.AuditRow, ...]
    frozen_share: float
    epochs: int
    best_epoch: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Describe the phase for `report.json` and the manifest."""
        return {
            **asdict(self.phase),
            "epochs": self.epochs,
            "epochs_planned": self.phase.epochs,
            "best_epoch": self.best_epoch,
            "frozen_share": self.frozen_share,
            "seconds": self.seconds,
        }


class History(dict[str, list[float]]):
    """One list per metric over all phases, such as `history["val_loss"]`; `phases` holds a record for each phase.

    An epoch for which a metric is not known, such as one that a user's callback logs now and then, holds NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[PhaseRecord] = []

    def add(self, logs: dict[str, list[float]], record: PhaseRecord) -> None:
        """Append one phase."""
        before = sum(phase.epochs for phase in self.phases)
        for name, values in logs.items():
            known = self.setdefault(name, [])
            known += [math.nan] * (before - len(known))
            known.extend(float(value) for value in values)
        self.phases.append(record)
        for values in self.values():
            values += [math.nan] * (before + record.epochs - len(values))

    def write_csv(self, path: Path) -> None:
        """Write a row per epoch: the phase's name, the epoch counted over all phases, and every metric."""
        phases = [record.phase.name for record in self.phases for _ in range(record.epochs)]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", "epoch", *self])
            for epoch, (phase, *values) in enumerate(zip(phases, *self.values(), strict=True), start=1):
                writer.writerow([phase, epoch, *values])


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
        output: A folder for `history.csv` and TensorBoard `logs/`. Defaults to None: nothing is written.
        callbacks: Keras callbacks; each sees the whole model. Keras calls them once more per phase.
        seed: Decides the order of the examples, augmentation and dropout. Defaults to 0.
        batch_size: Examples per step over all devices, at least 1. Defaults to 32.
        max_steps: Steps per phase at the most, to try things out. Defaults to None: no bound.
        quiet: Whether to print nothing. Defaults to True.

    Returns:
        The history: a dict of one list per metric over all phases, with `.phases`.

    Raises:
        InputError: If the model's outputs do not fit the task, or nothing would train.

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
    folder = Path(output) if output else None
    run = _Run(model, task, data, tuple(callbacks), seed, batch_size, max_steps, quiet, folder)
    history = History()
    for number, phase in enumerate(strategy):
        history.add(*_run_phase(run, phase, number, first_epoch=sum(record.epochs for record in history.phases)))
    if folder:
        history.write_csv(folder / "history.csv")
    return history


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
    quiet: bool
    output: Path | None

    def steps(self, phase: Phase) -> tuple[int, int]:
        """Return `(steps per epoch, epochs)` of a phase."""
        per_epoch = order.steps_per_epoch(len(self.data.train), self.batch_size)
        if self.max_steps is None:
            return per_epoch, phase.epochs
        return min(per_epoch, self.max_steps), 1


class _Trainee(keras.Model):
    """The part of a network that trains, while it trains; never saved or returned.

    Its train step gives each example the same share in the step, also where the last batch of an epoch does not
    split evenly over the devices: Keras averages the devices' means instead.
    """

    def train_step(self, data: Batch) -> dict[str, tf.Tensor]:
        inputs, targets, weights = data
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        here = tf.cast(tf.shape(weights)[0], tf.float32)
        everywhere = here if replicas == 1 else context.all_reduce(tf.distribute.ReduceOp.SUM, here)
        share = here * replicas / everywhere
        with tf.GradientTape() as tape:
            outputs = self(inputs, training=True)
            # Keras' losses are divided by the number of devices already, because gradients are summed over them.
            loss = self.compute_loss(inputs, targets, outputs, weights * share, training=True)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self._loss_tracker.update_state(loss * replicas, sample_weight=everywhere / replicas)
        return self.compute_metrics(inputs, targets, outputs, sample_weight=weights)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Create metrics from one device's share of a batch; Keras averages the shares, which fails if they differ."""
        strategy = self.distribute_strategy
        if iterator is not None and strategy.num_replicas_in_sync > 1:
            _, _, batches = next(iter(iterator))
            data_batch = keras.tree.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


def _run_phase(run: _Run, phase: Phase, number: int, first_epoch: int) -> tuple[dict[str, list[float]], PhaseRecord]:
    began = time.monotonic()
    audit = trainable.set_trainable(run.model, phase.selector, train_batch_norm=phase.train_batch_norm)
    parts = prefix.cut(run.model)
    _seed_generators(run.model, run.seed, number)
    steps_per_epoch, epochs = run.steps(phase)
    last_epoch = first_epoch + epochs
    trainee = _compiled(run, phase, parts.trained, steps_per_epoch, epochs)
    training, validation = _inputs(run, phase, number, parts)
    keep = KeepBest(trainee, phase.patience)
    before = trainee.evaluate(validation, return_dict=True, verbose=0)
    keep.consider(0, before["loss"], before["loss_error"])
    logs = trainee.fit(
        training,
        shuffle=False,  # the batches come in the order that the seed decides
        steps_per_epoch=steps_per_epoch,
        initial_epoch=first_epoch,
        epochs=last_epoch,
        validation_data=validation,
        callbacks=_callbacks(run, phase, keep, trainee, last_epoch, steps_per_epoch),
        verbose=0,
    ).history
    record = PhaseRecord(
        phase,
        audit,
        parts.frozen_share,
        epochs=len(logs["loss"]),
        best_epoch=keep.kept_epoch,
        seconds=time.monotonic() - began,
    )
    return logs, record


def _inputs(run: _Run, phase: Phase, number: int, parts: prefix.Cut) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Return what goes into the trained part: the training batches of the whole phase, and the validation batches."""
    steps_per_epoch, epochs = run.steps(phase)
    training = order.batches(
        run.data.train,
        run.batch_size,
        seed=run.seed,
        phase=number,
        steps=steps_per_epoch * epochs,
        augmentation=phase.augmentation,
    )
    replicas = distribution.strategy_of(run.model).num_replicas_in_sync
    validation = order.in_order(run.data.validation, even_batch(len(run.data.validation), run.batch_size, replicas))
    if parts.frozen is None:
        return training, validation
    infer = prefix.as_constant_function(parts.frozen)
    return _through(infer, training), _through(infer, validation)


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


def _compiled(run: _Run, phase: Phase, part: keras.Model, steps_per_epoch: int, epochs: int) -> keras.Model:
    from_logits = builders.outputs_are_logits(run.model)
    loss = run.task.loss(from_logits, run.data.train.targets)
    with distribution.strategy_of(run.model).scope():
        trainee = _Trainee(_unpacked(part.inputs), _unpacked(part.outputs), name="trainee")
        trainee.dtype_policy = run.model.dtype_policy  # Keras scales the loss of float16 models by this
        trainee.compile(
            optimizer=_optimizer(run.model, phase, steps_per_epoch, epochs),
            loss=loss,
            metrics=run.task.metrics(from_logits),
            weighted_metrics=[LossError(loss)],
        )
    return trainee


def _optimizer(model: keras.Model, phase: Phase, steps_per_epoch: int, epochs: int) -> keras.optimizers.Optimizer:
    averaged_steps = phase.averaging * steps_per_epoch
    return LayerwiseAdamW(
        learning_rate=learning_rate(phase, steps_per_epoch * epochs),
        weight_decay=phase.weight_decay,
        multipliers=trainable.rate_multipliers(model, phase.layer_decay),
        use_ema=averaged_steps > 0,
        ema_momentum=math.exp(-1 / averaged_steps) if averaged_steps else 0.99,
    )


def learning_rate(phase: Phase, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a phase's learning rate per step: a linear rise, then a cosine to zero or a constant.

    Args:
        phase: The phase.
        steps: Steps of the whole phase.

    Example:
        >>> rate = learning_rate(Phase("probe", learning_rate=0.1, warmup=0.5), steps=4)
        >>> [round(float(rate(step)), 3) for step in range(5)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    warmup = round(phase.warmup * steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else phase.learning_rate,
        decay_steps=max(steps - warmup, 1),
        alpha=0.0 if phase.schedule == "cosine" else 1.0,
        warmup_target=phase.learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def _callbacks(
    run: _Run, phase: Phase, keep: KeepBest, trainee: keras.Model, last_epoch: int, steps: int
) -> keras.callbacks.CallbackList:
    own: list[keras.callbacks.Callback] = [LearningRateLog(), keep]
    if phase.averaging:
        own.insert(0, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    if run.output:
        own.append(keras.callbacks.TensorBoard(str(run.output / "logs"), write_graph=False))
    if not run.quiet:
        own.append(Progress(phase.name, last_epoch))
    return callback_list(own, run.callbacks, trainee, run.model, {"epochs": last_epoch, "steps": steps})


def _seed_generators(model: keras.Model, seed: int, phase: int) -> None:
    """Give every Dropout and random layer a state that depends on the seed and the phase alone.

    They are counters that no saver of Keras keeps; without this a phase's dropout would depend on what ran before.
    """
    generators = [variable for variable in model.variables if "seed_generator" in variable.path]
    for number, variable in enumerate(generators):
        words = np.random.SeedSequence((seed, phase, number)).generate_state(2)
        variable.assign(np.array(words, variable.dtype))


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
