"""Checkpoints written tensor by tensor: files of a bounded size, and their index.

    model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json

as `transformers` names them. What each file holds is decided before the first tensor is computed, so files
can be written in any order, and anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from graphopt.fleet.mapped import INDEX, CheckpointError

MAIN = f"model.safetensors{INDEX}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a checkpoint: its tensors' own names and those they are stored by, and its bytes."""

    file: str
    names: dict[str, str]
    size: int


def check_target(target: Path) -> None:
    """
    Raises:
        CheckpointError: if there is something else than a sharded checkpoint.
    """
    if target.exists() and not (target / MAIN).is_file():
        raise CheckpointError(f"{target} exists and is no sharded checkpoint; not overwriting it")


def layout(
    sizes: Iterable[tuple[str, int]], limit: int, write_as: Sequence[tuple[str, str]] = ()
) -> list[Shard]:
    """The files for tensors of these sizes: in order, of at most `limit` bytes, or one tensor.

    Raises:
        CheckpointError: if two tensors would have one name.
    """
    parts: list[dict[str, int]] = [{}]
    room = limit
    for name, size in sizes:
        if size > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = size
        room -= size
    taken: set[str] = set()
    found = []
    for number, part in enumerate(parts, 1):
        names = {name: renamed(name, write_as) for name in part}
        for stored in names.values():
            if stored in taken:
                raise CheckpointError(f"two tensors of the result are called {stored}")
            taken.add(stored)
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        found.append(Shard(file, names, sum(part.values())))
    return found


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def write_shard(shard: Shard, value: Callable[[str], Tensor], folder: Path) -> None:
    """Write one file; `value` gives a tensor by its own name."""
    from safetensors.torch import save_file

    tensors = {stored: value(name) for name, stored in shard.names.items()}
    save_file(tensors, folder / shard.file, metadata={"format": "pt"})
    os.chmod(folder / shard.file, 0o644)


def write_index(shards: Sequence[Shard], folder: Path) -> None:
    where = {stored: one.file for one in shards for stored in one.names.values()}
    index = {"metadata": {"total_size": sum(one.size for one in shards)}, "weight_map": where}
    (folder / MAIN).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
