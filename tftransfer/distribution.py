"""Devices: look at what is there and choose the `tf.distribute` strategy and the precision."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tftransfer.errors import InputError

DEVICE_CHOICES = ("auto", "cpu", "gpu")
PRECISIONS = ("auto", "float32", "mixed_float16", "mixed_bfloat16")


@dataclass(frozen=True)
class Devices:
    """What `devices` chose.

    Args:
        strategy: The `tf.distribute` strategy in whose scope the model is built.
        precision: The Keras dtype policy.
        reason: One line that says what was chosen and why.
    """

    strategy: tf.distribute.Strategy
    precision: str
    reason: str

    @property
    def replicas(self) -> int:
        """How many devices share each batch."""
        return self.strategy.num_replicas_in_sync


@contextlib.contextmanager
def devices(choice: str = "auto", precision: str = "auto") -> Iterator[Devices]:
    """Choose devices and precision for the models that are built inside the `with` block.

    Args:
        choice: `"auto"` (GPUs if there are any, else the processor), `"cpu"`, `"gpu"`, or a number of devices of
            the best kind there is (`"2"`). Defaults to `"auto"`.
        precision: `"auto"` (by the GPU's compute capability; float32 on a processor), `"float32"`,
            `"mixed_float16"` or `"mixed_bfloat16"`. Heads compute in float32 in every case. Defaults to `"auto"`.

    Yields:
        The `Devices` that were chosen. The batch size stays the global one: replicas share it.

    Raises:
        InputError: If the choice is not known or there are not that many devices.

    Example:
        >>> with devices("cpu") as chosen:
        ...     chosen.precision
        'float32'
    """
    strategy, kind, why = _strategy(str(choice))
    policy, because = _precision(precision, kind)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        with strategy.scope():
            yield Devices(strategy, policy, f"{why}; {policy} ({because})")
    finally:
        keras.config.set_dtype_policy(before)


def strategy_of(model: keras.Model) -> tf.distribute.Strategy:
    """Return the strategy in whose scope a model was built.

    Raises:
        InputError: If the model was built in one scope and this is called in another.
    """
    current = tf.distribute.get_strategy()
    built_in = model._distribute_strategy  # Keras' own property answers with the current one where there was none
    if tf.distribute.has_strategy() and current is not built_in:
        raise InputError(
            f"the model was built under {type(built_in).__name__ if built_in else 'no strategy'} but is trained under "
            f"{type(current).__name__}; build it inside the same `with tft.devices(...)` block"
        )
    return built_in or current


def parts(variable: keras.Variable | tf.Variable) -> tuple[tf.Variable, ...]:
    """Return a variable's parts, one for each device; itself where there is one."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return tuple(getattr(value, "values", (value,)))


def shared_out(batches: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Return batches as the devices of a strategy take them: each a share, and none of them nothing.

    Shares are as even as can be. TensorFlow's own leave devices without an example, for which convolutions fail and a
    mean is none. Of a batch with fewer examples than devices each device takes all of them, so that a mean over the
    devices, that of BatchNorm too, is the mean over the batch.

    Args:
        batches: Of `(inputs, targets, weights)`.
        strategy: For one device they stay what they are.

    Returns:
        A distributed data set; for several devices of `(inputs, targets, weights, counts)`, where the last is 1, or 0
        for a share whose examples count as those of the first device in metrics.
    """
    devices = strategy.num_replicas_in_sync
    if devices == 1:
        return strategy.experimental_distribute_dataset(batches)
    plain = tf.autograph.experimental.do_not_convert

    def shares(context: tf.distribute.InputContext) -> tf.data.Dataset:
        own = devices // context.num_input_pipelines
        numbers = tf.data.Dataset.range(own).map(plain(lambda number: context.input_pipeline_id * own + number))
        each = plain(lambda *batch: numbers.map(plain(lambda number: _share(batch, number, devices))))
        return batches.flat_map(each)

    return strategy.distribute_datasets_from_function(shares)


def _share(batch: tuple[Any, ...], number: tf.Tensor, devices: int) -> tuple[Any, ...]:
    """Return a device's rows of a batch, and whether they count in metrics."""
    count = tf.shape(batch[-1], tf.int64)[0]
    few = count < devices
    first, last = (-(-count * place // devices) for place in (number, number + 1))
    first, last = tf.where(few, tf.zeros_like(first), first), tf.where(few, count, last)
    return *tf.nest.map_structure(lambda part: part[first:last], batch), tf.where(few & (number > 0), 0.0, 1.0)


@contextlib.contextmanager
def shared_statistics(model: keras.Model, divided: bool = False) -> Iterator[None]:
    """Make BatchNorm layers that move their statistics take them over the whole batch, on however many devices.

    Without it each device normalises by its own share, and what is kept are the first device's statistics.

    Args:
        model: Its layers are as they were afterwards.
        divided: Whether a batch is divided in time too: then each part is normalised by itself. Defaults to False.
    """
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    several = strategy_of(model).num_replicas_in_sync > 1 and not divided
    changed = [norm for norm in norms if several and norm.trainable and not norm.synchronized]
    for norm in changed:
        norm.synchronized = True
    try:
        yield
    finally:
        for norm in changed:
            norm.synchronized = False


def describe_hardware() -> dict[str, Any]:
    """Return what this machine offers: processors and GPUs by name, with compute capability where known."""
    gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    return {
        "processors": os.cpu_count(),
        "gpus": [details.get("device_name", "GPU") for details in gpus],
        "compute_capability": [list(details.get("compute_capability", ())) for details in gpus],
        "tpus": len(tf.config.list_physical_devices("TPU")),
    }


def _strategy(choice: str) -> tuple[tf.distribute.Strategy, str, str]:
    """Return the strategy, the kind of device, and why."""
    if choice not in DEVICE_CHOICES and not (choice.isdecimal() and int(choice) > 0):
        raise InputError(f"`devices` must be auto, cpu, gpu or a number from 1. Received: devices={choice!r}")
    if choice == "auto" and tf.config.list_physical_devices("TPU"):
        return _tpu_strategy(), "TPU", "TPU (recognised, untested)"
    _let_gpu_memory_grow()
    gpus, cpus = (tf.config.list_logical_devices(kind) for kind in ("GPU", "CPU"))
    if choice == "gpu" and not gpus:
        raise InputError("`devices` is gpu, but TensorFlow sees none on this machine; see `tftransfer doctor`")
    pool = cpus if choice == "cpu" or not gpus else gpus
    # Logical processors beyond the first exist only where somebody asked for them by number, as tests do.
    count = int(choice) if choice.isdecimal() else (len(gpus) if pool is gpus else 1)
    if count > len(pool):
        raise InputError(
            f"`devices` asks for {count}, but there are {len(pool)} of kind {pool[0].device_type}. "
            f"Received: devices={choice!r}"
        )
    kind = pool[0].device_type
    origin = "as asked" if choice != "auto" else "the best there is"
    return _strategy_on([device.name for device in pool[:count]]), kind, f"{count} x {kind} ({origin})"


def _strategy_on(names: list[str]) -> tf.distribute.Strategy:
    if len(names) > 1:
        return _mirrored(tuple(names))
    if "GPU" in names[0]:
        return tf.distribute.OneDeviceStrategy(names[0])
    return tf.distribute.get_strategy()  # on one processor the same as OneDeviceStrategy, with less overhead


@functools.cache
def _mirrored(names: tuple[str, ...]) -> tf.distribute.Strategy:
    """Return the one MirroredStrategy of a process on these devices.

    A second one would number its collective operations from the beginning again, and TensorFlow refuses a number whose
    tensor had another shape ("Shape mismatch in the collective instance").
    """
    return tf.distribute.MirroredStrategy(list(names))


def _tpu_strategy() -> tf.distribute.Strategy:
    """Connect to a TPU. Recognised but untested: no TPU was at hand when this was written."""
    return tf.distribute.TPUStrategy(tf.distribute.cluster_resolver.TPUClusterResolver.connect())


def _let_gpu_memory_grow() -> None:
    """Keep TensorFlow from taking all GPU memory at once; too late, and harmless, once a GPU is in use."""
    for gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)


def _precision(precision: str, kind: str) -> tuple[str, str]:
    """Return the dtype policy for a kind of device, and why."""
    if precision not in PRECISIONS:
        raise InputError(f"`precision` must be one of {', '.join(PRECISIONS)}. Received: precision={precision!r}")
    if precision != "auto":
        return precision, "as asked"
    if kind == "TPU":
        return "mixed_bfloat16", "a TPU"
    if kind == "CPU":
        return "float32", "no GPU"
    return _by_compute_capability(describe_hardware()["compute_capability"])


def _by_compute_capability(capabilities: list[list[int]]) -> tuple[str, str]:
    """Choose by the weakest GPU: bfloat16 from Ampere (8.0), float16 from Volta (7.0), else float32.

    Source: NVIDIA, CUDA C++ Programming Guide, arithmetic support by compute capability.
    """
    weakest = min((tuple(capability) for capability in capabilities), default=())
    if weakest >= (8, 0):
        return "mixed_bfloat16", f"compute capability {weakest[0]}.{weakest[1]}"
    if weakest >= (7, 0):
        return "mixed_float16", f"compute capability {weakest[0]}.{weakest[1]}"
    return "float32", "GPU without fast half precision"
