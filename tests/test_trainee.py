"""What a phase adds to the train step: it works in the step, and nothing of it stays."""

import keras
import numpy as np
import pytest

from tftransfer import builders, training
from tftransfer.averages import WiseFt
from tftransfer.checks import forgetting
from tftransfer.errors import InputError
from tftransfer.penalties import EWC, L2SP, DistillFromSource
from tftransfer.strategies import Phase

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


@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "WiSE-FT"])
def test_training_differs_from_plain_and_leaves_a_plain_model(small_network, small_task, small_data, name, tmp_path):
    extras = EXTRAS[name]
    model, _, history = _tuned(small_network, small_task, small_data, **extras)
    plain, _, _ = _tuned(small_network, small_task, small_data)
    assert any(not np.array_equal(a, b) for a, b in zip(model.get_weights(), plain.get_weights(), strict=True))
    assert not model.compiled
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in small_network().weights]
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "WiSE-FT"])
def test_the_same_seed_gives_the_same_bits(small_network, small_task, small_data, name):
    first, second = (_tuned(small_network, small_task, small_data, **EXTRAS[name])[0] for _ in range(2))
    for one, two in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("penalty", [L2SP(30.0), EWC(30.0, examples=8), DistillFromSource(30.0)])
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


def test_a_penalty_of_strength_zero_changes_nothing(small_network, small_task, small_data):
    with_it, _, _ = _tuned(small_network, small_task, small_data, penalty=L2SP(0.0))
    without, _, _ = _tuned(small_network, small_task, small_data)
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


def test_the_loss_of_mixed_examples_is_that_of_both_labels(small_network, small_task, small_data):
    """With one class only mixing targets changes nothing: the loss is the plain one of the mixed pictures."""
    _, _, mixed = _tuned(small_network, small_task, small_data, mixup=8.0, epochs=8)
    _, _, plain = _tuned(small_network, small_task, small_data, epochs=8)
    assert mixed["loss"][-1] > plain["loss"][-1] + 0.1  # half-and-half pictures can't be told apart for certain
    assert mixed["val_accuracy"][-1] > 0.5


def test_wise_ft_ends_on_the_line_and_says_where(small_network, small_task, small_data):
    model, before, history = _tuned(small_network, small_task, small_data, average=WiseFt(4), epochs=4)
    share = history.phases[0].tuned_share
    assert share in (0, 0.25, 0.5, 0.75, 1)
    free, _, _ = _tuned(small_network, small_task, small_data, epochs=4)
    for weight, end in zip(model.weights, free.weights, strict=True):
        expected = (1 - share) * before[weight.path] + share * end.numpy()
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_stochastic_depth_leaves_branches_out_and_serving_whole(small_task, small_data, estimate_batch_norm):
    def tuned(rate: float):
        keras.utils.set_random_seed(0)
        model = builders.image_classifier("MobileNetV2-0.35", 3, image_size=32, weights=None, dropout=0.0)
        model = estimate_batch_norm(model)
        phase = Phase("tune", "all", 1, 1e-3, warmup=0, stochastic_depth=rate)
        history = training.fine_tune(model, small_task, small_data, (phase,), batch_size=8, max_steps=2)
        return model, history

    (dropped, history), (_, plain) = tuned(0.5), tuned(0.0)
    assert history["loss"] != plain["loss"]
    assert np.isfinite(history["loss"]).all()
    pictures = np.zeros((2, 32, 32, 3), np.float32)
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
