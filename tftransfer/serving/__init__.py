"""Serving: write a SavedModel, prove that it answers as the trained network does, and publish it.

The surface is loaded lazily, so that `capi` can run in a process that never imports TensorFlow. The modules
are not called `verify` and `publish`: a submodule would hide the function of the same name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tftransfer.serving.export import export_savedmodel
    from tftransfer.serving.publication import newest_version, next_version, publish
    from tftransfer.serving.verification import Verification, verify

_FUNCTIONS = {
    "Verification": "verification",
    "export_savedmodel": "export",
    "newest_version": "publication",
    "next_version": "publication",
    "publish": "publication",
    "verify": "verification",
}

__all__ = ["Verification", "export_savedmodel", "newest_version", "next_version", "publish", "verify"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"tftransfer.serving.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'tftransfer.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
