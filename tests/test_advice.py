import dataclasses

import keras
import numpy as np
import pytest

from tftransfer import advice, head_search, planning, surgery, training
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def test_surgical_takes_the_groups_with_the_largest_gradients(small_network, small_task, small_data):
    model = small_network()
    before = model.get_weights()
    found = advice.surgical(model, small_task, small_data, share=0.5, epochs=4, batch_size=8)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    norms = {row[0]: row[1] for row in found.table.rows}
    chosen = {row[0] for row in found.table.rows if row[2] == "trains"}
    assert min(norms[name] for name in chosen) >= max(norms[name] for name in norms if name not in chosen)
    assert sum(norms[name] for name in chosen) >= 0.5 * sum(norms.values())
    assert found.strategy[1].selector == "groups:" + "+".join(name for name in norms if name in chosen)
    history = training.fine_tune(model, small_task, small_data, found.strategy, batch_size=8, max_steps=1)
    trained = {row.group for row in history.phases[1].audit if row.trainable}
    assert trained == {*chosen, "head"}
    assert any(name in " ".join(found.reasons) for name in chosen)


def test_relative_gradient_norms_are_those_by_hand(small_network, small_task, small_data):
    import tensorflow as tf

    model = small_network()
    probe = Phase("probe", "head", 1, 1e-12, warmup=0)  # leaves the head as it is
    norms = surgery.probe_and_measure(model, small_task, small_data, probe, batch_size=24).norms
    pictures = np.stack([small_data.train.pictures.load(i) for i in range(24)]).astype(np.float32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kernel = model.get_layer("conv_2").kernel
    with tf.GradientTape() as tape:
        value = loss(small_data.train.targets, model(pictures))
    expected = np.linalg.norm(tape.gradient(value, kernel.value)) / np.linalg.norm(kernel.numpy())
    assert norms["conv_2"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "again"])
def test_short_trials_decide_between_sets_of_groups(small_network, small_task, small_data, monkeypatch, again):
    """The trials that the advice is based on, and those of another call with the same seed."""
    seen, measure = [], surgery.probe_and_measure

    def noted(*given, **options):
        seen.append((options["trial"], measure(*given, **options)))
        return seen[-1][1]

    monkeypatch.setattr(surgery, "probe_and_measure", noted)
    model = small_network()
    before = model.get_weights()
    found = advice.surgical(model, small_task, small_data, search=2, epochs=4, batch_size=8, seed=1)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    ((trial, measured),) = seen
    assert (trial.epochs, trial.augmentation) == (2, "none")
    if again:
        trial = dataclasses.replace(found.strategy[1], epochs=2, augmentation="none")
        measured = measure(model, small_task, small_data, found.strategy[0], trial=trial, batch_size=8, seed=1)
    losses = [one.loss for one in measured.tried]
    assert losses == sorted(losses)
    assert len({one.groups for one in measured.tried}) == len(losses) > 1
    assert found.strategy[1].selector == "groups:" + "+".join(measured.tried[0].groups)
    assert f"Of {len(losses)} sets of groups, tried for 2 epochs" in found.reasons[-1]


def test_the_test_split_is_not_looked_at(small_network, small_task, small_data):
    def never(index):
        raise AssertionError("the test split was read")

    closed = dataclasses.replace(small_data.test, pictures=dataclasses.replace(small_data.test.pictures, load=never))
    data = dataclasses.replace(small_data, test=closed)
    advice.surgical(small_network(), small_task, data, epochs=2, batch_size=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("surgicl", "Did you mean 'surgical'"),
        ("surgical:share=0", r"in \(0, 1\]"),
        ("surgical:search=-1", "a whole number from 0"),
        ("surgical:sahre=1", "Did you mean 'share'"),
        ("surgical:seed=1", "has the options"),
    ],
)
def test_bad_advice_is_refused_at_once(text, said):
    with pytest.raises(InputError, match=said):
        advice.Choice(text)


def test_what_is_settled_on_must_fit_the_network(small_task, small_data):
    """Before a run writes anything: all groups have the branch that the topmost one lacks."""
    inputs = x = keras.Input((32, 32, 3))
    for number in (1, 2, 3):
        above = keras.layers.Conv2D(3, 3, padding="same", name=f"conv_{number}")(x)
        x = keras.layers.Add(name="add")([above, x]) if number == 2 else above
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(pooled))
    choice = advice.Choice("surgical:stochastic_depth=0.1")
    planning.check_strategy(model, choice.planned, small_task)
    assert choice(model, small_task, small_data, decided="groups:conv_2").decision == "groups:conv_2"
    with pytest.raises(InputError, match="'surgical' has `stochastic_depth`, but what trains has no residual branches"):
        choice(model, small_task, small_data, decided="groups:conv_3")


def test_surgical_mixes_examples_after_its_probe():
    assert [phase.mixup for phase in advice.Choice("surgical:mixup=0.2").planned] == [0.0, 0.2]


def test_a_tuned_probe_is_the_best_head_of_those_that_were_tried(small_network, small_task, small_data):
    model = small_network()
    before = model.get_weights()
    found = advice.tuned_probe(model, small_task, small_data, epochs=3, batch_size=8)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    losses = [row[2] for row in found.table.rows]
    assert losses == sorted(losses)
    (phase,) = found.strategy
    assert (phase.learning_rate, phase.weight_decay) == found.table.rows[0][:2]
    assert (phase.selector, phase.epochs) == ("head", 3)
    again = advice.Choice("tuned_probe", epochs=3)(model, small_task, small_data, decided=found.decision)
    assert again.strategy == found.strategy


@pytest.mark.parametrize("name", [pytest.param("tuned_probe", marks=pytest.mark.slow), "auto"])
def test_a_class_of_one_example_is_advised_on(small_network, small_task, small_data, name):
    train = small_data.train.subset(np.array([0, 3, 6, 9, 1, 4, 7, 2]))  # four, three and one of the three classes
    data = dataclasses.replace(small_data, train=train)
    found = advice.Choice(name, epochs=2)(small_network(), small_task, data)
    assert [phase.name for phase in found.strategy] == ["tuned probe"]
    assert np.isfinite(found.strategy[0].learning_rate)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        pytest.param("tuned_probe:augmentation=light,views=2", 8, marks=pytest.mark.slow),
        pytest.param("auto", 32, marks=pytest.mark.slow),
        ("auto", 16),
    ],
)
def test_training_finds_the_features_that_advice_was_based_on(
    small_network, small_task, small_data, tmp_path, name, batch_size
):
    pictures = small_data.train.pictures
    known = dataclasses.replace(pictures, digests=tuple(f"{number:064x}" for number in range(len(pictures))))
    data = dataclasses.replace(small_data, train=dataclasses.replace(small_data.train, pictures=known))
    run = {"batch_size": batch_size, "cache_dir": tmp_path / "kept"}
    model = small_network()
    strategy = advice.Choice(name, epochs=9)(model, small_task, data, **run).strategy
    history = training.fine_tune(model, small_task, data, strategy[:1], **run)
    assert history.phases[0].store.endswith(" 0 computed")


def test_a_rate_that_is_given_is_kept(small_network, small_task, small_data):
    choice = advice.Choice("tuned_probe:augmentation=light,views=2", epochs=2, learning_rate=0.02)
    (phase,) = choice(small_network(), small_task, small_data, batch_size=8).strategy
    assert (phase.learning_rate, phase.views, phase.augmentation) == (pytest.approx(0.02), 2, "light")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", []),
        (":augmentation=light", ["as they are"]),
        (":augmentation=light,views=2,average_views=true", ["2 views of the training pictures"]),
    ],
)
def test_a_tuned_probe_says_what_its_search_saw(small_network, small_task, small_data, monkeypatch, options, said):
    searched = []

    def search(features, *given, **options):
        searched.append(features)
        return (head_search.Tried(0.01, 1.0, 0.5, 0.1),)

    monkeypatch.setattr(head_search, "search", search)
    found = advice.Choice(f"tuned_probe{options}")(small_network(), small_task, small_data)
    assert all(part in " ".join(found.reasons) for part in said)
    assert len(found.reasons) == 1 + (said == ["as they are"])
    assert searched[0].shape == ((2 if "views" in options else 1), 24, 8)
    assert found.strategy[0].average_views == ("average" in options)


def test_a_head_with_hidden_layers_is_said_to_be_searched_as_a_linear_one(small_network, small_task, small_data):
    inner = small_network()
    pooled = inner.get_layer("head_pool").output
    hidden = keras.layers.Dense(4, "relu", name="head_hidden_1")(pooled)
    model = keras.Model(inner.input, keras.layers.Dense(3, name="logits")(hidden))
    found = advice.tuned_probe(model, small_task, small_data, epochs=1, max_steps=1)
    assert "hidden layers" in found.reasons[-1]
