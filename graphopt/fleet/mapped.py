"""Tensors of safetensors files, read where they lie.

A tensor is a window on its file: nothing is read before it is used, and what was read can be given back at
any time, since the file still has it. `bounded` does so whenever a process holds too much.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

INDEX = ".index.json"
INTERVAL = 0.01  # seconds between two looks at what is held
_BACK = 0.8  # of the limit; from there on memory is given back


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit its model."""


class Files:
    """The tensors of safetensors files, by name. They must not be written to."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []
        for path in paths:
            for one in shards(Path(path)):
                self._open(one)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as checked:  # of sizes and offsets
                names = checked.keys()
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._maps.append(whole)
        for name in names:
            if name in self.tensors:
                raise CheckpointError(f"{path}: {name} is in another file too")
            entry = header[name]
            dtype, start = _DTYPES.get(entry["dtype"]), entry["data_offsets"][0]
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} has the dtype {entry['dtype']}, which is not known"
                )
            shape = entry["shape"]
            count = int(torch.Size(shape).numel())
            self.tensors[name] = (
                torch.frombuffer(whole, dtype=dtype, count=count, offset=8 + size + start).view(shape)
                if count else torch.empty(shape, dtype=dtype)
            )  # fmt: skip

    def give_back(self) -> None:
        """Let the system have the memory; values that are used again are read again."""
        for one in self._maps:
            one.madvise(mmap.MADV_DONTNEED)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip


def shards(path: Path) -> list[Path]:
    """The files of a checkpoint: those of an index beside them, or the file itself.

    Raises:
        CheckpointError: naming what is damaged or missing.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: expected one index or one safetensors file, found {len(found)}"
            )
        path = found[0]
    if not path.name.endswith(INDEX):
        return [path]
    try:
        names = json.loads(path.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: {name!r} is no file beside it")
    return [path.parent / name for name in dict.fromkeys(names)]


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * mmap.PAGESIZE


@contextmanager
def bounded(files: Files, limit: int) -> Iterator[None]:
    """Give back what was read of the files whenever this process holds nearly `limit` bytes."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            if resident() > _BACK * limit:
                files.give_back()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
