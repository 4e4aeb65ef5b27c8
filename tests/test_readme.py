"""What the README says runs, runs; what it points at, exists."""

import importlib
import json
import re

import pytest

from tftransfer import comparison


def test_the_python_examples_run_one_after_the_other(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (repository / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile("".join(examples), "README.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"digits.keras", "digits.safetensors", "rates.png"}
    assert "head" in capsys.readouterr().out


def test_links_lead_somewhere(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_strategies_and_commands_are_named(repository):
    from tftransfer import strategies

    text = (repository / "README.md").read_text(encoding="utf-8")
    assert [name for name in strategies.names() if f"`{name}" not in text] == []
    commands = ("doctor", "backbones", "rank", "suggest", "strategies", "predict", "evaluate", "export", "verify")
    assert [name for name in (*commands, "scan", "sign", "audit") if f"tftransfer {name}" not in text] == []


@pytest.mark.parametrize("name", ["digits", "flowers", "flowers_all", "flowers_folds"])
def test_tables_of_strategies_are_those_of_the_committed_trials(repository, name):
    results = repository / "benchmarks" / "results"
    found = json.loads((results / f"strategies_{name}.json").read_text())
    trials = [comparison.Trial(**trial) for trial in found["trials"]]
    written = comparison.markdown(comparison.table(trials, found["metric"], comparison.note(found["about"])))
    assert (results / f"strategies_{name}.md").read_text() == written
    rows = "\n".join(line for line in written.splitlines() if line.startswith("|"))
    assert rows in (repository / "README.md").read_text()


def test_the_chosen_strategy_and_surgical_are_as_good_as_is_asked(repository):
    """What cross-validation chose reaches 0.85, and the strategy that asks the data is within two points of it."""
    results = repository / "benchmarks" / "results"
    chosen = json.loads((results / "strategies_flowers_folds.json").read_text())["strategies"][0]["strategy"]
    found = json.loads((results / "strategies_flowers_all.json").read_text())
    accuracy = {row["strategy"]: row["accuracy"]["value"] for row in found["strategies"]}
    assert accuracy[chosen] >= 0.85
    assert accuracy[chosen] - accuracy["surgical"] <= 0.02
    assert {(trial["strategy"], trial["seed"]) for trial in found["trials"]} >= {
        (name, seed) for name in (chosen, "surgical") for seed in (0, 1, 2)
    }


def test_what_is_said_of_copies_is_measured(repository):
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    results = repository / "benchmarks" / "results"
    flowers, cells, spoken = (
        json.loads((results / f"duplicates_{name}.json").read_text())
        for name in ("flowers", "cells", "spoken_digit_pictures")
    )
    kinds = (("resized", "resized"), ("encoded again", "JPEG quality 50"), ("cropped", "90 % of each side"),
             ("mirrored", "mirrored"), ("gray", "gray"))  # fmt: skip
    assert all(f"{flowers['recall'][kind]:.1%} ({said})" in text for kind, said in kinds)
    assert f"false alarms for {flowers['false_alarms']:.1%} of {flowers['setting']['others']} other" in text
    assert cells["false_alarms"] * cells["setting"]["others"] == pytest.approx(3)
    assert f"{spoken['false_alarms']:.1%} are false alarms" in text
    for found in (flowers, cells):
        assert found["recall"]["same"] == 1
        assert min(found["recall"].values()) >= 0.95


def test_what_is_against_forgetting_keeps_fifteen_points_more_for_one_point_less(repository):
    found = json.loads((repository / "benchmarks" / "results" / "strategies_digits.json").read_text())
    rows = {row["strategy"].partition(":")[0]: row for row in found["strategies"]}
    assert {trial["seed"] for trial in found["trials"]} == {0, 1, 2}
    for name in ("l2_sp", "ewc", "wise_ft"):
        kept = rows[name]["old task after"]["value"] - rows["full"]["old task after"]["value"]
        lost = rows["full"]["accuracy"]["value"] - rows[name]["accuracy"]["value"]
        assert kept >= 0.15, name
        assert lost <= 0.01, name


def test_speed_and_labels_are_the_committed_numbers(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    results = repository / "benchmarks" / "results"
    speeds = re.findall(r"\| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|", text.partition("\n## Speed\n")[2])
    names = [
        *(f"frozen_training_0.35_{side}" for side in ("ours", "warm", "views")),
        *(f"frozen_training_1_{side}" for side in ("ours", "warm")),
        *(f"partial_training_0.35_{side}" for side in ("ours", "files", "views")),
        *(f"full_training_0.35_ours_against_{rival}" for rival in ("keras", "keras_cached")),
    ]
    measured = [json.loads((results / f"{name}.json").read_text()) for name in names]
    assert [tuple(map(float, row)) for row in speeds] == [(one["times_faster"], *one["range"]) for one in measured]
    shares = json.loads((results / "labels_flowers.json").read_text())["shares"]
    for method in ("ours", "plain"):
        first, second, third = (shares[share]["precision"][method] for share in ("5%", "10%", "20%"))
        assert f"{first:.0%}, {second:.0%} and {third:.0%}" in " ".join(text.split())


def test_memory_stays_flat_and_the_readme_says_so(repository):
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    found = json.loads((repository / "benchmarks" / "results" / "memory.json").read_text())
    few, many = found["peak_mib"]["1000"], found["peak_mib"]["20000"]
    assert f"on 20,000 pictures peaks at {many} MiB, on 1,000 at {few} MiB" in text
    assert many - few <= 0.1 * few + found["setting"]["budget_mib"]


def test_checkpoints_take_as_little_time_as_is_asked(repository):
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    found = json.loads((repository / "benchmarks" / "results" / "checkpoints.json").read_text())
    assert f"trained on flowers: {found['share']:.2%} of the time" in text
    assert found["share"] <= 0.02


def test_wrong_labels_are_found_as_often_as_is_asked(repository):
    shares = json.loads((repository / "benchmarks" / "results" / "labels_flowers.json").read_text())["shares"]
    for share, asked in (("5%", 0.60), ("10%", 0.70), ("20%", 0.75)):
        assert shares[share]["precision"]["ours"] >= asked
        assert shares[share]["precision"]["ours"] > shares[share]["precision"]["plain"]


def test_the_wide_comparison_is_that_of_the_committed_trials(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    wide = importlib.import_module("wide_comparison")
    written = (wide.RESULTS / "wide_comparison.md").read_text()
    names = [line.split("|")[1].strip() for line in written.splitlines()[2:-1]]
    files = [wide.RESULTS / "wide_comparison" / f"{name.replace(', ', '_')}.json" for name in names]
    cells = {name: json.loads(file.read_text()) for name, file in zip(names, files, strict=True)}
    assert wide.markdown(cells) == written
    assert written in (repository / "README.md").read_text()
    assert len(cells) == 8
    for found in cells.values():
        assert {trial["seed"] for trial in found["trials"]} == {0, 1, 2}
        assert len(found["trials"]) == 3 * len(wide.STRATEGIES)


def test_ranking_agrees_with_tuning_as_often_as_is_asked_and_the_readme_says_so(repository):
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    found = json.loads((repository / "benchmarks" / "results" / "ranking.json").read_text())
    differ, every, cost = found["pairs_that_truly_differ"], found["all_pairs"], found["cost_against_fine_tuning"]
    agree = differ["agree"]["logme"]
    assert f"in {agree:.0%} of the {differ['pairs']} pairs" in text
    assert f"({every['agree']['logme']:.0%} of all {every['pairs']}" in text
    assert f"in {cost:.1%} of the time" in text
    assert agree >= 0.85
    assert cost < 0.1
    assert (len(found["networks"]), {len(rows) for rows in found["networks"].values()}) == (4, {5})


def test_the_advice_is_good_and_never_dearer_than_training_everything_and_the_readme_says_so(repository):
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    found = json.loads((repository / "benchmarks" / "results" / "advice.json").read_text())
    lost, costs = found["lost_on_average"], [one["cost"]["seconds"] for one in found["settings"].values()]
    assert f"{-100 * lost:.1f} points better on average than the strategy that is best on the other seeds" in text
    assert f"takes {min(costs):.0%} to {max(costs):.0%} of the time of `full`" in text
    assert lost <= 0.02
    assert max(*costs, *(one["cost"]["processor"] for one in found["settings"].values())) <= 1
    assert len(found["settings"]) >= 8


def test_savedmodels_serve_as_much_faster_as_is_asked_and_the_readme_says_so(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    for backbone in ("MobileNetV2", "EfficientNetB0"):
        for batch in (1, 16):
            name = f"serving_{backbone}_{batch}"
            found = json.loads((repository / "benchmarks" / "results" / f"{name}.json").read_text())
            lite = found["setting"]["litert_times_faster"]
            both = [(found["times_faster"], *found["range"]), (lite["median"], *lite["range"])]
            cells = " | ".join(f"{median} ({low} to {high})" for median, low, high in both)
            assert f"| `{backbone}`, batches of {batch} | {cells} |" in text
            assert found["times_faster"] >= 1.3


def test_int8_loses_a_point_at_most_and_the_readme_says_so(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    files = json.loads((repository / "benchmarks" / "results" / "litert_flowers.json").read_text())["files"]
    for name, row in list(files.items())[1:4]:
        assert f"| `{name}` | {row['MB']:.2f} | {row['accuracy']:.3f} | {row['same answer']:.1%} |" in text
    assert files["model_int8.tflite"]["accuracy"] >= files["model.keras"]["accuracy"] - 0.01
