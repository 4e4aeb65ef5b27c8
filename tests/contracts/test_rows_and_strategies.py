"""What every backbone does under every strategy; each promise has a case beside it that is proved to fail."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import backbones, builders, serving, strategies, tasks, training
from tftransfer.data import Data, Examples, Pictures
from tftransfer.errors import InputError
from tftransfer.strategies import Phase

# The demo's network and one with residual blocks; one row of each other family is slow.
QUICK = (("MobileNet-0.25", "demo"), ("MobileNetV2-0.35", None))
SLOW = (
    "ConvNeXtTiny",
    "MobileNet-0.25",
    "MobileNetV3Small",
    "VGG16",
    "VGG19",
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
NETWORKS = [
    *(pytest.param(name, weights, id=name) for name, weights in QUICK),
    *(pytest.param(name, None, id=f"{name}-random", marks=pytest.mark.slow) for name in SLOW),
]
TASK = tasks.SingleLabel(("red", "green", "blue"))


def _data(size: int, count: int = 12) -> Data:
    generator = np.random.default_rng(0)
    targets = np.arange(count, dtype=np.int32) % 3
    pictures = generator.integers(0, 120, (count, size, size, 3), np.uint8)
    pictures[np.arange(count), :, :, targets] += 100
    held = tf.constant(pictures)
    source = Pictures(tuple(map(str, range(count))), lambda index: tf.gather(held, index), (size, size))
    examples = Examples(source, targets, np.ones(count, np.float32))
    return Data("colours", TASK.labels, examples, examples, examples)


@pytest.fixture
def network(request, estimate_batch_norm):
    name, weights = request.param
    size = backbones.backbone(name).smallest_size
    model = builders.image_classifier(name, 3, image_size=size, weights=weights, dropout=0.0)
    return model if weights else estimate_batch_norm(model)


# What takes longest runs by default on the demo's network alone.
LONG = [NETWORKS[0], *(pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in NETWORKS[1:])]


def _both(parameters):
    return pytest.mark.parametrize("network", [_pair(p) for p in parameters], indirect=True)


def _pair(parameter):
    return pytest.param(parameter.values, id=parameter.id, marks=parameter.marks)


class _Watch(keras.callbacks.Callback):
    """Keep the whole model's weights as they are after each step, before any are restored or averaged."""

    def on_train_batch_end(self, batch, logs=None):
        self.weights = {weight.path: weight.numpy() for weight in self.model.weights}


def _should_train(model: keras.Model, phase: Phase) -> set[str]:
    """Return the paths of the weights that a phase means, found from names and classes of layers, not from any flag."""
    groups = backbones.depth_groups(model)
    below = [layer for layer in model.layers if layer.name in {name for group in groups for name in group.layers}]
    leaves = [leaf for layer in below for leaf in layer._flatten_layers()]
    if phase.selector.startswith("last:"):
        text = phase.selector.removeprefix("last:")
        count = math.ceil(int(text[:-1]) / 100 * len(groups)) if text.endswith("%") else int(text)
        names = {name for group in groups[-count:] for name in group.layers}
        chosen = [w for layer in below if layer.name in names for w in layer.weights]
    else:
        norms = (keras.layers.BatchNormalization, keras.layers.LayerNormalization)
        chosen = {
            "head": [],
            "all": [w for leaf in leaves for w in leaf.weights],
            "norm": [w for leaf in leaves if isinstance(leaf, norms) for w in leaf.weights],
            "bias": [w for leaf in leaves for w in leaf.weights if w.name in ("bias", "beta")],
            "attention": [w for w in model.weights if "squeeze_excite" in w.path or "_se_" in w.path],
        }[phase.selector]
    head = [w for w in model.weights if w.path.startswith("logits")]
    return {w.path for w in (*chosen, *head) if "moving" not in w.path and "seed_generator" not in w.path}


def _moved(network: keras.Model, phase: Phase, data: Data) -> set[str]:
    before = {weight.path: weight.numpy() for weight in network.weights}
    watch = _Watch()
    training.fine_tune(network, TASK, data, (phase,), batch_size=4, max_steps=2, callbacks=[watch])
    for weight in network.weights if phase.adapter is None else ():  # what was kept at the end is frozen alike
        if np.array_equal(watch.weights[weight.path], before[weight.path]) and "seed_generator" not in weight.path:
            np.testing.assert_array_equal(weight, before[weight.path], err_msg=weight.path)
    return {
        path
        for path, value in watch.weights.items()
        if not np.array_equal(value, before[path]) and "seed_generator" not in path
    }


def _phases() -> dict[str, Phase]:
    """Return every phase of every strategy, one of those that train the same in the same way."""
    found: dict[str, Phase] = {}
    for name in strategies.names():
        for phase in strategies.parse(name):
            parts = (phase.adapter, phase.penalty, phase.average)
            kinds = [type(part).__name__ for part in parts if part] + ["moments"] * phase.carry_moments
            found.setdefault("-".join([phase.selector, *kinds]), phase)
    return found


PHASES = _phases()
QUICK_PHASES = ("head", "all-Ema", "norm-Ema", "head-Lora-Ema")


def _network_and_phase():
    for parameter in NETWORKS:
        for key in PHASES:
            (name, weights) = parameter.values[0]
            slow = parameter.marks or (weights != "demo" and key not in QUICK_PHASES)
            marks = (pytest.mark.slow,) if slow else ()
            yield pytest.param((name, weights), key, id=f"{parameter.id}-{key}", marks=marks)


@pytest.mark.parametrize(("network", "key"), list(_network_and_phase()), indirect=["network"])
def test_two_steps_move_what_trains_and_nothing_else(network, key):
    phase = PHASES[key]
    data = _data(network.input_shape[1])
    expected = _should_train(network, phase)
    if phase.selector == "attention" and len(expected) == 2:
        with pytest.raises(InputError, match="matches nothing below the head"):
            _moved(network, phase, data)
        return
    moved = _moved(network, phase, data)
    assert moved <= expected
    kernels = {path for path in expected if path.endswith(("kernel", "gamma"))}
    assert kernels <= moved  # offsets may have no gradient in two steps


def test_a_selector_that_trains_too_much_would_be_seen(small_network):
    """The promise above can fail: what "all" moves is more than "head" means, and a rate of nearly zero moves less."""
    network = small_network()
    data = _data(32)
    assert not _moved(network, Phase("all", "all"), data) <= _should_train(network, Phase("probe", "head"))
    assert not {"logits/kernel"} <= _moved(network, Phase("probe", "head", learning_rate=1e-30), data)


def test_a_moved_statistic_would_be_seen(small_network):
    """The promise above can fail: stock `fit` on a network that is not frozen layer by layer moves statistics."""
    model = small_network()
    before = model.get_layer("norm_1").moving_mean.numpy()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = _data(32)
    pictures = np.stack([data.train.pictures.load(i) for i in range(12)]).astype(np.float32)
    model.fit(pictures, data.train.targets, verbose=0)
    assert not np.array_equal(before, model.get_layer("norm_1").moving_mean.numpy())


@_both(LONG)
def test_overfits_a_batch(network):
    data = _data(network.input_shape[1])
    rate = 2e-3 if any("moving" in w.path for w in network.weights) else 2e-4  # VGG diverges where others learn
    phase = Phase("all", "all", 25, rate, warmup=0.1)
    history = training.fine_tune(network, TASK, data, (phase,), batch_size=12)
    assert min(history["val_loss"]) < 0.5 * history["loss"][0]


@_both(NETWORKS[:1])
def test_without_a_learning_rate_it_would_not(network):
    history = training.fine_tune(network, TASK, _data(network.input_shape[1]), (Phase("all", "all", 3, 1e-9),))
    assert min(history["val_loss"]) > 0.9 * history["loss"][0]


@_both(NETWORKS)
def test_saves_and_loads(network, tmp_path):
    pictures = np.random.default_rng(1).uniform(0, 255, (2, *network.input_shape[1:])).astype(np.float32)
    before = network.predict(pictures, verbose=0)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(before, loaded.predict(pictures, verbose=0))
    assert backbones.depth_groups(loaded) == backbones.depth_groups(network)


@_both(LONG)
def test_exports_what_was_trained(network, tmp_path):
    version, verification = serving.publish(network, TASK, tmp_path / "serving", repeats=3)
    assert verification.passed, verification.lines()
    assert version.name == "1"


@_both(NETWORKS[:1])
def test_an_export_of_other_weights_would_be_refused(network, tmp_path):
    serving.export_savedmodel(network, TASK, tmp_path / "1")
    kernel = network.get_layer("logits").kernel
    kernel.assign(kernel + 0.01 * np.random.default_rng(0).normal(size=kernel.shape))
    assert not serving.verify(tmp_path / "1", model=network, task=TASK, repeats=3).passed
