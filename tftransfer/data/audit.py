"""Tell unusable pictures from usable ones, with a reason that a person can act on."""

from __future__ import annotations

import re

import tensorflow as tf

from tftransfer.data import images

_MAGIC = (
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"\x89PNG\r\n\x1a\n", 0, "PNG"),
    (b"GIF8", 0, "GIF"),
    (b"BM", 0, "BMP"),
    (b"WEBP", 8, "WebP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"II+\0", 0, "TIFF"),
    (b"MM\0+", 0, "TIFF"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftypavis", 4, "AVIF"),
    (b"ftyphei", 4, "HEIC"),
    (b"ftyphev", 4, "HEIC"),
    (b"ftypmif1", 4, "HEIF"),
    (b"ftypmsf1", 4, "HEIF"),
    (b"\0\0\1\0", 0, "Windows icon"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"\0\0\0\x0cJXL ", 0, "JPEG XL"),
    (b"\0\0\0\x0cjP", 0, "JPEG 2000"),
    (b"8BPS", 0, "Photoshop"),
    (b"%PDF", 0, "PDF"),
)
_POINTER = b"version https://git-lfs"
_NO_PIXELS = "picture has no pixels"
_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "WebP": (".webp",),
}
# A graph says `assertion failed: [text] [number]...`, eager execution `Summarized data: b'text'`.
_ASSERTION = re.compile(r"(?:assertion failed: \[(?P<graph>[^\]]*)\]|Summarized data: b'(?P<eager>[^\n]*)')")


def picture_format(contents: bytes) -> str | None:
    """Return a picture's format from its first bytes, or None if they are those of no known one.

    Example:
        >>> picture_format(b"GIF89a..."), picture_format(b"<!DOCTYPE html>")
        ('GIF', None)
    """
    for magic, place, name in _MAGIC:
        if contents[place : place + len(magic)] == magic and (name != "WebP" or contents[:4] == b"RIFF"):
            return name
    return None


def form(contents: bytes) -> str | None:
    """Return a picture's format, and of a JPEG whether it holds no EXIF: what its decoder may be told.

    Example:
        >>> form(b"GIF89a..."), form(bytes([255, 216, 255]) + b"..."), form(b"<!DOCTYPE html>")
        ('GIF', 'JPEG without EXIF', None)
    """
    name = picture_format(contents)
    return images.PLAIN_JPEG if name == "JPEG" and b"Exif" not in contents[: images.EXIF_WITHIN] else name


def has_wrong_extension(name: str, contents: bytes) -> bool:
    """Whether a file's extension names another picture format than its content has.

    Example:
        >>> has_wrong_extension("cat.jpg", b"GIF89a...")
        True
    """
    extensions = _EXTENSIONS.get(picture_format(contents) or "", ())
    return bool(extensions) and not name.lower().endswith(extensions)


def why_unusable(contents: bytes) -> str | None:
    """Return why the bytes cannot be a usable picture, from the header alone, or None.

    What only decoding shows, such as a truncated JPEG, is explained by `explain`.

    Args:
        contents: An encoded picture.
    """
    reason = why_not_a_picture(contents)
    if reason:
        return reason
    try:
        _check_header(tf.constant(contents))
    except tf.errors.OpError as error:
        return explain(error, contents)
    return None


def why_not_a_picture(contents: bytes) -> str | None:
    """Return why the first bytes are not those of a picture that TensorFlow decodes, or None.

    Args:
        contents: An encoded picture.

    Example:
        >>> why_not_a_picture(b"")
        'empty file'
        >>> why_not_a_picture(b"<!DOCTYPE html><html>")
        "not a picture: begins with '<!DOCTYPE html><'"
    """
    if not contents:
        return "empty file"
    name = picture_format(contents)
    if contents.startswith(_POINTER):
        return "not a picture: a pointer of Git LFS; `git lfs pull` fetches what it stands for"
    if name is None:
        return f"not a picture: begins with {_beginning(contents)}"
    if name not in images.FORMATS:
        return f"{name} is not a picture format that TensorFlow decodes ({', '.join(images.FORMATS)})"
    return None


@tf.function(input_signature=[tf.TensorSpec((), tf.string)], autograph=False)
def _check_header(contents: tf.Tensor) -> tf.Tensor:
    return images.check_header(contents)


def explain(error: Exception, contents: bytes) -> str:
    """Say in a few words why decoding failed.

    Args:
        error: What TensorFlow raised.
        contents: The encoded picture.
    """
    message = str(getattr(error, "message", error))
    stated = _ASSERTION.search(message)
    if stated:
        text = stated["graph"] or stated["eager"]
        if text == _NO_PIXELS and _ends_early(picture_format(contents) or "", contents):
            return f"{picture_format(contents)} data ends early"
        numbers = re.findall(r"\[(\d+)\]", message[stated.end() :])[:2]
        return text.replace("picture", f"picture of {numbers[0]}x{numbers[1]} pixels", 1) if len(numbers) == 2 else text
    name = picture_format(contents) or "picture"
    return f"{name} data ends early" if _ends_early(name, contents) else f"damaged {name} data"


def _ends_early(name: str, contents: bytes) -> bool:
    """Whether the mark that ends a file of this format is missing."""
    if name == "WebP":
        return len(contents) < 8 + int.from_bytes(contents[4:8], "little")
    if name == "BMP":
        return len(contents) < int.from_bytes(contents[2:6], "little")
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}.get(name, b"")
    return end not in contents[-64:]


def _beginning(contents: bytes) -> str:
    """Return the first bytes as a person can read them: as text if they are text, else in hexadecimal."""
    head = contents[:16]
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return repr(head.decode("ascii").strip()) if printable else f"bytes {head[:8].hex(' ')}"
