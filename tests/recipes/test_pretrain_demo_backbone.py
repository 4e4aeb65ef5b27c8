import hashlib
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from tftransfer import backbones, data
from tftransfer.checks import demo

FILES = {"demo_backbone.weights.h5", "demo_backbone.json", "DEMO_BACKBONE.md"}


@pytest.fixture(scope="module")
def packaged(repository):
    return repository / "tftransfer" / "assets"


@pytest.fixture(scope="module")
def card(packaged):
    return json.loads((packaged / "demo_backbone.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_smoke_run_writes_every_file(repository, tmp_path):
    recipe = repository / "recipes" / "pretrain_demo_backbone.py"
    command = [
        sys.executable,
        str(recipe),
        "--smoke",
        "--quiet",
        "--image-size",
        "32",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    written = json.loads((tmp_path / "demo_backbone.json").read_text(encoding="utf-8"))
    weights = (tmp_path / "demo_backbone.weights.h5").read_bytes()
    assert written["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (written["image_size"], written["source"]["pictures"]) == (32, 64)


def test_packaged_files_belong_together(packaged, card):
    assert {path.name for path in packaged.iterdir()} >= FILES
    weights = (packaged / "demo_backbone.weights.h5").read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["sha256"] in (packaged / "DEMO_BACKBONE.md").read_text(encoding="utf-8")
    assert len(weights) < 5_000_000


def test_packaged_weights_load_and_tell_pictures_apart(packaged, card):
    size = card["image_size"]
    network = keras.applications.MobileNet(
        alpha=float(card["backbone"].split("-")[1]),
        include_top=False,
        weights=None,
        input_shape=(size, size, 3),
    )
    before = network(np.zeros((1, size, size, 3), np.float32))
    network.load_weights(packaged / "demo_backbone.weights.h5")
    pictures = np.random.default_rng(0).uniform(-1, 1, (4, size, size, 3)).astype(np.float32)
    features = network(pictures).numpy().mean(axis=(1, 2))
    assert np.abs(before).max() < 1e-3 < features.std(axis=0).max()
    assert np.isfinite(features).all()


@pytest.mark.slow
def test_packaged_backbone_earns_its_place(card):
    """Measured here and now, and what the card says."""
    size = (card["image_size"], card["image_size"])
    digits, _ = data.load("demo", image_size=size, seed=card["seed"])
    keras.utils.set_random_seed(0)
    random, embedded = (backbones.build(card["backbone"], size, weights) for weights in (None, "demo"))
    rows = demo.compare_networks(digits, embedded, random)
    mean = {(row.features, row.per_class): row.mean for row in rows}
    for count, margin in ((1, 0.05), (5, 0.05), (10, 0.01)):
        assert mean["demo backbone", count] >= mean["raw pixels", count] + margin
        assert mean["demo backbone", count] >= mean["random weights", count] + 0.15
    for row in card["probe"]:
        if row["features"] != "random weights":  # those are of another draw
            assert mean[row["features"], row["per_class"]] == pytest.approx(row["mean"], abs=0.005)


@pytest.mark.parametrize(
    "option",
    [["--image-size", "16"], ["--seed", "-1"], ["--seed", "4294967296"], ["--epochs", "0"], ["--image-size", "64x64"]],
)
def test_bad_input_is_one_line_and_exit_2(repository, tmp_path, option):
    recipe = repository / "recipes" / "pretrain_demo_backbone.py"
    command = [sys.executable, str(recipe), *option, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert option[0] in run.stderr
    assert not (tmp_path / "out").exists()
