"""How much memory a step takes, how much there is, and into how many parts a batch is divided so that it fits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import psutil
import tensorflow as tf

from tftransfer.depth import nodes_in_order

SHARE = 0.5
"""A step whose estimate is more than this share of what is available is tried in a process of its own first."""

_HOPELESS = 4.0  # times what is available: it is halved without being tried
_BACKWARD = 2.0  # times the outputs of all layers: what a step keeps, and what it computes on the way back
_WAITING = 3  # whole batches of pictures at the same time: in the step, ready, and being read
_MARGIN = 0.8  # of what is available that a trial may take
_THREADS = 2**29  # bytes of addresses that threads will still reserve, where addresses are limited
_SECONDS = 180  # after which a trial has failed
_CGROUPS = Path("/sys/fs/cgroup")
Try = Callable[[keras.Model, int, "Room", tuple[int, int]], bool | None]


@dataclass(frozen=True)
class Room:
    """What memory there is.

    Args:
        shared: Bytes that this process and others may still take: of the machine or its control group.
        own: Bytes that this process alone may still take (`ulimit -v`); None for no limit.
    """

    shared: int
    own: int | None = None

    @property
    def least(self) -> int:
        """Bytes that this process can count on."""
        return max(self.shared if self.own is None else min(self.shared, self.own), 0)

    def without(self, taken: int) -> Room:
        """Return what is left beside so many bytes: a quarter at the least, as no division makes those fewer."""
        shared, own = (size if size is None else max(size - taken, size // 4) for size in (self.shared, self.own))
        return Room(shared or 0, own)


@dataclass(frozen=True)
class Division:
    """How a step's batch is divided.

    Args:
        micro_batches: Into how many parts, from 1.
        reason: Why, in plain words; empty for a batch that plainly fits.
    """

    micro_batches: int = 1
    reason: str = ""


def room() -> Room:
    """Return what memory there is now: the least of the machine's, the control group's, and the process's own limit."""
    shared = min(psutil.virtual_memory().available, _left_in_groups())
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = None if soft == resource.RLIM_INFINITY else soft - psutil.Process().memory_info().vms - _THREADS
    return Room(shared, own)


def _left_in_groups(own: str = "/proc/self/cgroup", root: Path = _CGROUPS) -> float:
    """Return how much the control groups of this process leave, infinity without a limit; versions 1 and 2."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        for line in Path(own).read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            base = root / "memory" if controllers else root
            if controllers and "memory" not in controllers.split(","):
                continue
            group = base / path.strip("/")
            for folder in (group, *group.parents):
                left = min(left, _left_in(folder))
                if folder == base:
                    break
    return left


def _left_in(folder: Path) -> float:
    """Return what one control group leaves; what it holds of files that nobody uses can be had."""
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            limit, taken = (int((folder / name).read_text(encoding="utf-8")) for name in (most, used))
            return limit - taken + _inactive(folder)
    return math.inf


def _inactive(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
    return 0


def step_bytes(part: keras.Model, examples: int, image_size: tuple[int, int]) -> int:
    """Estimate what a training step takes beside weights and moments: from the sizes of the layers' outputs.

    Args:
        part: What trains.
        examples: How many go through it at once.
        image_size: `(height, width)` that stands where a network takes pictures of any size.

    Example:
        >>> inputs = keras.Input((10,))
        >>> step_bytes(keras.Model(inputs, keras.layers.Dense(5)(inputs)), 3, (1, 1))
        580
    """
    outputs = sum(sum(sizes) for sizes in _sizes(part, image_size))
    gradients = sum(math.prod(variable.shape) * 4 for variable in part.variables)
    return int(examples * _BACKWARD * outputs + gradients)


def most_frozen(part: keras.Model | None, chunk: int, image_size: tuple[int, int], room: Room) -> int:
    """Return how many examples may go through the frozen part at once: `chunk`, or half of it until that fits.

    Args:
        part: The frozen part, if there is one.
        chunk: How many it should be.
        image_size: As for `step_bytes`.
        room: What memory there is.
    """
    largest = max((sum(sizes) for sizes in _sizes(part, image_size)), default=0) if part else 0
    while chunk > 1 and 2 * _BACKWARD * largest * chunk > SHARE * room.least:
        chunk = -(-chunk // 2)
    return chunk


def _sizes(part: keras.Model, image_size: tuple[int, int]) -> Iterator[list[int]]:
    """Yield the bytes of each operation's outputs for one example."""
    for node in nodes_in_order(part):
        inner: Any = getattr(node.operation, "_functional", node.operation)
        if hasattr(inner, "_nodes_by_depth"):
            yield from _sizes(inner, image_size)
        else:
            yield [_size(tensor, image_size) for tensor in node.outputs]


def _size(tensor: Any, image_size: tuple[int, int]) -> int:
    unknown = iter(image_size)
    sides = (next(unknown, 1) if side is None else side for side in tensor.shape[1:])
    return math.prod(sides) * tf.as_dtype(tensor.dtype).size


def divide(
    part: keras.Model, batch_size: int, image_size: tuple[int, int], room: Room, attempt: Try | None = None
) -> Division:
    """Decide into how many parts a batch is divided so that a training step fits into memory.

    The batch is halved until its estimate is less than half of what is available, or one step of that size was taken by
    a process of its own; that may die, and the run goes on. On a GPU, whose memory nobody is asked about, it is not
    divided.

    Args:
        part: What trains.
        batch_size: Examples per step over all devices, which share the memory.
        image_size: As for `step_bytes`.
        room: What memory there is.
        attempt: Takes a step in a process of its own. Defaults to `tried`.
    """
    if tf.config.list_physical_devices("GPU"):
        return Division()
    room = room.without(_WAITING * batch_size * math.prod(image_size) * 3 * 4)
    parts, trials = 1, 0
    while True:
        examples = -(-batch_size // parts)
        needed = step_bytes(part, examples, image_size)
        fits: bool | None = needed <= SHARE * room.least
        if not fits and needed <= _HOPELESS * room.least:
            fits = (attempt or tried)(part, examples, room, image_size)
            trials += 1
        if fits or examples == 1:
            return Division(parts, _told(batch_size, parts, examples, needed, room, trials, fits))
        parts = min(2 * parts, batch_size)


def _told(batch_size: int, parts: int, examples: int, needed: int, room: Room, trials: int, fits: bool | None) -> str:
    if parts == 1 and not trials and fits:
        return ""
    there, wanted = (f"{size / 2**20:,.0f} MiB" for size in (room.least, needed))
    how = "a trial in a process of its own took it" if fits and trials else f"a step is estimated at {wanted}"
    how = how if fits else f"even that may be too much, a step is estimated at {wanted}"
    if parts == 1:
        return f"a batch of {batch_size} fits into the {there} that are available: {how}"
    return (
        f"a batch of {batch_size} does not fit into the {there} that are available: each step adds up the gradients of "
        f"{parts} parts of at most {examples} examples ({how})"
    )


def tried(part: keras.Model, examples: int, room: Room, image_size: tuple[int, int]) -> bool | None:
    """Take one training step of a network in a process of its own, with random weights and inputs.

    Args:
        part: What trains.
        examples: How many go through it.
        room: What it may take.
        image_size: As for `step_bytes`.

    Returns:
        Whether it came to its end; None if the network cannot be handed over.
    """
    try:
        network = part.to_json()
    except (NotImplementedError, TypeError, ValueError):
        return None
    shapes = [_known(tensor.shape[1:], image_size) for tensor in part.inputs]
    asked = {
        "network": network,
        "shapes": shapes,
        "dtypes": [tf.as_dtype(tensor.dtype).name for tensor in part.inputs],
        "examples": examples,
        "shared": int(_MARGIN * room.shared),
        "own": None if room.own is None else int(_MARGIN * room.own),
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tftransfer.memory_probe"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as expired:
        return False if b"ready" in (expired.stdout or b"") else None
    except OSError:
        return None
    said = done.stdout.split()
    return "fits" in said if "ready" in said else None


def _known(sides: tuple[int | None, ...], image_size: tuple[int, int]) -> list[int]:
    unknown = iter(image_size)
    return [next(unknown, 1) if side is None else side for side in sides]
