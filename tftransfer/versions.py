"""Which versions of Python, this toolkit and the packages that decide results are at work."""

from __future__ import annotations

import contextlib
import platform
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
