"""Sign a run's folder with a key of one's own, and check such a signature; both work offline.

The signature is a Sigstore bundle as `model-signing` (the extra `sign`) writes it: the SHA-256 of every file of the
folder but its own and those of Git, signed with an elliptic key. `model_signing verify key RUN --signature
RUN/model.sig --public_key PUBLIC.pem` checks it too, without this toolkit.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tftransfer.errors import InputError
from tftransfer.integrity import MANIFEST, SEAL, SERVING, SIGNATURE, version_of
from tftransfer.report import Check

PASSWORD = "TFTRANSFER_KEY_PASSWORD"
"""The environment variable with the password of an encrypted key."""

NAME = "signature holds"


def sign(folder: str | os.PathLike[str], key: str | os.PathLike[str], password: str | None = None) -> Path:
    """Write `model.sig` into a run's folder, over all of its files as they are.

    Whether they are what the run wrote is for `tftransfer verify` to say, before. Whatever is written into the folder
    later, such as another version of the SavedModel, makes the signature stale: sign again.

    Args:
        folder: The run's folder.
        key: A private elliptic key (P-256, P-384 or P-521) in a PEM file outside the folder.
        password: Of the key, if it is encrypted. Defaults to None.

    Returns:
        The signature's file.

    Raises:
        InputError: If the extra is not installed, the key is none, its password is wrong, or the folder cannot be
            signed.
    """
    path, private = Path(folder).resolve(), Path(key)
    if private.resolve().is_relative_to(path):
        raise InputError(f"`key` {private} lies in the run's folder, which others will get: keep it elsewhere")
    secret = password.encode() if password is not None and is_encrypted(private) else None
    config = _library("signing").Config()
    try:
        config.use_elliptic_key_signer(private_key=private, password=secret)
    except Exception as error:  # the readers of keys raise what they happen to meet
        raise InputError(f"`key` must be {_EXPECTED.format('private')}. Received: {private} ({_line(error)})") from None
    try:
        config.set_hashing_config(_hashing()).sign(path, path / SIGNATURE)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be signed: {_line(error)}") from None
    return path / SIGNATURE


def is_encrypted(key: str | os.PathLike[str]) -> bool:
    """Tell from a PEM file whether its key needs a password.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        return b"ENCRYPTED" in Path(key).read_bytes()
    except OSError as error:
        raise InputError(f"`key` {key} cannot be read: {error.strerror}") from None


def check_signature(folder: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> Check:
    """Tell whether a run's `model.sig` was made with a key, over the files as they are now.

    Args:
        folder: The run's folder.
        public_key: The public key in a PEM file.

    Returns:
        The check; `problem` says in words why it failed, `changed`, `missing` and `unsigned` name the files.

    Raises:
        InputError: If the extra is not installed, or the public key is none.
    """
    path = Path(folder).resolve()
    config = _library("verifying").Config()
    try:
        config.use_elliptic_key_verifier(public_key=Path(public_key))
    except Exception as error:  # as for private ones
        what = _EXPECTED.format("public")
        raise InputError(f"`public_key` must be {what}. Received: {public_key} ({_line(error)})") from None
    if not (path / SIGNATURE).is_file():
        return Check(NAME, False, {"problem": "the run is not signed", "missing": [SIGNATURE]})
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints remarks on signatures of its older versions
            config.verify(path, path / SIGNATURE)
    except Exception as error:  # damaged signatures raise whatever their reader happens to meet
        if not str(error).startswith("Signature mismatch"):
            return Check(NAME, False, _unproved(error))
    # Here the signature is known to be the key's. Files may differ, or be left out of it by who signed.
    found = _differences(path)
    return Check(NAME, False, found) if found else Check(NAME, True, {"files": len(_signed(path))})


def _unproved(error: Exception) -> dict[str, Any]:
    """Say why it is not known what was signed: then it cannot be said either which files differ."""
    if str(error).startswith("Key mismatch"):
        return {"problem": "made with another key"}
    if "symlink" in str(error):
        return {"problem": _line(error)}
    return {"problem": f"{SIGNATURE} is damaged", "changed": [SIGNATURE]}


def _differences(folder: Path) -> dict[str, Any]:
    """Return which files are not the ones that were signed, and why that may be; empty if all are."""
    signed, present = _signed(folder), _present(folder)
    found = {
        "changed": [name for name in signed if name in present and present[name] != signed[name]],
        "missing": [name for name in signed if name not in present],
        "unsigned": [name for name in present if name not in signed],
    }
    names = [name for kind in found.values() for name in kind]
    if not names:
        return {}
    stale = bool(found["unsigned"]) and all(name in (MANIFEST, SEAL) or version_of(name) for name in names)
    published = f"{SERVING}/N was published after signing: if that was you, sign again"
    return {"problem": published if stale else "not the files that were signed"} | {
        kind: sorted(names) for kind, names in found.items() if names
    }


def _signed(folder: Path) -> Mapping[str, str]:
    """Read from the signature which files it is of; by then its reader has found nothing wrong with it."""
    envelope = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}


def _present(folder: Path) -> Mapping[str, str]:
    """Return what a signature made now would be of."""
    found = _hashing().hash(folder).resource_descriptors()
    return {item.identifier: item.digest.digest_hex for item in found}


def _hashing() -> Any:
    return _library("hashing").Config().set_ignored_paths(paths=[SIGNATURE])


_EXPECTED = "a {} elliptic key (P-256, P-384 or P-521) in a PEM file; `tftransfer sign --help` shows how to make one"


def _library(part: str) -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(f"signatures need {error.name}, which is missing: pip install 'tftransfer[sign]'") from None
    return getattr(model_signing, part)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
