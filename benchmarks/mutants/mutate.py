"""Laws, the mutants of a law, and a mutant put in the place of the original."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.mutants.equivalent import EQUIVALENT

# In the order in which they import each other.
LAWS = tuple(
    f"graphopt.ir.{name}"
    for name in (
        "affine",
        "sizes",
        "borders",
        "absorb",
        "extract",
        "maps",
        "tokens",
        "transpose",
        "linearity",
    )
)
LAW_METHODS = {
    ("graphopt.ir.ops.affine", "Conv"): ("scale_out", "scale_in", "_per_output", "response_kernel"),
    ("graphopt.ir.ops.norm", "BatchNorm"): ("scale_and_shift",),
}


@dataclasses.dataclass(frozen=True)
class Law:
    """A function whose source may be changed: a rewrite, or a law (of class `owner`) it reaches."""

    home: str
    owner: str
    tree: ast.Module
    node: ast.FunctionDef

    @property
    def name(self) -> str:
        """Its name; a case of a `singledispatch` table is named after its op."""
        if self.node.name != "_":
            return self.node.name
        first = self.node.decorator_list[0]
        case = first.args[0] if isinstance(first, ast.Call) else self.node.args.args[0].annotation
        return f"{ast.unparse(first).partition('.')[0]}[{ast.unparse(case or first)}]"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one law: `put(new)` makes it in the source tree, `put(old)` takes it back."""

    law: Law
    kind: str
    put: Callable[[ast.AST], None]
    old: ast.AST
    new: ast.AST

    @property
    def change(self) -> str:
        before, after = (" ".join(ast.unparse(one).split()) for one in (self.old, self.new))
        if isinstance(self.old, (ast.Constant, ast.Name)):  # says nothing without its line
            lines = (
                text.splitlines()
                for text in (ast.unparse(self.law.node), self.source(self.law.node))
            )
            changed = (pair for pair in zip(*lines, strict=True) if pair[0] != pair[1])
            before, after = (line.strip() for line in next(changed))
        return f"{before}  ->  {'(nothing)' if isinstance(self.new, ast.Pass) else after}"

    @property
    def lines(self) -> range:
        """Where the change is, in the source of its module."""
        first = getattr(self.old, "lineno", self.law.node.lineno)
        return range(first, getattr(self.old, "end_lineno", first) + 1)

    def argument(self, rewrite: str) -> str:
        """Why the rewrite means the same with this change; empty if no argument is known."""
        places = self.law.name, f"{rewrite}: {self.law.name}"
        found = (EQUIVALENT.get((place, one)) for place in places for one in (self.change, "*"))
        return next(filter(None, found), "")

    def source(self, of: ast.AST) -> str:
        self.put(self.new)
        try:
            return ast.unparse(of)
        finally:
            self.put(self.old)

    @contextlib.contextmanager
    def active(self, rewrite: str, home: str) -> Iterator[Any]:
        """The mutated rewrite called `rewrite` of the module `home`, in a copy of its module."""
        law = self.law
        with contextlib.ExitStack() as stack:
            if law.owner:
                module = importlib.import_module(law.home)
                scope = dict(vars(module))
                exec(self.source(law.node), scope)
                method, cls = scope[law.node.name], getattr(module, law.owner)
                stack.enter_context(mock.patch.object(cls, law.node.name, method))
                module = importlib.import_module(home)
            else:
                module = self._rebuilt(home)
            yield vars(module)[rewrite]

    def _rebuilt(self, home: str) -> types.ModuleType:
        """A copy of the module `home` that has the mutant, also where it imports it."""
        originals = {name: importlib.import_module(name) for name in (*LAWS, home)}
        try:
            for name, module in originals.items():
                mutated = name == self.law.home
                text = self.source(self.law.tree) if mutated else inspect.getsource(module)
                sys.modules[name] = _executed(name, text)
            return sys.modules[home]
        finally:
            sys.modules.update(originals)


def _executed(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(source, vars(module))
    return module


@functools.lru_cache
def _laws(home: str) -> list[Law]:
    tree = ast.parse(inspect.getsource(importlib.import_module(home)))
    found = []
    for top in tree.body:
        methods = LAW_METHODS.get((home, getattr(top, "name", "")))
        for node in top.body if methods and isinstance(top, ast.ClassDef) else [top]:
            if isinstance(node, ast.FunctionDef) and (not methods or node.name in methods):
                owner = top.name if methods else ""  # type: ignore[attr-defined]
                found.append(Law(home, owner, tree, node))
    return [law for law in found if law.owner or ".ops." not in home]


def reached(home: str, name: str) -> list[Law]:
    """The function called `name`, and the laws that it reaches by name."""
    homes = [home] if "canonicalize" in home else [home, *LAWS, *(key[0] for key in LAW_METHODS)]
    left = [law for one in homes for law in _laws(one)]
    found, waiting = [], [name]
    while waiting:
        wanted = waiting.pop()
        for law in [one for one in left if one.name.partition("[")[0] == wanted]:
            left.remove(law)
            found.append(law)
            waiting += _names(law.node)
    return found


def _names(function: ast.FunctionDef) -> list[str]:
    """The names that a function reads and does not bind itself, and those of attributes."""
    nodes = list(ast.walk(function))
    bound = {one.arg for one in nodes if isinstance(one, ast.arg)}
    names = [one for one in nodes if isinstance(one, ast.Name)]
    bound |= {one.id for one in names if isinstance(one.ctx, ast.Store)}
    attributes = [one.attr for one in nodes if isinstance(one, ast.Attribute)]
    return [one.id for one in names if one.id not in bound] + attributes
