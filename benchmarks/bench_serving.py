"""How much faster our SavedModels answer than what `model.export` writes, through the C library that servers use.

    python benchmarks/bench_serving.py [--backbones MobileNetV2 EfficientNetB0] [--batch-sizes 1 16]

The signature for pixels, at 224 pixels, with random weights, biases and statistics of BatchNorm. Both SavedModels are
loaded by one process that never imports TensorFlow, and answer in turn; so does a LiteRT file of the network in
float32, on as many threads as there are processors, for comparison. Writes results/serving_BACKBONE_BATCH.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tftransfer.serving import capi, tflite_files

SIDE, CLASSES = 224, 1000
SECONDS = 1.5  # of calls on each side in each round


def export(backbone: str, folder: Path) -> dict[str, dict[str, object]]:
    """Write two SavedModels and a LiteRT file of one network; returns where each is, and the tensors of the former."""
    from tftransfer import builders, cli, serving, tasks
    from tftransfer.serving import structure

    cli.import_tensorflow()
    model = builders.image_classifier(backbone, CLASSES, image_size=SIDE, weights=None)
    generator = np.random.default_rng(0)
    for variable in model.variables:  # zeros and ones would be left out of a graph of constants
        if variable.dtype == "float32" and len(variable.shape) == 1:
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
    task = tasks.SingleLabel(tuple(map(str, range(CLASSES))))
    serving.export_savedmodel(model, task, folder / "ours")
    model.export(folder / "stock", verbose=False)
    serving.export_litert(model, task, folder / "model.tflite")
    found: dict[str, dict[str, object]] = {"litert": {"file": str(folder / "model.tflite")}}
    for side, signature, output in (("ours", "tensor", "probabilities"), ("stock", "serving_default", "output_0")):
        definition = structure.read(folder / side).meta_graphs[0].signature_def[signature]
        (given,) = definition.inputs.values()
        found[side] = {"folder": str(folder / side), "input": given.name, "output": definition.outputs[output].name}
    return found


def measure(sides: dict[str, dict[str, str]], batch: int, rounds: int) -> list[tuple[float, ...]]:
    """Return seconds per call of the stock SavedModel, of ours and of the LiteRT file, for each round."""
    library = capi.load_library()
    pixels = np.random.default_rng(0).uniform(0, 255, (batch, SIDE, SIDE, 3)).astype(np.float32)
    lite = tflite_files.open_file(sides.pop("litert")["file"], len(os.sched_getaffinity(0)))
    answers = {"litert": lambda: lite(pixels)}
    for side, told in sides.items():
        session = capi.Session(library, told["folder"])

        def answer(session: capi.Session = session, told: dict[str, str] = told) -> None:
            session.run({told["input"]: pixels}, {"answer": told["output"]})

        answer()
        answers[side] = answer
    answers["litert"]()
    return [tuple(_seconds(answers[side]) for side in ("stock", "ours", "litert")) for _ in range(rounds)]


def _seconds(answer: object) -> float:
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        answer()  # type: ignore[operator]
        calls += 1
    return (time.perf_counter() - began) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["MobileNetV2", "EfficientNetB0"], help="(default: both)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:  # a process of its own: to write, or to measure
        name, argument = options.step.split(":", 1)
        if name == "export":
            print(json.dumps(export(options.backbones[0], Path(argument))))
        else:
            measured = measure(json.loads(argument), options.batch_sizes[0], options.rounds)
            assert "tensorflow" not in sys.modules
            print(json.dumps(measured))
        return
    from record import compare, record  # which imports Keras

    for backbone in options.backbones:
        with tempfile.TemporaryDirectory() as scratch:
            sides = _step(f"export:{scratch}", "--backbones", backbone)
            for batch in options.batch_sizes:
                given = ("--batch-sizes", str(batch), "--rounds", str(options.rounds))
                stock, ours, litert = zip(*_step(f"measure:{json.dumps(sides)}", *given), strict=True)
                setting = {
                    "backbone": backbone,
                    "batch": batch,
                    "rival": "model.export",
                    "signature": "tensor",
                    "litert_times_faster": compare(stock, litert),
                }
                record(f"serving_{backbone}_{batch}", list(zip(stock, ours, strict=True)), **setting)


def _step(step: str, *arguments: str) -> list | dict:
    command = [sys.executable, __file__, "--step", step, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
