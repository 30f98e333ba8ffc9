"""Measures block shapes on the device, once per kernel, device and class of sizes, and remembers.

The file `$XDG_CACHE_HOME/graphopt/triton/blocks.json` maps such a key to the blocks and warps that
were fastest, or to "framework" where torch's own ops were. Two extents are of one class if their
sizes round up to the same powers of two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from graphopt.backends.triton.blocks import Blocks, power

Milliseconds = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a kernel runs: its blocks and warps; no blocks mean torch's own ops."""

    blocks: Blocks | None
    warps: int = 4


def key_of(device: str, source: str, extent: Sequence[int]) -> str:
    """The name of a device, a kernel and a class of sizes."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return f"{device} {digest} {'x'.join(str(power(size)) for size in extent)}"


class Cache:
    """Choices by key, in memory and in a file that other processes write too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, Choice]:
        try:
            found = json.loads(self.path.read_text())
            return {key: Choice(one["blocks"], one["warps"]) for key, one in found.items()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # none yet, or not ours: it is measured again

    def find(self, key: str) -> Choice | None:
        return self.known.get(key)

    def add(self, key: str, choice: Choice) -> None:
        """Remember a choice; what others have added meanwhile stays."""
        self.known = {**self._read(), **self.known, key: choice}
        data = {name: dataclasses.asdict(one) for name, one in sorted(self.known.items())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(data, indent=1))
            os.replace(fresh, self.path)
        except OSError:
            pass  # a home that cannot be written: measured again next time


def fastest(
    candidates: Iterable[Choice], run: Callable[[Choice], Any], measure: Milliseconds
) -> Choice:
    """The candidate that runs in the least time; one that cannot be compiled, or does not fit the
    device, is passed over.

    Raises:
        Unusable: if none is left, with what the last one said.
    """
    best, least, error = None, float("inf"), ""
    for one in candidates:
        try:
            time = measure(lambda one=one: run(one))  # type: ignore[misc]
        except Exception as failure:
            if not unusable(failure):
                raise
            error = str(failure)
            continue
        if time < least:
            best, least = one, time
    if best is None:
        raise Unusable(f"no block shape fits the device: {error}")
    return best


class Unusable(RuntimeError):
    """A kernel that the device cannot run."""


def unusable(error: Exception) -> bool:
    """Whether an error says that a kernel cannot be compiled or does not fit the device.

    Everything else, the device's own errors above all, is no such thing. Triton's errors have a
    common base since 3.0 only in part: those of its compiler's passes are RuntimeErrors.
    """
    bases = {one.__name__ for one in type(error).__mro__}
    known = {"Unusable", "OutOfResources", "CompilationError", "PTXASError"}
    return bool(known & bases) or "PassManager::run failed" in str(error)


def measured(function: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, in milliseconds, the cache cold."""
    from triton.testing import do_bench

    found: float = do_bench(function, warmup=5, rep=20, return_mode="median")
    return found
