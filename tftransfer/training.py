"""`fine_tune`: run a strategy's phases one after the other, and leave a plain trained model behind."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tftransfer import (
    builders,
    checkpoints,
    constants,
    distribution,
    features,
    feeding,
    locks,
    memory,
    mixing,
    penalties,
    prefix,
    schedules,
    tensor_files,
    trainable,
)
from tftransfer.adapters import Adapter, Attached, Reached, adapter_of, base_digest
from tftransfer.averages import Ema, WiseFt
from tftransfer.callbacks import (
    Forgiving,
    KeepBest,
    LearningRateLog,
    ProgressBar,
    SwapAverages,
    TellSkipped,
    callback_list,
    hears_of_batches,
    looks_at_batches,
)
from tftransfer.console import audit_table, literal_console, print_table
from tftransfer.data import Data, order
from tftransfer.errors import check, is_number
from tftransfer.guard import Guard
from tftransfer.history import History, PhaseRecord
from tftransfer.interruption import Signals
from tftransfer.metrics import LossError
from tftransfer.optimizers import LayerwiseAdamW, LayerwiseSGD, Moment, own, renamed
from tftransfer.penalties import Source
from tftransfer.planning import below_the_head, check_call, check_strategy, functional, plan
from tftransfer.recording import Recorder, Subject, spent_before
from tftransfer.shelf import Shelf, shelf_at
from tftransfer.soundness import check_outputs
from tftransfer.strategies import Phase, Strategy
from tftransfer.tasks import Task
from tftransfer.trainee import Extras, Trainee, unpacked


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
    time_limit: float | None = None,
    save_every: float = 60.0,
    cache: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    cache_dtype: str = "float32",
    frozen_dtype: str = "float32",
    quiet: bool = True,
) -> History:
    """Train a model in place, phase by phase.

    Each phase sets what trains, cuts the network below it, runs the frozen part as a function of constants outside
    `fit`, compiles the rest once and trains it. At its end the best weights by validation loss are restored, the latest
    where chance can't tell epochs apart (`callbacks.KeepBest`); those that the phase began with count too, so that no
    phase ends worse on validation than it began by more than one standard error.

    What the last phase trained stays open on the model and the rest closed: `tft.set_trainable(model, "all")` opens
    all of it (`model.trainable = True` does nothing in Keras 3 where it is True already).

    Args:
        model: From a builder, or any functional model from pictures to the task's outputs; left uncompiled.
        task: What the outputs mean.
        data: Training and validation examples, from `data.load`.
        strategy: A tuple of phases, from `strategies`.
        output: A folder for `history.csv`, TensorBoard `logs/` and `checkpoints/`, which no other run may use at the
            same time. SIGINT (Ctrl-C), SIGTERM and SIGHUP then wait until the step that runs is written down; a second
            one does not. Defaults to None: nothing is written.
        callbacks: Keras callbacks; each sees the whole model. Keras calls them once more per phase. Where one may
            look at the model at every batch, nothing that is frozen is kept, as for `cache="off"`.
        seed: Decides the order of the examples, augmentation and dropout. Defaults to 0.
        batch_size: Examples per step over all devices, at least 1. Defaults to 32.
        max_steps: Steps per phase at the most, to try things out. Defaults to None: no bound.
        source: The old task, from `checks.forgetting.source_probe`; `EWC` and `DistillFromSource` use it. Defaults to
            None.
        adapter: A LoRA adapter to train on from; the model must be its base and the first phase its kind. Defaults to
            None.
        resume: Whether to go on from the last step that `output` holds, if it is of the same network, strategy, data,
            seed and versions; the result is then the same bit for bit as without the interruption. Of a user's
            callbacks, the attributes that changed while training are kept too where they hold numbers, texts and
            arrays, alone or in lists and dicts; files that one writes are its own (`CSVLogger` needs `append=True`).
            Defaults to True.
        time_limit: Seconds after which training ends, with the best weights so far and `history.complete` False; a
            later call goes on. Defaults to None: never.
        save_every: Seconds between checkpoints within a phase; longer ones where they would take more than 2% of the
            time, 0 for one after every step. Defaults to 60.
        cache: `"auto"` keeps what the frozen part gives where that pays, `"off"` computes it in every epoch; the result
            is the same bit for bit. Defaults to `"auto"`.
        cache_dir: A folder where it is kept for later runs too, and where it does not fit into memory. Defaults to
            None: memory alone.
        cache_dtype: `"float16"` rounds it, kept or not, which takes half the room. Defaults to `"float32"`.
        frozen_dtype: `"bfloat16"` computes it so, on processors that can. Its error is measured and said in the report.
            Defaults to `"float32"`.
        quiet: Whether to print nothing. Defaults to True.

    Returns:
        The history: a dict of one list per metric over all phases, with `.phases` and `.adapter`.

    Raises:
        InputError: If the model's outputs do not fit the task, nothing would train, a phase asks for what the network
            does not have, an example or a weight is not sound, or `output` holds phases of another call or is in use
            by another run.
        DivergedError: If steps go on to have a loss or gradients that are not finite, see `guard.Guard`. The model has
            its best weights then.

    Example:
        >>> import tftransfer as tft
        >>> data, task = tft.data.load("demo", image_size=(32, 32))
        >>> model = tft.builders.image_classifier("MobileNet-0.25", 10, image_size=32, weights=None)
        >>> history = tft.fine_tune(model, task, data, tft.strategies.linear_probe(epochs=1), max_steps=1)
        >>> len(history["loss"])
        1
    """
    model = functional(model)
    check_call(model, task, data, batch_size, callbacks)
    check_strategy(model, strategy, task, adapter)
    _check_kept(cache, cache_dtype, frozen_dtype)
    for name, seconds in (("time_limit", time_limit), ("save_every", save_every)):
        fits = seconds is None or (is_number(seconds) and seconds >= 0)
        check(fits, name, "a number of seconds from 0", seconds)
    folder, shelf = Path(output) if output else None, shelf_at(cache_dir)
    run = _Run(
        model=model,
        task=task,
        data=data,
        callbacks=tuple(callbacks),
        seed=seed,
        batch_size=batch_size,
        max_steps=max_steps,
        source=source,
        quiet=quiet,
        output=folder,
        adapter=adapter,
        cache=cache,
        shelf=shelf,
        narrow=cache_dtype == "float16",
        bfloat16=frozen_dtype == "bfloat16",
        save_every=save_every,
        deadline=math.inf if time_limit is None else time.monotonic() + time_limit,
    )
    base = base_digest(model) if folder else ""
    dtypes = cache_dtype if frozen_dtype == "float32" else f"{cache_dtype} of {frozen_dtype}"
    replicas = distribution.strategy_of(model).num_replicas_in_sync
    network = features.described(model) if folder else ""
    given = (strategy, seed, batch_size, max_steps, data, task, source, adapter)
    call = checkpoints.call_of(*given, base, dtypes, network, replicas)
    with contextlib.ExitStack() as stack:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(folder))
            run = dataclasses.replace(run, call=call)
        if folder or not quiet:
            stack.enter_context(run.signals)
        found = _earlier(folder, call, resume)
        stack.enter_context(prefix.nodes_as_they_were(model))
        history = _run_phases(run, strategy, found)
        if folder:
            _conclude(run, folder, history)
        history.notes += run.unwritten.values()
    return history


def _check_kept(cache: str, cache_dtype: str, frozen_dtype: str) -> None:
    """Refuse what cannot be kept, or computed here."""
    check(cache in feeding.CACHES, "cache", f"one of {', '.join(feeding.CACHES)}", cache)
    check(cache_dtype in ("float32", "float16"), "cache_dtype", "float32 or float16", cache_dtype)
    check(frozen_dtype in ("float32", "bfloat16"), "frozen_dtype", "float32 or bfloat16", frozen_dtype)
    can = frozen_dtype == "float32" or constants.has_bfloat16()
    needed = "float32 here: bfloat16 needs a processor with AVX512-BF16 or AMX, and no GPU"
    check(can, "frozen_dtype", needed, "bfloat16")


def _conclude(run: _Run, folder: Path, history: History) -> None:
    """Write the history, and remove the checkpoints that nobody needs any more."""
    try:
        history.write_csv(folder / "history.csv")
    except OSError as error:
        run.tell_unwritten("history.csv", error)
    if not history.complete:
        return
    try:
        checkpoints.finish(folder)
    except OSError as error:
        run.tell_unwritten("older checkpoints", error, "removed")


def _earlier(folder: Path | None, call: checkpoints.Call, resume: bool) -> checkpoints.Found:
    """Return what an earlier call has left to go on from."""
    if folder and resume:
        return checkpoints.latest(folder, call)
    if folder:
        checkpoints.clear(folder)
    return checkpoints.Found(None, None, ())


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
    cache: str
    shelf: Shelf | None
    narrow: bool
    bfloat16: bool
    save_every: float
    deadline: float
    call: checkpoints.Call | None = None
    signals: Signals = field(default_factory=Signals)
    shared: feeding.Shared = field(default_factory=dict)
    unwritten: dict[tuple[str, int | None], str] = field(default_factory=dict)

    def steps(self, phase: Phase) -> tuple[int, int]:
        """Return `(steps per epoch, epochs)` of a phase."""
        per_epoch = order.steps_per_epoch(len(self.data.train), self.batch_size)
        if self.max_steps is None:
            return per_epoch, phase.epochs
        return min(per_epoch, self.max_steps), 1

    def feed_steps(self, number: int, phase: Phase, done: int = 0) -> feeding.Steps:
        """Return which steps of a phase are to be fed."""
        place, start = self.place(number)
        replicas = distribution.strategy_of(self.model).num_replicas_in_sync
        return feeding.Steps(self.seed, place, *self.steps(phase), start, self.batch_size, replicas, done)

    def try_to_save(self, save: Callable[[Path, checkpoints.Call], None]) -> None:
        """Write a checkpoint; where that fails, say so once and go on with the one before."""
        if not (self.output and self.call):
            return
        try:
            save(self.output, self.call)
        except OSError as error:
            self.tell_unwritten("a checkpoint", error)

    def tell_unwritten(self, what: str, error: Exception, done: str = "written") -> None:
        """Say once that something cannot be written, which does not end training."""
        key = what, getattr(error, "errno", None)
        if key not in self.unwritten:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            self.unwritten[key] = f"While training, {what} could not be {done} ({reason}); training went on."
            literal_console(stderr=True).print(f"{what} cannot be {done} ({reason}): training goes on", soft_wrap=True)

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
    _set_generators(run.model, kept.generators)
    phase = strategy[len(kept.history.phases) - 1]
    attached = None
    if kept.factors and phase.adapter:
        with distribution.strategy_of(run.model).scope():
            attached = phase.adapter.prepare(run.model, run.seed)
        attached.set(kept.factors)
    return _Carried(renamed(kept.moments, _paths(run.model)), attached, kept.base, kept.generators), kept.history


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
        steps + min(per_epoch * history.phases[-1].best_epoch, history.phases[-1].steps),
        renamed(carried.moments, trainable.places(run.model)),
        carried.generators,
    )
    adapter = adapter_of(run.model, carried.attached, run.task.labels, carried.base, reached)
    carried.attached.merge()
    return adapter


def _run_phases(run: _Run, strategy: Strategy, found: checkpoints.Found) -> History:
    """Train the phases that are left, and write down after each what a later call goes on from."""
    carried, history = _begin(run) if found.kept is None else _go_on(run, strategy, found.kept)
    history.notes += found.notes
    history.seconds_before = sum(record.seconds for record in history.phases) + spent_before(found.progress).total
    for note in found.notes:
        literal_console(stderr=True).print(note, soft_wrap=True)
    first = len(history.phases)
    for number in range(first, len(strategy)):
        if history.phases and time.monotonic() >= run.deadline:
            history.complete = False
            break
        if number or run.adapter is None:
            carried = _continued(run, carried, strategy[number])
        carried = _run_phase(run, strategy, number, history, carried, found.progress if number == first else None)
        if not history.complete:
            break
        _set_generators(run.model, carried.generators)  # of the same moment as the weights that stay, if one is known
        moments = renamed(carried.moments, trainable.places(run.model))
        carried = dataclasses.replace(carried, generators=_generators(run.model))
        left = (carried.attached, carried.base, moments, carried.generators)
        run.try_to_save(partial(_save_phase, model=run.model, history=history, left=left))
        run.signals.release()
    history.adapter = _finish_adapter(run, carried, history)
    return history


def _save_phase(folder: Path, call: checkpoints.Call, model: keras.Model, history: History, left: tuple) -> None:
    checkpoints.save(folder, call, model, history, *left)


def _run_phase(
    run: _Run,
    strategy: Strategy,
    number: int,
    history: History,
    carried: _Carried,
    progress: checkpoints.Progress | None,
) -> _Carried:
    """Train one phase, add it to the history, and return what the next one may go on with."""
    began, phase = time.monotonic(), strategy[number]
    later, variables = feeding.still_frozen(run.model, strategy[number:], lambda one: run.steps(one)[1])
    audit, parts = plan(run.model, phase, carried.attached, variables)
    if not run.quiet:
        print_table(literal_console(), audit_table(f"What trains: {phase.name}", audit, _penalty_basis(run, phase)))
    _seed_generators(run, number)
    steps, division = _fitting(run, number, phase, parts, progress)
    below = _below(run, parts, steps.chunk)
    trainee = _compiled(run, phase, number, parts.trained, below, carried, steps.per_epoch * steps.epochs)
    feed = _fed(run, phase, steps, parts, below, later, trainee)
    matters = _moments_matter(strategy, number)
    keep = KeepBest(trainee, phase.patience, remember=lambda: _state(run, trainee) if matters else {"moments": {}})
    _consider_beginning(run, trainee, keep, feed.validation)
    guard = _guarded(trainee, keep)
    start = trainee.get_weights() if isinstance(phase.average, WiseFt) else []
    if progress:
        start = list(tensor_files.in_order(progress.kinds.get("start", {})))
    subject = Subject(trainee, run.model, keep, run.callbacks, start)
    recorder = _recorder(run, number, steps, history, subject, progress, division, began, feed.seconds)
    fitting = time.monotonic()
    logs = _fitted(run, phase, steps, feed, keep, trainee, recorder)
    fitting = time.monotonic() - fitting
    history.complete = not recorder.out_of_time
    tuned_share = _interpolate(phase, trainee, start, feed.validation)
    spent = recorder.spent
    record = PhaseRecord(
        phase=phase,
        audit=audit,
        frozen_share=parts.frozen_share,
        epochs=len(logs["loss"]),
        steps=recorder.steps,
        best_epoch=keep.kept_epoch,
        seconds=spent.total,
        tuned_share=tuned_share,
        penalty_basis=_penalty_basis(run, phase),
        extract_seconds=spent.extract,
        store=feed.summary,
        waited_share=feed.waited() / fitting,
        save_seconds=spent.save,
        skipped=guard.skipped().total,
        rollbacks=guard.skipped().rollbacks,
        faults=guard.sentence(),
        micro_batches=division.micro_batches,
        memory=division.reason,
    )
    history.add(logs, record)
    return dataclasses.replace(carried, **keep.kept)


def _consider_beginning(run: _Run, trainee: Trainee, keep: KeepBest, validation: tf.data.Dataset) -> None:
    """Let the weights that a phase begins with count among those that may be kept."""
    before = trainee.evaluate(validation, return_dict=True, verbose=0)
    if not math.isfinite(before["loss"]):
        check_outputs(trainee.answer, validation, run.data.validation.names)
    keep.consider(0, before["loss"], before["loss_error"])


def _recorder(
    run: _Run,
    number: int,
    steps: feeding.Steps,
    history: History,
    subject: Subject,
    progress: checkpoints.Progress | None,
    division: memory.Division,
    began: float,
    extracted: float,
) -> Recorder:
    """Return the callback that writes the phase down, with everything put back that an earlier call has left."""
    if progress:
        subject.put_back(progress)

    def write(now: checkpoints.Progress) -> None:
        run.try_to_save(partial(checkpoints.save_progress, progress=now))

    first = sum(record.epochs for record in history.phases)
    return Recorder(
        subject,
        write if run.output else None,
        number,
        steps.per_epoch,
        range(first, first + steps.epochs),
        began_with=progress,
        every=run.save_every,
        deadline=run.deadline,
        signals=run.signals,
        decided={"division": vars(division), "most_frozen": steps.most_frozen},
        began=began,
        extracted=extracted,
    )


def _fitting(
    run: _Run, number: int, phase: Phase, parts: prefix.Cut, progress: checkpoints.Progress | None
) -> tuple[feeding.Steps, memory.Division]:
    """Return a phase's steps as they fit into memory: divided as was decided earlier, or as is decided now."""
    steps = run.feed_steps(number, phase, progress.steps if progress else 0)
    image_size, room = run.data.train.pictures.image_size, memory.room()
    if progress:
        division = memory.Division(**progress.told["division"])
    else:
        views = phase.views if phase.average_views else 1
        division = memory.divide(parts.trained, steps.batch_size * views, image_size, room)
    if division.reason and not run.quiet:
        literal_console().print(f"{phase.name}: {division.reason}", soft_wrap=True)
    frozen = (
        progress.told["most_frozen"] if progress else memory.most_frozen(parts.frozen, steps.chunk, image_size, room)
    )
    return dataclasses.replace(steps, micro_batches=division.micro_batches, most_frozen=frozen), division


def _guarded(trainee: Trainee, keep: KeepBest) -> Guard:
    """Return the model's guard, which knows the way back from here on; a test of rates has one that does nothing."""
    guard = trainee.guard or Guard()
    guard.way_back = lambda: keep.weights
    return guard


def _names(run: _Run, steps: feeding.Steps, step: int) -> list[str]:
    """Return the names of a step's examples."""
    examples = run.data.train
    chosen = order.batch_indices(len(examples), steps.batch_size, steps.seed, steps.phase, step)
    return [examples.names[number] for number in chosen.numpy()]


def _fed(
    run: _Run,
    phase: Phase,
    steps: feeding.Steps,
    parts: prefix.Cut,
    below: constants.Constants | None,
    later: Sequence[Phase],
    trainee: Trainee,
) -> feeding.Feed:
    """Prepare a phase's batches, and the part that trains for them."""
    cache = feeding.WATCHED if looks_at_batches(run.callbacks) and run.cache == "auto" else run.cache
    feed = feeding.feed(
        run.data, phase, steps, parts, below, cache=cache, shelf=run.shelf, later=later, shared=run.shared
    )
    trainee.micro_batches = steps.micro_batches
    trainee.add_below(training=feed.below_training, validation=feed.below_validation, frozen=bool(parts.frozen))
    if parts.frozen and not feed.computes and steps.replicas == 1 and not hears_of_batches(run.callbacks):
        trainee.run_at_once(steps.at_once)
    if parts.frozen and not run.quiet:
        literal_console().print(f"What is frozen: {feed.summary}", soft_wrap=True)
    return feed


def _fitted(
    run: _Run,
    phase: Phase,
    steps: feeding.Steps,
    feed: feeding.Feed,
    keep: KeepBest,
    trainee: Trainee,
    recorder: Recorder,
) -> dict[str, list[float]]:
    """Train what trains, and return one list per metric."""
    bar = ProgressBar(phase.name, recorder.epochs.stop, literal_console(run.quiet))
    callbacks = _callbacks(run, phase, keep, trainee, recorder, bar, steps.per_epoch)
    run.signals.closing = bar.close
    if run.output:
        run.signals.hold()
    divided = steps.micro_batches > 1
    with contextlib.closing(bar), distribution.shared_statistics(run.model, divided=divided):
        return trainee.train(
            feed.training,
            feed.validation,
            epochs=recorder.left,
            per_epoch=steps.per_epoch,
            place=recorder.place,
            callbacks=callbacks,
        )


def _below(run: _Run, parts: prefix.Cut, chunk: int) -> constants.Constants | None:
    """Return the frozen part as a function of pictures of the data's size."""
    below: constants.Constants | None = None
    shapes: list[tuple[int | None, ...]] = [(*run.data.train.pictures.image_size, 3)]
    for stage in parts.stages:
        network = prefix.of_shapes(stage, shapes)
        below = constants.Constants(network, chunk, run.narrow, below, run.bfloat16)
        shapes = [output.shape[1:] for output in network.outputs]
    return below


def _state(run: _Run, trainee: keras.Model) -> dict[str, Any]:
    """Return what there is beside the weights, for somebody who goes on from here."""
    return {"moments": own(trainee.optimizer).moments(), "generators": _generators(run.model)}


def _moments_matter(strategy: Strategy, number: int) -> bool:
    """Whether somebody goes on with the optimizer's moments: the next phase, or a later call with the adapter."""
    last = number + 1 == len(strategy)
    return strategy[number].adapter is not None if last else strategy[number + 1].carry_moments


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


def _compiled(
    run: _Run,
    phase: Phase,
    number: int,
    part: keras.Model,
    below: constants.Constants | None,
    carried: _Carried,
    steps: int,
) -> Trainee:
    from_logits = builders.outputs_are_logits(run.model)
    loss = run.task.loss(from_logits, run.data.train.targets)
    with distribution.strategy_of(run.model).scope():
        trainee = Trainee(unpacked(part.inputs), unpacked(part.outputs), name="trainee")
        trainee.dtype_policy = run.model.dtype_policy  # Keras scales the loss of float16 models by this
    extras = _extras(run, phase, number, trainee, below, carried.attached)  # outside the scope: it runs the network
    with distribution.strategy_of(run.model).scope():
        trainee.add_extras(extras)
        fed = run.feed_steps(number, phase)
        guard = Guard(phase.name, fed.start, lambda step: _names(run, fed, step))
        optimizer = _optimizer(run, phase, carried.attached, steps, guard.rate)
        if phase.penalty and phase.penalty.replaces_decay:
            optimizer.exclude_from_weight_decay(list(below_the_head(run.model, trainee)))
        trainee.compile(
            optimizer=optimizer,
            loss=loss,
            metrics=run.task.metrics(from_logits),
            weighted_metrics=[LossError(loss)],
        )
        optimizer.start_from(trainee.trainable_variables, carried.moments)
        if phase.schedule != "exponential":  # a test of rates wants to see where the numbers leave
            trainee.add_guard(guard)
    return trainee


def _extras(
    run: _Run,
    phase: Phase,
    number: int,
    part: keras.Model,
    below: constants.Constants | None,
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


def _subject(run: _Run, part: keras.Model, below: constants.Constants | None) -> tuple[penalties.Subject, keras.Model]:
    """Return what a penalty is prepared for, and the network that gives outputs and features at once."""
    features = prefix.features(run.model, part)
    subject = penalties.Subject(
        body=keras.Model(part.inputs, features),
        below=_to_inputs(below),
        held=below_the_head(run.model, part),
        examples=run.data.train,
        source=run.source,
        seed=run.seed,
    )
    return subject, keras.Model(part.inputs, [*part.outputs, features])


def _to_inputs(below: constants.Constants | None) -> Callable[[tf.Tensor], Any]:
    """Return the function from pictures to what the trained part takes."""

    def to_inputs(pictures: tf.Tensor) -> Any:
        return pictures if below is None else unpacked(below(pictures))

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


def _optimizer(
    run: _Run, phase: Phase, attached: Attached | None, steps: int, factor: tf.Variable
) -> LayerwiseAdamW | LayerwiseSGD:
    multipliers = trainable.rate_multipliers(run.model, phase.layer_decay)
    averaged: dict[str, Any] = {}
    if isinstance(phase.average, Ema):
        averaged = {"use_ema": True, "ema_momentum": phase.average.momentum(run.steps(phase)[0])}
    optimizer = LayerwiseAdamW if phase.optimizer == "adamw" else LayerwiseSGD
    return optimizer(
        learning_rate=schedules.Scaled(schedules.learning_rate(phase, steps), factor),
        weight_decay=phase.weight_decay,
        multipliers={**multipliers, **(attached.multipliers(multipliers) if attached else {})},
        **averaged,
    )


def _callbacks(
    run: _Run,
    phase: Phase,
    keep: KeepBest,
    trainee: Trainee,
    recorder: Recorder,
    bar: ProgressBar,
    per_epoch: int,
) -> keras.callbacks.CallbackList:
    ours: list[keras.callbacks.Callback] = [LearningRateLog(), keep]
    if trainee.guard:
        ours.insert(1, TellSkipped(trainee.guard, run.quiet))
    if isinstance(phase.average, Ema):
        ours.insert(0, SwapAverages())
    if run.output:
        board = keras.callbacks.TensorBoard(str(run.output / "logs"), write_graph=False)
        ours.append(Forgiving(board, partial(run.tell_unwritten, "logs/")))
    ours.append(bar)
    params = {"epochs": recorder.epochs.stop, "steps": per_epoch}
    return callback_list(ours, run.callbacks, trainee, run.model, params, (recorder,))


def _generators(model: keras.Model) -> tuple[np.ndarray, ...]:
    return tuple(variable.numpy() for variable in trainable.generators(model))


def _set_generators(model: keras.Model, states: Sequence[np.ndarray]) -> None:
    """Give random layers states that were kept, if any were."""
    for variable, state in zip(trainable.generators(model), states, strict=False):
        variable.assign(state)


def _seed_generators(run: _Run, number: int) -> None:
    """Give every Dropout and random layer a state that depends on the seed and the phase alone.

    They are counters that no saver of Keras keeps; without this a phase's dropout would depend on what ran before. A
    phase that an earlier call began goes on with that call's states.
    """
    place, start = run.place(number)
    kept = run.adapter.reached.generators if run.adapter and start else ()
    for index, variable in enumerate(trainable.generators(run.model)):
        words = np.random.SeedSequence((run.seed, place, index)).generate_state(2)
        variable.assign(kept[index] if index < len(kept) else np.array(words, variable.dtype))
