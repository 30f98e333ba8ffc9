"""Saved models: a directory with a JSON graph, safetensors weights, and a manifest with their
sha256. No pickle, and nothing that is stored is executed: `graphopt.artifact_check` says what is believed.

    model/graph.json  model/weights.safetensors  model/manifest.json  model/kernels.py

The last one has the sources of generated kernels, if there are any, for reading: nothing runs them. The same
files as one are `model.zip`, see `graphopt.artifact_zip`.

Writing goes to a temporary directory beside the target, which takes its place at the end in one step: a
crash leaves the old artifact (or none), never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt.artifact_data import (
    ArtifactError as ArtifactError,
    decode_signature,
    dismantle as dismantle,
    encode_signature,
    provenance,
    rebuild as rebuild,
)
from graphopt.artifact_zip import NAME, Archive, begins_as_archive, is_archive, pack
from graphopt.files import beside, replace
from graphopt.ir.text_graph import TextError
from graphopt.module import OptimizedModule

if TYPE_CHECKING:
    from graphopt.artifact_check import Manifest

FORMAT = 2
LARGEST = 1 << 28  # bytes of a JSON file
MANIFEST = "manifest.json"
_FILES = ("graph.json", "weights.safetensors")


def save(
    module: OptimizedModule, path: str | os.PathLike[str], *, about: dict[str, Any] | None = None,
    add: Callable[[Path], None] | None = None, timed: bool = True,
) -> None:  # fmt: skip
    """Write `module` to `path`, replacing an earlier artifact there.

    Args:
        module: a result of `graphopt.optimize`, of one graph.
        path: a directory, or one file if its name ends in ".zip"; its parents are made.
        about: plain data for the manifest, under "build".
        add: puts more files into the directory it is called with; they are hashed like the others.
        timed: False leaves out of the report what differs from run to run.

    Raises:
        ArtifactError: if the model was captured by region, uses ops without a portable name, or if
            `path` exists and is not an artifact.
    """
    from safetensors.torch import save_file

    target = Path(path)
    check_place(target)
    graph, signature, tensors, report, training = dismantle(module)
    if not timed:
        report = module.report.untimed().to_dict()
    graph["signature"] = encode_signature(signature)
    graph["tensors"] = [[name, *entry[1:]] for name, entry in tensors.items()]  # in order
    graph["training"] = training
    with beside(target) as folder:
        work = folder / "contents"
        work.mkdir()
        (work / "graph.json").write_text(_dumped(graph))
        save_file(
            {name: entry[0].detach().contiguous().clone() for name, entry in tensors.items()},
            work / "weights.safetensors",
        )
        os.chmod(work / "weights.safetensors", 0o644)  # safetensors makes it private
        if sources := [one.source for one in getattr(module._run, "kernels", ())]:
            (work / "kernels.py").write_text("\n\n".join(sources))
        if add is not None:
            add(work)
        files = sorted(work.iterdir())
        manifest = {
            "format": FORMAT,
            "torch": torch.__version__,
            "bytes": {one.name: one.stat().st_size for one in files},
            "sha256": {one.name: _sha256(one) for one in files},
            "report": report,
            "provenance": provenance(module),
            **({} if about is None else {"build": about}),
        }
        (work / MANIFEST).write_text(sealed(manifest))
        if is_archive(target):
            pack(work, folder / "packed")
            work = folder / "packed"
        replace(work, target)


def check_place(target: Path) -> None:
    """
    Raises:
        ArtifactError: if there is something that is not an artifact, and would be lost.
    """
    ours = begins_as_archive(target) if is_archive(target) else (target / MANIFEST).is_file()
    if target.is_symlink() or (target.exists() and not ours):
        raise ArtifactError(f"{target} exists and is not a graphopt artifact; not overwriting it")


def load(
    path: str | os.PathLike[str], *, public_key: str | os.PathLike[str] | None = None,
    signature: str | os.PathLike[str] | None = None,
) -> OptimizedModule:  # fmt: skip
    """Read an artifact written by `save`.

    Args:
        path: a directory or a .zip.
        public_key: load only what the owner of this key signed; see `graphopt.signing`.
        signature: where the signature is, if not beside the artifact.

    Raises:
        ArtifactError: naming the file that is missing, truncated, altered or of another format, or what in
            it is not as `save` writes it.
    """
    from graphopt import artifact_check as check

    source = Path(path)
    if public_key is not None:
        from graphopt.signing import verify_signature

        verify_signature(source, public_key, signature=signature)
    elif signature is not None:
        raise ValueError("signature: expected a public_key that it is checked with, found none")
    with _opened(source) as files:
        manifest = _intact(files)
        text = files.text("graph.json", LARGEST)
        try:
            loaded = files.tensors("weights.safetensors")
            check.check_graph(text, loaded)
            graph = json.loads(text)
            check.check_provenance(manifest.provenance, graph["nodes"])
            tensors = {name: (loaded[name], *entry) for name, *entry in graph.pop("tensors")}
            calls = decode_signature(graph.pop("signature"))
            check.check_signature(calls, graph["nodes"])
            report = check.report_of(manifest.report).to_dict()
            return rebuild(graph, calls, tensors, report, graph.pop("training"))
        except Exception as error:  # of several libraries, on files that anybody may have made
            raise ArtifactError(f"{source}: not readable as an artifact: {said(error)}") from error


def manifest_of(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact, after size and sha256 of every file were checked; nothing is built of it.

    Raises:
        ArtifactError: naming the file that is missing, truncated, altered or of another format.
    """
    with _opened(Path(path)) as files:
        return _intact(files)


def is_artifact(path: Path) -> bool:
    """Whether a path looks like that of an artifact, intact or not."""
    return (path / MANIFEST).is_file() or (path.is_file() and is_archive(path))


# -- the files ----------------------------------------------------------------------------------


class Folder:
    """The files of an artifact that is a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """Nothing is open."""

    def names(self) -> set[str]:
        return {one.name for one in self.path.iterdir()}

    def text(self, name: str, largest: int) -> str:
        """
        Raises:
            ArtifactError: if it is no file, has more than `largest` bytes, or is no text.
        """
        path = self.path / name
        try:
            if path.is_symlink() or not path.is_file():
                raise ArtifactError(f"{path} is missing, or no file")
            if path.stat().st_size > largest:
                raise ArtifactError(f"{path} cannot be read: more than {largest >> 20} MiB")
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {said(error)}") from error

    def check(self, name: str, size: int | None, digest: str) -> None:
        """
        Raises:
            ArtifactError: if it is no file of this folder, or has another size or sha256.
        """
        file = self.path / name
        if not NAME.fullmatch(name) or file.is_symlink():
            raise ArtifactError(f"{self.path}: {name!r} is no file of its own folder")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing, or no file")
        if (found := file.stat().st_size) != size:
            raise ArtifactError(
                f"{file} is truncated or altered: it has {found} bytes, expected {size}"
            )
        if _sha256(file) != digest:
            raise ArtifactError(f"{file} is truncated or altered: its sha256 is not the manifest's")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / name)


@contextmanager
def _opened(source: Path) -> Iterator[Folder | Archive]:
    files: Folder | Archive
    try:
        if source.is_dir():
            files = Folder(source)
        elif source.is_file():
            files = Archive(source)
        else:
            raise ArtifactError(
                f"{source} is not a graphopt artifact (a directory with {MANIFEST}, or a zip archive)"
            )
    except OSError as error:
        raise ArtifactError(f"{source} cannot be read: {said(error)}") from error
    try:
        yield files
    finally:
        files.close()


def _intact(files: Folder | Archive) -> Manifest:
    """The manifest, after every file that it names was checked."""
    manifest = _manifest(files)
    for name, digest in manifest.sha256.items():
        try:
            files.check(name, manifest.bytes.get(name), digest)
        except OSError as error:
            raise ArtifactError(f"{files.path / name} cannot be read: {said(error)}") from error
    if isinstance(files, Archive) and (more := files.names() - {MANIFEST, *manifest.sha256}):
        raise ArtifactError(f"{files.path}: {min(more)} is not named in {MANIFEST}")
    return manifest


def _manifest(files: Folder | Archive) -> Manifest:
    from graphopt.artifact_check import Manifest

    path = files.path / MANIFEST
    text = files.text(MANIFEST, LARGEST)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {said(error)}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    if data.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {data.get('format')!r:.80}, expected {FORMAT}")
    try:
        if sealed(data) != text:
            raise ArtifactError(f"{path} is altered: it is not what its seal is of")
        found = Manifest.model_validate(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {said(error)}") from error
    if not all(name in found.sha256 for name in _FILES):
        raise ArtifactError(f"{path}: expected the sha256 of {' and '.join(_FILES)}")
    return found


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with the sha256 of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return _dumped({**rest, "seal": hashlib.sha256(_dumped(rest).encode()).hexdigest()})


def _dumped(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False)


def said(error: Exception) -> str:
    """An error in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}, found {first['input']!r:.80}"
    lines = str(error).strip().splitlines() or [""]
    known = type(error) in (ValueError, TextError, ArtifactError)
    return lines[0][:300] if known else f"{type(error).__name__}: {lines[0]:.300}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
