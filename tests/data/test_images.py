"""The decoder against Pillow, in eager execution and in graphs."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tftransfer.data import images
from tftransfer.data.audit import explain

SIZE = (10, 12)
KINDS = (
    "jpeg", "jpeg_progressive", "jpeg_gray", "jpeg_cmyk", "png", "png_gray", "png_bilevel", "png_palette",
    "png_palette_2", "png_palette_2_alpha", "png_gray_2", "png_gray_4",
    "png_palette_alpha", "png_gray_alpha", "png_rgba", "png_gray_16", "bmp", "bmp_gray", "bmp_palette", "gif",
    "gif_animated", "webp", "webp_lossless", "webp_rgba", "webp_rgba_lossy", "webp_animated",
    "webp_animated_rgba",
    "webp_animated_rgba_lossy",
)  # fmt: skip


@pytest.fixture(scope="module")
def in_graph():
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)
    def decode(batch):
        signature = tf.TensorSpec((*SIZE, 3), tf.uint8)
        return tf.map_fn(lambda one: images.decode_picture(one, SIZE), batch, fn_output_signature=signature)

    return decode


def by_pillow(contents):
    """Pillow's pixels on white, at full size."""
    image = Image.open(io.BytesIO(contents))
    if image.mode.startswith("I;16"):
        return np.repeat(np.asarray(image)[..., None] / 257, 3, axis=-1)
    image = image.convert("RGB") if image.mode == "CMYK" else ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return np.asarray(white.convert("RGB"))


def decoded(contents, size=SIZE):
    return images.decode_picture(tf.constant(contents), size).numpy().astype(int)


def with_exif(contents, exif):
    """Put a segment of EXIF behind the first two bytes of a JPEG."""
    body = b"Exif\0\0" + exif
    return contents[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + contents[2:]


def tiff(orientation, order="<", kind=3):
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(f"{order}HHIHH", 0x0112, kind, 1, orientation, 0)
    other = struct.pack(f"{order}HHII", 0x011A, 5, 1, 26)
    return mark + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", 2) + other + entry + bytes(4)


def test_every_kind_of_the_fixture_is_tested(encoded):
    assert set(KINDS) == set(encoded)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows(encoded, kind):
    expected = images.resize_picture(tf.constant(by_pillow(encoded[kind]), tf.float32), SIZE).numpy().astype(int)
    # JPEG and lossy WebP: Pillow may choose another inverse transform or upsampling.
    tolerance = 3 if "jpeg" in kind or "webp" in kind else 1
    assert np.abs(decoded(encoded[kind]) - expected).max() <= tolerance


def test_graphs_give_the_same_bits(encoded, in_graph):
    batch = in_graph(tf.constant(list(encoded.values()))).numpy()
    for number, contents in enumerate(encoded.values()):
        np.testing.assert_array_equal(batch[number], decoded(contents))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(encoded, orientation, order):
    contents = with_exif(encoded["jpeg"], tiff(orientation, order))
    assert images.exif_orientation(tf.constant(contents)) == orientation
    expected = images.resize_picture(tf.constant(by_pillow(contents), tf.float32), SIZE).numpy().astype(int)
    assert np.abs(decoded(contents) - expected).max() <= 3
    turned_by_pillow = Image.open(io.BytesIO(contents)).getexif()[0x0112]
    assert turned_by_pillow == orientation


def test_exif_behind_another_segment_is_found(encoded):
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 300) + b"x" * 300
    contents = with_exif(encoded["jpeg"], tiff(6))
    assert images.exif_orientation(tf.constant(contents[:2] + comment + contents[2:])) == 6


@pytest.mark.parametrize(
    "exif",
    [
        b"", b"II", tiff(0), tiff(9), tiff(6, kind=4), tiff(6)[:20], b"XX" + tiff(6)[2:], tiff(6)[:4] +
        b"\xff" * 4, tiff(6)[:8] + b"\xff\xff" + tiff(6)[10:14],
    ],
)  # fmt: skip
def test_malformed_exif_is_upright(encoded, exif):
    contents = with_exif(encoded["jpeg"], exif)
    assert images.exif_orientation(tf.constant(contents)) == 1
    assert decoded(contents).shape == (*SIZE, 3)


def test_letters_of_exif_elsewhere_are_no_exif(encoded):
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 60) + (b"Exif\0\0" + tiff(6)).ljust(60, b"\0")
    assert images.exif_orientation(tf.constant(encoded["jpeg"][:2] + comment + encoded["jpeg"][2:])) == 1


def test_frame_smaller_than_the_canvas_lies_on_white():
    first = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    first.paste((200, 30, 60, 255), (8, 4, 16, 12))
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=[first.rotate(90)], lossless=True)
    picture = decoded(buffer.getvalue(), (16, 24))
    np.testing.assert_array_equal(picture, by_pillow(buffer.getvalue()))


def test_16_bits_are_rounded_to_8():
    deep = np.array([[0, 257, 65535, 32768]], np.uint16)
    contents = tf.io.encode_png(deep[..., None]).numpy()
    np.testing.assert_array_equal(decoded(contents, (1, 4))[0, :, 0], [0, 1, 255, 128])


def test_pictures_at_their_own_size_are_unchanged(encoded):
    np.testing.assert_array_equal(decoded(encoded["png"], (20, 30)), by_pillow(encoded["png"]))


def _error(contents, in_graph):
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        in_graph(tf.constant([contents]))
    return explain(caught.value, contents)


def test_too_large_pictures_are_refused_from_their_header(bomb, in_graph):
    assert len(bomb) < 400_000
    assert _error(bomb, in_graph) == "picture of 20000x20000 pixels is larger than the limit of 100 megapixels"


HEADERS = {
    "GIF": (b"GIF89a" + struct.pack("<HH", 60_000, 50_000) + bytes(20), "60000x50000"),
    "BMP": (
        b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 60_000, -50_000, 1, 24, 0) + bytes(20),
        "60000x50000",
    ),
    "WebP, extended": (
        b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (59_999).to_bytes(3, "little") + (49_999).to_bytes(3, "little"),
        "60000x50000",
    ),
    "WebP, lossless": (
        b"RIFF\x40\0\0\0WEBPVP8L\x40\0\0\0\x2f" + ((15_999) | (14_999 << 14)).to_bytes(4, "little") + bytes(9),
        "16000x15000",
    ),
    "WebP, lossy": (
        b"RIFF\x40\0\0\0WEBPVP8 \x40\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_000, 15_000) + bytes(9),
        "16000x15000",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_the_header_of_every_format_is_read(kind, in_graph):
    contents, size = HEADERS[kind]
    assert _error(contents, in_graph).startswith(f"picture of {size} pixels is larger")


def test_a_jpeg_header_is_read(encoded, in_graph):
    jpeg = encoded["jpeg"]
    frame = jpeg.index(b"\xff\xc0")
    huge = jpeg[: frame + 5] + struct.pack(">HH", 60_000, 50_000) + jpeg[frame + 9 :]
    assert _error(huge, in_graph).startswith("picture of 50000x60000 pixels is larger")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "webp_animated", "bmp"])
def test_truncated_pictures_are_refused(encoded, in_graph, kind):
    contents = encoded[kind]
    reason = _error(contents[: int(len(contents) * 0.3)], in_graph)
    assert reason.endswith("data ends early")


@pytest.mark.parametrize("kind", KINDS)
def test_beginnings_of_pictures_are_refused_cleanly(encoded, in_graph, kind):
    for length in (1, 3, 9, 12, 16, 30):
        _error(encoded[kind][:length], in_graph)


@pytest.mark.parametrize("contents", [b"", b"\0", b"<!DOCTYPE html>", b"II*\0" + bytes(50), b"RIFF\0\0\0\0WAVE"])
def test_other_bytes_are_refused_cleanly(in_graph, contents):
    assert _error(contents, in_graph) == images.UNKNOWN
