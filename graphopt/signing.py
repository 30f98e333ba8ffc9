"""Signatures of artifacts, by sigstore's model-signing with a key pair (`pip install graphopt[sign]`).

The hashes of an artifact tell damage; a signature tells who made it. It is a file beside the artifact,
`NAME.gopt.sig`, over the names and sha256 of all of its files: the artifact itself, and so its bytes, stay as
they are. Keys are PEM files on the curves P-256, P-384 or P-521, as of

    openssl ecparam -genkey -name prime256v1 -noout -out key.pem
    openssl ec -in key.pem -pubout -out public.pem
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt.artifact import manifest_of, said
from graphopt.artifact_data import ArtifactError
from graphopt.files import beside, replace

LARGEST = 1 << 24  # bytes of a signature
SUFFIX = ".sig"

Place = str | os.PathLike[str]


class SignatureError(ArtifactError):
    """A signature that is missing, or not of this artifact by this key."""


def sign(
    artifact: Place, key: Place, *, signature: Place | None = None, password: str | None = None
) -> Path:
    """Sign an artifact that is intact.

    Args:
        artifact: a folder or a .zip.
        key: a private key, a PEM file.
        signature: where it is written; by default beside the artifact, with ".sig" behind its name.
        password: of an encrypted key.

    Returns:
        Where the signature is.

    Raises:
        ArtifactError: if the artifact is not intact, the key cannot be used, or model-signing is not
            installed.
    """
    configured = _library().signing.Config()
    source, target = Path(artifact), place_of(artifact, signature)
    manifest_of(source)
    with _usable(key):
        try:
            configured.use_elliptic_key_signer(private_key=Path(key), password=password)
        except TypeError:
            if password is None:
                raise
            # model-signing 1.1.1 passes it on to cryptography as it is, which takes bytes.
            configured.use_elliptic_key_signer(private_key=Path(key), password=password.encode())
    with beside(target) as work:
        try:
            configured.sign(source, work / target.name)
        except Exception as error:  # of several libraries
            raise ArtifactError(f"{source} cannot be signed: {said(error)}") from error
        replace(work / target.name, target)
    return target


def verify_signature(artifact: Place, public_key: Place, *, signature: Place | None = None) -> None:
    """Check that an artifact is, file by file, what the owner of a key signed.

    Args:
        artifact: a folder or a .zip.
        public_key: a PEM file.
        signature: by default beside the artifact, with ".sig" behind its name.

    Raises:
        SignatureError: if it is not, or there is no signature.
        ArtifactError: if there is no artifact, the key cannot be used, or model-signing is not installed.
    """
    configured = _library().verifying.Config()
    source, target = Path(artifact), place_of(artifact, signature)
    if not source.exists():
        raise ArtifactError(f"{source}: no such artifact")
    with _usable(public_key):
        configured.use_elliptic_key_verifier(public_key=Path(public_key))
    if not target.is_file():
        raise SignatureError(f"{source} is not signed: {target} is missing, or no file")
    if target.stat().st_size > LARGEST:
        raise SignatureError(f"{target} is no signature: more than {LARGEST >> 20} MiB")
    try:
        configured.verify(source, target)
    except Exception as error:  # of several libraries, on files that anybody may have made
        raise SignatureError(
            f"{source} is not what the owner of {public_key} signed: {said(error)}"
        ) from error


def place_of(artifact: Place, signature: Place | None) -> Path:
    """Where the signature of an artifact is."""
    if signature is not None:
        return Path(signature)
    path = Path(artifact)
    return path.with_name(path.name + SUFFIX)


@contextmanager
def _usable(key: Place) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the system and of cryptography
        raise ArtifactError(f"the key {key} cannot be used: {said(error)}") from error


def _library() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise ArtifactError(f"{error.name} is not installed: pip install graphopt[sign]") from error
    return model_signing
