"""Transfer learning for Keras 3 and TensorFlow: fine-tune a pretrained network, know what it is worth, serve it.

The surface is loaded lazily: `import tftransfer` costs no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "adapters",
    "advice",
    "backbones",
    "builders",
    "bundles",
    "checks",
    "choices",
    "comparison",
    "data",
    "planning",
    "report",
    "runs",
    "serving",
    "strategies",
    "tasks",
)
_FUNCTIONS = {
    "InputError": "errors",
    "devices": "distribution",
    "find_learning_rate": "rate_test",
    "fine_tune": "training",
    "load_model": "bundles",
    "predict": "inference",
    "scan": "scanning",
    "set_trainable": "trainable",
}

__all__ = sorted([*_MODULES, *_FUNCTIONS])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tftransfer.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"tftransfer.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'tftransfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
