"""`graphopt.lock`: the versions, sources and artifacts of a build, which `--locked` asks for again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt import files
from graphopt.builds.config import Config
from graphopt.builds.errors import Unlocked

FORMAT = 1
LARGEST = 1 << 24  # bytes
TABLES = ("versions", "sources", "artifacts")
ALWAYS = ("graphopt", "torch", "numpy", "safetensors")
OF_BACKEND = {
    "openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "triton": ("triton",),
    "auto": ("openvino", "onnxruntime", "onnx", "onnxscript", "triton"),
}  # fmt: skip
OF_EXPORT = {"openvino": ("openvino",), "onnx": ("onnx", "onnxscript")}
OF_SOURCE = {"torchvision": ("torchvision",), "timm": ("timm",)}

Lock = dict[str, Any]


def versions(config: Config) -> dict[str, str]:
    """Of Python and of what a build rests on; what is not installed is left out."""
    names = {*ALWAYS, *OF_SOURCE.get(config.model.source.partition(":")[0], ())}
    for target in config.targets:
        names |= {*OF_BACKEND.get(target.backend, ())}
        for format in target.export:
            names |= {*OF_EXPORT.get(format, ())}
    found = {"python": platform.python_version()}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources(data: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, str]:
    """sha256 of what is built: the configuration, whatever its spelling and order, and what it names."""
    text = json.dumps(data, sort_keys=True, default=str)
    return {"configuration": hashlib.sha256(text.encode()).hexdigest(), **hashes}


def read(path: Path) -> Lock:
    """
    Raises:
        Unlocked: if there is none, or it is damaged.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise Unlocked(f"{path} is damaged: more than {LARGEST >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unlocked(
            f"{path} cannot be read: {error.strerror or error}; build once without --locked"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Unlocked(f"{path} is damaged: {error}") from error
    tables = [found.get(one) for one in TABLES] if isinstance(found, dict) else [None]
    if not all(_of_texts(one) for one in tables):
        raise Unlocked(f"{path} is no lock file of graphopt")
    if found.get("format") != FORMAT:
        raise Unlocked(f"{path} has the format {found.get('format')!r:.80}, expected {FORMAT}")
    return found  # type: ignore[no-any-return]


def _of_texts(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(one, str) for one in table.values())


def compare(path: Path, what: str, locked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """
    Raises:
        Unlocked: naming every difference.
    """
    differing = [
        f"{name} is {found.get(name, 'missing'):.20}, expected {locked.get(name, 'none'):.20}"
        for name in sorted(locked.keys() | found.keys()) if locked.get(name) != found.get(name)
    ]  # fmt: skip
    if differing:
        raise Unlocked(f"{path.name}, {what}: {'; '.join(differing)}")


def write(path: Path, lock: Lock) -> None:
    files.write(path, json.dumps({"format": FORMAT, **lock}, indent=1, sort_keys=True) + "\n")


def hash_of(artifact: Path) -> str:
    """The sha256 of a file, or of the names and bytes of all files in a folder."""
    if artifact.is_file():
        with open(artifact, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for one in sorted(artifact.rglob("*")):
        if one.is_file():
            with open(one, "rb") as file:
                inner = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{one.relative_to(artifact).as_posix()} {inner}\n".encode())
    return digest.hexdigest()
