"""The report: JSON to the contract and back without loss, HTML that is safe, complete and self-contained."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tftransfer import report_html
from tftransfer.report import CLASSES, Check, Findings, Number, Picture, Report, Table

CONTRACT = {
    "task",
    "backbone",
    "strategy",
    "complete",
    "data",
    "metrics",
    "intervals",
    "seconds",
    "checks",
    "versions",
    "seed",
}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'

names = st.text(max_size=12)
floats = st.none() | st.floats(allow_nan=True, allow_infinity=True)
numbers = st.builds(Number, floats, floats, floats, st.none() | names)
scalars = st.none() | st.booleans() | st.integers() | floats | names
plain = st.recursive(scalars, lambda part: st.lists(part, max_size=2) | st.dictionaries(names, part, max_size=2))
dicts = st.dictionaries(names, plain, max_size=3)


@st.composite
def tables(draw):
    columns = draw(st.lists(names, min_size=1, max_size=3))
    row = st.tuples(*[scalars | numbers for _ in columns])
    rows = tuple(draw(st.lists(row, max_size=3)))
    return Table(draw(names), tuple(columns), rows, draw(names), draw(names), tuple(columns[:1]))


data = st.builds(
    lambda extra, name, count, files: {
        **extra,
        "name": name,
        "test": count,
        "quarantined": files,
        "splits": extra,
    },
    dicts,
    names,
    st.integers(0),
    st.lists(st.fixed_dictionaries({"file": names, "reason": names}), max_size=2),
)
reports = st.builds(
    Report,
    names,
    names,
    st.lists(dicts, max_size=2),
    st.booleans(),
    data,
    st.dictionaries(names, numbers, max_size=3),
    seconds=st.dictionaries(names, floats, max_size=2),
    checks=st.lists(st.builds(Check, names, st.none() | st.booleans(), dicts), max_size=2),
    versions=st.dictionaries(names, names, max_size=2),
    seed=st.integers(),
    tables=st.lists(tables(), max_size=2),
    pictures=st.lists(st.builds(Picture, names, st.binary(max_size=9), names, names, names), max_size=2),
    notes=st.lists(names, max_size=2),
)


def example(**changes):
    """A small report in which every part holds something."""
    parts = {
        "task": "image_classification",
        "backbone": "MobileNetV2",
        "strategy": [{"name": "probe", "epochs": 2}],
        "complete": True,
        "data": {
            "name": "flowers",
            "train": 450,
            "validation": 50,
            "test": 200,
            "splits": {"test": "20 %, seed 0"},
        },
        "metrics": {"accuracy": Number(0.93, 0.901, 0.952, "wilson"), "log_loss": Number(float("nan"))},
        "seconds": {"train": 8.0},
        "checks": (
            Check("calibration", True, {"error": np.float32(0.5)}),
            Check("leakage", None),
            Check("other", False),
        ),
        "versions": {"keras": "3.15.1"},
        "seed": 7,
        "tables": (
            Table(
                "Each class",
                ("class", "recall"),
                (("rose", Number(0.5, 0.4, 0.6)),),
                "Note.",
                CLASSES,
                ("recall",),
            ),
        ),
        "pictures": (Picture("Curves", b"\x89PNG", "How to read it."),),
        "notes": ("Read me.",),
    }
    return Report(**{**parts, **changes})


class Page(HTMLParser):
    """Collects the tags, attributes and visible words of a page, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words += words if self.open[-1:] != ["style"] else ""

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@settings(max_examples=60, deadline=None)
@given(reports)
def test_json_round_trips_exactly_and_is_strict_json(report):
    contents = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(contents) == report
    assert Report.from_json(contents).to_json() == report.to_json()


@settings(max_examples=30, deadline=None)
@given(reports)
def test_html_is_well_formed_for_anything(report):
    page = Page(report.to_html())
    assert not page.open
    report.to_html().encode("utf-8")


def test_json_keeps_the_contract():
    contents = example().to_json()
    assert set(contents) == CONTRACT | {"tables", "pictures", "notes"}
    assert {"name", "train", "validation", "test", "quarantined"} <= set(contents["data"])
    assert contents["metrics"] == {"accuracy": 0.93, "log_loss": None}
    assert contents["intervals"] == {"accuracy": {"low": 0.901, "high": 0.952, "method": "wilson"}}
    assert contents["checks"][0] == {"name": "calibration", "passed": True, "metrics": {"error": 0.5}}


def test_a_report_without_the_later_keys_is_read():
    contents = {name: part for name, part in example().to_json().items() if name in CONTRACT}
    assert Report.from_json(contents).tables == ()


def test_a_report_that_lacks_a_part_says_which():
    with pytest.raises(ValueError, match="must have backbone, seed"):
        Report.from_json({name: part for name, part in example().to_json().items() if name not in ("backbone", "seed")})


def test_numpy_values_become_plain():
    check = Check("any", np.bool_(True), {"values": np.array([1.5, np.nan]), "count": np.int64(3)})
    assert check == Check("any", True, {"values": [1.5, None], "count": 3})
    assert type(check.passed) is bool


@pytest.mark.parametrize("cell", [object(), [1], {"a": 1}, b"bytes"])
def test_cells_that_json_cannot_keep_are_refused(cell):
    with pytest.raises(TypeError, match="Received"):
        Table("title", ("column",), ((cell,),))


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match=r"2 cells\. Received"):
        Table("title", ("one", "two"), (("cell",),))


def test_findings_add_up():
    table = Table("title", ("column",), ())
    both = Findings({"a": Number(1.0)}, (table,)) + Findings({"b": Number(2.0)}, checks=(Check("c", True),))
    assert list(both.metrics) == ["a", "b"]
    assert (len(both.tables), len(both.checks)) == (1, 1)


def test_the_main_metric_leads_the_page():
    page = Page(example().to_html())
    assert "Accuracy 93.0\xa0% (95\xa0% interval 90.1–95.2\xa0%), on 200 test examples" in page.words


@pytest.mark.parametrize(
    ("metrics", "main"),
    [
        ({"brier_score": 0.1, "accuracy": 0.9}, "accuracy"),
        ({"r_squared": 0.1, "mean_absolute_error": 2.0}, "mean_absolute_error"),
        ({"sign/accuracy": 0.5}, "sign/accuracy"),
        ({}, None),
    ],
)
def test_main_metric(metrics, main):
    assert example(metrics={name: Number(value) for name, value in metrics.items()}).main_metric == main


def test_every_part_is_on_the_page():
    data = {**example().data, "quarantined": [{"file": "rose/7.jpg", "reason": "zero bytes"}]}
    words = Page(example(data=data, complete=False).to_html()).words
    parts = [
        "probe",
        "rose",
        "50.0\xa0%",
        "40.0–60.0\xa0%",
        "passed",
        "failed",
        "not decided",
        "20 %, seed 0",
        "450",
        "rose/7.jpg",
        "zero bytes",
        "8",
        "3.15.1",
        "7",
        "Read me.",
        "Incomplete",
        "undefined",
        "How to read it.",
    ]
    assert [part for part in parts if part not in words] == []


def test_nothing_from_the_data_becomes_markup():
    hostile = Report(
        task=HOSTILE,
        backbone=HOSTILE,
        strategy=[{"name": HOSTILE, HOSTILE: HOSTILE}],
        complete=False,
        data={
            "name": HOSTILE,
            "quarantined": [{"file": HOSTILE, "reason": HOSTILE}],
            "splits": {HOSTILE: [HOSTILE]},
        },
        metrics={HOSTILE: Number(1.0, method=HOSTILE)},
        seconds={HOSTILE: 1.0},
        checks=(Check(HOSTILE, True, {HOSTILE: HOSTILE}),),
        versions={HOSTILE: HOSTILE},
        tables=(Table(HOSTILE, (HOSTILE,), ((HOSTILE,),), HOSTILE, HOSTILE),),
        pictures=(Picture(HOSTILE, b"", HOSTILE, HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
    )
    page = Page(hostile.to_html())
    assert not page.all("script")
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.all("img"))


def test_the_page_loads_nothing():
    page = example().to_html()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<(script|link|iframe|object|embed)", page)
    assert "default-src 'none'" in page


def test_the_page_suits_phones_and_readers_of_any_kind():
    page = Page(example().to_html())
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(picture["alt"] for picture in page.all("img"))
    assert {heading["scope"] for heading in page.all("th")} == {"row", "col"}
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= targets
    assert "prefers-color-scheme: dark" in example().to_html()


def test_a_file_name_that_is_no_text_is_written():
    page = example(data={"quarantined": [{"file": b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), "reason": "x"}]})
    assert "caf?.jpg" in page.to_html()


def test_many_quarantined_files_are_cut_short_and_counted():
    files = [{"file": f"{i}.jpg", "reason": "empty"} for i in range(1234)]
    words = Page(example(data={"quarantined": files}).to_html()).words
    assert "199.jpg" in words
    assert "200.jpg" not in words
    assert "1,034 more" in words


@pytest.mark.parametrize(
    ("value", "percent", "written"),
    [
        (None, False, "–"),
        (True, False, "yes"),
        (0.12345, False, "0.123"),
        (0.12345, True, "12.3\xa0%"),
        (12345.678, False, "12,346"),
        (7, False, "7"),
        (10**20, False, "1e+20"),
        (-0.5, False, "-0.5"),
    ],
)
def test_numbers_are_written_for_people(value, percent, written):
    assert report_html.number(value, percent) == written


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("accuracy", True),
        ("sign/macro_f1", True),
        ("map50", True),
        ("mean_iou", True),
        ("entity_recall", True),
        ("log_loss", False),
        ("mean_absolute_error", False),
        ("r_squared", False),
        ("heat_map_size", False),
    ],
)
def test_shares_are_told_from_other_numbers(name, rate):
    assert report_html.is_rate(name) == rate


def test_reading_a_report_needs_no_tensorflow():
    heavy = "{'tensorflow', 'matplotlib', 'numpy'}"
    code = f"import sys, tftransfer.report, tftransfer.report_html; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
