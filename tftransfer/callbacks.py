"""The callbacks of a phase: keep the best weights, log the learning rate, show progress, adapt the user's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tftransfer.errors import InputError
from tftransfer.guard import Guard

Logs = dict[str, float] | None
_NOT_SHOWN = ("learning_rate", "loss_error", "val_loss_error")


class KeepBest(keras.callbacks.Callback):
    """Restore the best weights when training ends: the last whose validation loss chance can't tell from the lowest.

    On few validation examples the lowest of many losses is luck, mostly an early epoch at a high learning rate; so the
    latest epoch within one standard error of the lowest is kept. With many examples the error is small and the lowest
    loss decides. The weights that training began with count too, if they are shown to `consider` first.

    Args:
        model: The model that will be trained.
        patience: Epochs without a lower loss before training stops; 0 for never. Defaults to 0.
        remember: What else is to be kept at the same time, as `kept`. Defaults to nothing.

    Source: the one-standard-error rule, Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3.
    """

    def __init__(self, model: keras.Model, patience: int = 0, remember: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.set_model(model)
        self.patience = patience
        self.kept: Any = None
        self._remember = remember
        self.kept_epoch = 0
        self._epoch = 0
        self._lowest = math.inf
        self._lowest_epoch = 0
        self._most = math.inf  # the highest loss that counts as good as the lowest
        self._weights: list[np.ndarray] = []

    @property
    def weights(self) -> list[np.ndarray]:
        """The weights that are kept so far."""
        return self._weights

    def consider(self, epoch: int, loss: float, error: float = 0.0) -> None:
        """Keep the model's weights if their validation loss is within reach of the lowest; NaN and infinity never are.

        Nor are weights that are not finite.

        Args:
            epoch: Counted from 1 within the phase; 0 for the weights that it begins with.
            loss: The validation loss.
            error: Its standard error. Defaults to 0.
        """
        counts = math.isfinite(loss) and loss <= self._most
        weights = self.model.get_weights() if counts or not self._weights else []
        counts = counts and all(np.isfinite(part).all() for part in weights)
        if counts and loss < self._lowest:
            self._lowest, self._lowest_epoch = loss, epoch
            self._most = loss + (error if math.isfinite(error) else 0.0)
        if counts or not self._weights:
            self.kept_epoch = epoch
            self._weights = weights
            self.kept = self._remember()

    def state(self) -> tuple[list[np.ndarray], dict[str, float], Any]:
        """Return the best weights, the numbers that decide what comes after them, and what was kept with them."""
        names = ("kept_epoch", "_epoch", "_lowest", "_lowest_epoch", "_most")
        return self._weights, {name.lstrip("_"): getattr(self, name) for name in names}, self.kept

    def put_back(self, weights: list[np.ndarray], numbers: Mapping[str, float], kept: Any) -> None:
        """Go on from what `state` returned."""
        self._weights, self.kept = weights, kept
        self.kept_epoch, self._epoch = int(numbers["kept_epoch"]), int(numbers["epoch"])
        self._lowest, self._lowest_epoch = numbers["lowest"], int(numbers["lowest_epoch"])
        self._most = numbers["most"]

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        logs = logs or {}
        self._epoch += 1
        self.consider(self._epoch, logs.get("val_loss", math.inf), logs.get("val_loss_error", 0.0))
        if self.patience and self._epoch - self._lowest_epoch >= self.patience:
            self.model.stop_training = True

    def on_train_end(self, logs: Logs = None) -> None:
        self.model.set_weights(self._weights)


class TellSkipped(keras.callbacks.Callback):
    """Say which steps a guard has skipped when an epoch ends, and leave no number behind for an epoch without any step.

    Args:
        guard: Of the model that trains.
        quiet: Whether to print nothing.
        console: Where to print. Defaults to standard output.
    """

    def __init__(self, guard: Guard, quiet: bool, console: Console | None = None) -> None:
        super().__init__()
        self.guard, self.quiet = guard, quiet
        self.console = console or Console()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        skipped = self.guard.end_epoch()
        if logs is not None and skipped >= self.params.get("steps", math.inf):
            logs.update({name: math.nan for name in logs if not name.startswith("val_") and name != "learning_rate"})
        if skipped and not self.quiet:
            self.console.print(f"{self.guard.phase}: {self.guard.sentence()}", markup=False, soft_wrap=True)


class SwapAverages(keras.callbacks.SwapEMAWeights):
    """Put the weights' averages in place wherever epochs end and validation runs, in one call and without rounding.

    Keras' own does it in three calls for each variable, which for small data takes as long as a part of the training,
    and by adding and subtracting, so that the weights that training goes on with are not quite those it left.
    """

    def __init__(self) -> None:
        super().__init__(swap_on_epoch=True)
        self._swap: Callable[[], None] | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self._swap = None  # the optimizer may be another

    def _tf_swap_variables(self, optimizer: keras.optimizers.Optimizer) -> None:
        if self._swap is None:
            self._swap = tf.function(lambda: _exchange_averages(optimizer), autograph=False)
        self._swap()


def _exchange_averages(optimizer: keras.optimizers.Optimizer) -> None:
    """Exchange an optimizer's variables and their averages, on every device."""

    def exchange(variable: tf.Variable, average: tf.Variable) -> None:
        held = variable.read_value()
        variable.assign(average)
        average.assign(held)

    pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    for variable, average in pairs:
        optimizer._distribution_strategy.extended.update(variable.value, exchange, args=(average.value,))


class Forgiving(keras.callbacks.Callback):
    """Passes what happens in epochs on to a callback that writes, until it cannot.

    Args:
        inner: The callback; it hears of no batches.
        tell: Says why it cannot.
    """

    def __init__(self, inner: keras.callbacks.Callback, tell: Callable[[Exception], None]) -> None:
        super().__init__()
        self.inner: keras.callbacks.Callback | None = inner
        self.tell = tell

    def _pass_on(self, name: str, *given: Any) -> None:
        try:
            if self.inner:
                getattr(self.inner, name)(*given)
        except (OSError, tf.errors.OpError) as error:
            self.inner = None
            self.tell(error)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._pass_on("set_model", model)

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params(params)
        self._pass_on("set_params", params)

    def on_train_begin(self, logs: Logs = None) -> None:
        self._pass_on("on_train_begin", logs)

    def on_train_end(self, logs: Logs = None) -> None:
        self._pass_on("on_train_end", logs)

    def on_test_begin(self, logs: Logs = None) -> None:
        self._pass_on("on_test_begin", logs)

    def on_test_end(self, logs: Logs = None) -> None:
        self._pass_on("on_test_end", logs)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._pass_on("on_epoch_begin", epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._pass_on("on_epoch_end", epoch, logs)


class LearningRateLog(keras.callbacks.Callback):
    """Put the learning rate that the epoch ended with into the logs, for later callbacks and the history."""

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if logs is not None:
            logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


class ProgressBar(keras.callbacks.Callback):
    """Show a bar while an epoch runs and leave one line behind when it ends; close it where training may be broken off.

    Args:
        name: What the phase is called.
        last_epoch: Number of the phase's last epoch, counted over all phases.
        console: Where to print. Defaults to standard output.
    """

    def __init__(self, name: str, last_epoch: int, console: Console | None = None) -> None:
        super().__init__()
        self.name = name
        self.last_epoch = last_epoch
        self.console = console or Console()
        self._began = 0.0
        self._bar: Progress | None = None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._began = time.monotonic()
        title = TextColumn("{task.description}", markup=False)
        columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = self.console.quiet or not self.console.is_terminal
        self._bar = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self._task = self._bar.add_task(self._title(epoch), total=self.params.get("steps"))
        self._bar.start()

    def close(self) -> None:
        """Take the bar away, and give back the cursor and the standard streams that it has taken."""
        bar, self._bar = self._bar, None
        if bar:
            bar.stop()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._bar:
            self._bar.update(self._task, completed=batch + 1)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self.close()
        shown = {name: value for name, value in (logs or {}).items() if name not in _NOT_SHOWN}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items(), key=_training_first))
        seconds = f"{time.monotonic() - self._began:.1f} s"
        self.console.print(f"{self._title(epoch)}  {numbers}  {seconds}", highlight=False, soft_wrap=True)

    def _title(self, epoch: int) -> str:
        return f"{self.name}: epoch {epoch + 1} of {self.last_epoch}"


def _training_first(metric: tuple[str, float]) -> tuple[bool, bool, str]:
    name = metric[0]
    return name.startswith("val_"), not name.endswith("loss"), name


class HeedStop(keras.callbacks.Callback):
    """Stop training when a user's callback sets `stop_training` on the whole model, which is the one it sees."""

    def __init__(self, whole: keras.Model) -> None:
        super().__init__()
        self.whole = whole
        whole.stop_training = False

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self.whole.stop_training:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self.on_train_batch_end(epoch)


class HoldPlan(keras.callbacks.Callback):
    """Refuse a callback that changes what trains: Keras would ignore it in a step that is compiled."""

    def __init__(self, whole: keras.Model) -> None:
        super().__init__()
        self.whole = whole
        self.planned = self._flags()

    def _flags(self) -> list[bool]:
        layers = [layer.trainable for layer in self.whole._flatten_layers(include_self=False)]
        return layers + [variable.trainable for variable in self.whole.variables]

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.on_epoch_end(epoch)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self._flags() != self.planned:
            raise InputError(
                "one of `callbacks` changed `trainable`, which Keras ignores until the model is compiled again: give "
                "`fine_tune` a strategy with a further phase, whose `selector` says what trains from there on"
            )


_OF_BATCHES = tuple(f"on_{name}_{end}" for name in ("train_batch", "test_batch", "batch") for end in ("begin", "end"))


def hears_of_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether one of a user's callbacks does something at every batch.

    Keras' own that could save then, but are to do so after epochs, do not.

    Example:
        >>> hears_of_batches([keras.callbacks.EarlyStopping(), keras.callbacks.ModelCheckpoint("best.keras")])
        False
    """
    stock, savers = keras.callbacks.Callback, (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
    awake = [one for one in callbacks if not (type(one) in savers and one.save_freq == "epoch")]
    own = ((getattr(one, name), getattr(stock, name)) for one in awake for name in _OF_BATCHES)
    return any(getattr(method, "__func__", method) is not inherited for method, inherited in own)


def looks_at_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether one of a user's callbacks may look at the model at every batch, and not at the logs alone."""
    return hears_of_batches([one for one in callbacks if type(one) is not keras.callbacks.TerminateOnNaN])


def callback_list(
    own: Sequence[keras.callbacks.Callback],
    users: Sequence[keras.callbacks.Callback],
    trained: keras.Model,
    whole: keras.Model,
    params: dict[str, int],
    last: Sequence[keras.callbacks.Callback] = (),
) -> keras.callbacks.CallbackList:
    """Put callbacks together so that the toolkit's see the part that trains and the user's the whole model.

    Args:
        own: The toolkit's callbacks; they run first.
        users: The user's callbacks.
        trained: The model that trains.
        whole: The model that the user gave.
        params: `epochs` and `steps`, as Keras hands them to callbacks.
        last: The toolkit's callbacks that run after all others. Defaults to none.

    Returns:
        What `Trainee.train` takes as `callbacks`, with Keras' own history added.
    """
    listed = [*own, *users, HeedStop(whole), HoldPlan(whole), keras.callbacks.History(), *last]
    together = keras.callbacks.CallbackList(listed, model=trained, verbose=0, **params)
    for callback in users:
        callback.set_model(whole)
    return together
