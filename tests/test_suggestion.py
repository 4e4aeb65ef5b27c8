"""What is suggested follows from what was measured, and says so."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from tftransfer import (
    advice,
    cli,
    commands,
    constants,
    data,
    inference,
    prefix,
    strategies,
    suggestion,
    transferability,
)
from tftransfer.errors import InputError
from tftransfer.shelf import Shelf

FACTS = suggestion.Facts(500, 100, "accuracy", 0.85, 0.55, 0.4, 0.86, 0.2, 0.016, 3.0)


def test_where_there_is_more_to_gain_the_network_is_tuned():
    found = suggestion.suggest(FACTS)
    assert (found.strategy, found.epochs, found.batch_size) == ("freeze_then_unfreeze:augmentation=light", 27, 32)
    assert found.minutes == pytest.approx((1 + 5 * 18) * 500 * 0.003 / 60)
    assert "0.850 on examples that it has not seen: 30.0 points more than on those of random" in found.reasons[0]
    assert "(0.550), 45.0 more than on 8x8 pixels (0.400)." in found.reasons[0]
    assert any("mirrored in training" in reason for reason in found.reasons)


def test_minutes_are_those_of_the_epochs_that_are_asked_for():
    found = suggestion.suggest(FACTS, 18)
    assert found.epochs == 18
    assert found.minutes == pytest.approx((1 + 5 * 12) * 500 * 0.003 / 60)
    head = suggestion.suggest(dataclasses.replace(FACTS, smallest=5), 6)
    assert (head.epochs, head.minutes) == (6, pytest.approx(500 * 0.003 / 60))


def test_pictures_that_mean_something_else_mirrored_are_not_mirrored():
    found = suggestion.suggest(dataclasses.replace(FACTS, mirrored=0.5))
    assert found.strategy == "freeze_then_unfreeze:augmentation=light_no_flip"
    assert any("0.500" in reason for reason in found.reasons)


@pytest.mark.parametrize("change", [{"smallest": 5}, {"probe": 0.998, "mirrored": 0.998}])
def test_few_or_solved_examples_train_a_head_alone(change):
    assert suggestion.suggest(dataclasses.replace(FACTS, **change)).strategy == "tuned_probe"


@pytest.mark.parametrize(
    ("examples", "epochs", "batch_size", "head"),
    [(500, 14, 32, True), (500, 15, 32, False), (500, 15, 64, True), (256, None, 32, True), (300, None, 32, False)],
)
def test_few_steps_train_a_head_alone(examples, epochs, batch_size, head):
    found = suggestion.suggest(dataclasses.replace(FACTS, examples=examples), epochs, batch_size)
    assert (found.strategy == "tuned_probe") is head
    assert found.batch_size == batch_size
    steps = f"{found.epochs} epochs are {found.epochs * -(-examples // batch_size)} steps of {batch_size} examples"
    assert any(steps in reason for reason in found.reasons) is head


def test_numbers_are_never_solved():
    facts = dataclasses.replace(FACTS, smallest=None, error=None, metric="mean_absolute_error", probe=0.0, mirrored=0.0)
    assert suggestion.suggest(facts).strategy == "freeze_then_unfreeze:augmentation=light"
    worse = dataclasses.replace(facts, probe=1.0, mirrored=1.5)
    assert suggestion.suggest(worse).strategy.endswith("no_flip")
    small = dataclasses.replace(facts, probe=0.005, mirrored=0.02)  # an error in a large unit is a small number
    assert suggestion.suggest(small).strategy.endswith("no_flip")


@pytest.mark.parametrize(
    ("examples", "epochs", "batch_size"), [(100, 27, 32), (3000, 20, 32), (50_000, 10, 64), (10**6, 10, 64)]
)
def test_more_examples_need_fewer_epochs_and_take_larger_batches(examples, epochs, batch_size):
    found = suggestion.suggest(dataclasses.replace(FACTS, examples=examples))
    assert (found.epochs, found.batch_size) == (epochs, batch_size)


def test_the_fastest_of_those_as_good_as_the_best_is_chosen():
    small = dataclasses.replace(FACTS, probe=0.84, milliseconds=1.0)
    worse = dataclasses.replace(FACTS, probe=0.8, milliseconds=0.1)
    place, why = suggestion.choose([FACTS, small, worse])
    assert place == 1
    assert "1.0 instead of 3.0 milliseconds" in why
    place, why = suggestion.choose([worse, FACTS])
    assert place == 1
    assert "best" in why
    errors = [dataclasses.replace(one, metric="mean_absolute_error", error=None) for one in (FACTS, worse)]
    assert suggestion.choose(errors)[0] == 1
    assert suggestion.choose([FACTS])[0] == 0


def test_the_probe_on_other_features_is_by_models_that_have_not_seen_the_example():
    generator = np.random.default_rng(0)
    targets = np.arange(30) % 3
    features = np.eye(3)[targets] + generator.normal(0, 0.3, (30, 3))
    other = features[:, ::-1]
    first, second = transferability.probe_on((features, other), targets, folds=3, seed=4)
    np.testing.assert_array_equal(first, transferability.probe(features, targets, folds=3, seed=4))
    for inside, outside in StratifiedKFold(3, shuffle=True, random_state=4).split(features, targets):
        mean, deviation = features[inside].mean(axis=0), features[inside].std(axis=0)
        model = LogisticRegression(C=0.01, max_iter=200).fit((features[inside] - mean) / deviation, targets[inside])
        np.testing.assert_allclose(second[outside], model.predict_proba((other[outside] - mean) / deviation), rtol=1e-6)


def test_facts_are_the_same_when_features_are_found(small_network, small_task, small_data, tmp_path):
    pictures = dataclasses.replace(small_data.train.pictures, digests=tuple(f"{number:064x}" for number in range(24)))
    examples, network = dataclasses.replace(small_data.train, pictures=pictures), prefix.body(small_network())
    first, second = (suggestion.measure(network, small_task, examples, shelf=Shelf(tmp_path)) for _ in range(2))
    assert second.milliseconds > 0
    assert dataclasses.replace(second, milliseconds=first.milliseconds) == first


def test_the_network_is_made_constant_once(small_network, small_task, small_data, monkeypatch):
    made, make = [], constants.as_constant_function
    monkeypatch.setattr(constants, "as_constant_function", lambda *given: (made.append(given), make(*given))[1])
    suggestion.measure(prefix.body(small_network()), small_task, small_data.train)
    assert len(made) == 1


def test_facts_are_measured_on_the_training_split(small_network, small_task, small_data):
    network = prefix.body(small_network())
    facts = suggestion.measure(network, small_task, small_data.train)
    assert (facts.examples, facts.smallest, facts.metric) == (24, 8, "accuracy")
    assert facts.pixels == 1  # colours
    assert facts.random > 0.9  # which see colours too
    assert facts.probe > 0.5
    features = inference.pooled_features(network, small_data.train).values[0]
    assert facts.logme == pytest.approx(transferability.logme(features, small_data.train.targets), rel=1e-3)
    assert facts.mirrored == pytest.approx(facts.probe, abs=0.25)
    assert facts.milliseconds > 0
    names = [row[0] for row in suggestion.table(facts).rows]
    assert {"training examples", "LogME of the features", "accuracy, linear model on random filters"} <= {*names}


def test_random_filters_are_those_of_numpy_and_blind_to_brightness(small_data):
    random, pixels = suggestion._untrained(small_data.train, 3)
    assert (random.shape, pixels.shape) == ((24, 4 * 128), (24, 8 * 8 * 3))
    filters = tf.random.stateless_normal((6, 6, 3, 128), (3, 0)).numpy()
    filters -= filters.mean(axis=(0, 1, 2))
    picture = small_data.train.pictures.load(5).numpy() / 255
    found = [
        np.maximum(np.tensordot(picture[y : y + 6, x : x + 6], filters, 3), 0)
        for y in range(0, 14, 2)
        for x in range(14, 28, 2)
    ]
    np.testing.assert_allclose(random[5].reshape(2, 2, 128)[0, 1], np.mean(found, axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(pixels[5].reshape(8, 8, 3)[0, 0], 255 * picture[:4, :4].mean(axis=(0, 1)), rtol=1e-4)


def test_many_examples_are_probed_on_principal_components():
    features = np.random.default_rng(0).normal(size=(600, 100)) * np.linspace(1, 0.1, 100)
    components = suggestion._reduced(features, 0)
    assert components.shape == (600, 64)
    assert components.var(axis=0)[0] >= components.var(axis=0)[-1]
    np.testing.assert_array_equal(suggestion._reduced(features[:500], 0), features[:500])


def test_errors_are_not_called_points():
    worse = dataclasses.replace(FACTS, metric="mean_absolute_error", error=None, smallest=None)
    assert "on those of random filters 0.550, on 8x8 pixels 0.400." in suggestion.suggest(worse).reasons[0]
    worthless = dataclasses.replace(FACTS, random=0.9)
    assert "5.0 points less than on those of random filters" in suggestion.suggest(worthless).reasons[0]


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_other_tasks_are_measured_too(small_network, small_data, kind):
    from tftransfer import tasks

    task = tasks.MultiLabel(("a", "b")) if kind == "multi_label" else tasks.Regression(("size", "weight"))
    targets = np.stack([np.arange(24) % 2, np.arange(24) % 3 == 0], axis=1).astype(np.float32)
    examples = dataclasses.replace(small_data.train, targets=targets)
    facts = suggestion.measure(prefix.body(small_network(2)), task, examples)
    assert facts.smallest is None
    assert suggestion.suggest(facts).strategy == "tuned_probe"
    assert suggestion.suggest(facts, 225).strategy.startswith("freeze_then_unfreeze")


def test_mirrored_pictures_are_never_taken_for_the_others(small_data):
    pictures = suggestion._mirrored(small_data.train).pictures
    assert pictures.digests == ()
    for number in (tf.constant(3, tf.int64), tf.constant([1, 2], tf.int64)):
        np.testing.assert_array_equal(pictures.load(number), small_data.train.pictures.load(number)[..., ::-1, :])


def test_auto_settles_on_a_strategy_and_keeps_to_it(small_network, small_task, small_data, monkeypatch):
    model = small_network()
    before = [variable.numpy() for variable in model.variables]
    choice = advice.Choice("auto:mixup=0.1", epochs=6)
    assert [phase.selector for phase in choice.planned] == ["head", "all"]
    for facts in (FACTS, dataclasses.replace(FACTS, smallest=3)):
        monkeypatch.setattr(suggestion, "measure", lambda *_, facts=facts, **__: facts)
        found = choice(model, small_task, small_data, batch_size=8)
        again = choice(model, small_task, small_data, decided=found.decision)
        assert again.strategy == found.strategy
        assert sum(phase.epochs for phase in found.strategy) == 6
        assert found.strategy[-1].mixup == 0.1
        assert found.reasons[0].startswith(f"Chosen: {suggestion.suggest(facts, 6, 8).strategy}, 6 epochs")
        minutes = suggestion.suggest(facts, 6, 8).minutes
        assert f"Training is expected to take {minutes:.1f} minutes." in found.reasons
        assert found.table
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
    without = advice.Choice("auto")(model, small_task, small_data, batch_size=8)
    assert sum(phase.epochs for phase in without.strategy) == 27
    assert strategies.names().count("auto") == 0


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures in two colours."""
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "my pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = generator.integers(0, 150, (40, 40, 3), np.uint8)
        picture[..., number % 2] += 100
        path.write_bytes(tf.io.encode_png(picture).numpy())
    return str(tmp_path / "my pictures")


def test_the_command_says_what_to_run(pictures, capsys):
    assert cli.main(["suggest", "--data", pictures, "--backbones", "MobileNet-0.25=demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["image size"] for row in found["tried"]] == ["64x64", "32x32"]
    assert found["command"].startswith(f"python recipes/image_classification.py --data '{pictures}' --backbone")
    assert f"--strategy {found['suggestion']['strategy']} --epochs" in found["command"]
    assert not {"--task", "--seed", "--cache-dir"} & {*shlex.split(found["command"])}
    assert len(found["reasons"]) >= 3


def test_the_command_repeats_what_was_given_and_loads_each_size_once(pictures, tmp_path, capsys, monkeypatch):
    sizes = []
    monkeypatch.setattr(commands, "load", lambda *a, **k: sizes.append(k["image_size"]) or data.load(*a, **k))
    given = ["--task", "single_label", "--seed", "7", "--cache-dir", str(tmp_path / "kept")]
    both = "MobileNet-0.25=demo,MobileNet-0.25=none"
    assert cli.main(["suggest", "--data", pictures, "--backbones", both, "--image-size", "32", *given]) == 0
    assert sizes == [(32, 32)]
    shown = capsys.readouterr().out
    assert "64x64" not in shown
    call = shown[shown.index("python recipes/image_classification.py") :]
    assert shlex.split(call)[-6:] == given


@pytest.mark.parametrize("command", [pytest.param("rank", marks=pytest.mark.slow), "suggest"])
def test_commands_take_a_class_with_one_training_example(tmp_path, capsys, command):
    generator = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "pictures" / ("a" if number < 6 else "b") / f"{number}.png"  # 3 of b: one in each split
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(generator.integers(0, 256, (32, 32, 3), np.uint8)).numpy())
    arguments = ["--data", str(tmp_path / "pictures"), "--backbones", "MobileNet-0.25=demo", "--image-size", "32"]
    assert cli.main([command, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["probe"] >= 0 if command == "rank" else "has one example:" in " ".join(found["reasons"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbones", "MobilNetV2"], "Did you mean 'MobileNetV2'"),
        (["--backbones", "MobileNet-0.25=demo,MobileNet-0.25=demo"], "backbones"),
        (["--backbones", "MobileNet-0.25=nowhere.h5"], "nowhere.h5"),
        (["--backbones", "MobileNet-0.25=demo", "--task", "nothing"], "task_kind"),
    ],
)
def test_bad_input_to_the_command_is_one_line(capsys, arguments, said):
    assert cli.main(["suggest", "--data", "demo", "--image-size", "32", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("share=1", "has the options"),
        ("views=2", "has no `views`.*the head alone"),
        ("cutmix=1", "has no `cutmix`"),
        ("mixup=0.1,stochastic_depth=0.1", "has no `stochastic_depth`"),
    ],
)
def test_bad_options_of_auto_are_refused(option, said):
    with pytest.raises(InputError, match=said):
        advice.Choice(f"auto:{option}")
