"""Tables: what is read, and one clear line for what is wrong."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tftransfer import tasks
from tftransfer.data import load, sources
from tftransfer.errors import InputError

SIZE = (4, 4)


@pytest.fixture
def make_table(tmp_path):
    """Return a function that writes a table beside `0.png` to `11.png`."""
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def make(text, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def rows(labels, template="{}.png,{}"):
    return "\n".join(template.format(number, label) for number, label in enumerate(labels))


def refused(path, message, **options):
    with pytest.raises(InputError, match=message) as caught:
        load(path, image_size=SIZE, **options)
    assert "\n" not in str(caught.value)


ALTERNATING = ["cat", "dog"] * 6


def test_csv_with_a_byte_order_mark_spaces_and_blank_lines(make_table):
    data, task = load(make_table("\ufeffimage, label\n\n" + rows(ALTERNATING, "{}.png, {} ") + "\n"), image_size=SIZE)
    assert task == tasks.SingleLabel(("cat", "dog"))
    assert data.found == 12


def test_tsv_with_splits(make_table):
    splits = ["train"] * 6 + ["dev"] * 2 + ["TEST"] * 2 + ["trainval"] * 2
    lines = [f"{n}.png\t{ALTERNATING[n]}\t{split}\tx" for n, split in enumerate(splits)]
    data, _ = load(make_table("image\tlabel\tsplit\tgroup\n" + "\n".join(lines), "t.tsv"), image_size=SIZE)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 2)
    assert data.found == 10
    assert data.splits["notes"] == ["2 rows of split 'trainval' were left out: line 12, line 13"]


def test_several_labels_in_csv_and_jsonl(make_table):
    labels = ["red|round", "round", "red", ""] * 3
    data, task = load(make_table("image,label\n" + rows(labels)), image_size=SIZE)
    assert task == tasks.MultiLabel(("red", "round"))
    lines = [
        json.dumps({"image": f"{n}.png", "label": text.split("|") if text else []}) for n, text in enumerate(labels)
    ]
    same, _ = load(make_table("\n".join(lines), "t.jsonl"), image_size=SIZE)
    np.testing.assert_array_equal(same.train.targets, data.train.targets)
    assert same.train.names == data.train.names
    _, single = load(make_table("image,label\n" + rows(["a|b", "c"] * 6)), image_size=SIZE, task_kind="single_label")
    assert single.labels == ("a|b", "c")


def test_numbers(make_table):
    data, task = load(make_table("image,label\n" + rows([f"{n}.5|-1" for n in range(12)])), image_size=SIZE,
                      task_kind="regression")  # fmt: skip
    assert task == tasks.Regression(("value_1", "value_2"))
    assert data.train.targets.dtype == np.float32
    refused(
        make_table("image,label\n" + rows(["1.5", "two"] * 6)),
        "table.csv, line 3: .*finite",
        task_kind="regression",
    )


def test_rows_that_occur_twice_are_used(make_table):
    text = "image,label\n" + rows(ALTERNATING) + "\n" + rows(ALTERNATING)
    assert load(make_table(text), image_size=SIZE)[0].found == 24


BAD = {
    "image,class\n0.png,a": "line 1: column 'label' is missing.*columns 'image', 'class'",
    "": "column 'image' is missing.*columns none",
    "image,label,label\n": "'label' occurs twice",
    "image,label\n": "no rows below its header",
    "image,label\n0.png,a\n1.png\n": "line 3: 1 cells where the header has 2",
    "image,label\n0.png,a\n1.png,b,c\n": "line 3: 3 cells",
    "image,label\n0.png,a\n1.png,\n": "line 3: the label is empty",
    "image,label\n0.png,a\ngone.png,b\n": "line 3: file gone.png does not exist",
    f"image,label\n0.png,a\n{'x' * 300},b\n": "line 3: file x+ does not exist",
    "image,label\n0.png,a\n,b\n": "line 3: the `image` cell is empty",
    "image,label,split\n0.png,a,train\n1.png,b,\n": "line 3: `split` is empty",
    "image,label,split\n0.png,a,fold1\n": "no row is in a split.*'fold1'",
    'image,label\n0.png,"a\n': "line 2: unexpected end of data",
    b"image,label\n0.png,a\n1.png,\xe4\n": "line 3: byte 0xe4 is not UTF-8",
    "image,label\n0.png,a\n1.png,a\n2.png,a": "one class only",
    "image,label\n0.png,a\n1.png,a\n2.png,a\n3.png,b": "at least 3.*'b' with 1",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_tables(make_table, text):
    refused(make_table(text), BAD[text])


def test_bad_json_lines(make_table):
    refused(make_table('{"image": "0.png", "label": "a"}\n{"image"', "t.jsonl"), "line 2: not JSON")
    refused(make_table('["0.png", "a"]', "t.jsonl"), "line 1: expected an object")
    refused(
        make_table('{"image": "0.png", "label": "a"}\n{"image": "1.png"}', "t.jsonl"),
        "line 2: column 'label'",
    )
    refused(make_table('{"image": "0.png", "label": {"a": 1}}', "t.jsonl"), "line 1: a label must be")
    refused(make_table('{"image": "0.png", "label": ["a|b"]}', "t.jsonl"), r"line 1: .* must not hold `\|`.*'a\|b'")
    refused(make_table('\n{"image": "0.png", "label": ' + "1" * 5000 + "}", "t.jsonl"), "line 2: not JSON: Exceeds")
    deep = "[" * 100_000 + "]" * 100_000
    refused(make_table('{"image": "0.png", "label": ' + deep + "}", "t.jsonl"), "line 1: not JSON: maximum recursion")


def test_numbers_in_json_lines_are_classes_in_their_order(make_table):
    labels = [1, 1.0, 10, 2] * 3
    lines = [json.dumps({"image": f"{number}.png", "label": label}) for number, label in enumerate(labels)]
    assert load(make_table("\n".join(lines), "t.jsonl"), image_size=SIZE)[1].labels == ("1", "2", "10")


def test_a_table_that_cannot_be_read(make_table, monkeypatch):
    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = make_table("image,label\n")
    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    refused(path, "table.csv cannot be read: Permission denied")


def test_other_files_are_no_tables(make_table):
    refused(make_table("x", "photos.zip"), "is no table: expected a file that ends in .csv")


def test_a_file_that_is_no_picture_is_set_aside(make_table, tmp_path):
    (tmp_path / "0.png").write_text("<html>")
    data, _ = load(make_table("image,label\n" + rows(ALTERNATING)), image_size=SIZE)
    assert [item.file for item in data.quarantined] == ["0.png"]


def test_listing_a_table_decodes_nothing(make_table, monkeypatch):
    monkeypatch.setattr("tftransfer.data.listing.decode_picture", None)
    assert len(sources.listed(make_table("image,label\n" + rows(ALTERNATING)), 0).names) == 12


def _all_faults(path):
    faults = []
    listing = sources.listed(path, 0, faults.append)
    return listing, [str(fault).partition(", line ")[2] for fault in faults]


def test_an_audit_is_told_every_fault_by_its_line_and_the_rest_is_read(make_table):
    text = (
        "image,label,split,subject\n0.png,a,train,s1\n1.png,b\ngone.png,a,train,s2\n,b,train,s2\n"
        '2.png,"b\nb",train,s3\n3.png,b,,s3\n4.png,"b"x,train,s3\n\n5.png,b,test,s3\n6.png,"a,train,s4\n7.png,b,train,s4\n'
    )
    listing, faults = _all_faults(make_table(text))
    assert listing.names == ("0.png", "2.png", "5.png")
    assert listing.columns == {"subject": ("s1", "s3", "s3")}
    assert [fault.partition(":")[0] for fault in faults] == ["3", "9", "12", "8", "4", "5"]
    assert [listing.place(number).rpartition(" ")[2] for number in range(3)] == ["2", "6", "11"]
    lines = '{"image": "0.png", "label": "a"}\n{"image"\n[1]\n{"image": "1.png"}\n{"image": "2.png", "label": {}}\n'
    listing, faults = _all_faults(make_table(lines + '{"image": "3.png", "label": "b"}', "t.jsonl"))
    assert listing.names == ("0.png", "3.png")
    assert [fault.partition(":")[0] for fault in faults] == ["2", "3", "4", "5"]


@given(st.lists(st.text(alphabet='a,"\n\r\t.png0é', max_size=12), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_its_lines_hold_a_table_is_read_or_refused(make_table, lines):
    faults = []
    try:
        listing = sources.listed(make_table("image,label\n0.png,a\n" + "\n".join(lines), "odd.csv"), 0, faults.append)
    except InputError as error:
        faults.append(error)
    else:
        assert listing.names[0] == "0.png"
        assert set(listing.names) <= {f"{number}.png" for number in range(12)}
    assert all("odd.csv" in str(fault) for fault in faults)
