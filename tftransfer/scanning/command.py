"""What `tftransfer scan` does; apart from the other commands, which need TensorFlow."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from tftransfer.errors import InputError
from tftransfer.scanning.examination import SCANNED_FOR, examine
from tftransfer.scanning.finding import printable


def scan(options: argparse.Namespace) -> int:
    """Print what is found in each path; 1 if anything is."""
    for path in options.paths:
        if not os.path.lexists(path):
            raise InputError(f"there is no file or folder {path}")
    scanned = [(path, list(examine(path))) for path in options.paths]
    findings = [finding for _, models in scanned for _, found in models for finding in found]
    if options.json:
        content = [
            {"path": str(path), "models": [str(model) for model, _ in models], "findings": _json(models)}
            for path, models in scanned
        ]
        print(json.dumps(content, indent=1))
    elif not options.quiet:
        for path, models in scanned:
            _print(str(path), models)
    return 1 if findings else 0


def _json(models: list) -> list[dict[str, str]]:
    return [asdict(finding) for _, found in models for finding in found]


def _print(path: str, models: list) -> None:
    findings = [finding for _, found in models for finding in found]
    for finding in findings:
        print(finding)
    if not findings:
        number = f"{len(models)} model{'s' if len(models) > 1 else ''}"
        print(f"{printable(path)}: nothing found in {number} (scanned for: {SCANNED_FOR})")
