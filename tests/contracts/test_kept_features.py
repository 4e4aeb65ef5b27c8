"""On every family: features that are kept and features that are computed anew train to the same bits."""

from __future__ import annotations

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tftransfer
from tftransfer import (
    backbones,
    builders,
    callbacks,
    constants,
    feeding,
    inference,
    optimizers,
    tasks,
    trainable,
    training,
)
from tftransfer.data import Data, order
from tftransfer.strategies import Phase

TASK = tasks.SingleLabel(("red", "green", "blue"))
ROUNDING = 1e-5  # of folding, relative in norm
STEP = 1e-2  # the same, of what one step adds to a variable; it jumps where a ReLU's input is within rounding of zero
SELECTORS = ("head", "last:1", "last:3", "from")
FAMILIES = (
    "MobileNetV2-0.35",
    "ConvNeXtTiny",
    "MobileNetV3Small",
    "VGG16",
    "ResNet50",
    "ResNet50V2",
    "DenseNet121",
    "InceptionV3",
    "InceptionResNetV2",
    "Xception",
    "NASNetMobile",
    "EfficientNetB0",
    "EfficientNetV2B0",
)
QUICK = [("MobileNet-0.25", "head"), ("MobileNet-0.25", "last:1")]
SEEDS = {"NASNetMobile": 1}  # with seed 0 the input of a ReLU lies so near zero that folding moves it to the other side


RANDOM_DEPTH = ("EfficientNetB0", "EfficientNetV2B0")  # stock `fit` leaves out branches of what is frozen


def _cases(quick: list[tuple[str, str]], but: tuple[str, ...] = ()) -> list:
    every = itertools.product([name for name in ("MobileNet-0.25", *FAMILIES) if name not in but], SELECTORS)
    return [pytest.param(*case, id="-".join(case), marks=() if case in quick else pytest.mark.slow) for case in every]


@pytest.fixture(scope="module")
def build(with_scales, estimate_batch_norm):
    """Return a function that gives a network of one name, built once, with the weights that it was built with."""
    held: dict[tuple[str, float], tuple[keras.Model, list[np.ndarray]]] = {}

    def get(name: str, dropout: float = 0.2) -> keras.Model:
        if (name, dropout) not in held:
            held.clear()
            keras.utils.set_random_seed(SEEDS.get(name, 0))
            size = max(backbones.backbone(name).smallest_size, 32)
            model = builders.image_classifier(name, 3, image_size=size, weights=None, dropout=dropout)
            held[name, dropout] = estimate_batch_norm(with_scales(model)), model.get_weights()
        model, weights = held[name, dropout]
        model.set_weights(weights)
        return model

    return get


@pytest.fixture
def data(make_examples):
    """Return a function from a picture's side to a few pictures in three colours."""

    def made(size: int, count: int = 10) -> Data:
        generator = np.random.default_rng(0)
        targets = np.arange(count, dtype=np.int32) % 3
        pictures = generator.integers(0, 120, (count, size, size, 3), np.uint8)
        pictures[np.arange(count), :, :, targets] += 100
        some = make_examples(pictures, targets)
        return Data("colours", TASK.labels, some, some, some, found=3 * count)

    return made


def _phase(model: keras.Model, selector: str) -> Phase:
    groups = backbones.depth_groups(model)
    selector = f"from:{groups[len(groups) // 2].layers[0]}" if selector == "from" else selector
    return Phase(selector, selector, 2, 1e-3)


@pytest.mark.parametrize(("name", "selector"), _cases(QUICK))
def test_kept_and_computed_train_to_the_same_bits(build, data, monkeypatch, name, selector):
    monkeypatch.setattr(feeding, "_PAYS", 0.0)  # two epochs on little that is frozen would not pay
    monkeypatch.setattr(callbacks.KeepBest, "on_train_end", lambda self, logs=None: None)  # also where none was better
    ended = []
    for cache in ("auto", "off"):
        model = build(name)
        phase = _phase(model, selector)
        history = training.fine_tune(model, TASK, data(model.input_shape[1]), (phase,), batch_size=4, cache=cache)
        assert history.phases[0].store.startswith("kept") == (cache == "auto"), history.phases[0].store
        ended.append(model.get_weights())
    assert any(
        not np.array_equal(before, after) for before, after in zip(build(name).get_weights(), ended[0], strict=True)
    )
    for kept, computed in zip(*ended, strict=True):
        np.testing.assert_array_equal(kept, computed)


@pytest.mark.parametrize(("name", "selector"), _cases(QUICK[1:]))
def test_folded_features_and_one_step_are_those_of_the_network(build, data, monkeypatch, name, selector):
    monkeypatch.setattr(callbacks.KeepBest, "on_train_end", lambda self, logs=None: None)  # also where none was better
    model = build(name)
    phase = dataclasses.replace(_phase(model, selector), optimizer="sgd", schedule="constant", weight_decay=0.0)
    source = data(model.input_shape[1])
    stepped = []
    for folded in (True, False):
        model = build(name)
        if not folded:
            monkeypatch.setattr(constants, "as_constant_function", _with_variables)
        training.fine_tune(model, TASK, source, (phase,), batch_size=10, max_steps=1)
        stepped.append(model.get_weights())
    for before, ours, theirs in zip(build(name).get_weights(), *stepped, strict=True):
        if before.dtype == np.float32:  # states of random layers are whole numbers
            moved, error = _distance(theirs, before), _distance(ours, theirs)
            assert error <= min(ROUNDING * max(float(np.linalg.norm(theirs)), moved), STEP * moved)
        else:
            np.testing.assert_array_equal(ours, theirs)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other))


@pytest.mark.parametrize(("name", "selector"), _cases(QUICK[:1], but=RANDOM_DEPTH))
def test_unfolded_features_train_to_the_bits_of_stock_fit(build, data, monkeypatch, name, selector):
    """Kept or computed in every step: without folding nothing differs from `fit` on the whole network.

    The last bits of a sum may depend on how many examples come together: here it is four, kept or not.
    """
    monkeypatch.setattr(feeding, "_PAYS", 0.0)
    monkeypatch.setattr(callbacks.KeepBest, "on_train_end", lambda self, logs=None: None)  # stock `fit` keeps none
    monkeypatch.setattr(constants, "as_constant_function", _with_variables)
    model = build(name, dropout=0.0)
    alike = {
        "epochs": 1,
        "learning_rate": 1e-5,
        "optimizer": "sgd",
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
    }
    phase = dataclasses.replace(_phase(model, selector), **alike)
    source = data(model.input_shape[1], 12)
    ended = []
    for cache in ("auto", "off"):
        model = build(name, dropout=0.0)
        training.fine_tune(model, TASK, source, (phase,), batch_size=4, cache=cache)
        ended.append(model.get_weights())
    model = build(name, dropout=0.0)
    trainable.set_trainable(model, phase.selector)
    loss = TASK.loss(builders.outputs_are_logits(model), source.train.targets)
    model.compile(optimizers.LayerwiseSGD(phase.learning_rate, weight_decay=0.0), loss, jit_compile=False)
    model.fit(order.batches(source.train, 4, seed=0, phase=0, steps=3), shuffle=False, verbose=0)
    for kept, computed, stock in zip(*ended, model.get_weights(), strict=True):
        np.testing.assert_array_equal(computed, stock)
        if name == "Xception":  # whose sums are shared out over threads by an example's place among the four
            assert _distance(kept, stock) <= 1e-6 * np.linalg.norm(stock)
        else:
            np.testing.assert_array_equal(kept, stock)


def _with_variables(frozen: keras.Model, chunk: int | None = None):
    """Run the frozen part as a graph, but with its variables; what is kept is computed in chunks, a batch is one."""
    run = tf.function(lambda batch: tf.nest.flatten(frozen(tf.cast(batch, tf.float32), training=False)))

    def in_chunks(batch: tf.Tensor) -> list[tf.Tensor]:
        if chunk is None or not tf.executing_eagerly():
            return run(batch)
        parts = [run(batch[begin : begin + chunk]) for begin in range(0, len(batch), chunk)]
        return [tf.concat(outputs, axis=0) for outputs in zip(*parts, strict=True)]

    return in_chunks


@pytest.mark.parametrize("name", ["MobileNet-0.25", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_features_that_are_kept_are_the_networks(data, with_scales, estimate_batch_norm, name):
    keras.utils.set_random_seed(0)
    size = max(backbones.backbone(name).smallest_size, 32)
    network = estimate_batch_norm(with_scales(backbones.build(name, (size, size), None)))
    examples = data(size).train
    ours = inference.pooled_features(network, examples).values[0]
    pictures = np.stack([examples.pictures.load(index) for index in range(10)]).astype(np.float32)
    theirs = network(pictures, training=False).numpy().mean(axis=(1, 2))
    assert np.linalg.norm(ours - theirs) <= ROUNDING * np.linalg.norm(theirs)


REAL = pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param(
            "MobileNetV2-0.35",
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5",
            marks=pytest.mark.slow,
        ),
        ("MobileNet-0.25", "mobilenet_2_5_224_tf_no_top.h5"),
    ],
)


@REAL
def test_features_with_real_weights_are_the_networks(data, assets, name, file):
    network = backbones.build(name, (96, 96), str(assets / "weights" / file))
    examples = data(96).train
    ours = inference.pooled_features(network, examples).values[0]
    pictures = np.stack([examples.pictures.load(index) for index in range(10)]).astype(np.float32)
    theirs = network(pictures, training=False).numpy().mean(axis=(1, 2))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.slow
@REAL
def test_a_step_with_real_weights_is_the_networks(data, assets, monkeypatch, name, file):
    phase = Phase("step", "last:2", 1, 1e-2, optimizer="sgd", schedule="constant", weight_decay=0.0)
    ended = []
    for folded in (True, False):
        if not folded:
            monkeypatch.setattr(constants, "as_constant_function", _with_variables)
        keras.utils.set_random_seed(0)
        weights = str(assets / "weights" / file)
        model = builders.image_classifier(name, 3, image_size=96, weights=weights, dropout=0.0)
        training.fine_tune(model, TASK, data(96), (phase,), batch_size=10, max_steps=1)
        ended.append(model.get_weights())
    for one, other in zip(*ended, strict=True):
        assert np.linalg.norm(one.astype(np.float64) - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.slow
def test_folded_or_not_the_accuracy_is_the_same(monkeypatch):
    found, task = tftransfer.data.load("demo", image_size=(64, 64))
    accuracies: dict[bool, list[float]] = {True: [], False: []}
    for folded, reached in accuracies.items():
        if not folded:
            monkeypatch.setattr(constants, "as_constant_function", _with_variables)
        for seed in (0, 1, 2):
            keras.utils.set_random_seed(seed)
            model = builders.image_classifier("MobileNet-0.25", 10, image_size=64, weights="demo")
            phases = (Phase("top", "last:1", 2, 1e-3),)
            training.fine_tune(model, task, found, phases, seed=seed)
            answers = inference.predict(model, task, found.test).argmax(axis=1)
            reached.append(float(np.mean(answers == found.test.targets)))
    assert min(accuracies[True]) > 0.5
    assert min(accuracies[True]) - 1 / 360 <= np.mean(accuracies[False]) <= max(accuracies[True]) + 1 / 360
