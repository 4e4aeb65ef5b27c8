"""Which versions of Python, this toolkit and the packages that decide results are at work."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from importlib import metadata

from tftransfer import __version__

PACKAGES = ("tensorflow", "keras", "numpy", "scikit-learn", "safetensors", "tensorflow-datasets")


def versions() -> dict[str, str]:
    """Return each one's version by its name; what is not installed is left out."""
    found = {"python": platform.python_version(), "tftransfer": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which versions are others than before.

    Example:
        >>> differences({"keras": "3.14", "numpy": "2.4"}, {"keras": "3.15", "numpy": "2.4"})
        'keras 3.14 there, 3.15 here'
    """
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} there, {now.get(name)} here" for name in changed)
