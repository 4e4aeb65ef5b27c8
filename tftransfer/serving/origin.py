"""What a version was exported from, kept in it: a version that is there already need not be published again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from tftransfer import features, tasks, tensor_files, trainable
from tftransfer.tasks import Task
from tftransfer.versions import versions
from tftransfer.weights import digest

FILE = Path("assets.extra") / "tftransfer_origin.json"


@dataclass(frozen=True)
class Origin:
    """What a version was exported from.

    Args:
        source: Digest of it, see `source_of`.
        kept: Why its variables were kept; empty for a graph of constants.
    """

    source: str
    kept: str


def source_of(model: keras.Model, task: Task, samples: Sequence[bytes], **options: Any) -> str:
    """Return the SHA-256 over all that an export depends on.

    Args:
        model: The network; names that Keras numbers anew in each session do not count, nor states of random layers.
        task: What its outputs mean.
        samples: Encoded pictures that go into it.
        options: JSON; how it is exported.

    Returns:
        "" for a network with a layer that Keras cannot describe.
    """
    described = features.described(model)
    if not described:
        return ""
    variables = [variable.numpy() for variable in model.variables if not trainable.is_generator(variable)]
    parts = {
        "network": described,
        "variables": tensor_files.digest_of(tensor_files.numbered(variables)),
        "task": tasks.to_json(task),
        "samples": [hashlib.sha256(sample).hexdigest() for sample in samples],
        "options": options,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write(version_dir: Path, origin: Origin) -> None:
    """Put it into a SavedModel's folder in which all other files are, and which digests they have."""
    (version_dir / FILE).parent.mkdir(exist_ok=True)
    content = {**vars(origin), "files": _digests(version_dir)}
    (version_dir / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(version_dir: Path) -> Origin | None:
    """Return what a SavedModel was exported from; None if it does not say, or its files are others than then."""
    try:
        content = json.loads((version_dir / FILE).read_text(encoding="utf-8"))
        whole = content["files"] == _digests(version_dir)
        return Origin(str(content["source"]), str(content["kept"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digests(version_dir: Path) -> dict[str, str]:
    files = sorted(path.relative_to(version_dir) for path in version_dir.rglob("*") if path.is_file())
    return {path.as_posix(): digest(version_dir / path) for path in files if path != FILE}
