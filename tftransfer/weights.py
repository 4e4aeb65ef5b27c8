"""Weights of backbones: which file, is it the published one, and what the manifest says of it."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tftransfer.errors import InputError

# Squares for which Keras has ImageNet weights of their own; every other size takes those of 224 pixels.
SEVERAL_SIZES = {"MobileNet": (128, 160, 192, 224), "MobileNetV2": (96, 128, 160, 192, 224)}


def digest(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Compute the digest of a file.

    Args:
        path: The file.
        algorithm: A name of `hashlib`. Defaults to `"sha256"`.

    Returns:
        The digest in hexadecimal.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def demo_weights_path() -> Path:
    """Return the file of the weights that come with this package."""
    return Path(str(resources.files("tftransfer") / "assets" / "demo_backbone.weights.h5"))


def check_weights(weights: str | os.PathLike[str] | None, weights_kind: str | None) -> str | os.PathLike[str] | None:
    """Check that `weights` and `weights_kind` are something that can be loaded.

    Args:
        weights: `"imagenet"`, `"demo"`, None or a file.
        weights_kind: `"imagenet"` or None.

    Returns:
        `weights`, as it is.

    Raises:
        InputError: If a value is not known or the file is not there.
    """
    if weights_kind not in (None, "imagenet"):
        raise InputError(f"`weights_kind` must be None or 'imagenet'. Received: weights_kind={weights_kind!r}")
    if weights in (None, "imagenet", "demo"):
        return weights
    if not isinstance(weights, (str, os.PathLike)) or not Path(weights).is_file():
        raise InputError(
            "`weights` must be 'imagenet', 'demo', None or a file (.h5, .weights.h5, .keras), and there is "
            f"no such file. Received: weights={str(weights)!r}"
        )
    return weights


def check_demo(name: str) -> None:
    """Check that the embedded weights are this backbone's and whole.

    Args:
        name: Name of a row.

    Raises:
        InputError: If they are another row's, missing, or not as they were published.
    """
    card = demo_card()
    if name != card["backbone"]:
        raise InputError(
            f"`weights='demo'` fits {card['backbone']!r} only. Take that backbone, or `weights='imagenet'`, "
            f"a file or None. Received: backbone={name!r}"
        )
    if not demo_weights_path().is_file() or digest(demo_weights_path()) != card["sha256"]:
        raise InputError(
            f"The embedded demo weights are missing or damaged: {demo_weights_path().name} has not the "
            f"SHA-256 {card['sha256']}. Install tftransfer again"
        )


def demo_card() -> dict[str, Any]:
    """Return what is known of the embedded weights: `backbone`, `image_size`, `sha256`."""
    return asset("demo_backbone.json")


def describe_weights(
    name: str,
    weights: str | os.PathLike[str] | None,
    weights_kind: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Say for the manifest which weights go into a backbone.

    Args:
        name: Name of the row.
        weights: As `backbones.build` takes it.
        weights_kind: As `backbones.build` takes it. Defaults to None.
        image_size: `(height, width)` in pixels: MobileNet V1 and V2 have ImageNet weights for several sizes.
            Defaults to the natural size.

    Returns:
        `kind` (`"random"`, `"imagenet"`, `"demo"` or `"file"`), `file` (its name without the folder, or
        None), `sha256` (None where no file is at hand), `known` (whether the digest is one that was
        published) and `imagenet_rescaling` (whether EfficientNet V1's additional rescaling is in the
        network).

    Raises:
        InputError: If there is no such file.

    Example:
        >>> describe_weights("MobileNet", None)["kind"]
        'random'
    """
    weights = check_weights(weights, weights_kind)
    kind = weights if weights in ("imagenet", "demo") else "random" if weights is None else "file"
    path = _path_of(name, weights, image_size)
    at_hand = path is not None and path.is_file()
    return {
        "kind": kind,
        "file": path.name if path else None,
        "sha256": digest(path) if path and at_hand else None,
        "known": bool(path and at_hand and (kind == "demo" or published_name(path))),
        "imagenet_rescaling": name.startswith("EfficientNetB") and has_imagenet_rescaling(weights, weights_kind),
    }


def _path_of(name: str, weights: str | os.PathLike[str] | None, image_size: tuple[int, int] | None) -> Path | None:
    if weights is None:
        return None
    if weights == "demo":
        return demo_weights_path()
    if weights == "imagenet":
        home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))  # Keras shows its own to nobody
        return home / "models" / _keras_file(name, image_size)
    return Path(weights)


def _keras_file(name: str, image_size: tuple[int, int] | None) -> str:
    """Return the name of the file that Keras downloads for a row at a size."""
    file = asset("keras_weights.json")["networks"][name]["file"]
    network = name.partition("-")[0]
    if image_size and image_size[0] == image_size[1] and image_size[0] in SEVERAL_SIZES.get(network, ()):
        return file.replace("_224_", f"_{image_size[0]}_")
    return file


def published_name(path: Path) -> str | None:
    """Return the name under which Keras publishes a file of this content, or None."""
    known = asset("keras_weights.json")
    for algorithm in ("md5", "sha256"):
        found = digest(path, algorithm)
        for name, published in known[algorithm].items():
            if published == found:
                return name
    return None


def has_imagenet_rescaling(weights: str | os.PathLike[str] | None, weights_kind: str | None) -> bool:
    """Tell whether weights of an EfficientNet V1 were trained with ImageNet's additional rescaling.

    Args:
        weights: As `backbones.build` takes it.
        weights_kind: As `backbones.build` takes it.

    Returns:
        True for `"imagenet"`, for a file with Keras' own digest, for a `.keras` file whose network has it,
        and for any other file with `weights_kind="imagenet"`.
    """
    if weights is None or weights == "demo":
        return False
    if weights == "imagenet":
        return True
    path = Path(weights)
    if zipfile.is_zipfile(path):
        return _config_has_rescaling(path)
    return weights_kind == "imagenet" or (published_name(path) or "").startswith("efficientnetb")


def _config_has_rescaling(path: Path) -> bool:
    """Look into a `.keras` file's description, as text: nothing in it is run."""
    try:
        config = json.loads(zipfile.ZipFile(path).read("config.json"))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path.name} is no whole .keras file: {error}") from error
    return any(
        isinstance(scale, list) and np.allclose(scale, 1 / np.sqrt([0.229, 0.224, 0.225]))
        for scale in _rescaling_scales(config)
    )


def _rescaling_scales(config: object) -> Iterator[object]:
    if isinstance(config, dict):
        if config.get("class_name") == "Rescaling":
            yield config["config"]["scale"]
        for value in config.values():
            yield from _rescaling_scales(value)
    elif isinstance(config, list):
        for value in config:
            yield from _rescaling_scales(value)


def verify(path: Path) -> None:
    """Refuse a file that has the name of a published one but not its digest.

    Args:
        path: A weights file.

    Raises:
        InputError: If its digest is not the published one.
    """
    known = asset("keras_weights.json")
    for algorithm in ("sha256", "md5"):
        expected = known[algorithm].get(path.name)
        if expected and digest(path, algorithm) != expected:
            raise InputError(
                f"`weights` has the name of a file that Keras publishes but not its {algorithm.upper()} "
                f"{expected}: {path.name} is damaged or was changed. Download it again; to load it as it is, "
                "rename it"
            )


def rows_of_size(totals: set[int]) -> list[str]:
    """Name the rows of the table whose number of parameters is one of `totals`."""
    networks = asset("keras_weights.json")["networks"]
    return [row for row, facts in networks.items() if facts["parameters"] in totals]


def asset(name: str) -> dict[str, Any]:
    """Read one of the JSON files that come with this package."""
    return json.loads((resources.files("tftransfer") / "assets" / name).read_text(encoding="utf-8"))
