"""`tftransfer audit` as a user calls it: what it finds, writes, moves and refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import audits, cli
from tftransfer.data import inspect

CLASSES = ("daisy", "rose")


def _picture(seed, height=16, width=18):
    generator = np.random.default_rng(seed)
    layers = [
        tf.image.resize(generator.integers(0, 256, (side, side, 3)).astype(np.float32), (height, width), "bicubic")
        for side in (3, 8, 16)
    ]
    return tf.cast(tf.clip_by_value(sum(layers) / 3, 0, 255), tf.uint8)


def _write(root, height, width):
    for number in range(48):
        path = root / ("train", "train", "val", "test")[number // 2 % 4] / CLASSES[number % 2] / f"p{number}q.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(_picture(number, height + number % 7, width)).numpy())
    return root


@pytest.fixture(scope="module")
def _photos(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("audited") / "photos", 16, 18)


@pytest.fixture
def photos(_photos, tmp_path):
    """A clean folder of 48 pictures in two classes and three splits, too small to look for near copies."""
    return shutil.copytree(_photos, tmp_path / "photos")


@pytest.fixture
def large_photos(tmp_path):
    """Such a folder of pictures large enough for that."""
    return _write(tmp_path / "photos", 60, 70)


@pytest.fixture
def audit(tmp_path, capsys):
    """Return a function that audits data and gives the exit code and what is printed as JSON."""

    def run(data, *options, out=tmp_path / "out"):
        code = cli.main(["audit", "--data", str(data), "--out", str(out), "--json", *map(str, options)])
        printed = capsys.readouterr()
        assert len(printed.err.strip().splitlines()) == (1 if code == 2 else 0)
        return code, (printed.err if code == 2 else json.loads(printed.out))

    return run


def _checks(found):
    return {(one["check"], one["counts"]) for one in found["findings"]}


def test_clean_data_pass_and_everything_is_written(large_photos, audit, tmp_path):
    code, found = audit(large_photos, "--strict")
    assert (code, found["findings"], found["found"]) == (0, [], 48)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.html", "audit.json", "contents.json"}
    assert len(json.loads((tmp_path / "out" / "contents.json").read_text())["examples"]) == 48
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "Nothing was found" in page
    assert str(tmp_path) not in page + (tmp_path / "out" / "contents.json").read_text()


def test_what_is_wrong_is_found_and_shown(large_photos, audit, tmp_path):
    photos = large_photos
    train = photos / "train" / "daisy"
    (train / "broken.png").write_bytes(b"<html>")
    (train / "odd.jpg").write_bytes(tf.io.encode_png(_picture(100, 60, 70)).numpy())
    (train / "blank.png").write_bytes(tf.io.encode_png(tf.fill((60, 70, 3), tf.constant(9, tf.uint8))).numpy())
    (train / "again.png").write_bytes((train / "p0q.png").read_bytes())
    shutil.copy(train / "p0q.png", photos / "test" / "daisy" / "leak.png")
    mirrored = tf.io.encode_jpeg(tf.image.flip_left_right(_picture(1, 61, 70)), quality=60).numpy()
    (photos / "test" / "rose" / "copy.jpg").write_bytes(mirrored)
    (train / "wide.png").write_bytes(tf.io.encode_png(_picture(101, 40, 900)).numpy())
    (photos / "train" / "diasy").mkdir()
    (photos / "train" / "diasy" / "p.png").write_bytes(tf.io.encode_png(_picture(102, 60, 70)).numpy())
    code, found = audit(photos, "--strict")
    assert code == 1
    assert _checks(found) == {
        ("unusable", True), ("misnamed", False), ("blank", True), ("exact_copies", True), ("near_copies", True),
        ("sizes", False), ("label_names", True), ("balance", False)}  # fmt: skip
    by_check = {one["check"]: one for one in found["findings"]}
    assert by_check["unusable"]["where"] == "train/daisy/broken.png"
    assert by_check["near_copies"]["examples"] == ["test/rose/copy.jpg", "train/rose/p1q.png"]
    assert "mirrored" in by_check["near_copies"]["problem"]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert page.count("<figure>") == 6
    assert "<script" not in page


def test_changes_are_noticed_until_they_are_accepted(photos, audit, tmp_path):
    audit(photos)
    first, second = sorted((photos / "train" / "rose").iterdir())[:2]
    rotten = bytearray(first.read_bytes())
    rotten[len(rotten) // 2] ^= 1
    first.write_bytes(rotten)
    second.unlink()
    for _ in range(2):  # and again, as nobody said that it is right
        code, found = audit(photos, "--strict")
        assert code == 1
        changed = {one["where"] for one in found["findings"] if one["check"] == "changes"}
        assert changed == {f"train/rose/{first.name}", f"train/rose/{second.name}"}
    first.write_bytes(tf.io.encode_png(_picture(200)).numpy())
    assert audit(photos, "--accept")[0] == 0
    (photos / "train" / "rose" / "new.png").write_bytes(tf.io.encode_png(_picture(201)).numpy())
    code, found = audit(photos, "--strict")
    assert (code, _checks(found)) == (0, {("changes", False)})
    assert audit(photos)[1]["findings"] == []


def test_another_audits_contents_are_compared_on_request(photos, audit, tmp_path):
    audit(photos)
    copy = shutil.copytree(photos, tmp_path / "copy")
    code, error = audit(copy)
    assert code == 2
    assert "holds the audit of other data" in error
    (copy / "test" / "rose" / "p7q.png").unlink()
    against = tmp_path / "out" / "contents.json"
    code, found = audit(copy, "--against", against, "--strict", out=tmp_path / "other")
    assert (code, [one["problem"] for one in found["findings"]]) == (1, ["is missing: the earlier audit has it"])


def test_broken_files_are_moved_on_request_and_gone_next_time(photos, audit, tmp_path):
    (photos / "val" / "daisy" / "broken.png").write_bytes(b"<html>")
    code, found = audit(photos, "--quarantine", tmp_path / "aside", "--strict")
    assert code == 1
    assert [(one["file"], one["stays"]) for one in found["moved"]] == [("val/daisy/broken.png", None)]
    assert (tmp_path / "aside" / "val" / "daisy" / "broken.png").read_bytes() == b"<html>"
    code, found = audit(photos, "--strict")
    assert (code, found["findings"]) == (0, [])


def test_a_table_is_audited_by_its_lines(photos, audit, tmp_path):
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    rows = [f"{file},{file.split('/')[1]},{file.split('/')[0]},s{n % 5}" for n, file in enumerate(files)]
    table = photos / "all.csv"
    table.write_text(
        "image,label,split,subject\n" + "\n".join([*rows, "gone.png,rose,train,s1", f"{files[0]},,test,s0"])
    )
    code, found = audit(table, "--strict")
    assert code == 1
    places = [one["where"] for one in found["findings"] if one["check"] == "source" and one["counts"]]
    assert [place.rpartition(" ")[2] for place in places] == ["50", "51"]
    assert ("groups", True) in _checks(found)
    assert audit(table, "--quarantine", tmp_path / "q", out=tmp_path / "two")[0] == 2


def test_data_that_a_run_refuses_are_audited(photos, audit):
    (photos / "train" / "lonely").mkdir()
    (photos / "test" / "lonely").mkdir()
    (photos / "test" / "lonely" / "p.png").write_bytes(tf.io.encode_png(_picture(300)).numpy())
    code, found = audit(photos)  # without --strict
    assert code == 0
    problems = [one["problem"] for one in found["findings"] if one["check"] == "source"]
    assert any("holds no pictures" in problem for problem in problems)
    assert any("a run would refuse these data: test of" in problem for problem in problems)


BAD = {
    "no data": (["--data", "{0}/nothing"], "no such folder or table"),
    "no audit": (["--data", "{0}/photos", "--against", "{0}/nothing.json"], "nothing.json cannot be read"),
    "no JSON": (["--data", "{0}/photos", "--against", "{0}/photos/train/rose/p1q.png"], "p1q.png is not valid JSON"),
    "no contents": (["--data", "{0}/photos", "--against", "{0}/list.json"], "list.json is no contents.json"),
    "out in the data": (["--data", "{0}/photos", "--out", "{0}/photos/train/out"], "`out` must be a folder apart"),
    "out of others": (["--data", "{0}/photos", "--out", "{0}/full"], "`out` must be a new or empty folder"),
    "out is a file": (["--data", "{0}/photos", "--out", "{0}/list.json"], "`out` must be a folder"),
    "quarantine in the data": (["--data", "{0}/photos", "--quarantine", "{0}/photos/q"], "`quarantine` must be"),
    "quarantine of the demo": (["--data", "demo", "--quarantine", "{0}/q"], "`quarantine` must be left out"),
    "task": (["--data", "{0}/photos", "--task", "nonsense"], "`task_kind` must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(photos, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD[case]
    assert cli.main(["audit", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_is_the_same_for_the_same_data(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (photos, "photos"):
        assert cli.main(["audit", "--data", str(data)]) == 0
    printed = re.sub(r"\s", "", capsys.readouterr().out)
    assert "Nothingwasfound." in printed
    (folder,) = (tmp_path / "saved_models").iterdir()
    assert re.fullmatch(r"audit-photos-[0-9a-f]{8}", folder.name)


def test_small_pictures_that_look_the_same_are_not_called_copies(tmp_path):
    def near(side):
        pictures = np.stack([tf.image.resize(_picture(number // 2), (side, side)) for number in range(12)])
        splits = {"train": (pictures, list("ab") * 6), "test": (pictures[:2], list("ab"))}
        inspection = inspect(
            {name: (own.round(), labels) for name, (own, labels) in splits.items()}, image_size=(64, 64)
        )
        return [one for one in audits.of_inspection(inspection).findings["near_copies"] if one.counts]

    assert near(8) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_record_fails_a_strict_audit(audit, tmp_path, monkeypatch, capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=CLASSES)}

    class Audited(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            supervised = ("image", "label")
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(40):
                yield number, {"image": _picture(number).numpy(), "label": number % 2}

    Audited(data_dir=tmp_path / "tfds").download_and_prepare()
    capsys.readouterr()
    monkeypatch.setattr(tfds, "builder", lambda name: Audited(data_dir=tmp_path / "tfds"))
    assert audit("tfds:audited", "--strict", "--accept")[0] == 0
    (file,) = (tmp_path / "tfds").rglob("*.tfrecord*")
    contents = bytearray(file.read_bytes())
    contents[-500] ^= 2
    file.write_bytes(contents)
    code, found = audit("tfds:audited", "--strict", "--accept")
    (damaged,) = (one for one in found["findings"] if one["check"] == "unusable")
    assert (code, found["found"], found["usable"]) == (1, 40, 39)
    assert (damaged["where"], damaged["problem"]) == (f"{file.name}, record 39", "its data are damaged")


def test_a_name_cannot_break_the_page(tmp_path):
    hostile = '"><script>alert(1)</script>$x_{'
    for number in range(8):
        path = tmp_path / "p" / f"{hostile.replace('/', '|')}{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(tf.zeros((9, 9, 3), tf.uint8)).numpy())
    page = audits.page.render(audits.of_inspection(inspect(tmp_path / "p", image_size=(16, 16))))
    assert "<script" not in page
    assert "<figure>" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counted"),
    [("flowers", 0), ("cells", 2), ("spoken_digit_pictures", 0)],  # two cells were photographed twice
)
def test_real_data_give_no_false_alarm(assets, name, counted):
    audit = audits.of_inspection(inspect(assets / name, image_size=(128, 128)))
    assert audit.counted == counted
    assert audit.mentioned <= 6
    assert {check for check, found in audit.findings.items() if found} <= {"near_copies", "groups"}
