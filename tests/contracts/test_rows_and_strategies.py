"""What every backbone does under every strategy; each promise has a case beside it that is proved to fail."""

from __future__ import annotations

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import advice, backbones, builders, constants, serving, strategies, tasks, trainable, training
from tftransfer.averages import WiseFt
from tftransfer.data import Data, Examples, Pictures
from tftransfer.errors import InputError
from tftransfer.history import History
from tftransfer.optimizers import LayerwiseAdamW, LayerwiseSGD
from tftransfer.serving import export
from tftransfer.strategies import Phase

DEMO = ("MobileNet-0.25", "demo")
QUICK = (DEMO, ("MobileNetV2-0.35", None), ("ConvNeXtTiny", None))
SLOW = (  # one row of each other family, and the demo's with random weights
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
THREE = [pytest.param(pair, id=pair[0]) for pair in QUICK]
NETWORKS = [*THREE, *(pytest.param((name, None), id=f"{name}-random", marks=pytest.mark.slow) for name in SLOW)]
# A graph session rewrites these otherwise than a function (with ConvNeXt, Keras has XLA compile convolutions): the same
# SavedModel equals Keras bit for bit where TensorFlow 2 loads it, and within rounding where a session does.
REWRITTEN = ("ConvNeXtTiny", "DenseNet121", "EfficientNetV2B0")
# What takes longest runs by default on the demo's network alone.
LONG = [NETWORKS[0], *(pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in NETWORKS[1:])]
# By default without the largest: `test_depth.py` loads a ConvNeXt too.
SAVED = [*NETWORKS[:2], LONG[2], *NETWORKS[3:]]
STEPPED = SAVED[:3]
OTHERS = [pytest.param(*THREE[0].values, id=THREE[0].id, marks=pytest.mark.slow), *THREE[1:]]
TASK = tasks.SingleLabel(("red", "green", "blue"))


def _examples(size: int, count: int) -> Examples:
    generator = np.random.default_rng(0)
    targets = np.arange(count, dtype=np.int32) % 3
    pictures = generator.integers(0, 120, (count, size, size, 3), np.uint8)
    pictures[np.arange(count), :, :, targets] += 100
    held = tf.constant(pictures)
    source = Pictures(tuple(map(str, range(count))), lambda index: tf.gather(held, index), (size, size))
    return Examples(source, targets, np.ones(count, np.float32))


def _data(size: int, training_examples: int = 12, others: int = 12) -> Data:
    other = _examples(size, others)
    return Data("colours", TASK.labels, _examples(size, training_examples), other, other)


@pytest.fixture(scope="module")
def built(request, estimate_batch_norm, state_of):
    """Build each network once; beside it its row, its weights and what it holds else."""
    name, weights = request.param
    keras.utils.set_random_seed(0)
    size = backbones.backbone(name).smallest_size
    model = builders.image_classifier(name, 3, image_size=size, weights=weights, dropout=0.0)
    if weights is None:
        estimate_batch_norm(model)
    return request.param, model, model.get_weights(), state_of(model)


@pytest.fixture
def network(built, state_of):
    """Hand out a network as it was built, and see to it that nothing but its weights is changed."""
    _, model, weights, state = built
    yield model
    assert state_of(model) == state
    model.set_weights(weights)
    model.trainable = True


def _on(networks):
    return pytest.mark.parametrize("built", networks, indirect=True)


class _Watch(keras.callbacks.Callback):
    """Keep the whole model's weights as they are after each step, before any are restored or averaged."""

    def on_train_batch_end(self, batch, logs=None):
        self.weights = _values(self.model)


def _values(model: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: weight.numpy() for weight in model.weights if "seed_generator" not in weight.path}


def _below(model: keras.Model) -> list[keras.Layer]:
    return [model.get_layer(name) for group in backbones.depth_groups(model) for name in group.layers]


def _should_train(model: keras.Model, phase: Phase) -> set[str]:
    """Return the paths of the weights that a phase means, found from names and classes of layers, not from any flag."""
    groups = backbones.depth_groups(model)
    leaves = [leaf for layer in _below(model) for leaf in layer._flatten_layers()]
    constants = {w.path for leaf in leaves if isinstance(leaf, keras.layers.Normalization) for w in leaf.weights}
    if phase.selector.startswith("groups:"):
        named = phase.selector.removeprefix("groups:").split("+")
        layers = [name for group in groups if group.name in named for name in group.layers]
        chosen = [weight for name in layers for weight in model.get_layer(name).weights]
    elif phase.selector.startswith("last:"):
        some, _, parts = phase.selector.removeprefix("last:").partition("/")
        count = round(len(groups) * int(some) / int(parts)) if parts else int(some)
        chosen = [w for group in groups[-count:] for name in group.layers for w in model.get_layer(name).weights]
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
    return {w.path for w in (*chosen, *head) if "moving" not in w.path and "seed_generator" not in w.path} - constants


def _adapted(model: keras.Model) -> set[str]:
    """Return the paths of the kernels that LoRA changes when it is merged."""
    leaves = [leaf for layer in _below(model) for leaf in layer._flatten_layers()]
    kinds = (keras.layers.Dense, keras.layers.Conv2D, keras.layers.SeparableConv2D)
    mixing = [weight for leaf in leaves if isinstance(leaf, kinds) for weight in leaf.weights]  # of channels
    return {weight.path for weight in mixing if weight.name in ("kernel", "pointwise_kernel")}


def _two_steps(network: keras.Model, phase: Phase) -> tuple[set[str], set[str], History]:
    """Return what moved in two steps, what differs when the phase is over, and the history."""
    before, watch = _values(network), _Watch()
    data = _data(network.input_shape[1], 4, 2)
    history = training.fine_tune(network, TASK, data, (phase,), batch_size=2, max_steps=2, callbacks=[watch])
    return _changed(before, watch.weights), _changed(before, _values(network)), history


def _changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {path for path, value in after.items() if not np.array_equal(value, before[path])}


def _phases() -> dict[str, Phase]:
    """Return every phase of every strategy, one of those that train the same in the same way: the averaged one.

    Moments that are carried over are nothing to a phase on its own; `test_named_strategies.py` runs whole strategies.
    """
    found: dict[str, Phase] = {}
    for name in strategies.names():
        for phase in strategies.parse(name):
            interpolated = isinstance(phase.average, WiseFt)
            if interpolated:
                phase = dataclasses.replace(phase, average=WiseFt(2))  # fewer points on the line cost less
            parts = (phase.adapter, phase.penalty, phase.average if interpolated else None)
            key = "-".join([phase.selector, *(type(part).__name__ for part in parts if part)])
            if key not in found or phase.average:
                found[key] = phase
    found["surgical"] = advice.Choice("surgical").planned[1]
    return found


PHASES = _phases()
TRACED = ("head", "all")


@pytest.fixture
def pace(built, key, monkeypatch):
    """Trace two phases of the demo's network, run the others eagerly: tracing takes most of the time.

    `test_trainee.py` and `test_training.py` trace each kind of phase on a small network.

    The frozen part of all but the smallest runs with variables: folding millions of constants takes seconds.
    """
    row = built[0]
    traced = row == DEMO and key in TRACED
    if row not in QUICK[:2]:
        monkeypatch.setattr(constants, "as_constant_function", _with_variables)
    tf.config.run_functions_eagerly(not traced)
    yield
    tf.config.run_functions_eagerly(False)


def _with_variables(frozen: keras.Model, chunk: int | None = None):
    return lambda batch: tf.nest.flatten(frozen(tf.cast(batch, tf.float32), training=False))


def _settled(phase: Phase, network: keras.Model) -> Phase:
    """Settle a phase for a network: `surgical` on its lowest and highest group, penalties of large ones on their top.

    An adapter steps so little that no validation loss tells the steps apart: the last ones' moments are then kept.
    """
    if phase is PHASES["surgical"]:
        groups = backbones.depth_groups(network)
        return dataclasses.replace(phase, selector=f"groups:{groups[0].name}+{groups[-1].name}")
    if phase.adapter:
        return dataclasses.replace(phase, learning_rate=1e-5)
    heavy = network.count_params() > 10_000_000 and phase.selector == "all"
    holds = phase.penalty or isinstance(phase.average, WiseFt)
    return dataclasses.replace(phase, selector="last:2") if heavy and holds else phase


_eagerly = pytest.mark.filterwarnings(
    "ignore:Even though the `tf.config.experimental_run_functions_eagerly`:UserWarning"
)


@_eagerly
@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("key", PHASES)
@_on(LONG)
def test_two_steps_move_what_trains_and_nothing_else(network, key):
    _check_two_steps(network, key)


@_eagerly
@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("key", ["all", "head-Lora"])
@_on(OTHERS)
def test_two_steps_move_it_in_other_families_by_default_too(network, key):
    _check_two_steps(network, key)


def _check_two_steps(network: keras.Model, key: str) -> None:
    phase = _settled(PHASES[key], network)
    expected = _should_train(network, phase)
    if phase.selector != "head" and len(expected) == 2:  # no attention, or as in VGG no normalisation
        with pytest.raises(InputError, match="matches nothing below the head"):
            _two_steps(network, phase)
        return
    moved, differs, history = _two_steps(network, phase)
    assert moved == expected
    assert differs <= (expected | _adapted(network) if phase.adapter else expected)
    if phase.adapter:  # the factors are no weights of the network: what the optimizer remembers tells that they moved
        moments = {path: moment for path, moment in history.adapter.reached.moments.items() if "lora_" in path}
        assert len(moments) == 2 * len(_adapted(network))
        assert all(np.any(moment.slots[0]) for moment in moments.values())


def test_a_selector_that_trains_too_much_or_too_little_would_be_seen(small_network):
    """The promise above can fail: "all" moves more than "head" means, and a rate of nearly zero moves nothing."""
    network = small_network()
    assert _two_steps(network, Phase("all", "all"))[0] > _should_train(network, Phase("probe", "head"))
    assert not _two_steps(network, Phase("probe", "head", learning_rate=1e-30))[0]


def test_a_moved_statistic_would_be_seen(small_network):
    """The promise above can fail: stock `fit` on a network that is not frozen layer by layer moves statistics."""
    model = small_network()
    before = model.get_layer("norm_1").moving_mean.numpy()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = _data(32)
    pictures = np.stack([data.train.pictures.load(i) for i in range(12)]).astype(np.float32)
    model.fit(pictures, data.train.targets, verbose=0)
    assert not np.array_equal(before, model.get_layer("norm_1").moving_mean.numpy())


Steps = list[list[float]]


def _steps(model: keras.Model, optimizer: keras.optimizers.Optimizer, gradients: dict[str, float]) -> list[Steps]:
    """Let each weight begin at one and take one step, all of a variable with one gradient.

    Returns:
        How far the variables of each depth group went, from stem to head: kernels, and those of one dimension.
    """
    trainable.set_trainable(model, "all")
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(np.ones(variable.shape, np.float32))
    optimizer.apply([keras.ops.full(v.shape, gradients[v.path]) for v in variables], variables)
    groups = [*(group.layers for group in backbones.depth_groups(model)), ("logits",)]
    of_groups = [[w for name in layers for w in model.get_layer(name).weights if w.trainable] for layers in groups]
    assert sum(map(len, of_groups)) == len(variables)
    return [[[_step(w) for w in own if (len(w.shape) > 1) == kernel] for own in of_groups] for kernel in (True, False)]


def _step(variable: keras.Variable) -> float:
    return float(np.mean(1 - variable.numpy(), dtype=np.float64))


def _check_ratio(steps: Steps, ratio: float) -> None:
    """Compare each group's shortest and longest step with those of the group above."""
    pairs = [(below, above) for below, above in itertools.pairwise(steps) if below and above]
    assert len(pairs) >= len(steps) - 3  # ConvNeXt's topmost group has no kernel
    for below, above in pairs:
        assert [max(below) / min(above), min(below) / max(above)] == pytest.approx([ratio, ratio], rel=0.01)


@pytest.mark.parametrize("gradient", [1.0, 0.0])
@pytest.mark.parametrize("optimizer", [LayerwiseAdamW, LayerwiseSGD])
@_on(STEPPED)
def test_neighbouring_groups_step_and_decay_in_the_ratio_of_layer_decay(network, optimizer, gradient):
    multipliers = trainable.rate_multipliers(network, 0.7)
    gradients = dict.fromkeys(multipliers, gradient)
    kernels, others = _steps(network, optimizer(0.1, weight_decay=0.5, multipliers=multipliers), gradients)
    assert kernels[-1] == pytest.approx([0.1 * (gradient + 0.5)], rel=1e-3)  # the head's: the rate as it is
    _check_ratio(kernels, 0.7)
    if gradient:
        assert others[-1] == pytest.approx([0.1], rel=1e-3)  # not decayed
        _check_ratio(others, 0.7)
    else:
        assert not any(map(any, others))


@pytest.mark.parametrize("gradient", [1.0, 0.0])
@pytest.mark.parametrize("optimizer", [keras.optimizers.AdamW, keras.optimizers.SGD])
@_on(NETWORKS[:1])
def test_scaled_gradients_under_a_stock_optimizer_would_be_seen(network, optimizer, gradient):
    """The promise above can fail: AdamW steps as far as before, and under both all weights decay at one rate."""
    gradients = {path: gradient * factor for path, factor in trainable.rate_multipliers(network, 0.7).items()}
    kernels, _ = _steps(network, optimizer(0.1, weight_decay=0.5), gradients)
    with pytest.raises(AssertionError, match="approx"):
        _check_ratio(kernels, 0.7)
    if optimizer is keras.optimizers.AdamW or not gradient:
        _check_ratio(kernels, 1.0)


@pytest.mark.slow
@_on(LONG)
def test_overfits_a_batch(network):
    data = _data(network.input_shape[1])
    rate = 2e-3 if any("moving" in w.path for w in network.weights) else 2e-4  # VGG diverges where others learn
    phase = Phase("all", "all", 25, rate, warmup=0.1)
    history = training.fine_tune(network, TASK, data, (phase,), batch_size=12)
    assert min(history["val_loss"]) < 0.5 * history["loss"][0]


@pytest.mark.slow
@_on(NETWORKS[:1])
def test_without_a_learning_rate_it_would_not(network):
    history = training.fine_tune(network, TASK, _data(network.input_shape[1]), (Phase("all", "all", 3, 1e-9),))
    assert min(history["val_loss"]) > 0.9 * history["loss"][0]


@_on(SAVED)
def test_saves_and_loads(network, tmp_path):
    pictures = np.random.default_rng(1).uniform(0, 255, (2, *network.input_shape[1:])).astype(np.float32)
    before = network(pictures)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(before, loaded(pictures))
    assert backbones.depth_groups(loaded) == backbones.depth_groups(network)


@pytest.mark.parametrize(
    "optimise", [pytest.param(True, id="constants", marks=pytest.mark.slow), pytest.param(False, id="variables")]
)
@_on(LONG)
def test_exports_what_was_trained(network, built, tmp_path, optimise):
    """By three loaders: as a graph of constants within 1e-5, as the recipes do, with its variables bit for bit.

    Batches of 33 against single pictures may differ in the last bit: sums are shared out over threads otherwise.
    """
    version, verification = serving.publish(network, TASK, tmp_path / "serving", repeats=3, optimise=optimise)
    assert verification.passed, verification.lines()
    assert version.name == "1"
    assert all(check.name != "graph of constants" for check in verification.checks)
    loaders = ("graph session equals Keras", "C library equals graph session")
    with_keras, with_session = (
        check.metrics["maximum difference"] for name in loaders for check in verification.checks if check.name == name
    )
    rounded = optimise or built[0][0] in REWRITTEN
    assert with_keras <= (1e-5 if rounded else 0.0), verification.lines()
    assert with_session <= (1e-5 if optimise else 0.0), verification.lines()
    if not optimise:
        pictures = np.random.default_rng(1).uniform(0, 255, (4, *network.input_shape[1:])).astype(np.float32)
        served = tf.saved_model.load(version).signatures["tensor"](tf.constant(pictures))
        trained = export.answers_of(network, TASK)(tf.constant(pictures))
        for name, values in trained.items():
            np.testing.assert_array_equal(values, served[name])


@pytest.mark.slow
@_on(NETWORKS[:1])
def test_an_export_of_other_weights_would_be_refused(network, tmp_path):
    serving.export_savedmodel(network, TASK, tmp_path / "1")
    kernel = network.get_layer("logits").kernel
    kernel.assign(kernel + 0.01 * np.random.default_rng(0).normal(size=kernel.shape))
    assert not serving.verify(tmp_path / "1", model=network, task=TASK, repeats=3).passed
