import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tftransfer import strategies
from tftransfer.errors import InputError


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_is_a_tuple_of_phases(name):
    phases = strategies.parse(name)
    assert phases
    assert all(isinstance(phase, strategies.Phase) for phase in phases)


@given(st.sampled_from(strategies.names()), st.integers(4, 200))
def test_epochs_are_shared_out_completely(name, total):
    phases = strategies.parse(name, epochs=total)
    assert sum(phase.epochs for phase in phases) == total
    assert min(phase.epochs for phase in phases) >= 1


def test_epochs_follow_the_phases_own_share():
    assert [phase.epochs for phase in strategies.freeze_then_unfreeze(epochs=15)] == [5, 10]


def test_learning_rate_is_the_last_phases_and_the_ratio_stays():
    probe, tune = strategies.freeze_then_unfreeze(learning_rate=2e-4)
    assert tune.learning_rate == pytest.approx(2e-4)
    assert probe.learning_rate == pytest.approx(18 * 2e-4)


def test_augmentations_are_those_of_the_data_package():
    from tftransfer.data import augment

    assert set(strategies.AUGMENTATIONS) == set(augment.NAMED)


def test_options_reach_the_strategy():
    averaged = strategies.parse("linear_probe:augmentation=light,views=2,average_views=true")[0]
    assert (averaged.views, averaged.average_views, averaged.to_json()["average_views"]) == (2, True, True)
    assert not strategies.parse("full:views=2,average_views=False")[0].average_views
    moving = strategies.parse("freeze_then_unfreeze:train_batch_norm=true")
    assert [phase.train_batch_norm for phase in moving] == [False, True]
    assert strategies.parse("partial:last=3")[0].selector == "last:3"
    assert strategies.parse("full:layer_decay=0.8")[0].layer_decay == 0.8


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_mixes_examples_and_leaves_branches_out_after_its_probe(name):
    options = {"mixup": 0.2, "cutmix": 1.0, "stochastic_depth": 0.1}
    plain = strategies.parse(name)
    mixed = strategies.parse(f"{name}:{','.join(f'{key}={value}' for key, value in options.items())}")
    for number, (before, after) in enumerate(zip(plain, mixed, strict=True)):
        expected = before if number == 0 and len(plain) > 1 else dataclasses.replace(before, **options)
        assert after == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ful", "Did you mean 'full'"),
        ("partial:lasst=3", "Did you mean 'last'"),
        ("partial:last=two", "must be a whole number"),
        ("full:layer_decay=x", "must be a number"),
        ("full:augmentation=heavy", "one of none, light"),
        ("partial:last=0", "whole number from 1"),
        ("partial:last=1.5", "whole number"),
        ("norm_only:last=3", "has the options views, average_views, mixup"),
        ("linear_probe:views=2", "views.*give an `augmentation`"),
        ("full:views=-1", "views"),
        ("full:average_views=true", "`average_views` must be False .* give `views` from 2"),
        ("full:views=1,average_views=true", "average_views"),
        ("full:views=2,average_views=2", "`average_views` must be true or false"),
        ("full:layer_decay=2", r"in \(0, 1\]"),
        ("l2_sp:mixup=-1", "mixup"),
        ("l2_sp:mixup=0.1,mixup=0.2", "each option once"),
    ],
)
def test_bad_strategies_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        strategies.parse(text)


@pytest.mark.parametrize("epochs", [0, 1, -3])
def test_too_few_epochs_are_refused(epochs):
    with pytest.raises(InputError, match="`epochs` must be a whole number from 2"):
        strategies.parse("freeze_then_unfreeze", epochs=epochs)


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan"), float("inf"), "a"])
def test_bad_learning_rates_are_refused(rate):
    with pytest.raises(InputError, match="learning_rate"):
        strategies.parse("full", learning_rate=rate)


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": 1.0},
        {"weight_decay": -1.0},
        {"schedule": "step"},
        {"patience": -1},
        {"mixup": -1.0},
        {"cutmix": float("inf")},
        {"stochastic_depth": 1.0},
        {"optimizer": "adam"},
        {"epochs": 1.5},
        {"augmentation": "heavy"},
        {"learning_rate": "a"},
        {"learning_rate": None},
        {"layer_decay": "a"},
        {"warmup": "a"},
        {"weight_decay": None},
    ],
)
def test_bad_phases_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        strategies.Phase("phase", **wrong)
