"""The decoder against Pillow, in eager execution and in graphs."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tftransfer.data import audit, images
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


@pytest.mark.parametrize("form", [*images.FORMATS, images.PLAIN_JPEG])
def test_a_graph_of_one_format_gives_the_same_bits(encoded, form):
    own = tf.function(
        lambda one: images.decode_picture(one, SIZE, form), [tf.TensorSpec((), tf.string)], autograph=False
    )
    turned = {f"{kind}_turned": with_exif(encoded[kind], tiff(6)) for kind in ("jpeg", "jpeg_gray")}
    some = [contents for contents in {**encoded, **turned}.values() if audit.form(contents) == form]
    assert some
    for contents in some:
        np.testing.assert_array_equal(own(tf.constant(contents)), decoded(contents))


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
    "GIF": (b"GIF89a" + struct.pack("<HH", 60_000, 50_000) + b"\0\0\0," + bytes(20), "60000x50000"),
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


def gif(canvas, *frames, extension=b""):
    """A GIF of frames of one colour, each in `size`; the first bytes are those of a palette of two."""

    def frame(width, height):
        encoded = io.BytesIO()
        Image.new("P", (width, height)).save(encoded, "GIF")
        data = encoded.getvalue()
        start = data.index(b",\0\0\0\0")
        return data[start:-1]

    palette = bytes(range(6))
    head = b"GIF89a" + struct.pack("<HH", *canvas) + b"\x80\0\0" + palette
    return head + extension + b"".join(frame(*size) for size in frames) + b";"


def test_a_gif_frame_larger_than_its_canvas_is_refused(in_graph):
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 100 + b"\x03abc\0"
    for extension in (b"", comment, comment + comment):
        contents = gif((10, 10), (11_000, 10_000), extension=extension)
        assert _error(contents, in_graph) == "picture of 11000x10000 pixels is larger than the limit of 100 megapixels"
        assert in_graph(tf.constant([gif((10, 10), (10, 10), extension=extension)])).shape == (1, *SIZE, 3)


def test_only_the_first_frame_of_a_gif_is_decoded(encoded, in_graph):
    """TensorFlow decodes them all, so that a small file could ask for any memory."""
    contents = encoded["gif_animated"]
    cut = images._first_gif_frame(tf.constant(contents)).numpy()
    still = Image.open(io.BytesIO(cut))
    assert still.n_frames == 1
    assert Image.open(io.BytesIO(contents)).n_frames == 2
    np.testing.assert_array_equal(still.convert("RGB"), Image.open(io.BytesIO(contents)).convert("RGB"))
    refused_alone = gif((10, 10), (10, 10), (20_000, 20_000))
    assert in_graph(tf.constant([refused_alone])).shape == (1, *SIZE, 3)


def test_gifs_made_to_be_walked_for_ever_are_refused(in_graph):
    comment = b"\x21\xfe" + b"\x01x" * 60_000 + b"\0"
    assert _error(gif((10, 10), (10, 10), extension=comment), in_graph) == "GIF of too many blocks; save it as PNG"
    assert _error(gif((10, 10)), in_graph) == "GIF without a frame"


def animated_webp(chunk):
    """An animated WebP of one frame of 2x2 pixels that holds a chunk."""
    frame = bytes(6) + b"\1\0\0\1\0\0" + bytes(4) + chunk
    body = b"WEBPVP8X\x0a\0\0\0\x02\0\0\0\1\0\0\1\0\0" + b"ANIM\6\0\0\0" + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_frames_of_animated_webp_are_checked(in_graph):
    size = ((14_000 - 1) | (14_000 - 1) << 14).to_bytes(4, "little")
    large = b"VP8L" + struct.pack("<I", 16) + b"\x2f" + size + bytes(11)
    assert _error(animated_webp(large), in_graph).startswith("picture of 14000x14000 pixels is larger")
    nested = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + bytes(6)  # an animation within the frame
    assert _error(animated_webp(nested), in_graph) == "WebP frame holds no picture"


@pytest.mark.parametrize("order", ["red first", "blue first"])
def test_bmps_with_other_masks_are_refused(in_graph, order):
    """TensorFlow reads blue, green, red whatever the masks say."""
    masks = (0xFF, 0xFF00, 0xFF0000) if order == "red first" else (0xFF0000, 0xFF00, 0xFF)
    pixels = bytes((10, 20, 200, 255)) * 12
    header = struct.pack("<IiiHHIIiiII", 108, 4, 3, 1, 32, 3, 0, 0, 0, 0, 0) + struct.pack("<4I", *masks, 0xFF000000)
    contents = b"BM" + struct.pack("<IHHI", 122 + 48, 0, 0, 122) + header + bytes(52) + pixels
    if order == "red first":
        assert _error(contents, in_graph).startswith("BMP of a kind that TensorFlow does not decode")
    else:
        assert in_graph(tf.constant([contents])).numpy()[0, 0, 0].tolist() == [200, 20, 10]


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
