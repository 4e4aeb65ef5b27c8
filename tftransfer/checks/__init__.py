"""Checks: what can be said about a trained model. Each module has a function returning `report.Findings`."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["calibration", "forgetting", "intervals", "labels", "overfitting", "performance", "probe"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"tftransfer.checks.{name}")
    raise AttributeError(f"module 'tftransfer.checks' has no attribute {name!r}")
