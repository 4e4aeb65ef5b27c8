"""A folder with crafted files: of each the audit says what is wrong, by its name, and of good ones nothing."""

import io
import json
import os
import re
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tftransfer import cli
from tftransfer.data import load

CLEAN = 48
FOLDER = "train/daisy"  # where the crafted files lie


def _pixels(seed, height=60, width=70):
    """A picture unlike that of any other seed."""
    generator = np.random.default_rng(seed)
    layers = [generator.integers(0, 256, (side, side, 3), np.uint8) for side in (3, 8, 16)]
    grown = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in layers]
    return np.mean(grown, axis=0).astype(np.uint8)


def _encoded(kind, seed, mode="RGB", height=60, width=70, **options):
    buffer = io.BytesIO()
    Image.fromarray(_pixels(seed, height, width)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


jpeg, png = partial(_encoded, "JPEG"), partial(_encoded, "PNG")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def _with_chunk(contents, chunk):
    return contents[:33] + chunk + contents[33:]


def _with_exif(contents, exif):
    return contents[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + contents[2:]


def _oriented(seed, orientation):
    """A JPEG that is to be turned to look like the picture of its seed."""
    turn = Image.Transpose
    ways = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90,
            turn.TRANSVERSE, turn.ROTATE_270)  # fmt: skip
    picture, buffer, exif = Image.fromarray(_pixels(seed)), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    stored = picture.transpose(ways[orientation - 2]) if orientation > 1 else picture
    stored.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def _flipped(contents, place):
    changed = bytearray(contents)
    changed[place] ^= 4
    return bytes(changed)


def _half_zeros(contents):
    return contents[: len(contents) // 2] + bytes(len(contents) - len(contents) // 2)


def _of_size(contents, width, height):
    """A JPEG whose header says another size."""
    place = contents.index(b"\xff\xc0")
    return contents[: place + 5] + struct.pack(">HH", height, width) + contents[place + 9 :]


def _frame(contents, marker):
    return contents.replace(b"\xff\xc0", bytes((255, marker)), 1)


def _broken_huffman(contents):
    place = contents.index(b"\xff\xc4")
    return contents[: place + 5] + b"\xff" * 16 + contents[place + 21 :]


JPEG, PNG = jpeg(200), png(201)
BMP, GIF, WEBP = _encoded("BMP", 202), _encoded("GIF", 203), _encoded("WEBP", 204)
LOSSLESS = _encoded("WEBP", 205, lossless=True)
DECODED = "is not a picture format that TensorFlow decodes"
TOO_LARGE = "pixels is larger than the limit of 100 megapixels"

USED = {
    "progressive.jpg": jpeg(300, progressive=True),
    "restarting.jpg": jpeg(301, restart_marker_blocks=2),
    "optimized.jpg": jpeg(302, optimize=True),
    "gray.jpg": jpeg(303, "L"),
    "cmyk.jpg": jpeg(304, "CMYK"),
    "profile.jpg": jpeg(305, icc_profile=bytes(500)),
    "two in one.jpg": _encoded("MPO", 306, save_all=True, append_images=[Image.fromarray(_pixels(307))]),
    "UPPER.JPG": jpeg(308),
    "other.jfif": jpeg(309),
    "no extension": jpeg(310),
    'new\nline, "quoted" \u202e\U0001f338.jpg': jpeg(311),
    "x" * 251 + ".jpg": jpeg(312),
    os.fsdecode(b"caf\xe9.jpg"): jpeg(313),
    "garbage behind.jpg": jpeg(314) + b"garbage" * 500,
    "zeros behind.jpg": jpeg(315) + bytes(5000),
    "standard tables left out.jpg": jpeg(316).replace(b"\xff\xc4", b"\xff\xe5"),
    "broken exif.jpg": _with_exif(jpeg(317), b"II*\0\xff\xff\xff\xff" + bytes(16)),
    "exif of another order.jpg": _with_exif(jpeg(318), b"MM\0*\0\0"),
    "exif says 9.jpg": _with_exif(jpeg(319), b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0"),
    "palette.png": png(320, "P"),
    "gray and alpha.png": png(321, "LA"),
    "alpha.png": png(322, "RGBA"),
    "bilevel.png": png(323, "1"),
    "16 bits.png": tf.io.encode_png(_pixels(324).astype(np.uint16) * 257).numpy(),
    "moving.png": png(325, save_all=True, append_images=[Image.fromarray(_pixels(326))]),
    "garbage behind.png": png(327) + b"garbage",
    "comment of a wrong checksum.png": _with_chunk(png(328), _chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!"),
    "comment that is a bomb.png": _with_chunk(png(329), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5 * 10**7)))),
    "moving.gif": _encoded("GIF", 330, save_all=True, append_images=[Image.fromarray(_pixels(331))]),
    "garbage behind.gif": _encoded("GIF", 332) + b"garbage",
    "moving.webp": _encoded("WEBP", 333, save_all=True, append_images=[Image.fromarray(_pixels(334))]),
    "lossless with alpha.webp": _encoded("WEBP", 335, "RGBA", lossless=True),
    "padded exif.webp": _encoded("WEBP", 336, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0" + bytes(2000)),
    "zeros behind.webp": _encoded("WEBP", 337) + bytes(500),
    "palette.bmp": _encoded("BMP", 338, "P"),
    **{f"orientation {n}.jpg": _oriented(400 + n, n) for n in range(1, 9)},
}
"""Unusual files that are fine: nothing is said of them."""

SET_ASIDE = {
    "empty.jpg": (b"", "empty file"),
    "zeros.jpg": (bytes(2000), "not a picture: begins with bytes 00 00"),
    "text.jpg": (b"no picture here", "not a picture: begins with 'no picture here'"),
    "page.png": (b"<!DOCTYPE html>", "not a picture: begins with '<!DOCTYPE html>'"),
    "drawing.png": (b"<svg/>", "not a picture: begins with '<svg/>'"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; `git lfs pull`"),
    "archive.jpg": (b"PK\3\4" + bytes(90), "not a picture: begins with bytes 50 4b 03 04"),
    "moved by a byte.jpg": (b" " + jpeg(499), "not a picture: begins with bytes 20 ff d8"),
    "line ends converted.png": (png(498).replace(b"\r\n", b"\n"), "not a picture: begins with bytes 89 50 4e 47 0a"),
    "scan.jpg": (b"II*\0" + bytes(90), f"TIFF {DECODED}"),
    "big scan.tif": (b"II+\0" + bytes(90), f"TIFF {DECODED}"),
    "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(90), f"HEIC {DECODED}"),
    "phone.heic": (b"\0\0\0\x18ftypmif1" + bytes(90), f"HEIF {DECODED}"),
    "web.png": (b"\0\0\0\x1cftypavif" + bytes(90), f"AVIF {DECODED}"),
    "moving.avif": (b"\0\0\0\x1cftypavis" + bytes(90), f"AVIF {DECODED}"),
    "extra large.jpg": (b"\xff\x0a" + bytes(90), f"JPEG XL {DECODED}"),
    "film.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), f"JPEG 2000 {DECODED}"),
    "layers.jpg": (b"8BPS" + bytes(90), f"Photoshop {DECODED}"),
    "paper.jpg": (b"%PDF-1.7", f"PDF {DECODED}"),
    "favicon.png": (b"\0\0\1\0\1\0" + bytes(90), f"Windows icon {DECODED}"),
    "cut after 2.jpg": (JPEG[:2], "not a picture: begins with bytes ff d8"),
    **{
        f"cut after {end}.jpg": (JPEG[:end], "JPEG data ends early")
        for end in (4, 20, 200, len(JPEG) // 3, len(JPEG) // 2, len(JPEG) - 30, len(JPEG) - 2)
    },
    "half zeros.jpg": (_half_zeros(JPEG), "JPEG data ends early"),
    "broken Huffman table.jpg": (_broken_huffman(JPEG), "damaged JPEG data"),
    "no quantization.jpg": (JPEG.replace(b"\xff\xdb", b"\xff\xe5"), "damaged JPEG data"),
    "lossless.jpg": (_frame(JPEG, 0xC3), "damaged JPEG data"),
    "progressive that is not.jpg": (_frame(JPEG, 0xC2), "damaged JPEG data"),
    "hierarchical.jpg": (_frame(JPEG, 0xC5), "damaged JPEG data"),
    "12 bits.jpg": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "damaged JPEG data"),
    "no columns.jpg": (_of_size(JPEG, 0, 60), "damaged JPEG data"),
    "exif beyond the end.jpg": (JPEG[:2] + b"\xff\xe1\xff\xffExif\0\0" + JPEG[2:], "damaged JPEG data"),
    "bomb.jpg": (_of_size(JPEG, 60_000, 50_000), f"60000x50000 {TOO_LARGE}"),
    **{
        f"cut after {end}.png": (PNG[:end], "PNG data ends early")
        for end in (8, 20, 33, 50, len(PNG) // 2, len(PNG) - 12, len(PNG) - 1)
    },
    "half zeros.png": (_half_zeros(PNG), "PNG data ends early"),
    "wrong checksum of pixels.png": (_flipped(PNG, len(PNG) - 13), "damaged PNG data"),
    "wrong checksum of the header.png": (_flipped(PNG, 30), "damaged PNG data"),
    "flipped bit.png": (_flipped(PNG, len(PNG) // 2), "damaged PNG data"),
    "no columns.png": (_png_header(0, 5) + _chunk(b"IEND", b""), "picture has no pixels"),
    "bomb.png": (_png_header(20_000, 20_000), f"20000x20000 {TOO_LARGE}"),
    "largest bomb.png": (_png_header(2**31 - 1, 2**31 - 1), f"2147483647x2147483647 {TOO_LARGE}"),
    **{f"cut after {end}.gif": (GIF[:end], "GIF data ends early") for end in (7, 40, len(GIF) // 2)},
    "half zeros.gif": (_half_zeros(GIF), "GIF data ends early"),
    "no frame.gif": (GIF[:13] + b";", "GIF"),
    "bomb.gif": (b"GIF89a" + struct.pack("<HH", 60_000, 50_000) + b"\0\0\0," + bytes(20), f"60000x50000 {TOO_LARGE}"),
    **{f"cut after {end}.webp": (WEBP[:end], "WebP data ends early") for end in (40, len(WEBP) // 2, len(WEBP) - 1)},
    "cut after a half.webp": (LOSSLESS[: len(LOSSLESS) // 2], "WebP data ends early"),
    "bomb.webp": (
        b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + struct.pack("<I", 59_999)[:3] + struct.pack("<I", 49_999)[:3],
        f"60000x50000 {TOO_LARGE}",
    ),
    **{f"cut after {end}.bmp": (BMP[:end], "BMP data ends early") for end in (7, 40, len(BMP) // 2, len(BMP) - 1)},
    "run lengths.bmp": (_flipped(BMP, 30), "BMP of a kind that TensorFlow does not decode"),
    "bomb.bmp": (
        b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 60_000, -50_000, 1, 24, 0) + bytes(20),
        f"60000x50000 {TOO_LARGE}",
    ),
}
"""Files that cannot be used, with their reason."""

MADE = {
    "lost link.jpg": "cannot be read: No such file or directory",
    "link to itself.jpg": "cannot be read: Too many levels of symbolic links",
    "pipe.jpg": "cannot be read: not a regular file",
    "broken disk.jpg": "cannot be read: Input/output error",
}
"""What is no file of bytes; set aside as well."""

MENTIONED = {
    "really a png.jpg": (png(500), {("misnamed", False): "the extension of another format"}),
    "unfinished.jpg.part": (jpeg(501), {("misnamed", False): "the extension of another format"}),
    "blank.png": (tf.io.encode_png(np.full((60, 70, 3), 9, np.uint8)).numpy(), {("blank", True): "^blank: .* 0.0"}),
    "clear.png": (tf.io.encode_png(np.zeros((61, 70, 4), np.uint8)).numpy(), {("blank", True): "^blank: .* 0.0"}),
    "nearly blank.png": (
        tf.io.encode_png(_pixels(502) // 25 + np.uint8(90)).numpy(),
        {("blank", False): "^nearly blank"},
    ),
    "1x1.png": (png(503, height=1, width=1), {("blank", True): "^blank", ("sizes", False): "1x1 pixels: far smaller"}),
    "1x300.png": (png(504, height=300, width=1), {("sizes", False): "1x300 pixels: one side is 300.0 times"}),
    "wide.jpg": (jpeg(505, height=8, width=900), {("sizes", False): "900x8 pixels: one side is 112.5 times"}),
    "twin.jpg": (jpeg(506), {("exact_copies", True): "same content, as .*twin.jpg, with labels 'daisy', 'rose'"}),
    "leak.jpg": (jpeg(507), {("exact_copies", True): "same content, as .*leak.jpg, in test and train"}),
}
"""Files that are used, and of which something is said."""

LEFT_OUT = ("Thumbs.db", ".DS_Store", "desktop.ini", ".hidden.jpg", "._resources.jpg", "notes.txt", "__MACOSX/a.jpg")

CRAFTED = {
    **{name: (contents, {}) for name, contents in USED.items()},
    **{name: (contents, {("unusable", True): reason}) for name, (contents, reason) in SET_ASIDE.items()},
    **{name: (None, {("unusable", True): reason}) for name, reason in MADE.items()},
    **MENTIONED,
}


def _clean(root):
    for number in range(CLEAN):
        path = (
            root
            / ("train", "train", "val", "test")[number // 2 % 4]
            / ("daisy", "rose")[number % 2]
            / f"p{number}q.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, height=60 + number % 7))
    return root


def _craft(root):
    folder = root / FOLDER
    for name, (contents, _) in CRAFTED.items():
        if contents is not None:
            (folder / name).write_bytes(contents)
    (folder / "lost link.jpg").symlink_to("nothing.jpg")
    (folder / "link to itself.jpg").symlink_to("link to itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "broken disk.jpg").symlink_to("/proc/self/mem")  # a regular file whose first byte nobody can read
    for name in LEFT_OUT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(JPEG)
    (folder / "directory.jpg").mkdir()
    (folder / "loop").symlink_to(root)
    (root / "train" / "stray.jpg").write_bytes(JPEG)
    for name, place in (("twin.jpg", "train/rose"), ("leak.jpg", "test/daisy")):
        (root / place / name).write_bytes(CRAFTED[name][0])
    return root


@pytest.fixture(scope="module")
def crafted(tmp_path_factory):
    """The folder."""
    return _craft(_clean(tmp_path_factory.mktemp("crafted") / "photos"))


@pytest.fixture(scope="module")
def audited(crafted):
    """What `tftransfer audit --strict` writes, and its exit code."""
    out = crafted.parent / "out"
    code = cli.main(["audit", "--data", str(crafted), "--out", str(out), "--strict", "--json"])
    return json.loads((out / "audit.json").read_text()), code


def _name(name):
    return f"{FOLDER}/{name}".encode("utf-8", "backslashreplace").decode()


def _said(found, name):
    own = [one for one in found["findings"] if name in (one["where"], *one["examples"])]
    return {(one["check"], one["counts"]): one["problem"] for one in own}


def test_there_are_many():
    assert len(SET_ASIDE) + len(MADE) >= 40
    assert len(USED) >= 40
    assert len(MENTIONED) >= 10


@pytest.mark.parametrize("name", CRAFTED, ids=ascii)
def test_of_each_file_that_is_said_which_is_wrong_with_it(audited, name):
    expected, said = CRAFTED[name][1], _said(audited[0], _name(name))
    assert set(said) == set(expected)
    for key, problem in expected.items():
        assert re.search(problem, said[key]) if key[0] != "unusable" else problem in said[key]


def test_nothing_is_said_of_the_others_but_what_was_not_read(audited):
    found, code = audited
    files = {_name(name) for name in CRAFTED}
    others = [one for one in found["findings"] if not files & {one["where"], *one["examples"]}]
    assert code == 1
    assert {(one["where"], one["problem"], one["counts"]) for one in others} == {
        ("photos", "train: 1 files beside the class folders were not read: stray.jpg", False),
        ("photos", "daisy: 2 folders inside a class folder were not read: directory.jpg, loop", False),
    }


def test_used_and_set_aside_are_what_was_found(audited, crafted):
    found, _ = audited
    aside = {one["where"]: one["problem"] for one in found["findings"] if one["check"] == "unusable"}
    assert set(aside) == {_name(name) for name in (*SET_ASIDE, *MADE)}
    assert found["found"] == CLEAN + len(CRAFTED) + 2  # the other halves of twin and leak
    assert found["usable"] + len(aside) == found["found"]
    data, _ = load(crafted, image_size=(60, 70))
    assert {item.file: item.reason for item in data.quarantined} == aside
    assert len(data.train) + len(data.validation) + len(data.test) == found["usable"]
    assert data.found == found["found"]
    places = {name: place for place, name in enumerate(data.train.names)}
    for orientation in range(1, 9):  # all are used upright
        seen = data.train.pictures.load(tf.constant(places[_name(f"orientation {orientation}.jpg")], tf.int64))
        assert np.abs(seen.numpy().astype(float) - _pixels(400 + orientation)).mean() < 10  # of turned ones 40


@pytest.mark.slow
def test_clean_data_are_not_accused(tmp_path):
    out = tmp_path / "out"
    assert cli.main(["audit", "--data", str(_clean(tmp_path / "photos")), "--out", str(out), "--strict"]) == 0
    assert json.loads((out / "audit.json").read_text())["findings"] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    root = _clean(tmp_path / "photos")
    (root / FOLDER / "secret.jpg").write_bytes(jpeg(600))
    (root / FOLDER / "secret.jpg").chmod(0)
    (item,) = load(root, image_size=(60, 70))[0].quarantined
    assert (item.file, item.reason) == (f"{FOLDER}/secret.jpg", "cannot be read: Permission denied")


@pytest.mark.slow
def test_crafted_files_take_little_more_memory_than_clean_ones(crafted, tmp_path, run_python):
    peaks = [
        run_python(
            """
            import resource, sys
            from tftransfer import cli
            cli.import_tensorflow()
            from tftransfer.data import load
            load(sys.argv[1], image_size=(60, 70))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            """,
            folder,
        )
        for folder in (_clean(tmp_path / "photos"), crafted)
    ]
    assert peaks[1] - peaks[0] < 300  # MiB
