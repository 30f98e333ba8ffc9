"""`graphopt.lock`: the versions, sources and artifacts of a build, which `--locked` asks for again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.builds.config import Config
from graphopt.builds.errors import Unlocked

FORMAT = 1
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


def sources(config: Config, data: Mapping[str, Any], weights_hash: str) -> dict[str, str]:
    """sha256 of what is built: the configuration, whatever its spelling and order, and all weights."""
    text = json.dumps(data, sort_keys=True, default=str)
    return {"configuration": hashlib.sha256(text.encode()).hexdigest(), "weights": weights_hash}


def read(path: Path) -> Lock:
    """
    Raises:
        Unlocked: if there is none, or it is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Unlocked(
            f"{path} cannot be read: {error.strerror or error}; build once without --locked"
        ) from error
    except ValueError as error:
        raise Unlocked(f"{path} is damaged: {error}") from error
    tables = ("versions", "sources", "artifacts")
    if not isinstance(found, dict) or not all(isinstance(found.get(one), dict) for one in tables):
        raise Unlocked(f"{path} is no lock file of graphopt")
    if found.get("format") != FORMAT:
        raise Unlocked(f"{path} has the format {found.get('format')!r}, expected {FORMAT}")
    return found


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
    text = json.dumps({"format": FORMAT, **lock}, indent=1, sort_keys=True) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def hash_of(folder: Path) -> str:
    """The sha256 of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for one in sorted(folder.rglob("*")):
        if one.is_file():
            with open(one, "rb") as file:
                inner = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{one.relative_to(folder).as_posix()} {inner}\n".encode())
    return digest.hexdigest()
