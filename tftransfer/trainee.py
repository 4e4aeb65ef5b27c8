"""The part of a network that trains, while it trains: the one place with a train step of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tftransfer import distribution, micro_batches, mixing
from tftransfer.adapters import Attached
from tftransfer.guard import Guard, moving_before
from tftransfer.penalties import Term

Batch = tuple[Any, tf.Tensor, tf.Tensor]
Given = Batch | tuple[Any, tf.Tensor, tf.Tensor, tf.Tensor]
"""A batch, or a device's share of it and whether it counts in metrics, see `distribution.shared_out`."""

Below = Callable[[tf.Tensor], list[tf.Tensor]]


def unpacked(tensors: list[Any]) -> Any:
    """Return one tensor as itself, several as a tuple: the way a Keras model takes them."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


@dataclass(frozen=True)
class Extras:
    """What a phase adds to plain training; none of it is in the model afterwards.

    Args:
        key: The run's seed and the phase's number, which decide every random choice below.
        start: How many steps of the phase were done before.
        mixup, cutmix: See `mixing.mix`.
        branches: From the id of an addition to the place of its residual branch and the share of examples without it.
        adapter: Factors of LoRA beside the kernels.
        penalty: A term of the loss.
        body: From the inputs to `[outputs, features]`, for the penalty.
    """

    key: tuple[int, int] = (0, 0)
    start: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    branches: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    adapter: Attached | None = None
    penalty: Term | None = None
    body: keras.Model | None = None


class Trainee(keras.Model):
    """The part of a network that trains, while it trains; never saved or returned.

    Its train step gives each example the same share in the step, also where the last batch of an epoch does not
    split evenly over the devices, or has fewer examples than there are: Keras averages the devices' means instead.

    Where `micro_batches` is above 1, gradients are added up over so many parts of the batch, of which one at a time is
    in memory, what is frozen included. The step is that of the undivided batch but for rounding: each part counts by
    its share of the examples, a penalty once, and mixup and cutmix find their partners in the whole batch. What differs
    is what depends on examples that are computed together: dropout and stochastic depth draw anew in each part, and
    BatchNorm that trains normalises by a part, and moves its statistics once for each.
    """

    extras = Extras()
    guard: Guard | None = None
    micro_batches = 1  # parts that a step's batch is divided into, one after the other
    below_training: Below | None = None
    below_validation: Below | None = None
    frozen = False
    train_function: Any
    history: keras.callbacks.History
    _at_once: int | None = None
    _again: tuple[Any, Any, int] = (None, None, 0)  # a data set, an iterator that repeats it, its number of batches

    def add_below(self, *, training: Below | None, validation: Below | None, frozen: bool = False) -> None:
        """Run batches of pictures through the frozen part first; None where they come as its outputs already.

        Args:
            training, validation: The frozen part, or None.
            frozen: Whether there is one. Defaults to False.
        """
        self.below_training, self.below_validation, self.frozen = training, validation, frozen

    def add_extras(self, extras: Extras) -> None:
        """Take over what the phase adds; the adapter's factors become variables that train."""
        self.extras = extras
        if extras.adapter:
            self.factors = extras.adapter.variables

    def add_guard(self, guard: Guard) -> None:
        """Skip the steps whose numbers are not finite; call this after `compile`, in the scope of the strategy."""
        self.guard = guard
        if not self.optimizer.built:  # a step that may be skipped can't create variables
            self.optimizer.build(self.trainable_variables)

    def counters(self) -> dict[str, tf.Variable]:
        """Return what was skipped and what that led to: a run that goes on needs it as it needs weights and moments."""
        return self.guard.counters() if self.guard else {}

    def run_at_once(self, steps: int) -> None:
        """Run so many steps, or all of a validation, in one call of a graph: for steps that take less than a call.

        Callbacks hear of a batch only after so many, and of no batch of a validation; the numbers are the same bit for
        bit.

        Args:
            steps: A divisor of the steps per epoch.
        """
        self._at_once = self.steps_per_execution = steps

    def make_train_function(self, force: bool = False) -> Any:
        if self.train_function is None or force:
            self.train_function = self._watched()
        return self.train_function

    def _watched(self) -> Callable[[Any], Any]:
        """Return what takes steps, and goes back where too many in a row were skipped; they are traced anew then."""
        if self.guard:
            self.guard.take_over(self)
        take, begin = self._traced(), tf.constant(0)

        def run(iterator: Any) -> Any:
            nonlocal take
            done, logs = take(iterator, begin)
            while self.guard and self.guard.too_many:
                self.guard.roll_back(self)
                take = self._traced()
                if done < (self._at_once or 1):
                    done, logs = take(iterator, done)
            return logs

        return run

    def _traced(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Return a new graph of one step or many, from the number that is done to the number then, and metrics.

        One is a loop too: how TensorFlow rewrites a step, and so its last bits, depend on what the step is a part of.
        """
        return self._repeated(self.train_step, self._at_once or 1, self.guard)

    def evaluate(self, x: Any = None, *given: Any, callbacks: Any = None, **named: Any) -> Any:
        if self._at_once is None:
            shares = distribution.shared_out(x, self.distribute_strategy)  # Keras takes the number of shares for steps
            return super().evaluate(shares, *given, callbacks=callbacks, steps=int(x.cardinality()), **named)
        if self._again[0] is not x:
            count = int(x.cardinality())
            self._again = x, iter(x.repeat()), count
            self.test_function = self._repeated(self.test_step, count)
        if callbacks:  # averages of weights are put in their place by one
            callbacks.on_test_begin()
        self.reset_metrics()
        _, found = self.test_function(self._again[1], tf.constant(0))
        logs = {name: float(value) for name, value in found.items()}
        if callbacks:
            callbacks.on_test_end(logs)
        return logs

    def _repeated(
        self, step: Callable[[Given], Any], count: int, guard: Guard | None = None
    ) -> Callable[[Any, Any], tuple[Any, dict[str, tf.Tensor]]]:
        """Return a graph that takes steps until so many are done, or too many were skipped; and says the metrics."""

        def one(done: tf.Tensor, iterator: Any) -> tuple[tf.Tensor]:
            self.distribute_strategy.run(step, args=(next(iterator),))
            return (done + 1,)

        def goes_on(done: tf.Tensor) -> tf.Tensor:
            return (done < count) & guard.goes_on() if guard else done < count

        @tf.function(autograph=False)
        def run(iterator: Any, start: tf.Tensor) -> tuple[Any, dict[str, tf.Tensor]]:
            (done,) = tf.while_loop(goes_on, lambda done: one(done, iterator), (start,), parallel_iterations=1)
            return done, self.get_metrics_result()

        return run

    def train(
        self,
        batches: tf.data.Dataset,
        validation: tf.data.Dataset,
        *,
        epochs: range,
        per_epoch: int,
        place: int = 0,
        callbacks: keras.callbacks.CallbackList,
    ) -> dict[str, list[float]]:
        """Train as `fit` does, from any step of an epoch on, which `fit` cannot; `evaluate` was called before.

        Args:
            batches: All that are left, one after the other.
            validation: Each example once; evaluated after each epoch.
            epochs: Their numbers, for callbacks and logs.
            per_epoch: Steps of an epoch.
            place: How many of the first epoch's were done before. Defaults to 0.
            callbacks: With a history among them.

        Returns:
            One list per metric.
        """
        iterator = iter(distribution.shared_out(batches, self.distribute_strategy))
        self.make_train_function()
        self.stop_training = False
        callbacks.on_train_begin()
        logs: dict[str, Any] = {}
        for epoch in epochs:
            self.reset_metrics()
            callbacks.on_epoch_begin(epoch)
            self._train_epoch(iterator, range(place, per_epoch, self.steps_per_execution), callbacks)
            place = 0
            logs = {name: float(value) for name, value in self.get_metrics_result().items()}
            validated = self.evaluate(validation, callbacks=callbacks, return_dict=True, verbose=0)
            logs.update({f"val_{name}": value for name, value in validated.items()})
            callbacks.on_epoch_end(epoch, logs)
            if self.stop_training:
                break
        callbacks.on_train_end(logs)
        return self.history.history

    def _train_epoch(self, iterator: Any, steps: range, callbacks: keras.callbacks.CallbackList) -> None:
        for begin in steps:
            if self.stop_training:
                break
            callbacks.on_train_batch_begin(begin)
            logs = self.train_function(iterator)
            callbacks.on_train_batch_end(begin + steps.step - 1, logs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        adapter = self.extras.adapter
        if adapter is None:
            return super().call(inputs, training=training, mask=mask)
        call = super().call
        return adapter.call(lambda: call(inputs, training=training, mask=mask), self._kept_up())

    def _kept_up(self) -> list[keras.Variable]:
        """Return the variables that running the network may change: states of random layers, moving statistics."""
        kernels = self.extras.adapter.kernels if self.extras.adapter else ()
        fixed = {id(variable) for variable in (*kernels, *self.trainable_variables)}
        return [variable for variable in self.variables if id(variable) not in fixed]

    def answer(self, inputs: Any) -> tf.Tensor:
        """Return the outputs for a batch of validation as it comes."""
        below = self.below_validation
        return self(inputs if below is None else unpacked(below(inputs)), training=False)

    def _through(self, below: Below | None, data: Batch) -> Batch:
        """Return what goes into the part that trains.

        Whether it was kept or comes from the frozen part in the same graph must make no difference to how TensorFlow
        rewrites the rest, which depends on what it knows of shapes: it is shown the same in both cases.
        """
        inputs, targets, weights = data
        inputs = inputs if below is None else unpacked(below(inputs))
        if self.frozen:
            inputs = tf.nest.map_structure(_of_any_batch, inputs)
        return inputs, targets, weights

    def test_step(self, data: Given) -> dict[str, tf.Tensor]:
        inputs, targets, weights = self._through(self.below_validation, data[:3])
        outputs = self(inputs, training=False)
        loss = self.compute_loss(inputs, targets, outputs, weights, training=False)
        if len(data) == 4:
            targets, outputs, weights = _if_counted(data[3], targets, outputs, weights)
        count = tf.cast(tf.shape(weights)[0], tf.float32)
        self._loss_tracker.update_state(loss * self.distribute_strategy.num_replicas_in_sync, sample_weight=count)
        return self.compute_metrics(inputs, targets, outputs, sample_weight=weights)

    def train_step(self, data: Given) -> dict[str, tf.Tensor]:
        inputs, targets, weights = data[:3]
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        here = tf.cast(tf.shape(weights)[0], tf.float32)
        everywhere = here if replicas == 1 else context.all_reduce(tf.distribute.ReduceOp.SUM, here)
        share = here * replicas / everywhere
        key = self._key(context.replica_id_in_sync_group)
        before = moving_before(self) if self.guard else []
        batch = (inputs, targets, weights * share)
        gradients, loss, outputs = (self._in_parts if self.micro_batches > 1 else self._in_one)(
            batch, key, share / replicas
        )
        counts = data[3] if len(data) == 4 else tf.ones(())
        if self.guard is None:
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        else:  # a step that was skipped counts for nothing
            taken = self.guard.apply(self.optimizer, gradients, self.trainable_weights, loss, before)
            loss, counts = (tf.where(taken, value, tf.zeros((), value.dtype)) for value in (loss, counts))
        self._loss_tracker.update_state(loss * replicas, sample_weight=everywhere * counts / replicas)
        targets, outputs, weights = _if_counted(counts, targets, outputs, weights)
        return self.compute_metrics(inputs, targets, outputs, sample_weight=weights)

    def _in_one(self, batch: Batch, key: tf.Tensor, portion: tf.Tensor) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """Return gradients, this device's portion of the loss, and outputs."""
        batch = self._through(self.below_training, batch)
        with tf.GradientTape() as tape:
            outputs, loss = self._outputs_and_loss(batch, key, portion)
            scaled = self.optimizer.scale_loss(loss)
        return tape.gradient(scaled, self.trainable_weights), loss, outputs

    def _in_parts(self, batch: Batch, key: tf.Tensor, portion: tf.Tensor) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
        """Return the same, computed from one part of the batch after the other, each by its share of the examples."""
        mixes = self.extras.mixup or self.extras.cutmix
        partners = mixing.partners_of(tf.shape(batch[1])[0], key) if mixes else None

        def part(numbers: tf.Tensor, number: tf.Tensor, share: tf.Tensor) -> tuple[list[Any], tf.Tensor, tf.Tensor]:
            own = self._through(self.below_training, mixing.rows(batch, numbers))
            others = None
            if partners is not None:
                others = self._through(self.below_training, mixing.rows(batch, tf.gather(partners, numbers)))
            drops = tf.random.experimental.stateless_fold_in(key, 1000 + tf.cast(number, tf.int64))
            with tf.GradientTape() as tape:
                outputs, loss = self._outputs_and_loss(own, key, portion, others, drops)
                loss = loss * share
                scaled = self.optimizer.scale_loss(loss)
            return tape.gradient(scaled, self.trainable_weights), loss, outputs

        return micro_batches.added_up(part, tf.shape(batch[1])[0], self.micro_batches, self.trainable_weights)

    def _outputs_and_loss(
        self,
        batch: Batch,
        key: tf.Tensor,
        portion: tf.Tensor | float,
        others: Batch | None = None,
        drops: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return outputs and this device's portion of the loss; Keras divides its own by the number of devices.

        Args:
            batch: All of the step's, or a part of it.
            key: Of the step.
            portion: This device's, of a penalty.
            others: What each example is mixed with. Defaults to its partner in the batch.
            drops: Decides which branches are left out. Defaults to the key.
        """
        inputs, targets, weights = batch
        extras, drops = self.extras, key if drops is None else drops
        if not (extras.mixup or extras.cutmix):
            outputs, penalty = self._outputs_and_penalty(inputs, drops)
            return outputs, self.compute_loss(inputs, targets, outputs, weights, training=True) + penalty * portion
        others = others or mixing.rows(batch, mixing.partners_of(tf.shape(targets)[0], key))
        mixed, own = mixing.join(inputs, others[0], key, extras.mixup, extras.cutmix)
        outputs, penalty = self._outputs_and_penalty(mixed, drops)
        # Both halves in one call: the mean over twice as many rows is half the sum of both losses.
        both_targets = tf.concat([targets, others[1]], axis=0)
        both_weights = tf.concat([2 * own * weights, 2 * (1 - own) * others[2]], axis=0)
        twice = tf.concat([outputs, outputs], axis=0)
        return outputs, self.compute_loss(inputs, both_targets, twice, both_weights, training=True) + penalty * portion

    def _outputs_and_penalty(self, inputs: Any, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | float]:
        extras = self.extras
        if extras.penalty is None and not extras.branches:
            return self(inputs, training=True), 0.0
        network = extras.body or self
        outputs = self._with_dropped_branches(network, inputs, key)
        if extras.penalty is None:
            return outputs[0], 0.0
        return outputs[0], extras.penalty(inputs, outputs[1])

    def _with_dropped_branches(self, network: keras.Model, inputs: Any, key: tf.Tensor) -> list[tf.Tensor]:
        """Run a network in training mode, operation by operation, with some residual branches left out.

        They take the place of the network's own stochastic depth.
        """

        def operation(original: keras.Operation) -> Any:
            if id(original) in self.extras.branches:
                branch, rate = self.extras.branches[id(original)]
                site = list(self.extras.branches).index(id(original))
                return mixing.drop_branch(branch, rate, tf.random.experimental.stateless_fold_in(key, 100 + site))
            if self.extras.branches and isinstance(original, keras.layers.Dropout) and original.noise_shape is not None:
                return lambda *args, **kwargs: original(*args, **{**kwargs, "training": False})
            if getattr(original, "_call_has_training_arg", False):
                return lambda *args, **kwargs: original(*args, **{**kwargs, "training": True})
            return original

        def run() -> Any:
            return network._run_through_graph(network._standardize_inputs(inputs), operation_fn=operation)

        adapter = self.extras.adapter
        return tf.nest.flatten(adapter.call(run, self._kept_up()) if adapter else run())

    def _key(self, replica: Any) -> tf.Tensor:
        """Return `(2,)` int64 that differs for every seed, phase, step and device."""
        step = self.extras.start + tf.cast(tf.convert_to_tensor(self.optimizer.iterations), tf.int64)
        stepped = tf.random.experimental.stateless_fold_in(tf.constant(self.extras.key, tf.int64), step)
        return tf.random.experimental.stateless_fold_in(stepped, tf.cast(replica, tf.int64))

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Create metrics from one device's share of a batch; Keras averages the shares, which fails if they differ.

        The first to come is validation, before the first step.
        """
        strategy = self._distribute_strategy
        if iterator is not None and strategy is not None:
            if not self._compile_metrics.built:
                _, _, batches = next(iter(iterator))
                share = keras.tree.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
                data_batch = self._through(self.below_validation, share[:3])
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


def _if_counted(counts: tf.Tensor, *parts: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Return targets, outputs and weights for metrics: no row if they don't count; not all metrics heed weights."""
    rows = tf.shape(parts[0])[0] * tf.cast(counts, tf.int32)
    return tuple(part[:rows] for part in parts)


def _of_any_batch(tensor: tf.Tensor) -> tf.Tensor:
    """Return a tensor of which nothing is known but its shape without the batch."""
    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=[None, *tensor.shape[1:]])
