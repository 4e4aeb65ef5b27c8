"""Encoded pictures of every kind, made by Pillow, and folders of them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image


def pixels(height=20, width=30, channels=3, seed=0):
    """Smooth random pixels: noise would not survive a JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gray_png(width, height, bits, compressed):
    """A gray PNG around rows that are compressed already."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def png_bomb(side=20_000):
    """A gray PNG of `side` squared zeros, without ever holding them."""
    compressor = zlib.compressobj(9)
    rows = [compressor.compress(bytes(side + 1)) for _ in range(side)]
    return gray_png(side, side, 8, b"".join(rows) + compressor.flush())


def shallow_png(bits):
    """A gray PNG of 16x16 pixels whose bytes are random."""
    rows = np.random.default_rng(0).integers(0, 256, (16, 2 * bits), np.uint8)
    return gray_png(16, 16, bits, zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))


@pytest.fixture(scope="session")
def encoded():
    """One encoded picture of each kind that can be used, by name."""
    rgb, rgba = Image.fromarray(pixels()), Image.fromarray(pixels(channels=4))
    deep = Image.fromarray((pixels()[..., 0].astype(np.uint16) << 8) + 77)
    other = Image.fromarray(pixels(seed=1))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg_progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg_gray": encode(rgb.convert("L"), "JPEG"),
        "jpeg_cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "png": encode(rgb, "PNG"),
        "png_gray": encode(rgb.convert("L"), "PNG"),
        "png_bilevel": encode(rgb.convert("1"), "PNG"),
        "png_gray_2": shallow_png(2),
        "png_gray_4": shallow_png(4),
        "png_palette": encode(palette, "PNG"),
        "png_palette_2": encode(rgb.quantize(4), "PNG", bits=2),
        "png_palette_2_alpha": encode(rgb.quantize(4), "PNG", bits=2, transparency=1),
        "png_palette_alpha": encode(palette, "PNG", transparency=3),
        "png_gray_alpha": encode(rgba.convert("LA"), "PNG"),
        "png_rgba": encode(rgba, "PNG"),
        "png_gray_16": encode(deep, "PNG"),
        "bmp": encode(rgb, "BMP"),
        "bmp_gray": encode(rgb.convert("L"), "BMP"),
        "bmp_palette": encode(palette, "BMP"),
        "gif": encode(palette, "GIF"),
        "gif_animated": encode(rgb, "GIF", save_all=True, append_images=[other]),
        "webp": encode(rgb, "WEBP"),
        "webp_lossless": encode(rgb, "WEBP", lossless=True),
        "webp_rgba": encode(rgba, "WEBP", lossless=True),
        "webp_rgba_lossy": encode(rgba, "WEBP"),
        "webp_animated": encode(rgb, "WEBP", save_all=True, append_images=[other]),
        "webp_animated_rgba": encode(rgba, "WEBP", save_all=True, append_images=[other], lossless=True),
        "webp_animated_rgba_lossy": encode(rgba, "WEBP", save_all=True, append_images=[other]),
    }


@pytest.fixture(scope="session")
def bomb():
    """A PNG of 20000x20000 pixels in less than 400 kB."""
    return png_bomb()


@pytest.fixture(scope="session")
def odd_files(encoded, bomb):
    """Files by name that are broken (the first four) or unusual but readable."""
    return {
        "truncated.jpg": encoded["jpeg"][:-200],
        "page.jpg": b"<!DOCTYPE html>\n<html>",
        "empty.jpg": b"",
        "bomb.png": bomb,
        "alpha.webp": encoded["webp_rgba"],
        "deep.png": encoded["png_gray_16"],
        "cmyk.jpg": encoded["jpeg_cmyk"],
        "moving.gif": encoded["gif_animated"],
        "really_png.jpg": encoded["png"],
    }


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes PNG files `FOLDER/NUMBER.png` from `{folder: count}`."""

    def make(counts, name="photos"):
        root = tmp_path / name
        root.mkdir()
        for place, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels(8, 8, seed=100 * place + number))
                image.save(root / folder / f"{number}.png")
        return root

    return make
