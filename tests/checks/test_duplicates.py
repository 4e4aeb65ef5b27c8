"""Copies between splits: made by an independent library, found; and nothing else is."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from tftransfer.checks import duplicates
from tftransfer.data import load
from tftransfer.errors import InputError

SIZE = 96


def _picture(seed, size=SIZE):
    """A picture with detail at several scales, as photographs have."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            ),
            np.float32,
        )
        for side in (3, 8, 20)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def _crop(picture, corner):
    side = round(0.9 * SIZE)
    left, top = (round(share * (SIZE - side)) for share in corner)
    return picture.crop((left, top, left + side, top + side))


def _encoded_again(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "resized": lambda picture: picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.BILINEAR),
    "encoded again": _encoded_again,
    "cropped": lambda picture: _crop(picture, (0.3, 0.8)),
    "cropped at a corner": lambda picture: _crop(picture, (1.0, 0.0)),
    "mirrored": ImageOps.mirror,
    "gray": lambda picture: picture.convert("L").convert("RGB"),
    "mirrored and cropped": lambda picture: ImageOps.mirror(_crop(picture, (0.5, 0.5))),
    "brighter": lambda picture: picture.point(lambda value: min(value + 25, 255)),
}


def _array(pictures):
    return np.stack([np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for picture in pictures])


def _data(train, test, validation=()):
    splits = {"train": train, "test": test, "validation": validation or [_picture(900), _picture(901)]}
    given = {name: (_array(own), list("ab") * (len(own) // 2)) for name, own in splits.items()}
    return load(given, image_size=(SIZE, SIZE))[0]


@pytest.fixture(scope="module")
def originals():
    return [_picture(seed) for seed in range(40)]


BY_DEFAULT = ("resized", "encoded again", "mirrored and cropped")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in BY_DEFAULT else pytest.mark.slow) for kind in COPIES]
)
def test_copies_are_found_whichever_split_has_the_original(originals, kind):
    changed = [COPIES[kind](picture) for picture in originals[:10]]
    others = [_picture(seed) for seed in range(100, 110)]
    for train, test in ((originals, changed + others), (changed + others, originals)):
        data = _data(train, test)
        found = [copy for copy in duplicates.copies(data) if (copy.split, copy.other) == ("test", "train")]
        assert {(copy.index, copy.other_index) for copy in found} == {(place, place) for place in range(10)}
        assert all(copy.mirrored == ("mirrored" in kind) for copy in found)
        assert not any(copy.exact for copy in found)


def test_nothing_is_found_among_different_pictures(originals):
    assert duplicates.copies(_data(originals[:20], originals[20:])) == ()


def test_pictures_that_are_all_alike_are_no_copies():
    """A common motif: what two pictures share with all others does not make them copies."""
    motif = np.asarray(_picture(0), np.float32)

    def like(seed):
        own = np.asarray(_picture(seed), np.float32)
        return Image.fromarray((0.8 * motif + 0.2 * own).astype(np.uint8))

    train, test = [like(seed) for seed in range(1, 21)], [like(seed) for seed in range(50, 60)]
    assert duplicates.copies(_data(train, test)) == ()
    found = duplicates.copies(_data(train, [ImageOps.mirror(train[3]), *test[1:]]))
    assert [(copy.index, copy.other_index, copy.mirrored) for copy in found] == [(0, 3, True)]


def test_plain_pictures_are_no_copies_of_each_other():
    plain = [Image.new("RGB", (SIZE, SIZE), (value, value, value)) for value in (10, 90, 170, 250)]
    assert duplicates.copies(_data(plain[:2], plain[2:])) == ()


def test_exact_copies_are_all_found_and_come_first(originals):
    test = [*originals[:4], COPIES["gray"](originals[4]), _picture(500)]
    found = duplicates.copies(_data(originals[:10], test, validation=[originals[0], _picture(901)]))
    assert [copy.exact for copy in found] == [True] * 6 + [False]
    exact = {(copy.split, copy.index, copy.other, copy.other_index) for copy in found if copy.exact}
    assert exact == {("test", i, "train", i) for i in range(4)} | {("validation", 0, "train", 0)} | {
        ("test", 0, "validation", 0)
    }


def test_removing_leaves_test_whole_and_nothing_double(originals):
    test = [COPIES["cropped"](originals[0]), originals[1], _picture(500), _picture(501)]
    validation = [originals[1], originals[2], _picture(901), _picture(902)]
    data = _data(originals[:10], test, validation=validation)
    found = duplicates.copies(data)
    cleaned = duplicates.without_copies(data, found)
    assert [len(part) for part in (cleaned.train, cleaned.validation, cleaned.test)] == [7, 3, 4]
    assert cleaned.train.names == data.train.names[3:]
    np.testing.assert_array_equal(cleaned.train.targets, data.train.targets[3:])
    np.testing.assert_array_equal(cleaned.train.pictures.load(0), data.train.pictures.load(3))
    assert cleaned.splits["notes"][-1] == "4 copies of pictures of other splits were removed"
    assert duplicates.copies(cleaned) == ()
    gone = [item.file for item in cleaned.quarantined]
    assert sorted(gone) == sorted(
        {*data.train.names[:3], *(set(data.validation.names) - set(cleaned.validation.names))}
    )
    assert "a copy of test[0] of the test split" in {item.reason for item in cleaned.quarantined}
    assert cleaned.fingerprint != data.fingerprint


def test_removing_a_whole_class_is_refused(originals):
    data = _data(originals[:2], originals[:2])
    with pytest.raises(InputError, match="`remove_duplicates`: train would lose every picture"):
        duplicates.without_copies(data, duplicates.copies(data))
    data = _data(originals[:2], [originals[0], _picture(500)])
    with pytest.raises(InputError, match="train would lose a class"):
        duplicates.without_copies(data, duplicates.copies(data))


def test_the_report_lists_pairs_and_shows_them(originals, kept_by_a_report):
    data = _data(originals[:10], [originals[3], COPIES["mirrored"](originals[5])])
    found = duplicates.duplicates(data, duplicates.copies(data))
    (check,) = found.checks
    assert (check.passed, check.metrics["exact"], check.metrics["alike"]) == (False, 1, 1)
    (table,) = found.tables
    assert table.rows[0] == ("test[0]", "test", "train[3]", "train", "the same file")
    assert table.rows[1][:4] == ("test[1]", "test", "train[5]", "train")
    assert table.rows[1][4].endswith("mirrored")
    assert found.pictures[0].png.startswith(b"\x89PNG")
    assert kept_by_a_report(found)
    assert duplicates.duplicates(data, duplicates.copies(data), removed=True).checks[0].passed
    clean = duplicates.duplicates(data, ())
    assert (clean.checks[0].passed, clean.tables) == (True, ())


def test_copies_within_a_split_are_found_once_and_others_are_not(originals):
    changed = [COPIES[kind](originals[place]) for place, kind in enumerate(("resized", "mirrored", "gray"))]
    data = _data([*originals, *changed, originals[9]], originals[:2])
    found = duplicates.copies_within(data.train)
    assert {(copy.index, copy.other_index, copy.exact) for copy in found} == {
        (0, 40, False), (1, 41, False), (2, 42, False), (9, 43, True)}  # fmt: skip
    assert found[0].exact
    assert all(copy.likeness >= duplicates.SURE for copy in found)
    assert duplicates.copies_within(_data(originals, originals[:2]).train) == ()
