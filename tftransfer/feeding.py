"""What goes into the part of a network that trains: pictures, or what the frozen part gave for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import tensorflow as tf

from tftransfer import features, memory, prefix, trainable
from tftransfer.constants import Constants
from tftransfer.data import Data, Examples, order
from tftransfer.data.augment import named
from tftransfer.features import Kept
from tftransfer.inference import chunk_of
from tftransfer.prefix import Cut
from tftransfer.shelf import Shelf
from tftransfer.strategies import Phase, Strategy
from tftransfer.trainee import Below, unpacked

CACHES = ("auto", "off")
WATCHED = "watched"
"""In their place, where a callback looks at the model at every batch: nothing is kept then either."""

_OFF = {"off": "switched off", WATCHED: "a callback looks at every batch"}
_AT_ONCE = 64  # steps in one call of a graph at the most, so that a signal is heard soon
_SHARED = 0.25  # of the network's work that is worth keeping apart for later phases
_PAYS = 1.5  # keep features that are used so many times, weighted by the share of the work that they save


@dataclass(frozen=True)
class Steps:
    """Which steps of a phase are to be fed.

    Args:
        seed, phase: Decide the order of the examples and their augmentation.
        per_epoch, epochs: How many.
        start: How many were done before.
        batch_size: Examples per step.
        replicas: How many devices share them.
        done: How many an earlier call of the same run has done. Defaults to 0.
        micro_batches: Into how many parts a batch is divided. Defaults to 1.
        most_frozen: Examples that fit into memory in the frozen part. Defaults to 32.
    """

    seed: int
    phase: int
    per_epoch: int
    epochs: int
    start: int
    batch_size: int
    replicas: int
    done: int = 0
    micro_batches: int = 1
    most_frozen: int = features.BATCH

    @property
    def at_a_time(self) -> int:
        """How many examples of a batch go through what trains at once, over all devices."""
        return -(-self.batch_size // self.micro_batches)

    @property
    def chunk(self) -> int:
        """How many examples go through the frozen part at once."""
        return min(chunk_of(self.at_a_time, self.replicas), self.most_frozen)

    @property
    def at_once(self) -> int:
        """How many steps a graph takes in one call, where they are small: a divisor of those that are left."""
        common = math.gcd(self.per_epoch, self.done)
        return next(count for count in range(min(_AT_ONCE, common), 0, -1) if common % count == 0)


@dataclass(frozen=True)
class Use:
    """A phase as a user of what is frozen in it.

    Args:
        phase: What is to run.
        epochs: How many it will have.
        share: Of the network's work that is frozen in it, in [0, 1].
    """

    phase: Phase
    epochs: int
    share: float

    @property
    def views(self) -> tuple[str, int]:
        """Which views of the training examples it sees, and how many of each."""
        return _views(self.phase)

    def pays(self, views: int) -> bool:
        """Whether so many views of each example are used often enough to keep what is frozen of them."""
        return self.epochs / (1 if self.phase.average_views else views) * self.share > _PAYS

    @property
    def keeps(self) -> bool:
        """Whether what is frozen of the training examples is worth keeping."""
        return _repeats(self.phase) and self.pays(self.views[1])


def pays_to_share(uses: Sequence[Use], share: float) -> bool:
    """Whether what is frozen in all of several phases should be kept apart, and what only some freeze computed from it.

    Each later phase that sees the same views then saves that much of one epoch; where it is little, the frozen part of
    each phase stays in one piece, which is also what other runs find. How many phases there are makes no difference:
    all of them must come to the same.

    Args:
        uses: The phases; the first is about to run.
        share: Of the network's work that is frozen in all of them.
    """
    first, *later = uses
    again = [use for use in later if use.keeps and use.views == first.views]
    return first.keeps and bool(again) and share > _SHARED


def still_frozen(
    model: keras.Model, strategy: Strategy, epochs_of: Callable[[Phase], int]
) -> tuple[tuple[Phase, ...], list[keras.Variable]]:
    """Return the phases after the first whose frozen part is worth to be kept for both, and what trains in all of them.

    An adapter changes kernels that are below what trains, and a phase that trains everything leaves nothing: no phase
    from there on counts. What trains is set as one of the phases has it.

    Args:
        model: A functional model.
        strategy: What is left of it; the first phase is about to run.
        epochs_of: How many epochs a phase will have.
    """
    uses: list[Use] = []
    variables: list[keras.Variable] = []
    for phase in strategy if len(strategy) > 1 else ():
        trainable.set_trainable(model, phase.selector, train_batch_norm=phase.train_batch_norm)
        share = 0.0 if phase.adapter else prefix.work_below(model)
        if not share:
            break
        uses.append(Use(phase, epochs_of(phase), share))
        variables += model.trainable_variables
    if len(uses) < 2 or not pays_to_share(uses, prefix.work_below(model, variables)):
        return (), []
    return tuple(use.phase for use in uses[1:]), variables


@dataclass(frozen=True)
class Feed:
    """Batches for one phase.

    Args:
        training: Of the whole phase, one after the other.
        validation: Each example once.
        below_training, below_validation: What they have to go through first; None if they come out of it.
        seconds: What computing or finding what is kept took.
        summary: What is kept where, or why nothing is.
        waited: Says for how many seconds training has waited for batches so far.
    """

    training: tf.data.Dataset
    validation: tf.data.Dataset
    below_training: Below | None
    below_validation: Below | None
    seconds: float
    summary: str
    waited: Callable[[], float]

    @property
    def computes(self) -> bool:
        """Whether something that is frozen is computed in the steps."""
        return self.below_training is not None or self.below_validation is not None


Shared = dict[tuple[str, str, str, int], Kept]
"""What is kept for several phases: by digest of the frozen part, split, augmentation and number of views."""


def feed(
    data: Data,
    phase: Phase,
    steps: Steps,
    parts: Cut,
    below: Constants | None,
    *,
    cache: str,
    shelf: Shelf | None,
    later: Sequence[Phase] = (),
    shared: Shared | None = None,
) -> Feed:
    """Prepare a phase's batches; where it pays and there is room, what is frozen is computed now and kept.

    Args:
        data: Training and validation examples.
        phase: What is about to run.
        steps: Which part of it.
        parts: The network in two parts.
        below: The frozen one as a function, if there is one.
        cache: One of `CACHES`, or `WATCHED`.
        shelf: Where it is kept beyond the run.
        later: Phases to come that leave the lowest stage of `below` frozen too: what that gives for views that both
            need is kept as well, so that the rest is computed from it. Defaults to none.
        shared: What is kept so for several phases; it is added to. Defaults to nothing.
    """
    began, noted = time.monotonic(), len(shelf.notes) if shelf else 0
    use = Use(phase, steps.epochs, parts.work_share)
    keeper = _Keeper(steps, use, below, shelf, later, _still_used({} if shared is None else shared, below))
    training, summary = _kept_training(data, phase, keeper, cache)
    validation = keeper.keep("validation", data.validation, "none", 1) if cache == "auto" else None
    if below and not (training and validation):
        below.make()
    if below and below.bfloat16:
        summary += f"; {_about_bfloat16(below, data.train)}"
    batches, waited = _clocked(
        order.batches(
            data.train,
            steps.batch_size,
            seed=steps.seed,
            phase=steps.phase,
            steps=steps.per_epoch * steps.epochs - steps.done,
            start=steps.start + steps.done,
            augmentation=phase.augmentation,
            views=phase.views,
            average_views=phase.average_views,
            read=_read(training),
        )
    )
    if steps.micro_batches > 1:
        batches = _few_at_a_time(batches)
    return Feed(
        batches,
        order.in_order(data.validation, steps.at_a_time, _read(validation)),
        None if training else below,
        None if validation else below,
        time.monotonic() - began,
        "; ".join([summary, *(shelf.notes[noted:] if shelf else ())]),
        waited,
    )


def _few_at_a_time(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Bound the batches that are read ahead, where one is large already."""
    options = tf.data.Options()
    options.autotune.ram_budget = memory.room().least // 8
    return batches.with_options(options)


def _clocked(batches: tf.data.Dataset) -> tuple[tf.data.Dataset, Callable[[], float]]:
    """Measure how long it takes from asking for a batch to having it, all batches together."""
    waited = tf.Variable(0.0, trainable=False, dtype=tf.float64)
    plain = tf.autograph.experimental.do_not_convert
    clock = tf.data.Dataset.range(batches.cardinality()).map(plain(lambda _: tf.timestamp()))

    def note(asked: tf.Tensor, batch: Any, given: tf.Tensor) -> Any:
        waited.assign_add(given - asked)
        return batch

    return tf.data.Dataset.zip(clock, batches, clock).map(plain(note)), lambda: float(waited)


def _kept_training(data: Data, phase: Phase, keeper: _Keeper, cache: str) -> tuple[Kept | None, str]:
    """Return what is kept of the training split, and what there is to say about it."""
    if keeper.below is None:
        return None, "nothing is frozen"
    if cache in _OFF:
        return None, f"computed in every epoch: {_OFF[cache]}"
    if not _repeats(phase):
        return None, "computed in every epoch: each has new views of the examples"
    if not keeper.use.keeps:
        return None, "computed in every epoch: to keep it would not pay"
    kept = keeper.keep("train", data.train, *keeper.use.views)
    return kept, str(kept or "computed in every epoch: there is no room to keep it")


def _about_bfloat16(below: Constants, examples: Examples) -> str:
    pictures = next(iter(order.in_order(examples, features.BATCH)))[0]
    error = below.bfloat16_error(pictures)
    return f"in bfloat16, which differs from float32 by {error:.1%} in norm on the first {len(pictures)} pictures"


def _repeats(phase: Phase) -> bool:
    """Whether a phase sees the same views of its examples again."""
    return named(phase.augmentation) == named("none") or phase.views > 0


def _views(phase: Phase) -> tuple[str, int]:
    return phase.augmentation, max(phase.views, 1)


def _still_used(shared: Shared, below: Constants | None) -> Shared:
    """Let go of what this phase does not use, so that none after it does either."""
    if shared:
        used = [part.digest for part in (below, below and below.lower) if part]
        for name in [name for name in shared if name[0] not in used]:
            del shared[name]
    return shared


@dataclass(frozen=True)
class _Keeper:
    """Keeps what is frozen in a phase, and what is frozen below that in later ones too."""

    steps: Steps
    use: Use
    below: Constants | None
    shelf: Shelf | None
    later: Sequence[Phase]
    shared: Shared
    held: list[Kept] = field(default_factory=list)

    def keep(self, split: str, examples: Examples, augmentation: str, views: int) -> Kept | None:
        """Return what is kept of one split, computed now unless it is at hand; None if it does not pay or fit."""
        below = self.below
        if below is None or not self.use.pays(views):
            return None
        if not (below.lower or self.shared) or not below.digest:
            return self._computed(below, examples, augmentation, views)
        name = (split, augmentation, views)
        if (below.digest, *name) in self.shared:
            return replace(self.shared[below.digest, *name], computed=0)
        lower = None
        if below.lower and self._is_used_again(*name):
            lower = self.shared.get((below.lower.digest, *name))
            lower = lower or self._computed(below.lower, examples, augmentation, views)
            if lower:
                self.shared[below.lower.digest, *name] = lower
        return self._computed(below, examples, augmentation, views, lower)

    def _is_used_again(self, split: str, augmentation: str, views: int) -> bool:
        """Whether a later phase sees these views of a split."""
        return any(split == "validation" or _views(one) == (augmentation, views) for one in self.later)

    def _computed(
        self, below: Constants, examples: Examples, augmentation: str, views: int, lower: Kept | None = None
    ) -> Kept | None:
        kept = features.keep(
            below,
            examples,
            named(augmentation),
            views=views,
            seed=self.steps.seed,
            room=features.room(self.shelf, (*self.shared.values(), *self.held)),
            key=below.digest if self.shelf else "",
            lower=lower,
        )
        self.held.extend([kept] if kept else [])
        return kept


def _read(kept: Kept | None) -> order.Read | None:
    if kept is None:
        return None
    return lambda chosen, view: unpacked(kept.read(chosen, view))
