"""One decoder of pictures, inside TensorFlow's graph, for training, prediction and serving alike.

Every operation is one that TF Serving's C++ server has: no Python, no lookup tables. The size of a picture
is read from its header before anything is decoded, so that a small file cannot ask for gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WebP")
PLAIN_JPEG = "JPEG without EXIF"
MAX_PIXELS = 100_000_000
"""Pictures of more pixels (height times width, as the headers of file and first frame say) are not decoded."""

TOO_LARGE = f"picture is larger than the limit of {MAX_PIXELS // 1_000_000} megapixels"
UNKNOWN = f"not a picture format that TensorFlow decodes ({', '.join(FORMATS)})"
EXIF_WITHIN = 2**18  # bytes; EXIF comes first in a JPEG but for another segment or two of at most 64 KiB
_MOST_STEPS = 50_000  # through a GIF's blocks: a second or two; nearly all files need less than a hundred
_BMP_MASKS = [0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 0]
_BYTE_STRINGS = [bytes([value]) for value in range(256)]


def decode_picture(contents: tf.Tensor, image_size: tuple[int, int], form: str | None = None) -> tf.Tensor:
    """Decode one encoded picture to RGB at a given size.

    The format is told by content, not by name. A JPEG's EXIF orientation is applied; alpha is composited on
    white (but a BMP's fourth channel and a GIF's transparency are ignored); 16 bits are scaled to 8; gray
    becomes RGB; CMYK is converted without a colour profile; of an animation the first frame counts. The
    picture is stretched to `image_size`, bilinear with antialiasing.

    Args:
        contents: Scalar string, the bytes of a JPEG, PNG, GIF, BMP or WebP file.
        image_size: `(height, width)` in pixels.
        form: What `audit.form` says of the bytes, where that is known: the graph then lacks all else, and the result is
            the same. Defaults to None: told by content.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: If the bytes are no such picture, are damaged, or hold more than
            `MAX_PIXELS` pixels. It comes from the graph.

    Example:
        >>> decode_picture(tf.io.encode_png(tf.fill((4, 6, 1), tf.constant(7, tf.uint8))), (2, 3)).shape
        TensorShape([2, 3, 3])
    """
    return decode_with_size(contents, image_size, form)[0]


def decode_with_size(
    contents: tf.Tensor, image_size: tuple[int, int], form: str | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode a picture as `decode_picture` does, and say how large it was.

    Args:
        contents, image_size, form: As for `decode_picture`.

    Returns:
        uint8 `(height, width, 3)`, and `(height, width)` int64 in pixels as its header says and it is to be seen.
    """
    contents, size = _checked(contents, form)
    picture = _by_format((_decode_jpeg, _decode_png, _decode_gif, _decode_bmp, _decode_webp), contents, form)
    if form not in (None, "JPEG"):
        return _resized_to(picture, image_size), size
    orientation = exif_orientation(contents) if form is None else _jpeg_orientation(contents)
    lies_on_its_side = orientation >= 5
    # Turning the small picture instead of the large one gives the same pixels up to rounding, and is nearly
    # free.
    lying = tf.where(lies_on_its_side, tf.constant(image_size[::-1]), tf.constant(image_size))
    turned = _apply_orientation(_resized(picture, lying), orientation)
    return tf.ensure_shape(turned, (*image_size, 3)), tf.where(lies_on_its_side, size[::-1], size)


def resize_picture(picture: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Stretch a decoded picture to a given size, bilinear with antialiasing, as `decode_picture` does.

    Args:
        picture: `(height, width, 3)` uint8 or float in [0, 255].
        image_size: `(height, width)` of the result in pixels.

    Returns:
        uint8 `(height, width, 3)`.
    """
    return _resized_to(picture, image_size)


def check_header(contents: tf.Tensor, form: str | None = None) -> tf.Tensor:
    """Return `contents` unchanged after its format and size were checked; nothing is decoded.

    Args:
        contents: Scalar string, an encoded picture.
        form: As for `decode_picture`.

    Returns:
        The same scalar string; what is computed from it runs after the check.

    Raises:
        tf.errors.InvalidArgumentError: If the format is not known or the picture is too large.
    """
    return _checked(contents, form)[0]


def _checked(contents: tf.Tensor, form: str | None) -> tuple[tf.Tensor, tf.Tensor]:
    contents = tf.convert_to_tensor(contents)
    if form is None:
        known = tf.debugging.Assert(_format_number(contents) < len(FORMATS), [UNKNOWN])
        with tf.control_dependencies([known]):
            contents = tf.identity(contents)
    size = _by_format((_jpeg_size, _png_size, _gif_size, _bmp_size, _webp_size), contents, form)
    with tf.control_dependencies(_size_checks(size)):
        return tf.identity(contents), size


def _size_checks(size: tf.Tensor) -> list[tf.Operation]:
    """Return the operations that refuse a `(height, width)` of nothing or of too much."""
    height, width = tf.unstack(size)
    return [
        tf.debugging.Assert((height > 0) & (width > 0), ["picture has no pixels"]),
        tf.debugging.Assert(height * width <= MAX_PIXELS, [TOO_LARGE, width, height]),
    ]


def exif_orientation(contents: tf.Tensor) -> tf.Tensor:
    """Read a JPEG's EXIF orientation from its bytes.

    Args:
        contents: Scalar string, an encoded picture.

    Returns:
        Scalar int32 from 1 to 8; 1 (upright) if there is none, it is malformed, or the picture is no JPEG.
        The numbers are those of EXIF 2.3, tag 0x0112.
    """
    return tf.cond(_begins(contents, b"\xff\xd8\xff"), lambda: _jpeg_orientation(contents), lambda: tf.constant(1))


def _resized_to(picture: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    return tf.ensure_shape(_resized(picture, tf.constant(image_size)), (*image_size, 3))


def _resized(picture: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    resized = tf.image.resize(picture, size, method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


# --- formats ------------------------------------------------------------------------------------------------


def _begins(contents: tf.Tensor, magic: bytes, position: int = 0) -> tf.Tensor:
    """Whether `magic` stands at a position; `substr` fails behind the end, so bytes are padded."""
    padded = tf.strings.join([contents, b"\0" * (position + len(magic))])
    return tf.equal(tf.strings.substr(padded, position, len(magic)), magic)


def _format_number(contents: tf.Tensor) -> tf.Tensor:
    """Return the place in `FORMATS`, or their number if the bytes begin like none of them."""
    head = tf.strings.substr(tf.strings.join([contents, b"\0" * 12]), 0, 12)
    found = tf.stack(
        [
            _begins(head, b"\xff\xd8\xff"),
            _begins(head, b"\x89PNG\r\n\x1a\n"),
            _begins(head, b"GIF8"),
            _begins(head, b"BM"),
            _begins(head, b"RIFF") & _begins(head, b"WEBP", 8),
            True,
        ]
    )
    return tf.argmax(tf.cast(found, tf.int32), output_type=tf.int32)


def _by_format(
    branches: tuple[Callable[[tf.Tensor], tf.Tensor], ...], contents: tf.Tensor, form: str | None
) -> tf.Tensor:
    """Apply the function of a picture's format, of one per row of `FORMATS`."""
    if form is not None:
        return branches[0 if form == PLAIN_JPEG else FORMATS.index(form)](contents)
    return tf.switch_case(_format_number(contents), [lambda f=f: f(contents) for f in branches])


def _decode_jpeg(contents: tf.Tensor) -> tf.Tensor:
    # The transform is named because TensorFlow's default may change with its version or the machine.
    return tf.io.decode_jpeg(contents, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_png(contents: tf.Tensor) -> tf.Tensor:
    def deep() -> tf.Tensor:
        wide = tf.cast(tf.io.decode_png(contents, channels=4, dtype=tf.uint16), tf.int32)
        return _on_white(tf.cast((wide + 128) // 257, tf.uint8))

    def usual() -> tf.Tensor:
        return _on_white(tf.io.decode_png(contents, channels=4))

    def shallow() -> tf.Tensor:
        # TensorFlow 2.21 garbles fewer than 8 bits when it is asked for an alpha channel that is not there.
        picture = tf.io.decode_png(contents, channels=0)
        has_alpha = tf.shape(picture)[2] == 4
        opaque = tf.tile(picture, (1, 1, 3))[:, :, :3]  # one channel becomes three, three stay
        return tf.cond(has_alpha, lambda: _on_white(tf.ensure_shape(picture, (None, None, 4))), lambda: opaque)

    bits = _number(_bytes_of(contents), 24, 1)
    kind = tf.where(bits == 16, 0, tf.where(bits < 8, 1, 2))
    return tf.switch_case(kind, [deep, shallow, usual])


def _decode_gif(contents: tf.Tensor) -> tf.Tensor:
    # TensorFlow decodes every frame before it returns the first one, so the others are cut off.
    return tf.io.decode_image(_first_gif_frame(contents), channels=3, expand_animations=False)


def _decode_bmp(contents: tf.Tensor) -> tf.Tensor:
    """Decode a BMP; TensorFlow reads pictures with a palette as gray, so the palette is applied here."""
    data = _bytes_of(contents)
    bits, compression = _little(data, 28, 2), _little(data, 30, 4)
    usual = (compression == 0) & ((bits == 8) | (bits == 24) | (bits == 32))
    masks = _slice(data, 54, 12)  # red, green, blue; TensorFlow reads blue, green, red whatever they say
    fields = (compression == 3) & (bits == 32) & tf.reduce_all(masks == tf.constant(_BMP_MASKS, tf.uint8))
    plain = (_little(data, 14, 4) >= 40) & (usual | fields)
    refused = tf.debugging.Assert(plain, ["BMP of a kind that TensorFlow does not decode; save it as PNG"])
    with tf.control_dependencies([refused]):
        picture = tf.io.decode_bmp(contents, channels=0)

    def coloured() -> tf.Tensor:
        start = 14 + _little(data, 14, 4)
        colours = _slice(data, start, 1024)  # blue, green, red, unused for each index
        palette = tf.reverse(tf.reshape(colours, (256, 4))[:, :3], axis=[1])
        return tf.gather(palette, tf.cast(picture[:, :, 0], tf.int32))

    return tf.cond(bits == 8, coloured, lambda: picture[:, :, :3])


def _decode_webp(contents: tf.Tensor) -> tf.Tensor:
    return tf.cond(_is_animated_webp(contents), lambda: _first_frame(contents), lambda: _still_webp(contents))


def _still_webp(contents: tf.Tensor) -> tf.Tensor:
    # With a stated number of channels TensorFlow refuses the other kind instead of converting it.
    picture = tf.io.decode_image(contents, channels=0, expand_animations=False)
    has_alpha = tf.shape(picture)[2] == 4
    return tf.cond(has_alpha, lambda: _on_white(tf.ensure_shape(picture, (None, None, 4))), lambda: picture[:, :, :3])


def _on_white(picture: tf.Tensor) -> tf.Tensor:
    """Composite uint8 `(height, width, 4)` on white, in integers that fit 16 bits."""
    colour, alpha = tf.cast(picture[:, :, :3], tf.uint16), tf.cast(picture[:, :, 3:], tf.uint16)
    mixed = colour * alpha + (255 - alpha) * 255 + 127
    return tf.cast(mixed // 255, tf.uint8)


# --- GIF ----------------------------------------------------------------------------------------------------


def _first_gif_frame(contents: tf.Tensor) -> tf.Tensor:
    """Return the GIF up to the end of its first frame; one that ends earlier is left to the decoder."""
    data = _bytes_of(contents)
    place = _find_gif_frame(data)
    end = _behind_blocks(data, place + 11 + _colours(data, place + 9))
    whole = tf.size(data, tf.int64)
    first = tf.strings.join([tf.strings.substr(contents, tf.zeros((), tf.int64), tf.minimum(end, whole)), b";"])
    return tf.where(end < whole, first, contents)


def _find_gif_frame(data: tf.Tensor) -> tf.Tensor:
    """Return the position of the first frame's header, behind the end if the file ends before it."""

    def is_extension(place: tf.Tensor) -> tf.Tensor:
        return _number(data, place, 1) == 0x21

    def following(place: tf.Tensor) -> tuple[tf.Tensor]:
        return (_behind_blocks(data, place + 2),)

    start = 13 + _colours(data, 10)
    place = tf.while_loop(is_extension, following, (start,), maximum_iterations=_MOST_STEPS)[0]
    is_frame = (place >= tf.size(data, tf.int64)) | (_number(data, place, 1) == 0x2C)
    with tf.control_dependencies([tf.debugging.Assert(is_frame, ["GIF without a frame"])]):
        return tf.identity(place)


def _colours(data: tf.Tensor, place: tf.Tensor | int) -> tf.Tensor:
    """Return how many bytes of colours follow the header whose flags stand at a position."""
    flags = _number(data, place, 1)
    return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(tf.constant(2, tf.int64), flags % 8), 0)


def _behind_blocks(data: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Walk blocks that begin with their length, up to the empty one; return where it ends."""
    end = tf.size(data, tf.int64)

    def goes_on(place: tf.Tensor) -> tf.Tensor:
        return tf.cond(place < end, lambda: data[place] > 0, lambda: False)

    def following(place: tf.Tensor) -> tuple[tf.Tensor]:
        # Nearly all blocks are full, 255 bytes: up to 64 of them are one step.
        is_full = tf.concat([data[place : place + 256 * 64 : 256] == 255, [False]], axis=0)
        full = tf.argmin(tf.cast(is_full, tf.int32))
        return (place + tf.where(full > 0, 256 * full, 1 + tf.cast(data[place], tf.int64)),)

    place = tf.while_loop(goes_on, following, (start,), maximum_iterations=_MOST_STEPS)[0]
    with tf.control_dependencies([tf.debugging.Assert(~goes_on(place), ["GIF of too many blocks; save it as PNG"])]):
        return place + 1


# --- animated WebP ------------------------------------------------------------------------------------------


def _is_animated_webp(contents: tf.Tensor) -> tf.Tensor:
    flags = _number(_bytes_of(contents), 20, 1)
    return _begins(contents, b"VP8X", 12) & (tf.bitwise.bitwise_and(flags, 2) > 0)


def _first_frame(contents: tf.Tensor) -> tf.Tensor:
    """Decode the first frame of an animated WebP as the still picture that it is, on the white canvas.

    TensorFlow 2.21 writes behind the end of its buffer on animated WebP ("free(): corrupted unsorted
    chunks") and takes the process with it, so such bytes never reach its decoder.
    """
    data = _bytes_of(contents)
    place = _find_frame(data)
    header = _slice(data, place + 8, 16)
    left, top = 2 * _little(header, 0, 3), 2 * _little(header, 3, 3)
    still = _still_file(contents, data, place)
    is_picture = tf.reduce_any([_begins(still, chunk, 12) for chunk in (b"VP8 ", b"VP8L", b"VP8X\x0a\0\0\0\x10")])
    checks = [tf.debugging.Assert(is_picture, ["WebP frame holds no picture"]), *_size_checks(_webp_size(still))]
    with tf.control_dependencies(checks):
        picture = _still_webp(tf.identity(still))
    height, width = tf.unstack(tf.cast(_webp_size(contents), tf.int32))
    box = tf.shape(picture)
    below, right = height - tf.cast(top, tf.int32) - box[0], width - tf.cast(left, tf.int32) - box[1]
    fits = tf.debugging.Assert((below >= 0) & (right >= 0), ["WebP frame lies outside its canvas"])
    with tf.control_dependencies([fits]):
        paddings = [[tf.cast(top, tf.int32), below], [tf.cast(left, tf.int32), right], [0, 0]]
    return tf.pad(picture, paddings, constant_values=255)


def _find_frame(data: tf.Tensor) -> tf.Tensor:
    """Return the position of the first `ANMF` chunk."""
    end = tf.size(data, tf.int64)

    def is_other(place: tf.Tensor) -> tf.Tensor:
        return (place + 24 < end) & tf.reduce_any(_slice(data, place, 4) != tf.constant(list(b"ANMF"), tf.uint8))

    def following(place: tf.Tensor) -> tf.Tensor:
        size = _little(data, place + 4, 4)
        return place + 8 + size + size % 2

    place = tf.while_loop(is_other, lambda p: (following(p),), (tf.constant(30, tf.int64),))[0]
    found = tf.debugging.Assert(place + 24 < end, ["animated WebP without a frame"])
    with tf.control_dependencies([found]):
        return tf.identity(place)


def _still_file(contents: tf.Tensor, data: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
    """Wrap the data of the frame at `place` in the header of a still WebP file."""
    length = tf.minimum(_little(data, place + 4, 4), tf.size(data, tf.int64) - place - 8)
    frame = tf.strings.substr(contents, place + 24, tf.maximum(length - 16, 0))
    extent = tf.strings.substr(contents, place + 14, 6)  # width - 1 and height - 1, as a VP8X header holds them
    extended = tf.strings.join([b"VP8X\x0a\0\0\0\x10\0\0\0", extent])
    body = tf.strings.join([tf.where(_begins(frame, b"ALPH"), extended, b""), frame])
    size = tf.cast(tf.strings.length(body), tf.int64) + 4
    digits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(size, tf.constant([0, 8, 16, 24], tf.int64)), 255)
    return tf.strings.join([b"RIFF", tf.strings.reduce_join(tf.gather(_BYTE_STRINGS, digits)), b"WEBP", body])


# --- sizes, from headers ------------------------------------------------------------------------------------


def _jpeg_size(contents: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.image.extract_jpeg_shape(contents)[:2], tf.int64)


def _png_size(contents: tf.Tensor) -> tf.Tensor:
    data = _bytes_of(contents)
    return tf.stack([_number(data, 20, 4), _number(data, 16, 4)])


def _gif_size(contents: tf.Tensor) -> tf.Tensor:
    """Return the larger of the canvas and the first frame, which need not lie within it."""
    data = _bytes_of(contents)
    place = _find_gif_frame(data)
    frame = tf.stack([_little(data, place + 7, 2), _little(data, place + 5, 2)])
    return tf.maximum(tf.stack([_little(data, 8, 2), _little(data, 6, 2)]), frame)


def _bmp_size(contents: tf.Tensor) -> tf.Tensor:
    """Return the size; the height of a BMP is negative if its rows run from top to bottom."""
    data = _bytes_of(contents)
    height = _little(data, 22, 4)
    return tf.stack([tf.where(height >= 2**31, 2**32 - height, height), _little(data, 18, 4)])


def _webp_size(contents: tf.Tensor) -> tf.Tensor:
    """Return the size from the header of the lossy, lossless or extended kind."""
    data = _bytes_of(contents)
    packed = _little(data, 21, 4)  # lossless: 14 bits each of width - 1 and height - 1
    lossless = tf.stack([packed // 2**14 % 2**14 + 1, packed % 2**14 + 1])
    lossy = tf.stack([_little(data, 28, 2) % 2**14, _little(data, 26, 2) % 2**14])
    extended = tf.stack([_little(data, 27, 3) + 1, _little(data, 24, 3) + 1])
    simple = tf.where(_begins(contents, b"VP8L", 12), lossless, lossy)
    return tf.where(_begins(contents, b"VP8X", 12), extended, simple)


# --- EXIF ---------------------------------------------------------------------------------------------------


def _jpeg_orientation(contents: tf.Tensor) -> tf.Tensor:
    data = _bytes_of(contents)

    def read() -> tf.Tensor:
        place = _find_exif(data)
        return tf.where(place > 0, _tiff_orientation(data[place:]), 1)

    # Most pictures have no EXIF, and to look for its letters is a fifth of the price of walking the segments.
    head = data[:EXIF_WITHIN]
    letters = [head[at : tf.size(head) - 3 + at] == letter for at, letter in enumerate(b"Exif")]
    return tf.cond(tf.reduce_any(letters[0] & letters[1] & letters[2] & letters[3]), read, lambda: tf.constant(1))


def _find_exif(data: tf.Tensor) -> tf.Tensor:
    """Walk a JPEG's segments up to its first frame; return where the TIFF header of its EXIF begins, or 0."""
    zero = tf.constant(0, tf.int64)
    exif = tf.constant(list(b"\xff\xe1Exif\0\0"), tf.uint8)
    last = tf.constant([0xC0, 0xC1, 0xC2, 0xDA, 0xD9], tf.int64)  # a frame, a scan, the end

    def goes_on(place: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
        marker = _number(data, place + 1, 1)
        return (found == 0) & (_number(data, place, 1) == 255) & tf.reduce_all(marker != last)

    def step(place: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        head = tf.concat([_slice(data, place, 2), _slice(data, place + 4, 6)], axis=0)
        found = tf.where(tf.reduce_all(head == exif), place + 10, zero)
        is_fill = _number(data, place + 1, 1) == 255
        return place + tf.where(is_fill, zero + 1, 2 + _number(data, place + 2, 2)), found

    return tf.while_loop(goes_on, step, (zero + 2, zero))[1]


def _tiff_orientation(data: tf.Tensor) -> tf.Tensor:
    """Read tag 0x0112 of the first directory, in either byte order; anything malformed gives 1."""
    is_little = _number(data, 0, 2) == 0x4949

    def number(place: tf.Tensor | int, count: int) -> tf.Tensor:
        return tf.where(is_little, _little(data, place, count), _number(data, place, count))

    directory = number(4, 4)
    rows = tf.cast(_slice(data, directory + 2, 12 * number(directory, 2)), tf.int32)
    rows = tf.reshape(rows[: tf.size(rows) // 12 * 12], (-1, 12))
    order = tf.where(is_little, [1, 256], [256, 1])
    tags, kinds = (tf.reduce_sum(rows[:, at : at + 2] * order, axis=1) for at in (0, 2))
    values = tf.reduce_sum(rows[:, 8:10] * order, axis=1)
    is_sound = (tags == 0x0112) & (kinds == 3) & (values >= 1) & (values <= 8) & (number(2, 2) == 42)
    return tf.reduce_max(tf.concat([tf.where(is_sound, values, 1), [1]], axis=0))


def _apply_orientation(picture: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turn a picture upright: orientations 5 to 8 are 1 to 4 after the axes are swapped."""

    def turned() -> tf.Tensor:
        swapped = tf.cond(orientation >= 5, lambda: tf.transpose(picture, (1, 0, 2)), lambda: picture)
        turn = (orientation - 1) % 4
        mirrored = tf.cond((turn == 1) | (turn == 2), lambda: tf.reverse(swapped, [1]), lambda: swapped)
        return tf.cond(turn >= 2, lambda: tf.reverse(mirrored, [0]), lambda: mirrored)

    return tf.cond(orientation > 1, turned, lambda: picture)


# --- bytes --------------------------------------------------------------------------------------------------


def _bytes_of(contents: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_raw(contents, tf.uint8)


def _slice(data: tf.Tensor, start: tf.Tensor | int, count: tf.Tensor | int) -> tf.Tensor:
    """Return `count` bytes from `start`, zeros behind the end for a fixed count, fewer otherwise."""
    part = data[start : start + count]
    if isinstance(count, int):
        part = tf.ensure_shape(tf.pad(part, [[0, count - tf.size(part)]]), (count,))
    return part


def _number(data: tf.Tensor, start: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return the big-endian number of `count` bytes at `start`, scalar int64."""
    powers = tf.constant([256**power for power in reversed(range(count))], tf.int64)
    return tf.reduce_sum(tf.cast(_slice(data, start, count), tf.int64) * powers)


def _little(data: tf.Tensor, start: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return the little-endian number of `count` bytes at `start`, scalar int64."""
    powers = tf.constant([256**power for power in range(count)], tf.int64)
    return tf.reduce_sum(tf.cast(_slice(data, start, count), tf.int64) * powers)
