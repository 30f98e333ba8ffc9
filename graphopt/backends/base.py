"""What a backend is, and how one is found and chosen."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
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
_REGISTERED: dict[str, Backend] = {}


GROUP = "graphopt.backends"


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


def register(backend: Backend) -> None:
    """Make a backend known in this process, in place of an earlier one of its name. Packages name theirs
    under the entry-point group `graphopt.backends`."""
    if backend.name in _HOMES or backend.name == "auto":
        raise BackendError(f"the name {backend.name!r} is taken by a backend of graphopt")
    _REGISTERED[backend.name] = backend


def names() -> list[str]:
    """Of all backends, the simple ones first; they may be unable to run here."""
    installed = [one.name for one in entry_points(group=GROUP)]
    return list(dict.fromkeys([*_HOMES, *_REGISTERED, *installed]))


def _loaded(name: str) -> Backend:
    if name in _HOMES:
        ours: Backend = importlib.import_module(_HOMES[name]).BACKEND
        return ours
    if name in _REGISTERED:
        return _REGISTERED[name]
    (entry, *_) = entry_points(group=GROUP, name=name)
    try:
        theirs = entry.load()
    except Exception as error:
        raise BackendError(
            f"backend {name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(theirs, Backend):
        raise BackendError(
            f"backend {name}: expected a Backend, found {entry.value}: {theirs!r:.80}"
        )
    return theirs


def find(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: if there is none, or it cannot run here.
    """
    if name not in _HOMES and name not in (known := names()):  # installed packages are read last
        near = difflib.get_close_matches(name, [*known, "auto"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BackendError(f"unknown backend {name!r}{hint} (available: auto, {', '.join(known)})")
    backend = _loaded(name)
    if reason := backend.missing():
        raise BackendError(f"backend {name} cannot run here: {reason}")
    return backend


def candidates() -> list[Backend]:
    """Every backend that can run here and may be the fastest, the simple ones first."""
    found = []
    for name in names():
        try:
            found.append(find(name))
        except BackendError:
            continue
    return [backend for backend in found if backend.worth_timing()]
