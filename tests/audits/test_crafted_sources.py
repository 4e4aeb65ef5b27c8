"""Tables, lists of classes and TFRecord files with crafted faults: named by line or record, or refused in one line."""

import contextlib
import gzip
import io
import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import audits, cli
from tftransfer.data import inspect, records

COUNT, SPARE = 48, 30  # pictures of the clean rows, and of the crafted ones
CLASSES = ("daisy", "rose")


def _picture(seed, side=16):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def _file(number):
    return f"{number:02}.png"


def _rows(count=COUNT, label=lambda n: CLASSES[n % 2], template="{},{}"):
    return [template.format(_file(number), label(number)) for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and one beside their folder."""
    root = tmp_path_factory.mktemp("crafted") / "tables"
    (root / "a folder").mkdir(parents=True)
    for number in range(COUNT + SPARE):
        (root / _file(number)).write_bytes(tf.io.encode_png(_picture(number)).numpy())
    (root.parent / "outside.png").write_bytes(tf.io.encode_png(_picture(999)).numpy())
    return root


@pytest.fixture
def table(folder):
    """Return a function that writes a table, and `classes.txt` if it is given; both are gone afterwards."""
    written = []

    def write(contents, name="table.csv", classes=None):
        written.extend([folder / name, folder / "classes.txt"])
        (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        if classes is not None:
            (folder / "classes.txt").write_text(classes)
        return folder / name

    yield write
    for path in written:
        path.unlink(missing_ok=True)


def _audit(data, out, *options):
    """Audit as a user does; return the exit code and what is written, or the error."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["audit", "--data", str(data), "--out", str(out), "--json", *options])
    return code, error.getvalue() if code == 2 else json.loads((out / "audit.json").read_text())


def _findings(audit):
    return {(one.where, one.problem, one.counts) for found in audit.findings.values() for one in found}


def _audited(data, **options):
    return _findings(audits.of_inspection(inspect(data, image_size=(32, 32), **options)))


def _assert_found(found, expected):
    """Whether each is found and nothing else; expected are where, the problem's beginning and whether it counts."""
    left = set(found)
    for where, problem, counts in expected:
        own = {one for one in left if one[0].endswith(where) and re.match(problem, one[1]) and one[2] == counts}
        assert len(own) == 1, (where, problem, found)
        left -= own
    assert left == set()


HEADER = "image,label\n"
REFUSED = {
    "empty": (b"", "line 1: column 'image' is missing"),
    "no label": ("image,class\n00.png,a", "line 1: column 'label' is missing.*'image', 'class'"),
    "no header": ("00.png,daisy\n01.png,rose", "line 1: column 'image' is missing"),
    "another separator": ("image;label\n00.png;daisy", "line 1: column 'image' is missing.*'image;label'"),
    "a column twice": ("image,label,label\n", "line 1: column 'label' occurs twice"),
    "header only": (HEADER, "no rows below its header"),
    "no quote at the end of the header": ('"image,label\n00.png,a\n', "line 1: column 'image' is missing"),
    "UTF-16": ("image,label\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "Latin-1": (b"image,label\n00.png,a\n01.png,\xe4\n", "line 3: byte 0xe4 is not UTF-8"),
    "a workbook": (b"PK\3\4\x14\0\0\0", "line 1: column 'image' is missing"),
    "nothing is there": (f"{HEADER}x.png,a\ny.png,b\n", "no row that can be used.*line 2: file x.png does not exist"),
    "no label at all": (f"{HEADER}00.png,\n01.png, \n", "no example with a label.*line 3: the label is empty"),
    "splits of other names": ("image,label,split\n00.png,a,fold1\n", "no row is in a split.*'fold1'"),
}
"""Tables of which nothing can be told but why."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(table, tmp_path, case):
    contents, message = REFUSED[case]
    code, error = _audit(table(contents), tmp_path / "out")
    assert code == 2
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


NAMED = ("train.tfrecord", "train.tfrecord-00000-of-00002", "SHARD.TFREC", "some.tfrecords.gz")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_a_bare_tfrecord_file_is_refused_and_what_to_do_is_said(tmp_path, name, in_a_folder):
    (tmp_path / "records").mkdir()
    file = tmp_path / "records" / name
    file.write_bytes(records.framed(b"something"))
    code, error = _audit(file.parent if in_a_folder else file, tmp_path / "out")
    assert code == 2
    assert re.search(f"{name} is a TFRecord file.*tfds:NAME.*class folders.*tftransfer.data.load", error)
    assert len(error.splitlines()) == 1


CLEAN = {
    "plain": HEADER + "\n".join(_rows()),
    "byte order mark": "\ufeff" + HEADER + "\n".join(_rows()),
    "Windows": (HEADER + "\n".join(_rows()) + "\n").replace("\n", "\r\n"),
    "old Macintosh": (HEADER + "\n".join(_rows()) + "\n").replace("\n", "\r"),
    "quotes, spaces and blank lines": HEADER + "\n\n".join(_rows(template='"{}", {} ')),
}


@pytest.mark.parametrize(
    "case", [name if name == "plain" else pytest.param(name, marks=pytest.mark.slow) for name in CLEAN]
)
def test_clean_tables_are_not_accused(table, case):
    path = table(CLEAN[case])
    assert _audited(path) == set()


CELLS = [  # a row, and what is said of its line
    (f"{_file(48)},daisy,extra", "3 cells where the header has 2 columns"),
    (_file(49), "1 cells where the header has 2 columns"),
    (f'{_file(50)},"ro"se', "',' expected after '\"'"),
    (",rose", "the `image` cell is empty"),
    ("gone.png,rose", "file gone.png does not exist"),
    ("/nowhere/52.png,rose", "file /nowhere/52.png does not exist"),
    ("../elsewhere/52.png,rose", "file ../elsewhere/52.png does not exist"),
    ("48.PNG,rose", "file 48.PNG does not exist"),
    ("tables\\48.png,rose", r"file tables\\48.png does not exist"),
    ("https://example.org/48.png,rose", "file https://example.org/48.png does not exist"),
    ("a folder,rose", "a folder is no file"),
    ("48\0.png,rose", r"file '48\\x00.png' does not exist"),
    ('"48\n.png",rose', r"file '48\\n.png' does not exist"),
    (f"{'x' * 300},rose", "file x+ does not exist"),
    (f"{_file(51)},", "the label is empty"),
    (f"{_file(52)},  ", "the label is empty"),
    (f"{_file(53)},{'x' * 140_000}", "field larger than field limit"),
    ("../outside.png,rose", None),  # a picture may lie anywhere
    (f'{_file(54)},"daisy', "unexpected end of data"),  # the last, as it takes what follows
]


def test_every_faulty_line_of_a_table_is_named(table, tmp_path):
    rows, line, expected = _rows(), COUNT + 2, []
    for row, problem in CELLS:
        rows.append(row)
        if problem:
            expected.append((f"table.csv, line {line}", problem, True))
        line += 1 + row.count("\n")
    path = table(HEADER + "\n".join(rows))
    code, found = _audit(path, tmp_path / "out", "--strict")
    assert code == 1
    assert (found["found"], found["usable"]) == (COUNT + 1, COUNT + 1)
    _assert_found({(one["where"], one["problem"], one["counts"]) for one in found["findings"]}, expected)


def test_labels_that_are_slips_are_named(table):
    labels = ["Daisy", "da isy", "diasy", "ro\0se", "ro\nse", "nan"]
    rows = [*_rows(), *(f'{_file(COUNT + n)},"{label}"' for n, label in enumerate(labels))]
    expected = [
        ("table.csv", "a run would refuse these data: .* 'Daisy' with 1, 'da isy' with 1", True),
        ("class 'Daisy'", "is 'daisy' but for case, spaces or dashes", True),
        ("class 'da isy'", r"\(1 examples\) is nearly 'daisy' \(24\)", True),
        ("class 'diasy'", r"\(1 examples\) is nearly 'daisy' \(24\)", True),
        (r"'ro\x00se'", "holds line breaks or letters that nobody sees", True),
        (r"'ro\nse'", "holds line breaks or letters that nobody sees", True),
        ("class 'nan'", "may stand for a label that is missing", False),
    ]
    found = {one for one in _audited(table(HEADER + "\n".join(rows))) if "training examples only" not in one[1]}
    _assert_found(found, expected)


def test_classes_and_splits_that_do_not_fit_are_named(table):
    few = table(HEADER + "\n".join([*_rows(), f"{_file(48)},tulip", f"{_file(49)},tulip"]))
    expected = [
        ("table.csv", "a run would refuse these data: .* needs at least 3 .* 'tulip' with 2", True),
        ("class 'tulip'", "has 2 training examples only", False),
    ]
    _assert_found(_audited(few), expected)
    given = ("train", "train", "Val", " TEST ")
    rows = [f"{row},{given[n // 2 % 4]}" for n, row in enumerate(_rows())]
    crafted = [f"{_file(48)},rose,tarin", f"{_file(49)},rose,", f"{_file(50)},tulip,test", f"{_file(2)},daisy,train"]
    found = _audited(table("image,label,split\n" + "\n".join([*rows, *crafted])))
    expected = [
        ("table.csv", "1 rows of split 'tarin' were left out: line 50", False),
        ("table.csv, line 51", "`split` is empty", True),
        ("table.csv", "a run would refuse these data: test of .* holds classes that train lacks: 'tulip'", True),
        ("class 'tulip'", "has no example in validation", False),
        ("table.csv", r"1 rows name a picture again: line 53 \(as line 4\)", False),
        ("02.png", "the same content, as 02.png", False),
    ]
    _assert_found(found, expected)


def test_rows_that_occur_twice_are_named_and_count_with_another_label(table):
    rows = [*_rows(), f"{_file(0)},daisy", f"{_file(1)},daisy"]
    found = {one for one in _audited(table(HEADER + "\n".join(rows))) if one[0] != "00.png"}
    expected = [
        ("table.csv", r"2 rows name a picture again: line 50 \(as line 2\), line 51 \(as line 3\)", False),
        ("01.png", "the same content, as 01.png, .*with labels 'daisy', 'rose'", True),
    ]
    _assert_found(found, expected)


def test_a_list_of_classes_that_does_not_fit_is_named(table, tmp_path):
    text = HEADER + "\n".join(_rows())
    for classes, problem in (
        ("daisy\n", "lacks classes that occur: 'rose'"),
        ("daisy\nrose\ntulip", "names classes without a picture: 'tulip'"),
    ):
        expected = [("table.csv", f"a run would refuse these data: classes.txt of .* {problem}", True)]
        _assert_found(_audited(table(text, classes=classes)), expected)
    code, error = _audit(table(text, classes="daisy\nrose\nrose"), tmp_path / "out")
    assert code == 2
    assert "classes.txt names classes twice: 'rose'" in error


def test_numbers_that_are_none_are_named(table):
    bad = ["n/a", "nan", "inf", '"1,5"', "", "1|2", "1e999", "3 cm"]
    rows = [*_rows(label=lambda n: n / 7), *(f"{_file(COUNT + n)},{cell}" for n, cell in enumerate(bad))]
    problem = "a label must hold 1 finite numbers"
    expected = [(f"table.csv, line {COUNT + 2 + n}", f"{problem}.*{re.escape(repr(cell.strip(chr(34))))}", True)
                for n, cell in enumerate(bad)]  # fmt: skip
    expected.append(("table.csv", f"1 of {len(rows)} rows hold several labels or numbers", False))
    _assert_found(_audited(table(HEADER + "\n".join(rows)), task_kind="regression"), expected)


def test_a_separator_of_labels_that_slipped_in_is_named(table):
    rows = [*_rows(), f"{_file(48)},daisy|rose"]
    _assert_found(
        _audited(table(HEADER + "\n".join(rows))),
        [("table.csv", r"1 of 49 rows hold several labels or numbers, separated by `\|`: line 50", False)],
    )
    several = _rows(label=lambda n: ("daisy", "daisy|rose", "")[n % 3])
    assert _audited(table(HEADER + "\n".join(several))) == set()


LINES = [
    ('{"image": "48.png"}', "column 'label' is missing"),
    ('{"label": "rose"}', "column 'image' is missing"),
    ('{"image"', "not JSON"),
    ('["48.png", "rose"]', "expected an object"),
    ('{"image": "48.png", "label": {}}', "a label must be a text, a number or a list"),
    ('{"image": "48.png", "label": [["rose"]]}', "a label must be a text, a number or a list"),
    ('{"image": "48.png", "label": ["a|b"]}', r"a label in a list must not hold `\|`"),
    ('{"image": "48.png", "label": null}', "the label is empty"),
    ('{"image": 48, "label": "rose"}', "file 48 does not exist"),
    ('{"image": ["48.png"], "label": "rose"}', r"file \['48.png'\] does not exist"),
    ("[" * 100_000, "not JSON"),
]


def test_every_faulty_line_of_json_is_named(table):
    rows = [json.dumps({"image": _file(n), "label": CLASSES[n % 2]}) for n in range(COUNT)]
    text = "\n".join([*rows, *(row for row, _ in LINES)])
    expected = [(f"table.jsonl, line {COUNT + 1 + n}", problem, True) for n, (_, problem) in enumerate(LINES)]
    _assert_found(_audited(table(text, "table.jsonl")), expected)


def test_a_label_that_has_changed_is_named_next_time(table, tmp_path):
    assert _audit(table(HEADER + "\n".join(_rows())), tmp_path / "out", "--strict")[0] == 0
    other = ["07.png,daisy" if n == 7 else row for n, row in enumerate(_rows())]
    for _ in range(2):  # and again, as nobody said that it is right
        code, found = _audit(table(HEADER + "\n".join(other)), tmp_path / "out", "--strict")
        (one,) = found["findings"]
        assert (code, one["check"], one["where"]) == (1, "changes", "07.png")
        assert one["problem"] == "has the label 'daisy', and 'rose' in the earlier audit"
    assert _audit(table(HEADER + "\n".join(other)), tmp_path / "out", "--accept")[0] == 0
    assert _audit(table(HEADER + "\n".join(other)), tmp_path / "out", "--strict")[0] == 0


# --- TFRecord -----------------------------------------------------------------------------------------------

RECORDS = 24


@pytest.fixture(scope="module")
def _prepared(tmp_path_factory):
    """A data set that TensorFlow Datasets has prepared, and a function that opens a copy of it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=CLASSES)}

    class Crafted(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict, supervised_keys=("image", "label"))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(RECORDS):
                yield number, {"image": _picture(number), "label": number % 2}

    root = tmp_path_factory.mktemp("tfds") / "clean"
    Crafted(data_dir=root).download_and_prepare()
    return root, lambda path: Crafted(data_dir=path)


@pytest.fixture
def damaged(_prepared, tmp_path, monkeypatch):
    """Return a function that changes a copy of the file, given as frames, or else the metadata's lengths."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root, opened = _prepared
    copy = shutil.copytree(root, tmp_path / "copy")
    monkeypatch.setattr(tfds, "builder", lambda name: opened(copy))
    (file,) = copy.rglob("*.tfrecord*")

    def change(fault):
        if isinstance(fault, tuple):
            path = file.parent / "dataset_info.json"
            content = json.loads(path.read_text())
            content["splits"][0]["shardLengths"] = list(map(str, fault))
            path.write_text(json.dumps(content))
        else:
            whole = fault([records.framed(record.data) for record in records.records(file)])
            file.write_bytes(b"".join(whole))
        return file

    return change


def _with(number, change):
    return lambda frames: [*frames[:number], change(frames[number]), *frames[number + 1 :]]


def _flip(place):
    return _with(
        5, lambda frame: frame[: place % len(frame)] + bytes([frame[place] ^ 4]) + frame[place % len(frame) + 1 :]
    )


def _example(change):
    def changed(frame):
        example = tf.train.Example.FromString(frame[12:-4])
        change(example.features.feature)
        return records.framed(example.SerializeToString())

    return _with(5, changed)


FILE = "crafted-train.tfrecord-00000-of-00001"
LOST = {5: "its length is damaged", **dict.fromkeys(range(6, RECORDS), "cannot be found: the length of a record")}
BY_RECORD = {
    "data": (_flip(40), {5: "its data are damaged"}),
    "checksum of the data": (_flip(-1), {5: "its data are damaged"}),
    "length": (_flip(0), LOST),
    "checksum of the length": (_flip(9), LOST),
    "cut at the end": (
        _with(RECORDS - 1, lambda frame: frame[:-100]),
        {RECORDS - 1: "the file ends within this record"},
    ),
    "cut in a length": (_with(RECORDS - 1, lambda frame: frame[:7]), {RECORDS - 1: "the file ends within this record"}),
    "a record is missing": (lambda frames: frames[:-1], {RECORDS - 1: "missing: the file ends before it"}),
    "no example": (
        _with(5, lambda _: records.framed(b"no example")),
        {5: "no example of this data set: Could not parse"},
    ),
    "an empty record": (_with(5, lambda _: records.framed(b"")), {5: "no example of this data set: Feature: image"}),
    "no label": (_example(lambda own: own.pop("label")), {5: "no example of this data set: Feature: label"}),
    "a label that is text": (
        _example(lambda own: own["label"].bytes_list.value.append(b"rose")),
        {5: "no example of this data set: Key: label"},
    ),
    "metadata of more records": ((RECORDS + 2,), dict.fromkeys((RECORDS, RECORDS + 1), "missing")),
}
SLOW = set(BY_RECORD) - {"data", "cut at the end", "no example"}


@pytest.mark.filterwarnings("ignore")  # TFDS' own
@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BY_RECORD])
def test_every_faulty_record_is_named(damaged, case):
    fault, expected = BY_RECORD[case]
    damaged(fault)
    inspection = inspect("tfds:crafted", image_size=(32, 32))
    aside = {one.name: one.reason for one in inspection.seen if one.reason}
    assert set(aside) == {f"{FILE}, record {number}" for number in expected}
    assert all(aside[f"{FILE}, record {number}"].startswith(problem) for number, problem in expected.items())
    assert len(inspection.places) + len(aside) == len(inspection.seen) == max(RECORDS, *(n + 1 for n in expected))
    found = {(where, problem) for where, problem, _ in _findings(audits.of_inspection(inspection))}
    assert set(aside.items()) <= found


NOT_READ = {
    "an empty file": (lambda frames: [], "record 0: missing: the file ends before it"),
    "a page": (lambda frames: [b"<!DOCTYPE html>" * 9], "record 0: its length is damaged"),
    "compressed": (lambda frames: [gzip.compress(b"".join(frames))], "record 0: its length is damaged"),
    "zeros": (lambda frames: [bytes(5000)], "record 0: its length is damaged"),
    "metadata of more files": ((12, 12), "-of-00002, record 0: the file cannot be read: No such file"),
    "a label beyond the classes": (
        _example(lambda own: own["label"].int64_list.value.__setitem__(0, 7)),
        r"label 7 of train\[5\] is none of the 2 classes",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOT_READ)
def test_records_that_cannot_be_read_at_all_are_refused_in_one_line(damaged, tmp_path, case):
    fault, message = NOT_READ[case]
    damaged(fault)
    code, error = _audit("tfds:crafted", tmp_path / "out")
    assert code == 2
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
def test_more_records_and_files_than_the_metadata_say_are_named(damaged):
    file = damaged(lambda frames: [*frames, records.framed(b"no example")])
    shutil.copy(file, file.with_name("crafted-train.tfrecord-00001-of-00002"))
    expected = [
        (f"{FILE}, record {RECORDS}", "no example of this data set", True),
        ("crafted", f"{FILE} holds more than the {RECORDS} records that its metadata say", False),
        ("crafted", "crafted-train.tfrecord-00001-of-00002 was not read", False),
    ]
    found = _audited("tfds:crafted")
    _assert_found({one for one in found if "training examples only" not in one[1]}, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_record_whose_picture_is_none_is_named_and_clean_ones_are_not(damaged):
    damaged(_example(lambda own: own["image"].bytes_list.value.__setitem__(0, b"<html>")))
    found = {one for one in _audited("tfds:crafted") if "training examples only" not in one[1]}
    _assert_found(found, [("train[5]", "not a picture: begins with '<html>'", True)])


def test_there_are_many():
    assert len(REFUSED) + len(CELLS) + len(LINES) + len(BY_RECORD) + len(NOT_READ) >= 20
