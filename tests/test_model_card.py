"""The card has its sections in order, every number of it is the report's, and its code runs."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest

from tftransfer import bundles, model_card
from tftransfer.report import Number, Report, Table

SECTIONS = [
    "Task", "Intended use and limits", "Data", "Training", "Metrics on the test split", "Label by label", "Checks",
    "How to use it", "Provenance",
]  # fmt: skip
HEADS = [
    "split | examples | from",
    "label | train | validation | test",
    "phase | trains | epochs | kept epoch | learning rate | schedule | optimizer | augmentation | further",
    "metric | value | 95 % interval | how the interval was found",
    "class | recall | F1 | test examples",
    "check | outcome | found",
    "package | version",
]


@pytest.fixture
def card(written_run):
    return (written_run / "MODEL_CARD.md").read_text(encoding="utf-8")


def _tables(card):
    """Return the rows of each table by its head, cell by cell."""
    tables = {}
    for block in re.findall(r"(?:^\|.*\n)+", card + "\n", re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert {len(line) for line in lines} == {len(lines[0])}
        assert set(lines[1]) == {"---"}
        tables[" | ".join(lines[0])] = lines[2:]
    return tables


def test_sections_and_tables_come_in_this_order(card):
    assert card.startswith("# small on colours\n\nGives one label for each picture: small, fine-tuned")
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == SECTIONS
    assert list(_tables(card)) == HEADS


def test_numbers_are_those_of_the_report(card, written_run):
    report = json.loads((written_run / "report.json").read_text())
    tables = _tables(card)
    for (name, value, interval, _), (key, expected) in zip(tables[HEADS[3]], report["metrics"].items(), strict=True):
        assert name == {"accuracy": "Accuracy", "log_loss": "Log loss", "macro_f1": "Macro F1"}[key]
        assert value == model_card.exact(expected)
        around = report["intervals"].get(key, {})
        bounds = [model_card.exact(around[end]) for end in ("low", "high") if around.get(end) is not None]
        assert interval == (" to ".join(bounds) or "–")
    assert float(tables[HEADS[3]][0][1]) == round(report["metrics"]["accuracy"], 4)
    counts = {name: str(report["data"][name]) for name in ("train", "validation", "test")}
    assert {row[0]: row[1] for row in tables[HEADS[0]]} == counts
    per_label = report["data"]["per_label"]
    counted = list(zip(*per_label.values(), strict=True))
    assert [tuple(map(int, row[1:])) for row in tables[HEADS[1]]] == counted
    assert tables[HEADS[2]] == [["probe", "head", "3", "2", "0.009", "–", "–", "–", "mixup 0.2"]]
    assert tables[HEADS[4]][0] == ["red", "0.7500 (0.3000 to 0.9600)", "0.7000", "4"]
    assert tables[HEADS[5]][0] == ["Calibration", "passed", "expected calibration error: 0.0123"]
    assert dict(tables[HEADS[6]]) == report["versions"]
    assert "**Accuracy 0.8333** (95 % interval 0.5520 to 0.9530) on 12 test examples" in card
    assert "Label blue has the fewest test examples: 3." in card


def test_limits_say_what_was_not_looked_into_and_what_failed(card):
    limits = card.split("## Intended use and limits")[1].split("##")[0]
    assert "These checks failed: duplicates." in limits
    missing = limits.split("Not looked into: ")[1]
    assert "whether labels are wrong" in missing
    assert "pictures lie in two splits" not in missing


def test_provenance_is_that_of_the_manifest(card, written_run):
    manifest = bundles.read_manifest(written_run)
    assert manifest["files"]["model.keras"] in card
    assert manifest["weights"]["sha256"] in card
    assert manifest["data"]["fingerprint"] in card
    assert str(written_run.parent) not in card


def test_report_and_finished_manifest_give_the_same_card(card, written_run):
    assert model_card.render(bundles.read_report(written_run), bundles.read_manifest(written_run)) == card


def test_the_code_for_keras_runs(card, written_run, monkeypatch):
    monkeypatch.chdir(written_run)
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "MODEL_CARD.md", "exec"), {})
    assert "shape=(1, 3)" in printed.getvalue()


def _manifest(kind="single_label", labels=("a", "b"), **further):
    task = {"kind": kind, "name": "image_classification"}
    return {"task": task, "labels": list(labels), "image_size": [32, 48], **further}


def test_a_report_that_says_little_makes_a_card_all_the_same():
    report = Report("image_classification", "small", [], False, {}, {})
    card = model_card.render(report, _manifest(current=None, configuration={"smoke": True}))
    assert "Nothing was measured." in card
    assert "stopped before its end" in card
    assert "not for use" in card
    assert "no SavedModel had passed" in card
    assert "target_size=(32, 48)" in card


def test_many_labels_are_shortened():
    labels = [f"label {number}" for number in range(60)]
    counts = {split: list(range(60, 0, -1)) for split in ("train", "validation", "test")}
    rows = tuple((label, Number(0.5)) for label in labels)
    table = Table("Each class", ("class", "recall"), rows, section="Class by class")
    data = {"labels": labels, "per_label": counts}
    report = Report("image_classification", "small", [], True, data, {}, tables=(table,))
    card = model_card.render(report, _manifest(labels=labels))
    assert "label 49 and 10 more, in `manifest.json`" in card
    assert "The 50 rarest of 60 labels" in card
    assert _tables(card)["label | train | validation | test"][0] == ["label 59", "1", "1", "1"]
    assert "50 of 60 rows" in card


@pytest.mark.parametrize("name", ["a|b", "<script>", "*b*", "`c`", "two\nlines", "_d_", "[e](f)", "&lt;", "a\\|b"])
def test_names_are_shown_as_they_are(name):
    from markdown_it import MarkdownIt

    data = {"name": "x", "labels": [name, "b"], "per_label": {"train": [1, 2]}, "splits": {"notes": [name]}}
    card = model_card.render(Report("image_classification", name, [], True, data, {}), _manifest(labels=[name, "b"]))
    shown = [
        "".join(part.content for part in token.children if part.type == "text")
        for token in MarkdownIt("commonmark").enable("table").parse(card)
        if token.type == "inline"
    ]
    line = " ".join(name.split())
    assert shown[0] == f"{line} on x"
    assert f"Labels (2): {line}, b" in shown
    assert line in shown


@pytest.mark.parametrize(("kind", "said"), [("multi_label", "sigmoid"), ("regression", "`values`")])
def test_other_tasks_say_what_comes_out(kind, said):
    report = Report("image_classification", "small", [], True, {}, {})
    card = model_card.render(report, _manifest(kind))
    assert said in card
    assert "still given one of them" not in card
