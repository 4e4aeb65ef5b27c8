"""What tests share: quiet TensorFlow, shards of the slow tests, small data and small networks."""

from __future__ import annotations

import gc
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tftransfer import cli

cli.import_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tftransfer import bundles, tasks, versions  # noqa: E402
from tftransfer.data.examples import Data, Examples, Pictures  # noqa: E402
from tftransfer.report import CLASSES, Check, Number, Report, Table  # noqa: E402

gc.freeze()  # what was imported stays; without it each collection looks through all of TensorFlow


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", help="run the I-th of N shards of the selected tests, I/N")


def pytest_collection_modifyitems(config, items):
    index, count = map(int, config.getoption("--shard").split("/"))
    items[:] = [item for number, item in enumerate(items) if number % count == index - 1]


@pytest.fixture(autouse=True)
def _seeded():
    """Give every test the same random start, whatever ran before it."""
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)  # Python collects what is left often enough


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def assets(repository) -> Path:
    """Real weights and pictures, where somebody has put them; tests that need them are skipped elsewhere."""
    folder = Path(os.environ.get("TFTRANSFER_ASSETS", repository.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("needs real weights and data: set TFTRANSFER_ASSETS to their folder")
    return folder


def _examples(pictures: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> Examples:
    held = tf.constant(pictures)
    names = tuple(f"picture {number}" for number in range(len(pictures)))
    source = Pictures(names, lambda index: tf.gather(held, index), tuple(pictures.shape[1:3]))
    return Examples(source, targets, np.ones(len(targets), np.float32) if weights is None else weights)


@pytest.fixture(scope="session")
def make_examples():
    """Return a function from pictures and targets in memory to `Examples`."""
    return _examples


def _coloured(count: int, image_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures whose class is their brightest channel, with noise: easy, but not without looking."""
    generator = np.random.default_rng(seed)
    targets = np.arange(count, dtype=np.int32) % 3
    pictures = generator.integers(0, 120, (count, image_size, image_size, 3), np.uint8)
    pictures[np.arange(count), :, :, targets] += 100
    return pictures, targets


@pytest.fixture(scope="session")
def small_data() -> Data:
    """24 training, 12 validation and 12 test pictures of 32 pixels in three classes."""
    splits = [_examples(*_coloured(count, 32, seed)) for seed, count in enumerate((24, 12, 12))]
    return Data("colours", ("red", "green", "blue"), *splits, found=48)


@pytest.fixture(scope="session")
def small_task() -> tasks.SingleLabel:
    """The task of `small_data`."""
    return tasks.SingleLabel(("red", "green", "blue"))


def _estimate_batch_norm(model: keras.Model, seed: int = 0) -> keras.Model:
    """Re-estimate BatchNorm on random pictures: random weights in inference mode give features near zero."""
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    kept = [(layer.momentum, layer.trainable) for layer in norms]
    for layer in norms:
        layer.momentum, layer.trainable = 0.0, True
    pictures = np.random.default_rng(seed).uniform(0, 255, (16, *model.input_shape[1:])).astype(np.float32)
    for _ in range(2):
        model(pictures, training=True)
    for layer, (momentum, trainable) in zip(norms, kept, strict=True):
        layer.momentum, layer.trainable = momentum, trainable
    return model


@pytest.fixture(scope="session")
def estimate_batch_norm():
    """Return the function that re-estimates a model's BatchNorm statistics."""
    return _estimate_batch_norm


def _with_scales(model: keras.Model) -> keras.Model:
    """Give normalisation scales and offsets, and convolutions biases, as they are in networks that were trained.

    With the ones and zeros that networks begin with folding has little to do; and random networks blow each rounding up
    by a thousand times, as scales are too large for that in trained ones.
    """
    generator = np.random.default_rng(0)
    for layer in model._flatten_layers():
        ranges = {"gamma": (0.2, 0.6), "beta": (-0.2, 0.6), "bias": (-0.1, 0.1)}
        for name, (low, high) in ranges.items():
            variable = getattr(layer, name, None)
            if isinstance(variable, keras.Variable):
                variable.assign(generator.uniform(low, high, variable.shape))
    return model


@pytest.fixture(scope="session")
def with_scales():
    """Return the function that gives a model of random weights scales and offsets as trained ones have."""
    return _with_scales


def _small_network(num_classes: int = 3, dropout: float = 0.0) -> keras.Model:
    layers = keras.layers
    inputs = keras.Input((32, 32, 3), name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(inputs)
    for number in (1, 2, 3):
        x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name=f"conv_{number}")(x)
        x = layers.BatchNormalization(name=f"norm_{number}")(x)
        x = layers.ReLU(name=f"relu_{number}")(x)
    x = layers.GlobalAveragePooling2D(name="head_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="head_dropout")(x)
    return _estimate_batch_norm(keras.Model(inputs, layers.Dense(num_classes, name="logits")(x)))


@pytest.fixture(scope="session")
def small_network():
    """Return a function that builds a small convolutional network with BatchNorm and a builder's head names."""
    return _small_network


def _report() -> Report:
    counts = {"train": [9, 8, 7], "validation": [4, 4, 4], "test": [5, 4, 3]}
    splits = {name: {"examples": sum(own), "from": "the source"} for name, own in counts.items()}
    phase = {"name": "probe", "selector": "head", "epochs": 3, "best_epoch": 2, "learning_rate": 0.009, "mixup": 0.2}
    rows = [(name, Number(0.75, 0.3, 0.96, "wilson"), 0.7, 4) for name in ("red", "green", "blue")]
    return Report(
        task="image_classification",
        backbone="small",
        strategy=[phase],
        complete=True,
        data={
            "name": "colours",
            **{name: sum(own) for name, own in counts.items()},
            "quarantined": [{"file": "a|b.png", "reason": "empty"}],
            "splits": splits,
            "labels": ["red", "green", "blue"],
            "per_label": counts,
        },
        metrics={
            "accuracy": Number(0.83333, 0.55198, 0.95299, "wilson"),
            "log_loss": Number(0.00001234, method="none: too few examples"),
            "macro_f1": Number(None),
        },
        seconds={"train": 1.25, "total": 2.5},
        checks=(Check("calibration", True, {"expected_calibration_error": 0.0123}), Check("duplicates", False)),
        versions=versions.versions(),
        tables=(Table("Each class", ("class", "recall", "F1", "test examples"), tuple(rows), section=CLASSES),),
    )


@pytest.fixture(scope="session")
def _written_run(tmp_path_factory, small_task) -> Path:
    """A finished run with every kind of file, written without training; its SavedModels are none."""
    folder = tmp_path_factory.mktemp("written") / "run"
    configuration = {"recipe": "image_classification", "seed": 0}
    bundles.begin(folder, configuration)
    saved_model = ("saved_model.pb", "fingerprint.pb", "variables/variables.index", "variables/variables.data-00000")
    names = [f"serving/{version}/{name}" for version in (1, 2) for name in saved_model]
    for name in (*names, "logs/train/events.out.v2", "checkpoints/001-000000000/state.safetensors", "history.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"what {name} holds\n".encode() * 20)
    bundles.write_samples(folder, [tf.io.encode_png(np.zeros((32, 32, 3), np.uint8)).numpy()] * 2)
    provenance = {
        "weights": {"kind": "file", "file": "small.h5", "sha256": "ab" * 32, "known": False},
        "data": {"fingerprint": "cd" * 32},
        "decisions": {"devices": "1 x CPU"},
        "current": "2",
    }
    keras.utils.set_random_seed(0)
    bundles.save(folder, _small_network(), small_task, _report(), configuration=configuration, provenance=provenance)
    return folder


@pytest.fixture
def written_run(_written_run, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(_written_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def flip_a_bit():
    """Return a function that flips one bit of a file, at a place that depends on the seed and the file's name."""

    def flip(file: Path, seed: int = 0) -> None:
        contents = bytearray(file.read_bytes())
        generator = np.random.default_rng([seed, *file.name.encode()])
        contents[generator.integers(len(contents))] ^= 1 << int(generator.integers(8))
        file.write_bytes(contents)

    return flip


@pytest.fixture
def run_python():
    """Return a function that runs a program in a process of its own and reads the JSON on its last line."""

    def run(program, *arguments):
        command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


_ON_DEVICES = """\
import json
from tftransfer import cli
cli.import_tensorflow()
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * {count})
from tftransfer.data import Data, Examples, Pictures
"""


@pytest.fixture
def run_on_devices(run_python):
    """Return a function that runs a program where there are several logical processors, two by default.

    It finds `json`, `keras`, `np` and `tf`, `Data`, and what small data are made by here: `_examples(*_coloured(...))`.
    """

    def run(program, *arguments, count=2):
        own = [inspect.getsource(function) for function in (_examples, _coloured)]
        return run_python("\n".join([_ON_DEVICES.format(count=count), *own, textwrap.dedent(program)]), *arguments)

    return run
