"""What share of a run checkpoints take at their defaults.

    python benchmarks/bench_checkpoints.py --data FLOWERS --weights FILE [--backbone MobileNetV2-0.35] [--epochs 30]

Everything is trained, with AdamW, so that a checkpoint holds the weights, both moments and the best weights so far; a
checkpoint every minute, and one at the end of each phase. The time in which tensors are read, hashed, written and
synced, over that of the whole call. Writes results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import write

from tftransfer import cli

MOST = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="MobileNetV2-0.35", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="(default: %(default)s)")
    options = parser.parse_args()
    cli.import_tensorflow()
    import keras

    import tftransfer as tft
    from tftransfer import checkpoints, recording
    from tftransfer.strategies import Phase

    taken: list[float] = []
    recording.Recorder._record = _clocked(recording.Recorder._record, taken)
    checkpoints.save = _clocked(checkpoints.save, taken)
    keras.utils.set_random_seed(0)
    data, task = tft.data.load(options.data, image_size=(224, 224))
    model = tft.builders.image_classifier(options.backbone, len(data.labels), image_size=224, weights=options.weights)
    strategy = (Phase("probe", "head", 2, 1e-2), Phase("all", "all", options.epochs, 1e-4, optimizer="adamw"))
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        tft.fine_tune(model, task, data, strategy, output=folder)
        seconds = time.perf_counter() - began
    share = sum(taken) / seconds
    measured = {"share": round(share, 4), "checkpoints": len(taken)}
    setting = {"backbone": options.backbone, "data": Path(options.data).name, "epochs": options.epochs}
    write("checkpoints", measured, **setting)
    print(f"{len(taken)} checkpoints took {share:.2%} of {seconds:.0f} seconds (at most {MOST:.0%} is asked)")


def _clocked(function: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
    """Return a function that adds what it takes to a list."""

    @wraps(function)
    def clocked(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            taken.append(time.perf_counter() - began)

    return clocked


if __name__ == "__main__":
    main()
