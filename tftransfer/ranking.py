"""Which pretrained network suits a data set, before any is tuned: scores on features that are computed once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import keras

from tftransfer import inference, transferability
from tftransfer.data import Data
from tftransfer.report import RESULT, Table
from tftransfer.shelf import Shelf
from tftransfer.tasks import Task

_CLASSES_ONLY = "single_label"


@dataclass(frozen=True)
class Scores:
    """How well one network's features suit a task; only differences on the same data mean something.

    Args:
        name: The network's.
        logme: Log evidence of a linear model on the features, see `transferability.logme`; networks are ranked by it.
        probe: The task's main metric of a cross-validated linear model.
        neighbours, h_score, n_leep: As in `transferability`; None unless each example has one class.
        width: How many features there are.
        parameters: How many numbers the network has.
        milliseconds: What one picture takes on this machine; None if its features were found in files.
        seconds: What all of it took.
    """

    name: str
    logme: float
    probe: float | None
    neighbours: float | None
    h_score: float | None
    n_leep: float | None
    width: int
    parameters: int
    milliseconds: float | None
    seconds: float


def score(
    network: keras.Model, name: str, task: Task, data: Data, *, seed: int = 0, shelf: Shelf | None = None
) -> Scores:
    """Compute a network's features of the training pictures, and how well they suit the task.

    Args:
        network: Headless, from `backbones.build`.
        name: What the table calls it.
        task: What the targets mean.
        data: Only its training split is looked at.
        seed: Of the probe's folds. Defaults to 0.
        shelf: Where features are kept for later. Defaults to None.
    """
    began = time.monotonic()
    found = inference.pooled_features(network, data.train, seed=seed, shelf=shelf)
    (features,), targets = found.values, data.train.targets
    predicted = transferability.probe(features, targets, seed=seed)
    single = task.kind == _CLASSES_ONLY
    return Scores(
        name,
        transferability.logme(features, targets),
        task.measure(targets, predicted)[task.main_metric],
        transferability.neighbours(features, targets) if single else None,
        transferability.h_score(features, targets) if single else None,
        transferability.n_leep(features, targets, seed) if single else None,
        features.shape[1],
        network.count_params(),
        found.milliseconds,
        time.monotonic() - began,
    )


def table(scores: Sequence[Scores], task: Task) -> Table:
    """Put networks side by side, the one with the largest LogME first."""
    ranked = sorted(scores, key=lambda one: -one.logme)
    columns = ("backbone", "LogME", f"probe {task.main_metric}", "neighbours", "H-score", "N-LEEP", "parameters", "ms")
    rows = tuple(
        (
            one.name,
            one.logme,
            one.probe,
            one.neighbours,
            one.h_score,
            one.n_leep,
            one.parameters,
            one.milliseconds,
        )
        for one in ranked
    )
    note = (
        "Measured on the training split. Larger is better for every score but an error; the probe is cross-validated, "
        "and tuning adds to it. Milliseconds are per picture on this machine; none where features were kept before."
    )
    return Table("Backbones ranked", columns, rows, note, section=RESULT)
