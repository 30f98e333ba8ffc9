"""What a backend is, and how one is found and chosen."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any

from torch import fx

Runnable = Callable[..., Any]

_HOMES = {
    "eager": "graphopt.backends.eager",
    "prepacked": "graphopt.backends.prepacked",
    "triton": "graphopt.backends.triton",
    "openvino": "graphopt.backends.openvino",
    "onnxruntime": "graphopt.backends.onnxruntime",
    "inductor": "graphopt.backends.inductor",
}  # simple ones first: in that order "auto" builds them, and prefers them where they are as fast


class BackendError(ValueError):
    """An unknown backend, or one that cannot run here."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run a graph module.

    `lower(module, trainable)` returns a callable with the module's signature; lines of text that it
    has as `remarks` go into the report. `missing()` says why the backend cannot run here, or returns "";
    `worth_timing()` whether "auto" tries it; `build_seconds` is what building is expected to take: a
    constant, and so much for every op.
    """

    name: str
    lower: Callable[[fx.GraphModule, bool], Runnable]
    missing: Callable[[], str] = lambda: ""
    worth_timing: Callable[[], bool] = lambda: True
    build_seconds: tuple[float, float] = (2.0, 0.05)

    def expected_build(self, ops: int) -> float:
        """Seconds to build a graph of so many ops."""
        constant, per_op = self.build_seconds
        return constant + per_op * ops

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
    """Every backend that can run here and may be the fastest, the simple ones first."""
    found = []
    for name in _HOMES:
        try:
            found.append(find(name))
        except BackendError:
            continue
    return [backend for backend in found if backend.worth_timing()]
