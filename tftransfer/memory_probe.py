"""Take one training step of a network under a limit of memory: `memory.tried` starts this, and it may die.

Reads from standard input what `memory.tried` writes; says `ready` once the network ran on a single example, and `fits`
once the step was taken.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Build, warm up, set the limit, and take the step."""
    with contextlib.suppress(OSError):  # where memory runs out, this process is to die and not the run
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    asked = json.load(sys.stdin)
    step = _step(asked)
    for number in (
        signal.SIGABRT,
        signal.SIGSEGV,
        signal.SIGBUS,
    ):  # TensorFlow's handlers need memory, and may wait for it
        signal.signal(number, signal.SIG_DFL)
    step(1)
    _limit(asked["shared"], asked["own"])
    print("ready", flush=True)
    step(asked["examples"])
    print("fits", flush=True)


def _step(asked: dict[str, Any]) -> Any:
    """Return the function that takes a step of so many examples; everything trains that could."""
    import keras
    import tensorflow as tf

    network = keras.models.model_from_json(asked["network"])
    for layer in network._flatten_layers():
        layer.trainable = True
    variables = [variable.value for variable in network.trainable_variables]
    signature = [
        tf.TensorSpec((None, *shape), dtype) for shape, dtype in zip(asked["shapes"], asked["dtypes"], strict=True)
    ]

    @tf.function(input_signature=signature, autograph=False)
    def take(*inputs: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(network(inputs[0] if len(inputs) == 1 else list(inputs), training=True))
            loss = tf.add_n([tf.reduce_mean(tf.square(tf.cast(output, tf.float32))) for output in outputs])
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            if gradient is not None:
                variable.assign_sub(tf.cast(0.0, variable.dtype) * tf.convert_to_tensor(gradient))

    return lambda examples: take(*(tf.zeros((examples, *spec.shape[1:]), spec.dtype) for spec in signature))


def _limit(shared: int, own: int | None) -> None:
    """Allow so many bytes more than this process takes now; of those that are shared it takes some itself."""
    import psutil

    taken = psutil.Process().memory_info()
    more = max(shared - taken.rss, 0) if own is None else min(max(shared - taken.rss, 0), own)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken.vms + more
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
