"""Verify a whole run: its manifest, its files, its signature, and what its SavedModel answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tftransfer import bundles, integrity, serving, signing
from tftransfer.errors import InputError
from tftransfer.report import Check


def verify_run(
    folder: Path,
    version: Path | None = None,
    public_key: Path | None = None,
    *,
    repeats: int = 50,
    trust: bool = False,
) -> serving.Verification:
    """Verify a run's files, and its newest SavedModel against its Keras model.

    Nothing is loaded that is not what the run wrote, or, with a key, what its owner has signed.

    Args:
        folder: The run's folder.
        version: Another one of its versions, `serving/N`. Defaults to the newest.
        public_key: Check the signature with this key. Defaults to None: not checked.
        repeats: How often the same request is sent, at least 2. Defaults to 50.
        trust: Load what is there without a scan. Defaults to False.

    Raises:
        InputError: If the folder holds no finished run or no SavedModel, or the key is none.
    """
    signature = _signature(folder, public_key)
    manifest, checks = check_folder(folder)
    newest = version or serving.newest_version(folder / integrity.SERVING)
    if not manifest or (newest is None and not checks[-1].passed):
        return serving.Verification((*checks, *signature))
    if newest is None:
        raise InputError(f"{folder} holds no serving/N: run `tftransfer export {folder}` first")
    why_not = _why_not_to_load(newest, *checks, *signature)
    if why_not:
        answers: tuple[Check, ...] = (Check("SavedModel", None, {"reason": f"not loaded: {why_not}"}),)
    else:
        answers = _verify_answers(folder, manifest, newest, repeats, trust)
    return serving.Verification((*answers, *checks, *signature))


def check_folder(folder: Path) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """Read a run's manifest, and compare it with its seal and the files with it.

    Returns:
        The manifest, empty if it was changed: what it says of the other files may then be anything; and the checks.

    Raises:
        InputError: If the folder holds no finished run.
    """
    sealed = integrity.check_seal(folder)
    if not sealed.passed and (folder / bundles.SEAL).is_file():
        return {}, (sealed,)
    manifest = bundles.finished_manifest(folder)
    return manifest, (sealed, integrity.check_files(folder, manifest))


def _signature(folder: Path, public_key: Path | None) -> tuple[Check, ...]:
    """Check a run's signature; without a key say at most that there is one."""
    if public_key:
        return (signing.check_signature(folder, public_key),)
    signed = (folder / integrity.SIGNATURE).is_file()
    return (Check(signing.NAME, None, {"reason": "no --public-key was given"}),) * signed


def _why_not_to_load(version: Path, sealed: Check, files: Check, *signature: Check) -> str:
    differing = [name for names in files.metrics.values() if isinstance(names, list) for name in names]
    if any(integrity.version_of(name) == version.name for name in differing):
        return f"{integrity.SERVING}/{version.name} is not what was published"
    if not sealed.passed:
        return f"without {bundles.SEAL} the manifest may be anybody's"
    return "the signature does not hold" if any(check.passed is False for check in signature) else ""


def _verify_answers(
    folder: Path, manifest: dict[str, Any], version: Path, repeats: int, trust: bool
) -> tuple[Check, ...]:
    """Compare what a version answers with the Keras model, if that is the one that was trained, else with itself."""
    trained = integrity.is_as_listed(folder, manifest, bundles.MODEL)
    model = bundles.load_model(folder / bundles.MODEL, trust=trust) if trained else None
    task, samples = bundles.task_of(folder, manifest), bundles.read_samples(folder)
    return serving.verify(version, samples, model=model, task=task, repeats=repeats, trust=trust).checks
