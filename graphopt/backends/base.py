"""What a backend is, and how one is found and chosen."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Runnable = Callable[..., Any]

_HOMES = {
    "eager": "graphopt.backends.eager",
    "prepacked": "graphopt.backends.prepacked",
    "inductor": "graphopt.backends.inductor",
    "triton": "graphopt.backends.triton",
}
ROUNDS = 5


class BackendError(ValueError):
    """An unknown backend, or one that cannot run here."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run a graph module.

    `lower(module, trainable)` returns a callable with the module's signature; lines of text that it
    has as `remarks` go into the report. `missing()` says why the backend cannot run here, or returns "";
    `worth_timing()` whether "auto" tries it.
    """

    name: str
    lower: Callable[[fx.GraphModule, bool], Runnable]
    missing: Callable[[], str] = lambda: ""
    worth_timing: Callable[[], bool] = lambda: True

    def lower_again(self, report: Any) -> Callable[[fx.GraphModule], Runnable]:
        """`lower` for a module that was optimized before, with the mode its report tells."""
        trainable = report.mode != "deploy"
        return lambda module: self.lower(module, trainable)


def find(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: if there is none, or it cannot run here.
    """
    if name not in _HOMES:
        near = difflib.get_close_matches(name, [*_HOMES, "auto"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BackendError(f"unknown backend {name!r}{hint} (available: auto, {', '.join(_HOMES)})")
    backend: Backend = importlib.import_module(_HOMES[name]).BACKEND
    if reason := backend.missing():
        raise BackendError(f"backend {name} cannot run here: {reason}")
    return backend


def candidates() -> list[Backend]:
    """Every backend that can run here and may be the fastest."""
    found = []
    for name in _HOMES:
        try:
            found.append(find(name))
        except BackendError:
            continue
    return [backend for backend in found if backend.worth_timing()]


def choose(
    lowered: Sequence[tuple[Backend, Runnable]], call: Callable[[Runnable], Any]
) -> list[tuple[Backend, float]]:
    """Median seconds per call of each candidate, rounds interleaved, fastest first."""
    times: dict[str, list[float]] = {backend.name: [] for backend, _ in lowered}
    with torch.no_grad():
        for _, run in lowered:
            call(run)
        for _ in range(ROUNDS):
            for backend, run in lowered:
                start = time.perf_counter()
                call(run)
                times[backend.name].append(time.perf_counter() - start)
    ranked = [(backend, statistics.median(times[backend.name])) for backend, _ in lowered]
    return sorted(ranked, key=lambda one: one[1])
