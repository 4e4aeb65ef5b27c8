import unicodedata

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font

from tftransfer.data import glyphs
from tftransfer.errors import InputError


@pytest.fixture(scope="module")
def made():
    return glyphs.generated_signs(120, image_size=32, seed=3, drawn=60)


def test_the_same_seed_gives_the_same_bits(made):
    again = glyphs.generated_signs(120, image_size=32, seed=3, drawn=60)
    np.testing.assert_array_equal(again[0], made[0])
    np.testing.assert_array_equal(again[1], made[1])


def test_another_seed_gives_other_pictures_of_the_same_classes(made):
    pictures, _, names = glyphs.generated_signs(120, image_size=32, seed=4, drawn=60)
    assert (pictures != made[0]).any(axis=(1, 2, 3)).all()
    assert names == made[2]


def test_shapes_types_and_names(made):
    pictures, labels, names = made
    assert (pictures.shape, pictures.dtype) == ((120, 32, 32, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((120,), np.int32)
    assert len(set(names)) == len(names) == len(glyphs.PRINTED) + 60
    assert 0 <= labels.min() <= labels.max() < len(names)


def test_classes_are_equally_frequent():
    _, labels, names = glyphs.generated_signs(2 * len(glyphs.PRINTED), image_size=8, drawn=0)
    np.testing.assert_array_equal(np.bincount(labels), np.full(len(names), 2))


def test_every_picture_shows_something(made):
    assert (np.ptp(made[0].mean(axis=-1), axis=(1, 2)) > 40).all()


def test_no_printed_character_is_a_number():
    numbers = {sign for sign in glyphs.PRINTED if unicodedata.category(sign).startswith("N")}
    assert not numbers
    assert not any("digit" in name or "superscript" in name for name in glyphs.class_names(0))
    assert all(unicodedata.numeric(sign, None) is None for sign in glyphs.PRINTED)


def test_every_font_holds_the_characters_it_is_used_for():
    held = {name: set(FT2Font(str(glyphs._font_file(name))).get_charmap()) for name in glyphs.FONTS}
    missing = [(s, font) for s in glyphs.PRINTED for font in glyphs._fonts_for(s) if ord(s) not in held[font]]
    assert not missing


def test_drawn_characters_differ_and_two_hands_differ():
    first, second = (np.concatenate([points for points, _ in glyphs._character(n)]) for n in (0, 1))
    assert first.shape != second.shape or np.abs(first - second).max() > 0.1
    one, other = (glyphs._handwriting(0, np.random.default_rng(seed)) for seed in (0, 1))
    assert 0 < max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) < 1.5


def test_share_of_coloured_pictures():
    pictures = glyphs.generated_signs(60, image_size=16, drawn=10, colour=0.0)[0]
    assert (pictures[..., 0] == pictures[..., 1]).all()
    pictures = glyphs.generated_signs(60, image_size=16, drawn=10, colour=1.0)[0]
    assert (pictures[..., 0] != pictures[..., 1]).any(axis=(1, 2)).all()


def test_other_fonts_are_reported(monkeypatch):
    monkeypatch.setitem(glyphs.FONTS, "cmr10.ttf", ("0" * 64, "BaKoMa"))
    with pytest.warns(UserWarning, match=r"may differ too: cmr10\.ttf"):
        glyphs.generated_signs(1, image_size=8, drawn=0)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"image_size": 7}, {"seed": -1}, {"drawn": -1}, {"colour": 1.5}])
def test_numbers_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"`{name}` must be .* Received: {name}="):
        glyphs.generated_signs(**{"count": 2, **wrong})
