"""Signatures: good ones pass, and nothing that was changed, swapped or signed by somebody else."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import graphopt
from graphopt.artifact import ArtifactError
from graphopt.signing import SignatureError
from tests.builds import nets
from tests.builds.helpers import command, contents

pytest.importorskip("model_signing", reason="pip install graphopt[sign]")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


def keys(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """A new key pair, private and public."""
    key = ec.generate_private_key(ec.SECP256R1())
    return written(folder, name, key, password)


def written(folder: Path, name: str, key, password: bytes | None = None) -> tuple[Path, Path]:
    lock = serialization.NoEncryption()
    if password is not None:
        lock = serialization.BestAvailableEncryption(password)
    private, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("signed")
    fast = graphopt.optimize(*nets.both())
    for name in ("net.gopt", "net.gopt.zip"):
        fast.save(home / name)
    keys(home, "mine")
    keys(home, "other")
    return home


@pytest.fixture
def home(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "home"))


BOTH = pytest.mark.parametrize("name", ["net.gopt", "net.gopt.zip"])


@BOTH
def test_what_was_signed_loads_and_is_unchanged(home, name):
    artifact, before = home / name, contents(home)
    assert graphopt.sign(artifact, home / "mine.pem") == home / f"{name}.sig"
    after = contents(home)
    assert after.pop(f"{name}.sig") and after == before
    graphopt.verify_signature(artifact, home / "mine-public.pem")
    loaded = graphopt.load(artifact, public_key=home / "mine-public.pem")
    assert loaded.report.model == "Net"
    (home / f"{name}.sig").rename(home / "elsewhere")
    moved = artifact.rename(home / f"moved-{name}")
    graphopt.load(moved, public_key=home / "mine-public.pem", signature=home / "elsewhere")


@BOTH
def test_another_key_is_refused(home, name):
    graphopt.sign(home / name, home / "mine.pem")
    with pytest.raises(SignatureError, match=f"{name} is not what the owner of .*other-public.pem"):
        graphopt.load(home / name, public_key=home / "other-public.pem")
    graphopt.sign(home / name, home / "other.pem")  # in place of the first signature
    with pytest.raises(SignatureError):
        graphopt.verify_signature(home / name, home / "mine-public.pem")
    graphopt.verify_signature(home / name, home / "other-public.pem")


def test_a_model_with_hashes_of_its_own_is_not_the_one_that_was_signed(home):
    """Whoever changes all files and their hashes still has no key."""
    for name in ("net.gopt", "net.gopt.zip"):
        graphopt.sign(home / name, home / "mine.pem")
        model = nets.other()
        graphopt.optimize(model, nets.both()[1]).save(home / name)
        assert graphopt.load(home / name).report.model == "Net"
        with pytest.raises(SignatureError) as caught:
            graphopt.load(home / name, public_key=home / "mine-public.pem")
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("file", ["graph.json", "weights.safetensors", "manifest.json", "more.bin"])
def test_every_file_of_a_folder_is_signed(home, file):
    graphopt.sign(home / "net.gopt", home / "mine.pem")
    with open(home / "net.gopt" / file, "ab") as out:
        out.write(b" ")
    with pytest.raises(SignatureError):
        graphopt.verify_signature(home / "net.gopt", home / "mine-public.pem")


def test_signatures_that_are_none(home):
    artifact, public = home / "net.gopt", home / "mine-public.pem"
    place = home / "net.gopt.sig"
    with pytest.raises(SignatureError, match=r"is not signed: .*net\.gopt\.sig is missing"):
        graphopt.load(artifact, public_key=public)
    graphopt.sign(artifact, home / "mine.pem")
    whole = json.loads(place.read_text())
    for text in ("", "{}", "[]", "null", "[" * 100_000, json.dumps({**whole, "dsseEnvelope": {}}),
                 place.read_text()[:-40]):  # fmt: skip
        place.write_text(text)
        with pytest.raises(SignatureError) as caught:
            graphopt.verify_signature(artifact, public)
        assert "\n" not in str(caught.value)
    with open(place, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(SignatureError, match="more than 16 MiB"):
        graphopt.verify_signature(artifact, public)
    place.unlink()
    place.mkdir()
    with pytest.raises(SignatureError, match="missing, or no file"):
        graphopt.verify_signature(artifact, public)


def test_a_signature_of_another_artifact(home):
    graphopt.sign(home / "net.gopt.zip", home / "mine.pem")
    with pytest.raises(SignatureError):
        graphopt.load(home / "net.gopt", public_key=home / "mine-public.pem",
                      signature=home / "net.gopt.zip.sig")  # fmt: skip


def test_keys_that_cannot_be_used(home):
    artifact = home / "net.gopt"
    written(home, "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    keys(home, "locked", b"secret")
    (home / "text.pem").write_text("no key")
    for name in ("rsa.pem", "text.pem", "nowhere.pem", "locked.pem", "mine-public.pem"):
        with pytest.raises(ArtifactError, match=f"{name} cannot be used"):
            graphopt.sign(artifact, home / name)
    for name in ("rsa-public.pem", "text.pem", "nowhere.pem", "mine.pem"):
        with pytest.raises(ArtifactError, match=f"{name} cannot be used"):
            graphopt.verify_signature(artifact, home / name)
    assert not (home / "net.gopt.sig").exists()
    graphopt.sign(artifact, home / "locked.pem", password="secret")
    graphopt.verify_signature(artifact, home / "locked-public.pem")


def test_only_what_is_intact_is_signed(home):
    (home / "net.gopt" / "graph.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"graph\.json is truncated or altered"):
        graphopt.sign(home / "net.gopt", home / "mine.pem")
    with pytest.raises(ArtifactError, match="no such artifact"):
        graphopt.verify_signature(home / "nowhere", home / "mine-public.pem")
    with pytest.raises(ValueError, match="expected a public_key"):
        graphopt.load(home / "net.gopt.zip", signature=home / "x.sig")


def test_the_commands(home):
    artifact, key = home / "net.gopt", ("--key", home / "mine.pem")
    public = ("--key", home / "mine-public.pem")
    code, text = command("verify-signature", artifact, *public)
    assert code == 1 and text.startswith("graphopt: ") and "is not signed" in text
    assert command("sign", artifact, *key)[0] == 0
    assert command("verify-signature", artifact, *public)[0] == 0
    code, text = command("verify-signature", artifact, "--key", home / "other-public.pem")
    assert code == 1 and len(text.splitlines()) == 1 and "other-public.pem" in text
    code, text = command("sign", artifact, "--key", home / "nowhere.pem")
    assert code == 2 and "nowhere.pem cannot be used" in text


def test_without_the_extra_it_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for code, text in (
        command("sign", home / "net.gopt", "--key", home / "mine.pem"),
        command("verify-signature", home / "net.gopt", "--key", home / "mine-public.pem"),
    ):
        assert code == 2 and text == (
            "graphopt: model_signing is not installed: pip install graphopt[sign]"
        )
    assert graphopt.load(home / "net.gopt").report.model == "Net"
