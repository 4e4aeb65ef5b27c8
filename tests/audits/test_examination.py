"""Each finding is found where it is, and nowhere in clean data."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tftransfer import audits
from tftransfer.audits import label_names
from tftransfer.audits.groups import stem
from tftransfer.data.examples import Seen
from tftransfer.errors import InputError


def _clean(count=60):
    """Three classes in three splits, with sizes and names as photographs have them."""
    generator = np.random.default_rng(0)
    sides = generator.integers(200, 500, (count, 2)).tolist()
    return [
        Seen(
            f"{'abc'[n % 3]}/{generator.integers(10**9)}_{n}x.jpg",
            ("daisy", "rose", "tulip")[n % 3],
            ("train", "train", "train", "train", "validation", "test")[n // 3 % 6],
            f"{n:064x}",
            size=tuple(sides[n]),
            spread=40.0 + n % 7,
        )
        for n in range(count)
    ]


def _found(seen, kind="single_label", **options):
    audit = audits.examine(audits.Subject("some", kind, tuple(seen), **options))
    return {name: own for name, own in audit.findings.items() if own}


def test_nothing_is_found_in_clean_data():
    assert _found(_clean(120)) == {}


CHANGED = {
    "unusable": ({"reason": "empty file"}, "empty file", True),
    "misnamed": ({"misnamed": True}, "another format", False),
    "blank": ({"spread": 0.0}, "^blank", True),
    "sizes": ({"size": (300, 4000)}, "13.3 times the other", False),
}


@pytest.mark.parametrize("check", CHANGED)
def test_one_picture_is_found(check):
    changed, problem, counts = CHANGED[check]
    seen = _clean(120)
    seen[7] = replace(seen[7], **changed)
    ((finding,),) = (found := _found(seen)).values()
    assert list(found) == [check]
    assert (finding.where, finding.counts, finding.examples) == (seen[7].name, counts, (7,))
    assert re.search(problem, finding.problem)


def test_nearly_blank_ones_and_other_sizes_are_mentioned():
    seen = _clean(120)
    seen[3], seen[4], seen[5] = (
        replace(seen[3], spread=2.0),
        replace(seen[4], size=(8, 9)),
        replace(seen[5], size=(6000, 8000)),
    )
    found = _found(seen)
    assert [one.problem.split(":")[0] for one in found["blank"]] == ["nearly blank"]
    assert [(one.where, "smaller" in one.problem) for one in found["sizes"]] == [
        (seen[4].name, True), (seen[5].name, False)]  # fmt: skip
    assert not any(one.counts for own in found.values() for one in own)


def test_all_sizes_alike_or_all_different_are_usual():
    alike = [replace(one, size=(8, 8)) for one in _clean()]
    sides = np.exp(np.random.default_rng(0).normal(5, 1, 60)).astype(int) + 1
    different = [replace(one, size=(int(side), int(side))) for one, side in zip(_clean(), sides, strict=True)]
    assert "sizes" not in _found(alike)
    assert "sizes" not in _found(different)
    assert "sizes" not in _found([replace(one, size=None) for one in _clean()])


def test_faults_of_the_source_count_and_notes_do_not():
    found = _found(_clean(120), faults=("t.csv, line 3: 1 cells",), refused="too small", notes=("2 left out",))
    assert [(one.where, one.problem, one.counts) for one in found.pop("source")] == [
        ("t.csv, line 3", "1 cells", True),
        ("some", "a run would refuse these data: too small", True),
        ("some", "2 left out", False),
    ]
    assert found == {}


def test_rare_and_missing_classes_are_mentioned():
    seen = _clean(600)
    few = [replace(one, name=f"f{n}", label="iris", digest=f"f{n}", split="train") for n, one in enumerate(seen[:9])]
    found = _found([*seen, *few])
    assert [one.problem for one in found["balance"]] == [
        "has 9 training examples only",
        "has no example in validation: it is not measured there",
        "has no example in test: it is not measured there",
    ]
    lopsided = [one for n, one in enumerate(seen) if one.label != "tulip" or n % 90 == 2]
    many = [replace(one, name=f"{k}{one.name}", digest=f"{k}{one.digest}") for k in range(10) for one in lopsided]
    more = [*many, *(replace(one, name=f"r{one.name}", digest=f"r{n}") for n, one in enumerate(seen) if n % 3 == 0)]
    assert {one.where for one in _found(more).get("balance", ())} == {"class 'tulip'"}


@pytest.mark.parametrize(
    ("name", "usual", "count", "counts"),
    [
        ("Rose", "rose", 20, True),
        ("sun_flower", "Sun  flower", 20, True),
        ("cafe\u0301", "café", 20, True),
        ("tluip", "tulip", 1, True),
        ("tulipp", "tulip", 2, True),
        ("tulips", "tulip", 20, False),
        ("house", "mouse", 20, None),
        ("cat", "bat", 1, None),
        ("class 1", "class 2", 1, None),
        ("daisies", "daisy", 1, None),
    ],
)
def test_names_that_may_mean_the_same(name, usual, count, counts):
    def some(label, number):
        return [Seen(f"{label}{n}", label, "train", f"{label}{n}") for n in range(number)]

    found = _found([*some("other", 50), *some(usual, 50), *some(name, count)])
    alike = found.get("label_names", ())
    assert [(one.where, one.counts) for one in alike] == ([] if counts is None else [(f"class {name!r}", counts)])


def test_a_label_with_a_line_break_counts():
    seen = [replace(one, label="da\nisy") if n == 5 else one for n, one in enumerate(_clean(120))]
    assert "quote may be missing" in _found(seen)["label_names"][0].problem


def test_several_labels_and_numbers():
    several = [replace(one, label=f"{one.label}|Round" if n % 2 else "round") for n, one in enumerate(_clean(120))]
    assert [one.where for one in _found(several, "multi_label")["label_names"]] == ["class 'round'"]
    numbers = [replace(one, label=str(n / 7)) for n, one in enumerate(_clean(120))]
    assert _found(numbers, "regression") == {}


names = st.text(alphabet="abc1 é", min_size=1, max_size=7)


def _is_one_step(one, other):
    """Whether a step turns one into the other, by trying all of them; a step on a digit is none."""
    letters = "abc é"
    steps = {one[:i] + one[i + 1 :] for i in range(len(one)) if not one[i].isdigit()}
    steps |= {one[:i] + letter + one[i:] for i in range(len(one) + 1) for letter in letters}
    steps |= {one[:i] + letter + one[i + 1 :] for i in range(len(one)) for letter in letters if not one[i].isdigit()}
    steps |= {
        one[:i] + one[i + 1] + one[i] + one[i + 2 :]
        for i in range(len(one) - 1)
        if not (one[i] + one[i + 1]).count("1")
    }
    return other in steps


@given(st.lists(names, unique=True, max_size=12))
def test_near_names_are_those_one_step_apart(given_names):
    found = {frozenset(pair) for pair in label_names.near(given_names)}
    long = [name for name in given_names if len(name) >= 5]
    assert found == {
        frozenset(pair) for pair in itertools.combinations(long, 2) if _is_one_step(*pair) and _is_one_step(*pair[::-1])
    }


@given(st.lists(st.text(max_size=6), unique=True, max_size=6))
def test_whatever_the_classes_are_called_they_are_examined(labels):
    seen = [Seen(f"{n}.png", label, "train", str(n)) for n, label in enumerate(labels)]
    for kind in ("single_label", "multi_label"):
        _found(seen, kind)


def test_the_same_content_counts_in_two_splits_or_with_two_labels():
    seen = _clean(120)
    for place, original in ((3, 0), (12, 1), (4, 0)):
        seen[place] = replace(seen[place], digest=seen[original].digest)
    (three, two) = _found(seen)["exact_copies"]
    assert three.where == seen[0].name
    assert three.counts
    assert "with labels 'daisy', 'rose'" in three.problem
    assert (two.examples, two.counts) == ((1, 12), True)
    assert "in train and validation" in two.problem
    within = _clean(120)
    within[3] = replace(within[3], digest=within[0].digest)
    assert [one.counts for one in _found(within)["exact_copies"]] == [False]


def _with_groups(groups, column="subject", count=120):
    return [replace(one, cells=((column, groups(n)),)) for n, one in enumerate(_clean(count))]


def test_a_column_that_groups_counts_where_it_crosses_splits():
    apart = _with_groups(lambda n: f"s{n // 3 % 6}-{n // 18}")
    assert _found(apart) == {}
    (finding,) = _found(_with_groups(lambda n: f"s{n // 9}", "patient_id"))["groups"]
    assert (finding.where, finding.counts) == ("column 'patient_id'", True)
    (one,) = _found([replace(one, cells=(("Subject", "x"),)) if n in (0, 15) else one
                     for n, one in enumerate(apart)])["groups"]  # fmt: skip
    assert "1 of" in one.problem
    assert "'x'" in one.problem


def test_other_columns_are_mentioned_only_where_they_were_meant_to_be_kept_apart():
    assert _found(_with_groups(lambda n: "red" if n % 2 else "blue", "colour")) == {}
    assert _found(_with_groups(lambda n: str(n), "number")) == {}

    def mostly_apart(n):
        return "g0-0" if n == 15 else f"g{n // 3 % 6}-{n // 18}"

    (finding,) = _found(_with_groups(mostly_apart, "farm"))["groups"]
    assert not finding.counts


@pytest.mark.parametrize(
    ("template", "mentioned"),
    [
        ("{label}/patient{group}_{n:03}.png", True),
        ("{label}/IMG_{n:04}.png", False),
        ("{label}/{label}_{n}.png", False),
        ("{label}/{n}.png", False),
        ("{label}/{n}00{n}_a{n}b.png", False),
    ],
)
def test_names_of_files_that_group_are_mentioned(template, mentioned):
    seen = [replace(one, name=template.format(label=one.label, group=n // 6, n=n)) for n, one in enumerate(_clean(120))]
    found = _found(seen).get("groups", ())
    assert [one.counts for one in found] == [False] * mentioned


@given(st.text(max_size=30))
def test_a_stem_is_the_beginning_of_a_name(name):
    found = stem(f"a/{name}.png".replace("\0", ""))
    assert found is None or found in name


def test_changes_since_an_earlier_audit():
    seen = _clean(120)
    digests = {one.name: one.digest for one in seen[:119]} | {"gone.png": "0" * 64, seen[4].name: "f" * 64}
    labels = {one.name: "iris" if n in (4, 6) else one.label for n, one in enumerate(seen[:100])}
    found = _found(seen, known=audits.Known(digests, labels))
    assert {(one.where, one.counts) for one in found["changes"]} == {
        ("gone.png", True), (seen[4].name, True), (seen[6].name, True), (seen[119].name, False)}  # fmt: skip
    problems = {one.where: one.problem for one in found.pop("changes")}
    assert problems[seen[4].name] == "has changed since the earlier audit"
    assert problems[seen[6].name] == "has the label 'daisy', and 'iris' in the earlier audit"
    assert found == {}
    assert _found(seen, known=audits.Known({one.name: one.digest for one in seen})) == {}


def test_an_example_that_is_listed_twice_has_both_labels():
    seen = _clean(12)
    twice = [*seen, replace(seen[0], label="rose")]
    known = audits.contents.contents(audits.Subject("some", "single_label", tuple(twice)))
    assert known.labels[seen[0].name] == "daisy, rose"
    assert not known.changed_since(known)
    for label in ("daisy", "tulip"):
        other = audits.Subject("some", "single_label", (*seen, replace(seen[0], label=label)), known=known)
        assert [one.where for one in audits.contents.changes(other)] == [seen[0].name]
        assert audits.contents.contents(other).changed_since(known)


def test_contents_of_audits_before_labels_were_kept_can_be_read(tmp_path):
    digests = {one.name: one.digest for one in _clean(12)}
    file = tmp_path / "contents.json"
    file.write_text(json.dumps({"data": "some", "examples": digests}))
    assert audits.contents.read(file) == audits.Known(digests, {}, "some")
    known = audits.Known(digests, dict.fromkeys(digests, "rose"), "some")
    file.write_text(json.dumps(audits.contents.written(known)))
    assert audits.contents.read(file) == known
    for labels in ([], {"a.png": 1}):
        file.write_text(json.dumps({"data": "some", "examples": digests, "labels": labels}))
        with pytest.raises(InputError, match=r"is no contents\.json"):
            audits.contents.read(file)
