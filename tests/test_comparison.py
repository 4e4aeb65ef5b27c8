import json

import numpy as np
import pytest

from tftransfer import advice, comparison, strategies
from tftransfer.comparison import Trial
from tftransfer.errors import InputError

TRIALS = (
    Trial("full", 0, -1, 0.8, 10.0, 100, 0.9, 0.5),
    Trial("full", 1, -1, 0.9, 20.0, 100, 0.9, 0.3),
    Trial("linear_probe", 0, -1, 0.95, 1.0, 10, 0.9, 0.9),
)


def test_the_table_holds_means_and_ranges_the_best_first():
    table = comparison.table(TRIALS, "accuracy")
    assert [row[0] for row in table.rows] == ["linear_probe", "full"]
    name, accuracy, trials, seconds, parameters, before, after = table.rows[1]
    assert (name, trials, seconds, parameters) == ("full", 2, 15.0, 100)
    assert (accuracy.value, accuracy.low, accuracy.high) == (pytest.approx(0.85), 0.8, 0.9)
    assert before.value == pytest.approx(0.9)
    assert after.value == pytest.approx(0.4)


def test_without_an_old_task_there_are_no_columns_for_it():
    table = comparison.table((Trial("full", 0, -1, 0.8, 10.0, 100),), "accuracy")
    assert table.columns == ("strategy", "accuracy", "trials", "seconds", "parameters trained")


def test_the_lowest_error_comes_first():
    trials = (Trial("a", 0, -1, 2.0, 1.0, 1), Trial("b", 0, -1, 1.0, 1.0, 1))
    assert comparison.table(trials, "mean_absolute_error").rows[0][0] == "b"


ABOUT = {
    "backbone": "MobileNet-0.25",
    "weights": "demo",
    "image_size": [32, 32],
    "data": "colours",
    "fingerprint": "f",
    "train": 24,
    "test": 12,
    "folds": None,
    "train_on_validation": False,
    "epochs": 3,
    "batch_size": 8,
}


def test_what_is_written_says_the_same_and_is_read_again(tmp_path):
    compared = comparison.write(tmp_path, TRIALS, "accuracy", ABOUT)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "| full | 85.0 % (80.0 % to 90.0 %) | 2 | 15.0 | 100 |" in text
    assert "MobileNet-0.25 (demo) at 32x32 pixels on colours, 3 epochs of 24 examples in batches of 8." in text
    assert "too hopeful" in text
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["strategies"][1]["accuracy"]["value"] == pytest.approx(0.85)
    assert comparison.begin(tmp_path, ABOUT) == TRIALS
    assert compared.rows[0][0] == "linear_probe"


def test_why_a_strategy_chose_is_kept_and_older_files_know_of_no_reasons(tmp_path):
    trials = (Trial("surgical", 0, -1, 0.8, 10.0, 100, reasons=("The gradient is largest in top.",)), *TRIALS)
    comparison.write(tmp_path, trials, "accuracy", ABOUT)
    assert comparison.begin(tmp_path, ABOUT) == trials
    file = tmp_path / "comparison.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "trials": [_without_reasons(trial) for trial in written["trials"]]}))
    assert comparison.begin(tmp_path, ABOUT)[1:] == TRIALS


def _without_reasons(trial):
    return {name: value for name, value in trial.items() if name != "reasons"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["full", "tuned_probe"], "What tuned_probe takes to choose, beside those epochs, is in its seconds."),
        (["auto", "surgical:share=0.5"], "What auto and surgical:share=0.5 take to choose, beside those epochs, is in"),
        (["auto", "surgical", "tuned_probe"], "What auto, surgical and tuned_probe take to choose"),
    ],
)
def test_the_note_names_what_chose_beside_its_epochs(names, said):
    trials = [Trial(name, 0, -1, 0.9 - 0.1 * place, 1.0, 1) for place, name in enumerate(names)]
    assert said in comparison.table(trials, "accuracy").note
    assert "to choose" not in comparison.table(TRIALS, "accuracy").note


def test_other_data_versions_and_damage_are_not_gone_on_with(tmp_path):
    comparison.write(tmp_path, TRIALS, "accuracy", ABOUT)
    with pytest.raises(InputError, match="differs in fingerprint"):
        comparison.begin(tmp_path, {**ABOUT, "fingerprint": "g"})
    now = {**ABOUT, "versions": {"keras": "3.15", "numpy": "2.4"}}
    with pytest.raises(InputError, match="is no comparison"):
        comparison.begin(tmp_path, now)  # which versions it is of is not known
    comparison.write(tmp_path, TRIALS, "accuracy", {**ABOUT, "versions": {"keras": "3.14", "numpy": "2.4"}})
    with pytest.raises(InputError, match="differs in versions .keras 3.14 there, 3.15 here.: choose a new folder"):
        comparison.begin(tmp_path, now)
    comparison.write(tmp_path, TRIALS, "accuracy", now)
    assert comparison.begin(tmp_path, now) == TRIALS
    (tmp_path / "comparison.json").write_text('{"trials": [{}]}')
    with pytest.raises(InputError, match="is no comparison"):
        comparison.begin(tmp_path, ABOUT)


def test_with_folds_the_range_is_over_seeds_and_the_test_split_is_said_to_be_closed():
    trials = [Trial("full", seed, fold, 0.1 * (seed + fold), 1.0, 1) for seed in (0, 2) for fold in (0, 4)]
    accuracy = comparison.table(trials, "accuracy").rows[0][1]
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx((0.3, 0.2, 0.4))
    one_seed = comparison.table(trials[:2], "accuracy")
    assert (one_seed.rows[0][1].low, one_seed.rows[0][1].high) == pytest.approx((0.0, 0.4))
    assert "over folds" in one_seed.note
    assert "not looked at" in comparison.note({**ABOUT, "folds": 5})


@pytest.mark.parametrize("metric", ["accuracy", "mean_absolute_error"])
def test_a_strategy_without_finite_answers_comes_last_and_is_said(metric):
    trials = (Trial("broken", 0, -1, None, 1.0, 1), Trial("full", 0, -1, 0.2, 1.0, 1))
    table = comparison.table(trials, metric)
    assert [row[0] for row in table.rows] == ["full", "broken"]
    assert table.rows[1][1].value is None
    assert "1 trials gave no finite answers" in table.note
    comparison.picture(table)


def test_a_pattern_does_not_break_the_markdown_table():
    trials = (Trial("partial:layers=re:a|b", 0, -1, 0.2, 1.0, 1),)
    assert "partial:layers=re:a\\|b" in comparison.markdown(comparison.table(trials, "accuracy"))


def test_the_picture_is_drawn():
    assert comparison.picture(comparison.table(TRIALS, "accuracy")).png.startswith(b"\x89PNG")


def test_folds_hold_out_every_training_example_once_and_no_test_example(small_data):
    parts = list(comparison.folds(small_data, 4))
    held = np.concatenate([part.test.names for part in parts])
    assert sorted(held) == sorted(small_data.train.names)
    for part in parts:
        assert not set(part.train.names) & set(part.test.names)
        assert len(part.train) + len(part.test) == len(small_data.train)
        assert np.bincount(part.test.targets).tolist() == [2, 2, 2]
        number = small_data.train.names.index(part.test.names[1])
        np.testing.assert_array_equal(part.test.pictures.load(1), small_data.train.pictures.load(number))
        assert part.test.targets[1] == small_data.train.targets[number]


@pytest.mark.parametrize("count", [1, 9])
def test_impossible_folds_are_refused(small_data, count):
    with pytest.raises(InputError, match="from 2 to 8"):
        list(comparison.folds(small_data, count))


def test_what_weighs_by_the_validation_split_cannot_train_on_it():
    comparison.check_validation_is_free([advice.Choice("full"), advice.Choice("surgical")])
    with pytest.raises(InputError, match="weighs by that split. Received: .*wise_ft"):
        comparison.check_validation_is_free([advice.Choice("full"), advice.Choice("wise_ft")])


def test_the_validation_split_trains_after_the_choice(monkeypatch, small_data, small_task, small_network):
    seen = {}

    def choose(model, task, data, **_):
        seen["chosen by"] = data.train.names
        return advice.Advice(strategies.linear_probe(epochs=1), ("It is small.",))

    def train(model, task, data, *given, **options):
        seen["trained on"], seen["validated on"] = data.train.names, data.validation.names
        return real(model, task, data, *given, **options)

    real = comparison.training.fine_tune
    monkeypatch.setattr(comparison.training, "fine_tune", train)
    monkeypatch.setattr(advice.Choice, "__call__", lambda self, *given, **options: choose(*given, **options))
    choice = advice.Choice("linear_probe", 1)
    trial = comparison.run_trial(choice, small_network, small_task, small_data, seed=0, train_on_validation=True)
    assert trial.reasons == ("It is small.",)
    assert seen["chosen by"] == small_data.train.names
    assert seen["trained on"] == small_data.train.names + small_data.validation.names
    assert seen["validated on"] == small_data.validation.names


@pytest.mark.parametrize("text", ["", "full,full", "full,nonsense", "full:layer_decay=2"])
def test_bad_lists_of_strategies_are_refused(text):
    with pytest.raises(InputError):
        comparison.split_list(text)
