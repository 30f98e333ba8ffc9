"""Passes: named, with dataclass fields as options, found through the entry points
`graphopt.passes`, so that third-party passes install with pip."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar

from graphopt.ir.driver import Session
from graphopt.ir.rewrite import Rewrite

Data = Sequence[tuple[Any, Any]]  # calls of a model: (inputs, target)


class PassError(ValueError):
    """An unknown pass or option, or an option value of the wrong type."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Base of all passes: `name` is what pipelines call it, fields are its options."""

    name: ClassVar[str] = ""

    def run(self, session: Session) -> None:
        """Rewrite `session.graph` through the session."""
        raise NotImplementedError

    def within(self, seen: Callable[[Data], Data]) -> Pass:
        """The pass for a part of the model: `seen` turns calls of the whole into calls of that part."""
        return self

    @classmethod
    def summary(cls) -> str:
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def all_rewrites(cls) -> tuple[Rewrite, ...]:
        return ()


class RewritePass(Pass):
    """A pass that is a set of rewrites, applied until none fires."""

    rewrites: ClassVar[tuple[Rewrite, ...]] = ()

    def run(self, session: Session) -> None:
        session.run(self.rewrites)

    @classmethod
    def all_rewrites(cls) -> tuple[Rewrite, ...]:
        return cls.rewrites


@dataclasses.dataclass(frozen=True)
class SingleRewrite(Pass):
    """One rewrite as a pass of its own."""

    rewrite: Rewrite

    def run(self, session: Session) -> None:
        session.run([self.rewrite])


@dataclasses.dataclass(frozen=True)
class Together(Pass):
    """Several sets of rewrites on one worklist: each goes on where another one made room."""

    passes: tuple[RewritePass | SingleRewrite, ...]

    def run(self, session: Session) -> None:
        rewrites = []
        for one in self.passes:
            for rewrite in one.rewrites if isinstance(one, RewritePass) else (one.rewrite,):
                rewrites.append(rewrite)
                session.pass_of[rewrite.name] = one.name or rewrite.name
        session.run(rewrites)
        session.pass_of.clear()


def as_pass(found: Any) -> Pass | type[Pass] | None:
    """A pass or pass class as it is, a rewrite as a pass of its own; None for anything else."""
    if isinstance(found, Rewrite):
        return SingleRewrite(found)
    if isinstance(found, Pass) or (isinstance(found, type) and issubclass(found, Pass)):
        return found
    return None


@lru_cache(maxsize=1)
def available() -> dict[str, type[Pass]]:
    """All installed passes by name: every named pass in this folder, then the entry points."""
    import graphopt.passes as home

    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(home.__path__):
        scope = vars(importlib.import_module(f"{home.__name__}.{module.name}"))
        for cls in scope.values():
            if isinstance(cls, type) and issubclass(cls, Pass) and cls.name:
                found[cls.name] = cls
    for entry in entry_points(group="graphopt.passes"):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return dict(sorted(found.items()))


def find(name: str) -> type[Pass]:
    """The pass called `name`.

    Raises:
        PassError: naming the nearest passes, if there is none.
    """
    passes = available()
    if name in passes:
        return passes[name]
    near = difflib.get_close_matches(name, passes, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise PassError(f"unknown pass {name!r}{hint} (available: {', '.join(sorted(passes))})")
