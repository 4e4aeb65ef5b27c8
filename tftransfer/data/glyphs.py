"""Pictures of letters, signs and invented characters: a source task without a download and without digits.

Two families of classes. *Printed* classes are letters (Latin, Greek, Cyrillic) and signs, set in the fonts
that Matplotlib ships and then bent. *Drawn* classes are characters that no alphabet knows: each is one to
three pen strokes fixed by the class's number, and each picture is a fresh handwriting of it. The idea of a
source that formulas make is that of Kataoka et al. 2020 (arXiv:2101.08515); one character, many hands is that
of Omniglot (Lake et al. 2015, doi:10.1126/science.aab3050).
"""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.interpolate import CubicSpline

from tftransfer.errors import InputError

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijklmnqrty"  # without small letters that only differ in size
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω"  # without look-alikes of Latin letters
CYRILLIC = "БДЖЗИЛУЦЧШЩЪЫЬЭЮЯбдзлфэя"
SIGNS = "!?&@#%$§¶+=<>*~{}[]()/\\∀∂∃∅∇∈∏√∝∞∠∧∩∪∫∴≈≠≡≤≥⊂⊃⊕⊗⊥"
PRINTED = LATIN + GREEK + CYRILLIC + SIGNS

DEJAVU, STIX, COMPUTER_MODERN = "Bitstream Vera / public domain", "SIL OFL 1.1", "BaKoMa"
FONTS: dict[str, tuple[str, str]] = {
    "DejaVuSans.ttf": ("3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22", DEJAVU),
    "DejaVuSans-Bold.ttf": ("b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167", DEJAVU),
    "DejaVuSans-Oblique.ttf": ("ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213", DEJAVU),
    "DejaVuSansMono.ttf": ("602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3", DEJAVU),
    "DejaVuSansMono-Bold.ttf": ("baada9a5172fe20886251aff0433fc38461912d5daf07287e7bee56620a8da96", DEJAVU),
    "DejaVuSansMono-Oblique.ttf": (
        "28052813f7a709fc89f52d192dc995ef4f0fdc5c3d7b73a49d6849b1916d0cd0",
        DEJAVU,
    ),
    "DejaVuSerif.ttf": ("107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa", DEJAVU),
    "DejaVuSerif-Bold.ttf": ("c3753f2ed6bc673f15846dc45addbeb3b9c872f32fb18fd53a21f1bef1ed7676", DEJAVU),
    "DejaVuSerif-Italic.ttf": ("3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04", DEJAVU),
    "STIXGeneral.ttf": ("167378031e2dddc6216d67819c9260e9a06ffc4c478e4e23cb98a6fd44b183c2", STIX),
    "STIXGeneralBol.ttf": ("e8533dc7083fa346bda1933d60ea4a83b67d0945bceaf1b3541f82b4a0e2c6a0", STIX),
    "STIXGeneralItalic.ttf": ("6cfcb333d22b7c3c623bdfd40174f14c85c3d6731ca6166c1edc80140eae8527", STIX),
    "STIXGeneralBolIta.ttf": ("98788fd4ba48dfbb2bd026c0e20a247a8b06c7372879628b7a6bb0d5bb09736c", STIX),
    "cmb10.ttf": ("074497b50c43ea57597181591f9893d38fc12a87e95104f5657fc2481f61a23a", COMPUTER_MODERN),
    "cmmi10.ttf": ("3092965b8811fd6a6765799664845181fc1dd1330b937f915808c485d316234d", COMPUTER_MODERN),
    "cmr10.ttf": ("4dd9761b058c009db9b2145f55ee6617d093c273dd3d6c5b3e43ff6110fa9bf6", COMPUTER_MODERN),
    "cmss10.ttf": ("7df91a83d05b2e471ec638cb0b435a360a3c792b09fc42a7da67e91f2e79115a", COMPUTER_MODERN),
    "cmti10.ttf": ("f9f1f9f654308ae82f7be4441ae89b080896b34cc220bbea173c5e9adcfe3ef7", COMPUTER_MODERN),
    "cmtt10.ttf": ("6211f09ae93599991afda970c24669dad1a77e253d915624fbf212f702f071d7", COMPUTER_MODERN),
}
"""File name in Matplotlib's font folder: (SHA-256 of the file that made the committed weights, licence)."""

CANVAS = 64  # pixels; glyphs are drawn at this size, then reduced
GLYPH = 44  # pixels; the longer side of a glyph on the canvas
CURVE_POINTS = 28  # per stroke
COARSE_SIZES = (10, 12, 16, 24, 32)

Stroke = tuple[np.ndarray, bool]  # control points (n, 2) as (x, y), and whether the curve is closed


def generated_signs(
    count: int, image_size: int = 64, seed: int = 0, drawn: int = 400, colour: float = 0.2
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Make pictures of printed and invented characters with their labels.

    Use it as a source task to pretrain on, or to measure what fine-tuning forgets. Classes are the same for
    every seed and as equal in number as `count` allows (a count below the number of classes takes the first
    ones, printed before drawn); picture `i` depends on `seed`, `i` and its label only.

    Args:
        count: Number of pictures, from 1.
        image_size: Height and width in pixels, from 8. Defaults to 64.
        seed: From 0. The same seed gives the same bits, with the same versions of Pillow and the fonts.
        drawn: Number of invented characters beside the printed ones, from 0. Defaults to 400.
        colour: Share of pictures in random colours, the others being light grey on black, in [0, 1].
            Defaults to 0.2.

    Returns:
        Pictures, uint8 `(count, image_size, image_size, 3)`; labels, int32 `(count,)`; the classes' names.

    Raises:
        InputError: If a number is out of its range.

    Example:
        >>> pictures, labels, class_names = generated_signs(4, image_size=32, drawn=10)
        >>> pictures.shape, len(class_names) - 10 == len(PRINTED)
        ((4, 32, 32, 3), True)
    """
    for name, value, least in (
        ("count", count, 1),
        ("image_size", image_size, 8),
        ("seed", seed, 0),
        ("drawn", drawn, 0),
    ):
        if value < least:
            raise InputError(f"`{name}` must be at least {least}. Received: {name}={value}")
    if not 0 <= colour <= 1:
        raise InputError(f"`colour` must be in [0, 1]. Received: colour={colour}")
    warn_of_other_fonts()
    names = class_names(drawn)
    labels = np.random.default_rng(seed).permutation(np.arange(count) % len(names)).astype(np.int32)
    pictures = np.empty((count, image_size, image_size, 3), np.uint8)
    for index, label in enumerate(labels):
        pictures[index] = _picture(int(label), image_size, colour, np.random.default_rng([seed, index]))
    return pictures, labels, names


def class_names(drawn: int) -> tuple[str, ...]:
    """Name the classes: the printed characters' Unicode names, then `drawn 0000`, `drawn 0001`, ..."""
    return (*(unicodedata.name(sign).lower() for sign in PRINTED), *(f"drawn {i:04d}" for i in range(drawn)))


def warn_of_other_fonts() -> None:
    """Warn if Matplotlib's fonts are not those that made the committed weights: the pictures differ then."""
    others = [name for name, (expected, _) in FONTS.items() if font_sha256(name) != expected]
    if others:
        warnings.warn(
            "Matplotlib's fonts differ from those that this project was made with, so generated pictures may"
            f" differ too: {', '.join(others)}.",
            stacklevel=3,
        )


@cache
def fonts() -> dict[str, dict[str, str]]:
    """Return the SHA-256 and the licence of every font that characters are rendered in."""
    return {name: {"sha256": font_sha256(name), "licence": licence} for name, (_, licence) in FONTS.items()}


def font_sha256(name: str) -> str:
    """Give the SHA-256 of one of Matplotlib's font files."""
    return hashlib.sha256(_font_file(name).read_bytes()).hexdigest()


def _font_file(name: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


def _picture(label: int, image_size: int, colour: float, rng: np.random.Generator) -> np.ndarray:
    """Make one picture `(image_size, image_size, 3)` of the class `label`."""
    if label < len(PRINTED):
        canvas = _bent(_printed(PRINTED[label], rng), rng)
    else:
        canvas = _ink(_handwriting(label - len(PRINTED), rng), rng)
    return _painted(_reduced(canvas, image_size, rng), colour, rng)


# Printed characters.


def _printed(character: str, rng: np.random.Generator) -> Image.Image:
    """Set a character in one of the fonts that hold it, in one of three weights."""
    fonts = _fonts_for(character)
    return _glyph(character, fonts[rng.integers(len(fonts))], int(rng.choice((0, 0, 2, 5))))


def _fonts_for(character: str) -> list[str]:
    """List the fonts that hold a character: Computer Modern has Latin letters only, italics lack signs."""
    if character in SIGNS:
        return ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf"]
    return [name for name in FONTS if character in LATIN or not name.startswith("cm")]


@cache
def _glyph(character: str, font: str, extra_width: int) -> Image.Image:
    """Render a character in the middle of the canvas, its longer side `GLYPH` pixels."""
    large = Image.new("L", (160, 160))
    ImageDraw.Draw(large).text((80, 80), character, 255, _typeface(font), anchor="mm", stroke_width=extra_width)
    large = large.crop(large.getbbox())
    scale = GLYPH / max(large.size)
    small = large.resize([max(2, round(side * scale)) for side in large.size], Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(small, ((CANVAS - small.width) // 2, (CANVAS - small.height) // 2))
    return canvas


@cache
def _typeface(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(font)), 72, layout_engine=ImageFont.Layout.BASIC)


def _bent(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn, slant, stretch and bend a canvas: an affine map and a mesh of nine cells, corners jittered."""
    steps = np.linspace(0, CANVAS, 4)
    corners = np.stack(np.meshgrid(steps, steps), axis=-1) - CANVAS / 2
    corners = corners @ np.linalg.inv(_affine(rng)).T + CANVAS / 2 + rng.normal(0, 2.2, (4, 4, 2))
    edges = steps.round().astype(int)
    mesh = [
        (
            (edges[j], edges[i], edges[j + 1], edges[i + 1]),
            (*corners[i, j], *corners[i + 1, j], *corners[i + 1, j + 1], *corners[i, j + 1]),
        )
        for i in range(3)
        for j in range(3)
    ]
    return canvas.transform(canvas.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _affine(rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Draw a matrix `(2, 2)` that turns (sd 7 degrees), slants (sd 0.22) and stretches (sd 15 %)."""
    angle, slant = rng.normal(0, 0.13 * strength), rng.normal(0, 0.22 * strength)
    width, height = np.exp(rng.normal(0, 0.15 * strength, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.array([[width, slant], [0, height]])


# Drawn characters.


@cache
def _character(number: int) -> tuple[Stroke, ...]:
    """Invent character `number`: strokes of 4 to 11 control points in all, in a box of height 1 around 0."""
    rng = np.random.default_rng([2026, number])
    strokes = _strokes(rng)
    while not 4 <= sum(4 if closed else len(points) for points, closed in strokes) <= 11:
        strokes = _strokes(rng)
    every_point = np.concatenate([points for points, _ in strokes])
    low, high = every_point.min(axis=0), every_point.max(axis=0)
    size = np.maximum(high - low, 0.35) / [rng.uniform(0.5, 0.95), 1]
    return tuple(((points - (low + high) / 2) / size, closed) for points, closed in strokes)


def _strokes(rng: np.random.Generator) -> list[Stroke]:
    """Draw one to three strokes; a later one starts at a point of an earlier one seven times in ten."""
    strokes: list[Stroke] = []
    for number in range(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2))):
        points, closed = _stroke(rng)
        if number and rng.random() < 0.7:
            earlier = strokes[rng.integers(number)][0]
            points = points + earlier[rng.integers(len(earlier))] - points[0]
        strokes.append((points, closed))
    return strokes


def _stroke(rng: np.random.Generator) -> Stroke:
    """Draw a line, a curve through three to five points, an arc or a loop inside the unit square."""
    kind = rng.choice(("line", "curve", "arc", "loop"), p=(0.28, 0.34, 0.26, 0.12))
    if kind == "loop":
        return _ellipse(rng, np.arange(6) / 6 * 2 * np.pi), True
    if kind == "arc":
        span = rng.uniform(0.6, 1.9) * np.pi * rng.choice((-1, 1))
        return _ellipse(rng, rng.uniform(0, 2 * np.pi) + np.linspace(0, span, 6)), False
    count, least = (2, 0.45) if kind == "line" else (rng.integers(3, 6), 0.3)
    points = rng.uniform(0, 1, (count, 2))
    while np.hypot(*np.diff(points, axis=0).T).min() < least:
        points = rng.uniform(0, 1, (count, 2))
    return points, False


def _ellipse(rng: np.random.Generator, angles: np.ndarray) -> np.ndarray:
    radii = rng.uniform(0.15, 0.5, 2)
    return rng.uniform(0.25, 0.75, 2) + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii


def _handwriting(number: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Write character `number` with an unsteady hand; returns one `(CURVE_POINTS, 2)` line per stroke."""
    whole, phase, bend = _affine(rng), rng.uniform(0, 2 * np.pi, 2), rng.normal(0, 0.04, 2)
    lines = []
    for points, closed in _character(number):
        middle = points.mean(axis=0)
        unsteady = points - middle + rng.normal(0, 0.045, points.shape)
        unsteady = unsteady @ _affine(rng, 0.6).T + middle + rng.normal(0, 0.035, 2)
        line = _spline(len(points), closed) @ unsteady
        lines.append((line + np.sin(4 * line[:, ::-1] + phase) * bend) @ whole.T)
    return lines


@cache
def _spline(count: int, closed: bool) -> np.ndarray:
    """Give the matrix `(CURVE_POINTS, count)` that takes control points to points on the cubic spline."""
    ends = np.eye(count)[:1] if closed else np.empty((0, count))
    values = np.concatenate([np.eye(count), ends])
    kind = "periodic" if closed else "natural"
    return CubicSpline(np.linspace(0, 1, len(values)), values, bc_type=kind)(np.linspace(0, 1, CURVE_POINTS))


def _ink(lines: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """Draw lines in the middle of the canvas with a round pen of random width."""
    every_point = np.concatenate(lines)
    low, high = every_point.min(axis=0), every_point.max(axis=0)
    width = rng.uniform(4, 10)
    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        line = (line - (low + high) / 2) * GLYPH / max((high - low).max(), 1e-3) + CANVAS / 2
        pen.line(line.ravel().tolist(), 255, round(width))
        for x, y in (*line[::4], line[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
    return canvas


# Both.


def _reduced(canvas: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """Cut a canvas to its ink, reduce it (to 8x8 half of the time) and bring it to `image_size`."""
    left, top, right, bottom = canvas.getbbox() or (0, 0, CANVAS, CANVAS)
    side = max(8, round(max(right - left, bottom - top) * rng.uniform(0.98, 1.18)))
    spare = np.minimum(np.maximum(side - np.array([right - left, bottom - top]), 0), 0.15 * side)
    shift = rng.uniform(-0.5, 0.5, 2) * spare
    x, y = round((left + right - side) / 2 + shift[0]), round((top + bottom - side) / 2 + shift[1])
    coarse = 8 if rng.random() < 0.5 else int(rng.choice(COARSE_SIZES))
    small = canvas.crop((x, y, x + side, y + side)).resize((coarse, coarse), Image.Resampling.BOX)
    return small.resize((image_size, image_size), Image.Resampling.BILINEAR)


def _painted(mask: Image.Image, colour: float, rng: np.random.Generator) -> np.ndarray:
    """Give a mask its paint: light grey on black, or two colours that differ in brightness, and noise."""
    share = np.asarray(mask, np.float32)[..., None] / 255
    if rng.random() >= colour:
        return np.repeat((share * rng.uniform(200, 255)).astype(np.uint8), 3, axis=-1)
    ink, paper = rng.uniform(0, 255, (2, 3))
    while abs(ink.mean() - paper.mean()) < 70:
        ink, paper = rng.uniform(0, 255, (2, 3))
    painted = share * ink + (1 - share) * paper
    painted += rng.normal(0, rng.uniform(0, 12), (*share.shape[:2], 1))
    return painted.clip(0, 255).astype(np.uint8)
