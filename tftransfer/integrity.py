"""Whether a run's files are the ones that its manifest names: what was changed, what is missing, what nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tftransfer.report import Check
from tftransfer.weights import digest

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
SIGNATURE = "model.sig"
SERVING = "serving"
# The digest of another text differs in some 60 of its 64 digits, a damaged one in a few.
_DAMAGED_DIGITS = 32


def digests(folder: Path, *parts: str) -> dict[str, str]:
    """Return the SHA-256 of a run's files, by their paths inside its folder.

    Manifest, seal and signature are left out, which cannot hold their own, and so is what is hidden: leftovers of what
    was interrupted.

    Args:
        folder: The run's folder.
        parts: Files or folders inside it. Defaults to all there are.
    """
    roots = [folder / part for part in parts] or [folder]
    found = {path for root in roots for path in (root, *root.rglob("*")) if path.is_file()}
    files = sorted(path.relative_to(folder) for path in found)
    return {path.as_posix(): digest(folder / path) for path in files if not _is_left_out(path)}


def _is_left_out(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.as_posix() in (MANIFEST, SEAL, SIGNATURE)


def changed_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the files whose SHA-256 is not the manifest's, missing ones included.

    Whole versions of the SavedModel before the current one may be missing: housekeeping removes them.
    """
    files = manifest.get("files", {})
    return [
        name for name in files if not (is_as_listed(folder, manifest, name) or _may_be_gone(folder, name, manifest))
    ]


def is_as_listed(folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
    """Tell whether a file is the one that the manifest names."""
    try:
        return digest(folder / name) == manifest.get("files", {}).get(name)
    except OSError:
        return False


def is_of_removed_version(folder: Path, name: str) -> bool:
    """Tell whether a file belongs to a version of the SavedModel whose folder is not there any more."""
    version = version_of(name)
    return version is not None and not (folder / SERVING / version).exists()


def version_of(name: str) -> str | None:
    """Return the version of the SavedModel that a file of a run belongs to, if it belongs to one.

    Example:
        >>> version_of("serving/2/variables/variables.index"), version_of("report.json")
        ('2', None)
    """
    match name.split("/"):
        case [folder, version, *_] if folder == SERVING and version.isdecimal():
            return version
    return None


def _may_be_gone(folder: Path, name: str, manifest: Mapping[str, Any]) -> bool:
    version = version_of(name)
    return version not in (None, manifest.get("current", version)) and is_of_removed_version(folder, name)


def unknown_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return what lies among the versions of the SavedModel and is not in the manifest: servers would load it.

    Files elsewhere, such as notes, are nobody's business. A version of which no file is known is named as a whole.
    """
    files = manifest.get("files", {})
    known = {version_of(name) for name in files}
    unknown: list[str] = []
    for version in sorted(item for item in (folder / SERVING).glob("*") if item.name.isdecimal()):
        if version.name not in known:
            unknown.append(f"{SERVING}/{version.name}")
            continue
        unknown += [name for name in _names_below(folder, version) if name not in files]
    return unknown


def _names_below(folder: Path, part: Path) -> Iterator[str]:
    """Return everything below a folder that is not itself a folder; links are not followed, so they count as well."""
    paths = (path for path in sorted(part.rglob("*")) if path.is_symlink() or not path.is_dir())
    return (path.relative_to(folder).as_posix() for path in paths)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> Check:
    """Compare a run's files with its manifest; what differs stands under `changed`, `missing` and `unknown`."""
    differing = changed_files(folder, manifest)
    found = {
        "changed": [name for name in differing if (folder / name).is_file()],
        "missing": [name for name in differing if not (folder / name).is_file()],
        "unknown": unknown_files(folder, manifest),
    }
    problems = {kind: names for kind, names in found.items() if names}
    return Check("files equal the manifest", not problems, problems or {"files": len(manifest.get("files", {}))})


def seal_of(manifest: Path) -> str:
    """Return what `manifest.sha256` must say of a manifest, in the form that `sha256sum --check` reads."""
    return f"{digest(manifest)}  {MANIFEST}\n"


def check_seal(folder: Path) -> Check:
    """Compare a run's manifest with `manifest.sha256`; which of the two was changed stands under `changed`."""
    name = "manifest equals its seal"
    missing = [file for file in (MANIFEST, SEAL) if not (folder / file).is_file()]
    if missing:
        return Check(name, False, {"missing": missing})
    written, expected = (folder / SEAL).read_bytes().decode(errors="replace"), seal_of(folder / MANIFEST)
    if written == expected:
        return Check(name, True)
    whole = re.fullmatch(rf"[0-9a-f]{{64}}  {re.escape(MANIFEST)}\n", written)
    differing = sum(one != other for one, other in zip(written, expected, strict=False))
    return Check(name, False, {"changed": [MANIFEST if whole and differing > _DAMAGED_DIGITS else SEAL]})
