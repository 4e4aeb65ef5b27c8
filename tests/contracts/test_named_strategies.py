"""What every named strategy keeps to from its first phase to its last, without tracing: all on a tiny network, and a
few of several kinds on real ones."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import advice, builders, checkpoints, sealed_folders, strategies, tensor_files, trainable, training
from tftransfer.errors import InputError
from tftransfer.history import History
from tftransfer.strategies import Strategy


def _parsed(name: str, epochs: int | None = None) -> Strategy:
    """Return a strategy; `surgical`, which asks the data, as it is once it has settled on two groups."""
    if name == "surgical":
        return advice.Choice(name, epochs).settled("groups:conv_1+conv_3").strategy
    return strategies.parse(name, epochs)


NAMES = (*strategies.names(), "surgical")
SEVERAL = [name for name in NAMES if len(_parsed(name)) > 1]
REAL = (("MobileNet-0.25", "demo"), ("MobileNetV2-0.35", None), ("ConvNeXtTiny", None))
OF_SEVERAL_KINDS = ("gradual", "lora", "l2_sp", "norm_only")
pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`")


@pytest.fixture(scope="module", autouse=True)
def _untraced():
    """Tracing takes most of the time here, and `test_checkpoints.py` and others trace."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def data(small_data):
    """Four training pictures, two for validation."""
    return dataclasses.replace(small_data, train=_first(small_data.train, 4), validation=_first(small_data.test, 2))


def _first(examples, count):
    pictures = dataclasses.replace(examples.pictures, names=examples.pictures.names[:count])
    return dataclasses.replace(
        examples, pictures=pictures, targets=examples.targets[:count], weights=examples.weights[:count]
    )


@pytest.fixture(scope="module")
def fresh(small_network, estimate_batch_norm):
    """Return a function from a strategy's name to the network that it is tried on, the same at every call."""

    def build(name: str, real: tuple[str, str | None] | None = None) -> keras.Model:
        keras.utils.set_random_seed(5)
        if real:
            model = builders.image_classifier(real[0], 3, image_size=32, weights=real[1], dropout=0.3)
            return model if real[1] else estimate_batch_norm(model)
        return _with_attention() if name == "attention_only" else small_network(dropout=0.3)

    return build


def _with_attention() -> keras.Model:
    layers = keras.layers
    inputs = keras.Input((32, 32, 3), name="image")
    x = layers.Conv2D(4, 3, strides=4, activation="relu", name="conv_1")(inputs)
    weighed = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze_excite_pool")(x)
    weighed = layers.Conv2D(4, 1, activation="sigmoid", name="squeeze_excite_conv")(weighed)
    x = layers.GlobalAveragePooling2D(name="head_pool")(layers.Multiply(name="weighed")([x, weighed]))
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.Dropout(0.3, name="head_dropout")(x)))


def _strategy(name: str) -> Strategy:
    """One epoch each, and one more for the first or last phase."""
    return _parsed(name, epochs=len(_parsed(name)) + 1)


def _weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in model.weights if "seed_generator" not in weight.path}


class _KeepCopies(keras.callbacks.Callback):
    """Copy what the output folder holds when a phase begins, and within its first epoch after a step.

    That is what a process that is stopped there leaves behind.
    """

    def __init__(self, output: Path, copies: Path) -> None:
        super().__init__()
        self.output, self.copies, self.phase = output, copies, 0

    def on_train_begin(self, logs=None):
        if self.phase:
            self._copy("boundary")
        self.phase += 1
        self.first = True

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1 and self.first:
            self._copy("within")
            self.first = False

    def _copy(self, kind):
        shutil.copytree(self.output / checkpoints.FOLDER, self.copies / kind / str(self.phase) / checkpoints.FOLDER)


@dataclass(frozen=True)
class _Finished:
    """A strategy that has run to its end."""

    name: str
    real: tuple[str, str | None] | None
    model: keras.Model
    history: History
    state_before: dict[str, Any]
    boundaries: list[Path]
    within: list[Path]


@pytest.fixture(scope="module")
def finished(request, fresh, small_task, data, state_of, tmp_path_factory):
    """Run a strategy once for all tests of it."""
    name, real = request.param
    model, folder = fresh(name, real), tmp_path_factory.mktemp(name)
    before = state_of(model)
    history = training.fine_tune(
        model,
        small_task,
        data,
        _strategy(name),
        batch_size=2,
        output=folder / "output",
        callbacks=[_KeepCopies(folder / "output", folder / "copies")],
        save_every=0,
    )
    copies = [sorted(folder.glob(f"copies/{kind}/*")) for kind in ("boundary", "within")]
    return _Finished(name, real, model, history, before, *copies)


def _on(names, real=()):
    cases = [pytest.param((name, None), id=name) for name in names]
    slow = [(name, network) for network in real for name in OF_SEVERAL_KINDS]
    cases += [pytest.param(case, id=f"{case[0]}-{case[1][0]}", marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("finished", cases, indirect=True)


@_on(NAMES, REAL)
def test_the_history_is_as_long_as_the_sum_of_epochs(finished):
    strategy, history = _strategy(finished.name), finished.history
    assert {len(values) for values in history.values()} == {sum(phase.epochs for phase in strategy)}
    assert [record.epochs for record in history.phases] == [phase.epochs for phase in strategy]


def test_a_history_that_ends_early_would_be_seen(fresh, small_task, data):
    """The promise above can fail: a bound on the steps ends each phase after one epoch."""
    strategy = strategies.parse("linear_probe", epochs=2)
    history = training.fine_tune(fresh("linear_probe"), small_task, data, strategy, batch_size=2, max_steps=1)
    assert {len(values) for values in history.values()} == {1}


@_on(NAMES, REAL)
def test_nothing_is_left_on_the_model(finished, state_of):
    assert state_of(finished.model) == finished.state_before


@_on(NAMES)
def test_the_model_is_saved_and_loaded_as_any_other(finished, tmp_path):
    finished.model.save(tmp_path / "model.keras")
    assert b"tftransfer" not in zipfile.ZipFile(tmp_path / "model.keras").read("config.json")
    loaded = _weights(keras.saving.load_model(tmp_path / "model.keras"))
    for path, value in _weights(finished.model).items():
        np.testing.assert_array_equal(loaded[path], value)


@pytest.mark.parametrize("leave", ["compiled", "attributes", "variables", "nodes", "config"])
def test_what_is_left_on_a_model_would_be_seen(fresh, state_of, leave):
    """The promise above can fail in each of its parts."""
    model = fresh("full")
    before = state_of(model)
    layer = model.get_layer("conv_1")
    {
        "compiled": lambda: model.compile("sgd", "mse"),
        "attributes": lambda: setattr(layer, "factor", 1.0),
        "variables": lambda: layer.enable_lora(2),
        "nodes": lambda: keras.Model(layer.output, model.output),
        "config": lambda: setattr(model.get_layer("head_dropout"), "rate", 0.1),
    }[leave]()
    assert state_of(model)[leave] != before[leave]


def test_a_strategy_that_does_not_fit_the_network_is_refused(small_network, small_task, data):
    with pytest.raises(InputError, match="matches nothing below the head"):
        training.fine_tune(small_network(), small_task, data, _strategy("attention_only"), batch_size=2)


@_on(SEVERAL, REAL)
def test_going_on_at_each_phase_boundary_equals_never_having_stopped(finished, fresh, small_task, data, tmp_path):
    assert len(finished.boundaries) == len(_strategy(finished.name)) - 1
    _goes_on(finished, finished.boundaries, fresh, small_task, data, tmp_path)


@_on(NAMES, REAL)
def test_going_on_within_each_phase_equals_never_having_stopped(finished, fresh, small_task, data, tmp_path):
    assert len(finished.within) == len(_strategy(finished.name))
    _goes_on(finished, finished.within, fresh, small_task, data, tmp_path)


def _goes_on(finished, copies, fresh, small_task, data, tmp_path):
    expected, strategy = _weights(finished.model), _strategy(finished.name)
    for copy in copies:
        output = shutil.copytree(copy, tmp_path / copy.name)
        model = fresh(finished.name, finished.real)
        history = training.fine_tune(model, small_task, data, strategy, batch_size=2, output=output)
        assert dict(history) == dict(finished.history)
        for (path, value), other in zip(_weights(model).items(), expected.values(), strict=True):
            np.testing.assert_array_equal(value, other, err_msg=path)  # Keras numbers what has no name


@pytest.mark.parametrize("lost", ["weight", "moment0"])
@_on(["gradual"])
def test_what_is_lost_at_a_boundary_would_be_seen(finished, fresh, small_task, data, tmp_path, lost):
    """The promise above can fail: without a weight or a moment, training goes on elsewhere."""
    output, model = shutil.copytree(finished.boundaries[-1], tmp_path / "output"), fresh(finished.name)
    for within in (output / checkpoints.FOLDER).glob("*-*[1-9]*"):
        shutil.rmtree(within)
    folder = max((output / checkpoints.FOLDER).iterdir())
    described, kinds = tensor_files.read(folder / checkpoints.FILE, checkpoints.PHASE)
    place = trainable.places(model)["logits/kernel"]
    changed = {**kinds, lost: {**kinds[lost], place: np.zeros_like(kinds[lost][place])}}
    told = {name: value for name, value in described.items() if name not in ("format", "sha256")}
    sealed_folders.write(
        folder, lambda new: tensor_files.write(new / checkpoints.FILE, changed, checkpoints.PHASE, **told)
    )
    history = training.fine_tune(model, small_task, data, _strategy(finished.name), batch_size=2, output=output)
    assert dict(history) != dict(finished.history)
    assert not np.array_equal(_weights(model)["logits/kernel"], _weights(finished.model)["logits/kernel"])
