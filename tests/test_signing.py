"""Signatures with keys of one's own: what they hold for, and what is said where they do not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from tftransfer import bundles, cli, integrity, serving, signing
from tftransfer.errors import InputError

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None, reason="needs the extra sign (model-signing)"
)
PASSWORD = "a good password"


def _openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _make_key(folder, name, *options):
    """Make a pair of keys as the help says."""
    _openssl(folder, "genpkey", *options, "-out", f"{name}.pem")
    _openssl(folder, "pkey", "-in", f"{name}.pem", "-passin", f"pass:{PASSWORD}", "-pubout", "-out", f"{name}.pub.pem")


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """A folder with pairs of keys: own, another, encrypted, and of kinds that cannot be used."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make keys")
    folder = tmp_path_factory.mktemp("keys")
    curve = ("-algorithm", "EC", "-pkeyopt")
    _make_key(folder, "own", *curve, "ec_paramgen_curve:P-256")
    _make_key(folder, "another", *curve, "ec_paramgen_curve:P-384")
    _make_key(folder, "encrypted", *curve, "ec_paramgen_curve:P-256", "-aes256", "-pass", f"pass:{PASSWORD}")
    _make_key(folder, "ed25519", "-algorithm", "ed25519")
    _make_key(folder, "rsa", "-algorithm", "RSA")
    _make_key(folder, "secp256k1", *curve, "ec_paramgen_curve:secp256k1")
    return folder


@pytest.fixture
def signed(written_run, keys):
    signing.sign(written_run, keys / "own.pem")
    return written_run


@needs_library
def test_a_signature_holds_for_the_files_as_they_are(signed, keys):
    found = signing.check_signature(signed, keys / "own.pub.pem")
    assert found.passed
    assert found.metrics == {"files": len(bundles.read_manifest(signed)["files"]) + 2}
    assert integrity.check_files(signed, bundles.read_manifest(signed)).passed


@needs_library
def test_the_library_alone_finds_the_same(signed, keys, flip_a_bit):
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys / "own.pub.pem")
    config.verify(signed, signed / "model.sig")
    flip_a_bit(signed / "report.html")
    with pytest.raises(ValueError, match=r"report\.html"):
        config.verify(signed, signed / "model.sig")


@needs_library
@pytest.mark.parametrize(
    "name", ["model.keras", "manifest.json", "manifest.sha256", "serving/2/saved_model.pb", "logs/train/events.out.v2"]
)
def test_a_changed_and_a_missing_file_is_named(signed, keys, flip_a_bit, name):
    flip_a_bit(signed / name)
    found = signing.check_signature(signed, keys / "own.pub.pem")
    assert found.passed is False
    assert found.metrics == {"problem": "not the files that were signed", "changed": [name]}
    (signed / name).unlink()
    assert signing.check_signature(signed, keys / "own.pub.pem").metrics["missing"] == [name]


@needs_library
def test_a_file_more_is_named(signed, keys):
    (signed / "notes.txt").write_text("mine")
    assert signing.check_signature(signed, keys / "own.pub.pem").metrics["unsigned"] == ["notes.txt"]


@needs_library
def test_a_version_published_after_signing_makes_the_signature_stale(signed, keys):
    shutil.copytree(signed / "serving" / "2", signed / "serving" / "3")
    bundles.refresh(signed, "serving/3")
    found = signing.check_signature(signed, keys / "own.pub.pem")
    assert found.passed is False
    assert "published after signing" in found.metrics["problem"]
    assert found.metrics["changed"] == ["manifest.json", "manifest.sha256"]
    assert {name.split("/")[1] for name in found.metrics["unsigned"]} == {"3"}
    signing.sign(signed, keys / "own.pem")
    assert signing.check_signature(signed, keys / "own.pub.pem").passed


@needs_library
def test_another_key_is_not_the_one(signed, keys):
    found = signing.check_signature(signed, keys / "another.pub.pem")
    assert found.passed is False
    assert found.metrics == {"problem": "made with another key"}


@needs_library
def test_a_run_that_is_not_signed_fails(written_run, keys):
    found = signing.check_signature(written_run, keys / "own.pub.pem")
    assert found.passed is False
    assert found.metrics["missing"] == ["model.sig"]


@needs_library
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"no json", b"\xff"])
def test_a_signature_that_is_none_is_named(signed, keys, content):
    (signed / "model.sig").write_bytes(content)
    found = signing.check_signature(signed, keys / "own.pub.pem")
    assert found.metrics == {"problem": "model.sig is damaged", "changed": ["model.sig"]}


@needs_library
def test_a_damaged_signature_never_holds(signed, keys, flip_a_bit):
    whole = (signed / "model.sig").read_bytes()
    for seed in range(60):
        (signed / "model.sig").write_bytes(whole)
        flip_a_bit(signed / "model.sig", seed)
        assert signing.check_signature(signed, keys / "own.pub.pem").passed is False


@needs_library
def test_what_the_signer_left_out_does_not_hold(written_run, keys):
    from model_signing import hashing
    from model_signing import signing as library

    config = library.Config().use_elliptic_key_signer(private_key=keys / "own.pem")
    part = hashing.Config().set_ignored_paths(paths=["model.sig", "serving"])
    config.set_hashing_config(part).sign(written_run, written_run / "model.sig")
    found = signing.check_signature(written_run, keys / "own.pub.pem")
    assert found.passed is False
    assert "serving/2/saved_model.pb" in found.metrics["unsigned"]


@needs_library
def test_a_run_may_be_renamed_and_put_under_git(signed, keys):
    (signed / ".git").mkdir()
    (signed / ".git" / "config").write_text("")
    (signed / ".gitattributes").write_text("*.keras filter=lfs")
    moved = signed.rename(signed.with_name("moved"))
    assert signing.check_signature(moved, keys / "own.pub.pem").passed


@needs_library
def test_links_are_refused(written_run, keys):
    (written_run / "linked").symlink_to("report.json")
    with pytest.raises(InputError, match="symlink"):
        signing.sign(written_run, keys / "own.pem")
    (written_run / "linked").unlink()
    signing.sign(written_run, keys / "own.pem")
    (written_run / "linked").symlink_to("report.json")
    assert "symlink" in signing.check_signature(written_run, keys / "own.pub.pem").metrics["problem"]


@needs_library
def test_an_encrypted_key_takes_its_password(written_run, keys):
    assert signing.is_encrypted(keys / "encrypted.pem")
    assert not signing.is_encrypted(keys / "own.pem")
    for wrong in (None, "", "another"):
        with pytest.raises(InputError, match="private elliptic key"):
            signing.sign(written_run, keys / "encrypted.pem", wrong)
    assert not (written_run / "model.sig").exists()
    signing.sign(written_run, keys / "encrypted.pem", PASSWORD)
    assert signing.check_signature(written_run, keys / "encrypted.pub.pem").passed
    signing.sign(written_run, keys / "own.pem", PASSWORD)  # of no use, and no harm
    assert signing.check_signature(written_run, keys / "own.pub.pem").passed


@needs_library
@pytest.mark.parametrize("name", ["ed25519.pem", "rsa.pem", "secp256k1.pem", "own.pub.pem"])
def test_keys_of_other_kinds_are_refused(written_run, keys, name):
    with pytest.raises(InputError, match="P-256"):
        signing.sign(written_run, keys / name)
    with pytest.raises(InputError, match="P-256"):
        signing.check_signature(written_run, keys / ("own.pem" if name == "own.pub.pem" else name))


@needs_library
def test_missing_keys_are_named(written_run, keys):
    with pytest.raises(InputError, match=r"none\.pem"):
        signing.sign(written_run, keys / "none.pem", "any")
    with pytest.raises(InputError, match=r"none\.pem"):
        signing.check_signature(written_run, keys / "none.pem")


def test_a_private_key_does_not_belong_into_the_run(written_run, keys):
    shutil.copy(keys / "own.pem", written_run / "own.pem")
    with pytest.raises(InputError, match="which others will get"):
        signing.sign(written_run, written_run / "own.pem")


@pytest.mark.parametrize("command", ["sign", "verify"])
def test_without_the_extra_one_line_says_how_to_get_it(written_run, keys, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    option = ["--key", str(keys / "own.pem")] if command == "sign" else ["--public-key", str(keys / "own.pub.pem")]
    assert cli.main([command, str(written_run), *option]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "signatures need model_signing, which is missing: pip install 'tftransfer[sign]'" in error


@needs_library
def test_sign_and_verify_on_the_command_line(written_run, keys, capsys, monkeypatch):
    monkeypatch.setenv("TFTRANSFER_KEY_PASSWORD", PASSWORD)
    assert cli.main(["sign", str(written_run), "--key", str(keys / "encrypted.pem"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"].endswith("model.sig")
    assert signing.check_signature(written_run, keys / "encrypted.pub.pem").passed


@needs_library
@pytest.mark.parametrize(("key", "code"), [("own", 0), ("another", 1)])
def test_what_another_has_signed_is_not_even_loaded(signed, keys, capsys, monkeypatch, key, code):
    calls = []
    passed = serving.Verification(()).with_check("looked", True)
    monkeypatch.setattr(serving, "verify", lambda *_, **__: calls.append(1) or passed)
    assert cli.main(["verify", str(signed), "--public-key", str(keys / f"{key}.pub.pem"), "--json"]) == code
    checks = {check["name"]: check["passed"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["signature holds"] is (code == 0)
    assert checks["files equal the manifest"] is True
    assert len(calls) == (code == 0)


@needs_library
def test_a_password_is_asked_for_where_somebody_can_answer(written_run, keys, capsys, monkeypatch):
    command = ["sign", str(written_run), "--key", str(keys / "encrypted.pem")]
    monkeypatch.delenv("TFTRANSFER_KEY_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert cli.main(command) == 2
    assert "TFTRANSFER_KEY_PASSWORD" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: PASSWORD)
    assert cli.main(command) == 0


@needs_library
@pytest.mark.parametrize("name", ["history.csv", "manifest.json"])
def test_a_run_that_was_changed_is_not_signed(written_run, keys, flip_a_bit, capsys, name):
    flip_a_bit(written_run / name)
    assert cli.main(["sign", str(written_run), "--key", str(keys / "own.pem"), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["metrics"] for check in checks if check["passed"] is False] == [{"changed": [name]}]
    assert not (written_run / "model.sig").exists()


@needs_library
def test_an_unfinished_run_is_not_signed(tmp_path, keys, capsys):
    bundles.begin(tmp_path / "run", {})
    assert cli.main(["sign", str(tmp_path / "run"), "--key", str(keys / "own.pem")]) == 2
    assert "not finished" in capsys.readouterr().err


def test_the_help_shows_how_to_make_a_key(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sign", "--help"])
    told = capsys.readouterr().out
    assert "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256" in told
    assert "stale" in told
    assert "--password" not in told
