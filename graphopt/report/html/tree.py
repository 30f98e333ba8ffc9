"""Ops as a tree of source modules, and the edges inside of each module.

A module with one op alone is that op; a module with one module alone is written as one, `a.b`; one that
is called again and again in between others, as an activation may be, is its ops. What an
edge joins is seen at every level of the tree: between two ops of different modules it runs from module
to module at the level that holds both, and through the borders of all modules below that. Sizes are read
from everywhere, and their edges are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import networkx as nx

from graphopt.report.story import Listed, is_within

ENTRY, EXIT = "entry", "exit"  # the borders of a module
Inner = int | str  # an op, by its number, or a module, by its path


@dataclasses.dataclass
class Module:
    """What is inside a module, in the order of its first ops, and the edges between: pairs of children,
    `ENTRY` and `EXIT`."""

    path: str
    label: str
    children: list[Inner] = dataclasses.field(default_factory=list)
    edges: dict[tuple[Inner, Inner], None] = dataclasses.field(default_factory=dict)


def tree(ops: Sequence[Listed]) -> dict[str, Module]:
    """The modules that are left as such, each before what is inside it, by path; "" is the model."""
    homes = [one.where for one in ops]
    while True:
        modules = _tree(ops, homes)
        loose = _called_in_between(modules)
        if not loose:
            return modules
        for path in loose:
            outer = path.rpartition(".")[0]
            homes = [outer if is_within(home, path) else home for home in homes]


def _called_in_between(modules: dict[str, Module]) -> set[str]:
    """Modules of ops alone that are on a cycle of their parent's edges."""
    found = set()
    for module in modules.values():
        graph = nx.DiGraph(list(module.edges))
        for cycle in nx.strongly_connected_components(graph):
            for one in cycle if len(cycle) > 1 else ():
                if one in modules and all(isinstance(k, int) for k in modules[one].children):
                    found.add(one)
    return found


def _tree(ops: Sequence[Listed], homes: Sequence[str]) -> dict[str, Module]:
    inside = _children(homes)
    modules: dict[str, Module] = {}
    home: list[list[str]] = [[] for _ in ops]  # the modules around each op, from the outside

    def enter(path: str, label: str, around: list[str]) -> None:
        module = modules[path] = Module(path, label)
        for child in inside[path]:
            prefix = f"{path}." if path else ""
            while isinstance(child, str) and len(inside[child]) == 1:
                only = inside[child][0]
                if isinstance(only, int):
                    child = only
                    break
                child = only
            module.children.append(child)
            if isinstance(child, int):
                home[child] = [*around, path]
            else:
                enter(child, child.removeprefix(prefix), [*around, path])

    enter("", "", [])
    for source, target in edges(ops):
        if source is None or ops[source].type != "int":
            _draw(modules, home, source, target)
    read = {source for source, _ in edges(ops)}
    for one in range(len(ops)):
        if read and one not in read:
            _draw(modules, home, one, None)
    return modules


def edges(ops: Sequence[Listed]) -> Iterator[tuple[int | None, int]]:
    """(op, op that reads it); None for an input of the model. A name is that of the last op of this name
    before: the graphs of several regions stand one after the other."""
    number: dict[str, int] = {}
    for target, one in enumerate(ops):
        for name in one.reads:
            yield number.get(name), target
        number[one.name] = target


def _children(homes: Sequence[str]) -> dict[str, list[Inner]]:
    """Of every module path, the ops of its own and the modules directly inside, in order."""
    inside: dict[str, list[Inner]] = {"": []}
    for number, path in enumerate(homes):
        known = path in inside
        inside.setdefault(path, []).append(number)
        while not known:
            parent = path.rpartition(".")[0]
            known = parent in inside
            inside.setdefault(parent, []).append(path)
            path = parent
    return inside


def _draw(
    modules: dict[str, Module], home: list[list[str]], source: int | None, target: int | None
) -> None:
    """Enter an edge at every level; None is outside of the model."""

    def trail(op: int | None) -> list[Inner]:
        return [] if op is None else [*home[op], op]

    a, b = trail(source), trail(target)
    common = 0
    while a and b and a[common] == b[common]:
        common += 1
    if common:
        modules[str(a[common - 1])].edges[a[common], b[common]] = None
    for k in range(common + 1, len(b)):
        modules[str(b[k - 1])].edges[ENTRY, b[k]] = None
    for k in range(common + 1, len(a)):
        modules[str(a[k - 1])].edges[a[k], EXIT] = None
