"""What a phase adds to the train step: it works in the step, and nothing of it stays."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import builders, distribution, mixing, prefix, trainable, training
from tftransfer.averages import WiseFt
from tftransfer.checks import forgetting
from tftransfer.data import order
from tftransfer.errors import InputError
from tftransfer.penalties import EWC, L2SP, DistillFromSource
from tftransfer.strategies import Phase
from tftransfer.trainee import Extras, Trainee

EXTRAS = {
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "mixup and cutmix": {"mixup": 0.4, "cutmix": 1.0},
    "L2-SP": {"penalty": L2SP(1.0)},
    "EWC": {"penalty": EWC(1.0, examples=4)},
    "distillation": {"penalty": DistillFromSource()},
    "WiSE-FT": {"average": WiseFt(3)},
    "SGD": {"optimizer": "sgd"},
    "one cycle": {"schedule": "one_cycle"},
}
# By the combination of both, by another selector, by a strong penalty, by the step on averaged views.
SHOWN_ELSEWHERE = ("mixup", "cutmix", "EWC", "distillation", "L2-SP", "SGD")


def _tuned(network, task, data, selector="all", rate=0.02, epochs=1, **extras):
    keras.utils.set_random_seed(0)
    model = network()
    before = {w.path: w.numpy() for w in model.weights}
    phase = Phase("tune", selector, epochs, rate, warmup=0, schedule=extras.pop("schedule", "constant"), **extras)
    history = training.fine_tune(model, task, data, (phase,), batch_size=8)
    return model, before, history


def _distance(model, before) -> float:
    moved = [w.numpy() - before[w.path] for w in model.weights if w.path.startswith("conv")]
    return float(np.sqrt(sum(np.square(part).sum() for part in moved)))


@pytest.fixture(scope="module")
def plain(small_network, small_task, small_data):
    """The weights after training without any extras, by what trains."""
    return {
        selector: _tuned(small_network, small_task, small_data, selector)[0].get_weights()
        for selector in ("all", "last:2")
    }


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        *(
            pytest.param(name, "all", marks=pytest.mark.slow if name in SHOWN_ELSEWHERE else ())
            for name in EXTRAS
            if name != "WiSE-FT"
        ),
        ("EWC", "last:2"),
        ("distillation", "last:2"),
    ],
)
def test_an_extra_changes_training_reproducibly_and_leaves_a_plain_model(
    small_network, small_task, small_data, plain, name, selector
):
    (first, _, history), (second, _, _) = (
        _tuned(small_network, small_task, small_data, selector, **EXTRAS[name]) for _ in range(2)
    )
    for one, two in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(a, b) for a, b in zip(first.get_weights(), plain[selector], strict=True))
    assert np.isfinite(history["loss"]).all()
    assert not first.compiled
    assert [w.path for w in first.weights] == [w.path for w in small_network().weights]


@pytest.mark.parametrize(
    "penalty",
    [
        L2SP(30.0),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (EWC(30.0, examples=8), DistillFromSource(30.0))),
    ],
)
def test_a_strong_penalty_keeps_the_network_near_its_start(small_network, small_task, small_data, penalty):
    held, before, _ = _tuned(small_network, small_task, small_data, epochs=3, rate=0.005, penalty=penalty)
    free, _, _ = _tuned(small_network, small_task, small_data, epochs=3, rate=0.005)
    if isinstance(penalty, DistillFromSource):  # holds the function, not the weights
        pictures = np.stack([small_data.test.pictures.load(i) for i in range(12)]).astype(np.float32)
        reference = small_network()
        reference.set_weights(list(before.values()))
        features = [
            keras.Model(model.input, model.get_layer("head_pool").output)(pictures) for model in (reference, held, free)
        ]
        assert np.abs(features[1] - features[0]).mean() < 0.7 * np.abs(features[2] - features[0]).mean()
    else:
        assert _distance(held, before) < 0.7 * _distance(free, before)


@pytest.mark.slow
def test_a_penalty_of_strength_zero_changes_nothing(small_network, small_task, small_data):
    with_it, _, _ = _tuned(small_network, small_task, small_data, penalty=L2SP(0.0), weight_decay=0.0)
    without, _, _ = _tuned(small_network, small_task, small_data, weight_decay=0.0)
    for one, two in zip(with_it.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_the_source_reaches_the_penalty(small_network, small_task, small_data):
    keras.utils.set_random_seed(0)
    model = small_network()
    source = forgetting.source_probe(model, small_data)
    phase = Phase("tune", "all", 1, 0.02, penalty=DistillFromSource())
    history = training.fine_tune(model, small_task, small_data, (phase,), source=source, batch_size=8)
    _, _, without = _tuned(small_network, small_task, small_data, penalty=DistillFromSource(), schedule="cosine")
    assert history["loss"] != without["loss"]


def test_the_loss_of_mixed_examples_is_the_weighted_one_of_both_labels(small_network, small_task, small_data):
    model = small_network()
    trainable.set_trainable(model, "all")
    trainee = Trainee(model.input, model.output)
    trainee.compile(loss=small_task.loss(from_logits=True, targets=small_data.train.targets))
    pictures = np.stack([small_data.train.pictures.load(i) for i in range(4)]).astype(np.float32)
    targets, weights = small_data.train.targets[:4], np.array([1.0, 2.0, 0.5, 3.0], np.float32)
    key = tf.constant([3, 4], tf.int64)
    trainee.add_extras(Extras(mixup=1.0))
    _, loss = trainee._outputs_and_loss((pictures, tf.constant(targets), tf.constant(weights)), key, 1.0)
    mixed, partners, own = mixing.mix((pictures, tf.constant(targets), tf.constant(weights)), key, 1.0, 0.0)
    logs = tf.nn.log_softmax(model(mixed)).numpy()
    own, partners = np.asarray(own), np.asarray(partners)
    rows = np.arange(4)
    by_hand = -own * weights * logs[rows, targets]
    by_hand = by_hand - (1 - own) * weights[partners] * logs[rows, targets[partners]]
    assert 0.01 < float(np.mean(own)) < 0.99
    np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-5)


def test_a_step_on_averaged_views_is_the_mean_of_the_steps_on_each(small_network, small_task, small_data):
    model, rate = small_network(), 0.05
    kernel, bias = (weight.numpy().astype(np.float64) for weight in model.get_layer("logits").weights)
    pictures = order.pictures(small_data.train, "light", views=2)
    one_hot, steps = np.eye(3)[small_data.train.targets], []
    for view in range(2):
        features = prefix.body(model)(pictures(tf.range(24, dtype=tf.int64), tf.constant(view, tf.int64))).numpy()
        odds = np.exp(features @ kernel + bias)
        off = (odds / odds.sum(axis=1, keepdims=True) - one_hot) / 24
        steps.append((rate * features.T @ off, rate * off.sum(axis=0)))
    assert np.linalg.norm(steps[0][0] - steps[1][0]) > 0.01 * np.linalg.norm(steps[0][0])
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
    phase = Phase("probe", "head", 1, rate, augmentation="light", views=2, average_views=True, **plain)
    training.fine_tune(model, small_task, small_data, (phase,), batch_size=24, max_steps=1)
    after = [weight.numpy() for weight in model.get_layer("logits").weights]
    for before, own, one, two in zip((kernel, bias), after, *steps, strict=True):
        np.testing.assert_allclose(before - own, (one + two) / 2, rtol=1e-3, atol=1e-6)


def test_a_leash_takes_the_place_of_weight_decay_below_the_head(small_network, small_task, small_data):
    """At a vanishing gradient of the leash and a decay of 100 %, only the head decays."""
    tuned = {"rate": 1e-3, "weight_decay": 100.0, "selector": "all"}
    held, before, _ = _tuned(small_network, small_task, small_data, penalty=L2SP(1e-9), **tuned)
    free, _, _ = _tuned(small_network, small_task, small_data, **tuned)
    assert _distance(held, before) < 0.2 * _distance(free, before)


@pytest.mark.slow
def test_a_float16_network_carries_its_moments(small_task, small_data):
    with distribution.devices("cpu", "mixed_float16"):
        inputs = keras.Input((32, 32, 3))
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, strides=4)(inputs))
        model = keras.Model(inputs, keras.layers.Dense(3, name="logits", dtype="float32")(x))
    strategy = (Phase("one", "all", 1, 0.01), Phase("two", "all", 1, 0.01, carry_moments=True, penalty=EWC(0.1)))
    history = training.fine_tune(model, small_task, small_data, strategy, batch_size=8)
    assert np.isfinite(history["loss"]).all()


def test_stochastic_depth_takes_the_place_of_the_networks_own_and_a_penalty_does_not(estimate_batch_norm):
    """EfficientNet drops branches by itself; at a vanishing share of ours nothing is dropped."""
    model = builders.image_classifier("EfficientNetB0", 3, image_size=32, weights=None, dropout=0.0)
    model = estimate_batch_norm(model)
    trainable.set_trainable(model, "all")
    trainee = Trainee(model.input, model.output)
    first = next(iter(mixing.residual_branches(trainee).items()))
    trainee.add_extras(Extras(branches={first[0]: (first[1], 1e-12)}))
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    (outputs,) = trainee._with_dropped_branches(trainee, pictures, tf.constant([0, 0], tf.int64))
    np.testing.assert_allclose(outputs, model(pictures, training=False), rtol=1e-4, atol=1e-4)
    assert not np.allclose(model(pictures, training=True), outputs, rtol=1e-4, atol=1e-4)
    trainee.add_extras(Extras(penalty=lambda inputs, features: 0.0))
    (penalised,) = trainee._with_dropped_branches(trainee, pictures, tf.constant([0, 0], tf.int64))
    assert not np.allclose(penalised, outputs, rtol=1e-4, atol=1e-4)


def test_wise_ft_ends_on_the_line_and_says_where(small_network, small_task, small_data):
    model, before, history = _tuned(small_network, small_task, small_data, average=WiseFt(4), epochs=4)
    share = history.phases[0].tuned_share
    assert share in (0, 0.25, 0.5, 0.75, 1)
    free, _, _ = _tuned(small_network, small_task, small_data, epochs=4)
    for weight, end in zip(model.weights, free.weights, strict=True):
        expected = (1 - share) * before[weight.path] + share * end.numpy()
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_stochastic_depth_leaves_branches_out_and_serving_whole(small_task, small_data):
    def tuned(rate: float):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((32, 32, 3))
        x = keras.layers.Conv2D(4, 5, strides=4)(keras.layers.Rescaling(1 / 255)(inputs))
        x = keras.layers.add([x, keras.layers.Conv2D(4, 3, padding="same")(x)])
        x = keras.layers.GlobalAveragePooling2D()(x)
        model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
        phase = Phase("tune", "all", 1, 1e-3, warmup=0, stochastic_depth=rate)
        return model, training.fine_tune(model, small_task, small_data, (phase,), batch_size=8)

    (dropped, history), (_, plain) = tuned(0.5), tuned(0.0)
    assert history["loss"] != plain["loss"]
    assert np.isfinite(history["loss"]).all()
    pictures = np.ones((2, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(dropped(pictures, training=True), dropped(pictures, training=True))


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        ({"selector": "head", "penalty": L2SP()}, "no weight below the head trains"),
        ({"selector": "head", "cutmix": 1.0}, "use `mixup`"),
        ({"selector": "all", "stochastic_depth": 0.2}, "no residual branches"),
    ],
)
def test_what_a_network_does_not_have_is_refused(small_network, small_task, small_data, extras, said):
    with pytest.raises(InputError, match=said):
        training.fine_tune(small_network(), small_task, small_data, (Phase("tune", epochs=1, **extras),))


def test_the_audit_says_how_fast_each_group_trains(small_network, small_task, small_data, capsys):
    model = small_network()
    phase = Phase("tune", "last:2", 1, 0.01, layer_decay=0.5)
    history = training.fine_tune(model, small_task, small_data, (phase,), quiet=False)
    rates = {row.group: row.learning_rate for row in history.phases[0].audit}
    assert rates["head"] == 0.01
    assert sorted(rate for rate in rates.values() if rate)[:2] == [0.0025, 0.005]
    assert None in rates.values()
    shown = capsys.readouterr().out
    assert "What trains: tune" in shown
    assert "0.0025" in shown
