import dataclasses
import json
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import backbones, builders, choices, cli, constants, inference, ranking, strategies, tasks, training
from tftransfer.errors import InputError
from tftransfer.shelf import Shelf, shelf_at


@pytest.fixture(scope="module")
def network():
    return backbones.build("MobileNet-0.25", (32, 32), "demo")


def test_pooled_features_are_the_networks_own(network, small_data):
    found = inference.pooled_features(network, small_data.validation)
    pictures = np.stack([small_data.validation.pictures.load(index) for index in range(12)]).astype(np.float32)
    expected = network(pictures, training=False).numpy().mean(axis=(1, 2))
    np.testing.assert_allclose(found.values, expected[None], rtol=1e-4, atol=1e-5)
    assert found.computed == 12


@pytest.mark.parametrize("chunk", [4, 32])
def test_milliseconds_are_those_of_a_picture_without_making_the_graph(network, small_data, monkeypatch, chunk):
    class Slow:
        outputs = (tf.TensorSpec((256,), tf.float32),)

        def __init__(self, network, size):
            assert size == chunk

        def make(self):
            time.sleep(0.5 if not hasattr(self, "made") else 0)
            self.made = True

        def after(self, inputs):
            time.sleep(0.01 * len(inputs[0]))
            return [tf.zeros((len(inputs[0]), 256))]

    monkeypatch.setattr(constants, "Constants", Slow)
    found = inference.pooled_features(network, small_data.validation, chunk=chunk)
    assert 10 <= found.milliseconds < 30


def test_features_that_do_not_fit_into_memory_are_refused(network, small_data, monkeypatch):
    class Nothing:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Nothing)
    with pytest.raises(InputError, match="features of 2 views of 12 pictures do not fit"):
        inference.pooled_features(network, small_data.validation, augmentation="light", views=2)


@pytest.mark.slow
def test_views_of_pooled_features_differ(network, small_data):
    found = inference.pooled_features(network, small_data.validation, augmentation="strong", views=2)
    assert found.values.shape == (2, 12, 256)
    assert np.abs(found.values[0] - found.values[1]).max() > 0.01


def test_scores_are_those_of_the_training_split(network, small_data, small_task):
    scores = ranking.score(network, "demo", small_task, small_data)
    assert scores.width == 256
    assert scores.parameters == network.count_params()
    assert 0 <= scores.probe <= 1
    assert 0 <= scores.neighbours <= 1
    other = dataclasses.replace(small_data, train=small_data.validation)
    assert ranking.score(network, "demo", small_task, other).logme != scores.logme


@pytest.mark.parametrize("kind", [pytest.param("multi_label", marks=pytest.mark.slow), "regression"])
def test_tasks_without_one_class_each_are_ranked_too(network, small_data, kind):
    targets = np.eye(3, dtype=np.float32)[small_data.train.targets]
    data = dataclasses.replace(small_data, train=dataclasses.replace(small_data.train, targets=targets))
    task = {"multi_label": tasks.MultiLabel, "regression": tasks.Regression}[kind](small_data.labels)
    scores = ranking.score(network, "demo", task, data)
    assert np.isfinite([scores.logme, scores.probe]).all()
    assert scores.neighbours is scores.h_score is scores.n_leep is None


def test_the_table_begins_with_the_most_promising(network, small_data, small_task):
    one = ranking.score(network, "one", small_task, small_data)
    rows = ranking.table([one, dataclasses.replace(one, name="better", logme=one.logme + 1)], small_task).rows
    assert [row[0] for row in rows] == ["better", "one"]


def test_kept_features_are_found_and_change_nothing(network, small_data, small_task, tmp_path):
    pictures = dataclasses.replace(small_data.train.pictures, digests=tuple(f"{n:064x}" for n in range(24)))
    data = dataclasses.replace(small_data, train=dataclasses.replace(small_data.train, pictures=pictures))
    first, second = (ranking.score(network, "demo", small_task, data, shelf=Shelf(tmp_path)) for _ in range(2))
    assert first.milliseconds > 0
    assert second.milliseconds is None
    assert (first.logme, first.probe, first.n_leep) == (second.logme, second.probe, second.n_leep)


@pytest.mark.slow  # by default what advice kept: see `test_advice.py`
@pytest.mark.parametrize("name", ["MobileNet-0.25", "EfficientNetB0"])
def test_training_finds_the_features_that_ranking_kept(small_data, small_task, tmp_path, name):
    pictures = dataclasses.replace(small_data.train.pictures, digests=tuple(f"{n:064x}" for n in range(24)))
    data = dataclasses.replace(small_data, train=dataclasses.replace(small_data.train, pictures=pictures))
    keras.utils.set_random_seed(0)
    network = backbones.build(name, (32, 32), None)
    ranking.score(network, name, small_task, data, shelf=shelf_at(tmp_path))
    model = builders.image_classifier(name, 3, image_size=32, weights=None)
    for own, ranked in zip(model.layers, network.layers, strict=False):
        own.set_weights(ranked.get_weights())
    phases = strategies.linear_probe(epochs=3)
    history = training.fine_tune(model, small_task, data, phases, cache_dir=tmp_path)
    assert history.phases[0].store.endswith(" 0 computed")


def test_networks_are_listed_by_name_and_weights():
    listed = choices.listed_networks("MobileNetV2,MobileNet-0.25=demo, MobileNet-0.25=none", (32, 48))
    assert list(listed) == ["MobileNetV2", "MobileNet-0.25 demo", "MobileNet-0.25 random"]
    assert [network.weights for network in listed.values()] == ["imagenet", "demo", None]
    assert {network.image_size for network in listed.values()} == {(32, 48)}


def test_the_command_ranks_by_logme(small_data, tmp_path, capsys):
    for index, target in enumerate(small_data.train.targets):
        path = tmp_path / "pictures" / small_data.labels[target] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(small_data.train.pictures.load(index)).numpy())
    both = "MobileNet-0.25=none,MobileNet-0.25=demo"
    arguments = ["rank", "--data", str(tmp_path / "pictures"), "--backbones", both, "--image-size", "32", "--json"]
    assert cli.main(arguments) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in ranked} == {"MobileNet-0.25 demo", "MobileNet-0.25 random"}
    assert ranked[0]["logme"] > ranked[1]["logme"]
    assert cli.main([argument for argument in arguments if argument != "--json"]) == 0
    assert capsys.readouterr().out.index(ranked[0]["name"].split()[1]) > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backbones", "MobileNetV9"], "MobileNetV"),
        (["--backbones", "MobileNet-0.25=demo,MobileNet-0.25=demo"], "`backbones`"),
        (["--backbones", "MobileNet-0.25=nothing.h5"], "nothing.h5"),
        (["--backbones", "MobileNet-0.25=demo", "--data", "nowhere"], "nowhere"),
        (["--backbones", "MobileNet-0.25=demo", "--cache-dir", __file__], "cache_dir"),
        (["--backbones", ""], "backbone"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, says, capsys):
    assert cli.main(["rank", "--data", "demo", "--image-size", "32", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert says in captured.err
