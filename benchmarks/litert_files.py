"""What LiteRT's files cost and are worth, against the network they come from.

    python recipes/image_classification.py --data FOLDER --backbone MobileNetV2-0.35 --weights FILE --epochs 10 --out R
    python benchmarks/litert_files.py --run R --data FOLDER

First what int8 is built on, on validation pictures and a hundred training pictures that calibrate nothing: how many
pictures calibrate, whether everything is int8 or what surrounds the layers with weights stays in float, and whether
biases make up for the rounding of weights. Nothing is chosen by the test split. Then `tftransfer export R --format
litert`, and the times of its files for batches of 1 and 16. Writes results/litert_DATA.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from record import write

from tftransfer import cli

COUNTS, HELD_OUT = (10, 50, 100, 200, 300), 100
BATCHES, ROUNDS = (1, 16), 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", help="(default: the run's own, where its manifest can name them)")
    options = parser.parse_args()
    cli.import_tensorflow()
    from tftransfer import bundles, exports
    from tftransfer.serving import litert

    bundle = bundles.load(options.run)
    data, note = exports.data_again(bundle, options.data)
    if note:
        parser.error(note)
    choices = fidelity(bundle, data)
    folder, verification, table = exports.export_files(bundle, litert.RUNTIME, tuple(litert.FILES), options.data)
    if folder is None:
        parser.error("; ".join(verification.failed))
    rows = {row[0]: described(table.columns[1:], row[1:]) for row in table.rows}
    times = {name: {str(batch): taken(folder / name, batch) for batch in BATCHES} for name in litert.FILES.values()}
    setting = {
        "backbone": bundle.manifest["backbone"],
        "image_size": list(bundle.image_size),
        "test_pictures": len(data.test),
        "calibration_pictures": min(200, len(data.train)),
        "times": "median of one thread per processor, milliseconds a batch",
    }
    write(f"litert_{Path(data.name).name}", {"files": rows, "milliseconds": times, "int8_choices": choices}, **setting)


def taken(path: Path, batch: int) -> float:
    """Return the milliseconds of a batch, on every processor."""
    from tftransfer.serving import tflite_files

    threads = len(os.sched_getaffinity(0))
    return round(tflite_files.milliseconds(path, batch, threads=threads, rounds=ROUNDS), 2)


def described(columns: tuple[str, ...], cells: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row of the table as JSON."""
    numbers = (getattr(cell, "value", cell) for cell in cells)
    found = {name: number for name, number in zip(columns, numbers, strict=True) if number is not None}
    spans = {name: [cell.low, cell.high] for name, cell in zip(columns, cells, strict=True) if hasattr(cell, "low")}
    return {**{name: float(f"{number:.4g}") for name, number in found.items()}, "intervals": spans}


def fidelity(bundle: Any, data: Any) -> dict[str, dict[str, float]]:
    """Return how well int8 answers as the network, by what it is built on."""
    from tftransfer import inference, serving
    from tftransfer.checks import performance
    from tftransfer.data import order
    from tftransfer.serving import files, litert, tflite_files

    drawn = np.random.default_rng(1).permutation(len(data.train))
    unseen = data.train.subset(drawn[:HELD_OUT]).joined(data.validation)
    rest = data.train.subset(drawn[HELD_OUT:])
    pictures = np.concatenate([batch.numpy() for batch, _, _ in order.in_order(unseen, 32)])
    expected = inference.predict(bundle.model, bundle.task, unseen)
    own = {"_unweighted_ends": litert._unweighted_ends, "corrected": litert.corrected}
    kinds: dict[str, tuple[int, dict[str, Any]]] = {f"{count} pictures": (count, {}) for count in COUNTS}
    kinds["200 pictures, all in int8"] = (200, {"_unweighted_ends": lambda content: []})
    kinds["200 pictures, biases as they were"] = (200, {"corrected": lambda quantized, exact, pictures: quantized})
    found = {"float32": measured(performance, bundle.task, unseen, expected, expected)}
    print(f"float32: {found['float32']}", flush=True)
    for name, (count, others) in kinds.items():
        with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(litert, **{**own, **others}):
            path = Path(folder) / "model.tflite"
            calibration = files.calibration_pictures(rest, count)
            serving.export_litert(bundle.model, bundle.task, path, quantize="int8", calibration=calibration)
            numbers = tflite_files.open_file(path, 2)(pictures)["probabilities"]
        found[name] = measured(performance, bundle.task, unseen, numbers, expected)
        print(f"{name}: {found[name]}", flush=True)
    return found


def measured(performance: Any, task: Any, unseen: Any, numbers: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return accuracy, log loss, agreement and the mean difference of probabilities."""
    metrics = performance.metrics_of(task, unseen.targets, numbers)
    return {
        "accuracy": round(metrics["accuracy"].value, 4),
        "log_loss": round(metrics["log_loss"].value, 4),
        "same_answer": round(float(np.mean(numbers.argmax(1) == expected.argmax(1))), 4),
        "mean_difference": round(float(np.abs(numbers - expected).mean()), 5),
    }


if __name__ == "__main__":
    main()
