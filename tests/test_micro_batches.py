"""A batch in parts is the batch: losses and weights are equal but for rounding, whatever a phase adds."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import distribution, heads, memory, micro_batches, training
from tftransfer.adapters import Lora
from tftransfer.averages import Ema
from tftransfer.penalties import EWC, L2SP, DistillFromSource
from tftransfer.strategies import Phase

KINDS = {
    "plain": {},
    "frozen below": {"selector": "last:1"},
    "mixing": {"mixup": 0.4, "cutmix": 1.0, "selector": "last:4"},
    "L2-SP": {"penalty": L2SP(1.0)},
    "EWC": {"penalty": EWC(1.0, examples=4)},
    "distillation": {"penalty": DistillFromSource(), "selector": "last:4"},
    "LoRA": {"selector": "head", "adapter": Lora(2)},
    "average": {"average": Ema(0.5)},
    "views": {"augmentation": "light", "views": 2, "average_views": True},
}


@pytest.fixture
def divided(monkeypatch):
    """Return a function that sets into how many parts batches are divided."""

    def divide(parts):
        monkeypatch.setattr(memory, "divide", lambda *given: memory.Division(parts, f"{parts} parts"))

    return divide


def _trained(model, task, data, **extras):
    plain = {"selector": "all", "optimizer": "sgd", "warmup": 0, "schedule": "constant"}
    phase = Phase("tune", **{"epochs": 2, "learning_rate": 0.02, **plain, **extras})
    history = training.fine_tune(model, task, data, (phase,), batch_size=10, cache="off")
    return history, [weight.numpy() for weight in model.weights]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("mixing", "LoRA") else pytest.mark.slow) for kind in KINDS]
)
def test_a_batch_in_parts_is_the_batch(small_network, small_task, small_data, divided, kind):
    """Batches of 10, 10 and 4 examples: whole, in two parts, in three (4, 4, 2 and 2, 2), and one by one."""
    weights = np.random.default_rng(0).uniform(0.2, 3, 24).astype(np.float32)
    data = dataclasses.replace(small_data, train=dataclasses.replace(small_data.train, weights=weights))
    found = []
    for parts in (1, 2, 3, 16):
        divided(parts)
        keras.utils.set_random_seed(0)
        model = small_network()
        body = keras.Model(model.input, model.get_layer("head_pool").output)
        model = keras.Model(model.input, heads.Dense(3, dropout=0.0, l2=0.1)(model.get_layer("relu_3").output))
        assert body.built
        history, ended = _trained(model, small_task, data, **KINDS[kind])
        assert history.phases[0].micro_batches == parts
        found.append((history, ended))
    (whole, ended), *others = found
    for history, weights in others:
        for name in ("loss", "accuracy", "loss_error", "val_loss"):
            np.testing.assert_allclose(history[name], whole[name], rtol=1e-5, atol=1e-6)
        for one, other in zip(ended, weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


def test_what_is_frozen_runs_part_by_part(small_network, small_task, small_data, divided, monkeypatch):
    from tftransfer.trainee import Trainee

    seen, add_below = [], Trainee.add_below

    def noting(self, *, training, validation, frozen):
        def below(pictures):
            tf.py_function(lambda one: seen.append(len(one)), [pictures], [])
            return training(pictures)

        add_below(self, training=below, validation=validation, frozen=frozen)

    monkeypatch.setattr(Trainee, "add_below", noting)
    divided(4)
    _trained(small_network(), small_task, small_data, selector="last:1", epochs=1)
    assert seen == [3, 3, 3, 1, 3, 3, 3, 1, 1, 1, 1, 1]


def test_parts_of_float16_networks_are_added_up(small_network, small_task, small_data, divided):
    losses = []
    for parts in (1, 3):
        divided(parts)
        keras.utils.set_random_seed(0)
        with distribution.devices("cpu", "mixed_float16"):
            model = small_network()
        losses.append(_trained(model, small_task, small_data)[0]["loss"])
    np.testing.assert_allclose(*losses, rtol=0.01)


def test_statistics_move_once_for_each_part(small_network, small_task, small_data, divided):
    moved = []
    for parts in (1, 5):
        divided(parts)
        model = small_network()
        before = model.get_layer("norm_1").moving_mean.numpy()
        _trained(model, small_task, small_data, train_batch_norm=True, learning_rate=1e-9)
        moved.append(np.abs(model.get_layer("norm_1").moving_mean.numpy() - before).sum())
    assert moved[1] > 2 * moved[0] > 0


def test_a_skipped_step_leaves_the_statistics_of_all_its_parts(small_network, small_task, small_data, divided):
    """Numbers that leave float32 in one part only."""
    divided(3)
    model = small_network()
    huge = dataclasses.replace(small_data.train, weights=np.where(np.arange(24) == 5, 3e38, 1).astype(np.float32))
    history, _ = _trained(
        model, small_task, dataclasses.replace(small_data, train=huge), train_batch_norm=True, epochs=1
    )
    assert history.phases[0].skipped == 1
    assert "picture 5" in history.phases[0].faults or "more" in history.phases[0].faults


def test_a_variable_without_a_gradient_has_none():
    used, unused = tf.Variable([1.0, 2.0]), tf.Variable(3.0)

    def part(numbers, number, share):
        with tf.GradientTape() as tape:
            outputs = tf.cast(numbers, tf.float32)[:, None] * used
            loss = tf.reduce_mean(outputs) * share
        return tape.gradient(loss, [used, unused]), loss, outputs

    gradients, loss, outputs = tf.function(lambda: micro_batches.added_up(part, tf.constant(5), 3, [used, unused]))()
    assert gradients[1] is None
    np.testing.assert_allclose(gradients[0], [1.0, 1.0])
    assert float(loss) == 3.0
    np.testing.assert_allclose(outputs, np.arange(5)[:, None] * [[1.0, 2.0]])


_TWO_DEVICES = """
    from tftransfer import distribution, memory, tasks, training
    from tftransfer.adapters import Lora
    from tftransfer.penalties import DistillFromSource
    from tftransfer.strategies import Phase

    def examples(count, seed):
        return _examples(*_coloured(count, 32, seed))

    # 27 examples in batches of 8: the last one has 3, which are 2 and 1 on two devices
    data = Data("colours", ("a", "b", "c"), examples(27, 0), examples(9, 1), examples(6, 2))
    layers = keras.layers

    def network(dropout):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((32, 32, 3))
        x = layers.Conv2D(4, 5, strides=4, name="low")(layers.Rescaling(1 / 255)(inputs))
        x = layers.BatchNormalization()(x)
        x = layers.Conv2D(4, 3, padding="same", name="high")(x)
        x = layers.Dropout(dropout, name="head_dropout")(layers.GlobalAveragePooling2D()(x))
        return keras.Model(inputs, layers.Dense(3, name="logits", dtype="float32")(x))

    tried = {
        "plain": Phase("plain", "all", 2, 1e-2, optimizer="sgd"),
        "frozen below": Phase("frozen", "last:2", 2, 1e-2, optimizer="sgd", penalty=DistillFromSource()),
        "LoRA": Phase("LoRA", "head", 2, 1e-2, optimizer="sgd", adapter=Lora(2)),
        "mixing": Phase("mixing", "all", 2, 1e-2, optimizer="sgd", mixup=0.4),
        "statistics": Phase("statistics", "all", 2, 1e-2, optimizer="sgd", train_batch_norm=True),
        "dropout": Phase("dropout", "all", 2, 1e-2, optimizer="sgd"),
    }
    found = {}
    for name, phase in tried.items():
        ended = []
        for parts in (1, 3):
            memory.divide = lambda *given: memory.Division(parts, "given")
            with distribution.devices("2"):
                model = network(0.5 if name == "dropout" else 0.0)
            task = tasks.SingleLabel(data.labels)
            history = training.fine_tune(model, task, data, (phase,), batch_size=8, cache="off")
            assert np.isfinite(history["loss"]).all(), (name, history)
            assert history.phases[0].skipped == 0, history.phases[0].faults
            ended.append(np.concatenate([w.numpy().ravel() for w in model.weights] + [history["loss"]]))
        found[name] = float(np.linalg.norm(ended[0] - ended[1]) / np.linalg.norm(ended[0]))
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_parts_are_added_up_on_two_devices(run_on_devices):
    """Statistics of BatchNorm and dropout are those of each part."""
    apart = run_on_devices(_TWO_DEVICES)
    assert apart.pop("statistics") > 1e-5
    assert apart.pop("dropout") > 1e-5
    assert max(apart.values()) < 1e-5, apart
