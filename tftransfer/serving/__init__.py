"""Serving: write a SavedModel or files for other runtimes, prove that they answer as the trained network does, publish.

The surface is loaded lazily, so that `capi` can run in a process that never imports TensorFlow. The modules
are not called `verify` and `publish`: a submodule would hide the function of the same name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tftransfer.serving.export import export_savedmodel
    from tftransfer.serving.litert import export_litert
    from tftransfer.serving.onnx import export_onnx
    from tftransfer.serving.publication import newest_version, next_version, publish
    from tftransfer.serving.verification import Verification, verify

_FUNCTIONS = {
    "Verification": "verification",
    "export_litert": "litert",
    "export_onnx": "onnx",
    "export_savedmodel": "export",
    "newest_version": "publication",
    "next_version": "publication",
    "publish": "publication",
    "verify": "verification",
}

__all__ = [
    "Verification",
    "export_litert",
    "export_onnx",
    "export_savedmodel",
    "newest_version",
    "next_version",
    "publish",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"tftransfer.serving.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'tftransfer.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
