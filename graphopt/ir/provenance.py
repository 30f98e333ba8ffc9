"""Which modules of the source model a node stands for.

A node stands for the module that it was captured in, or in whose place it was emitted (`where`).
Modules that a replacement leaves without an op live on in the ops that it made: these have absorbed
them (`absorbed`). So a convolution stands for itself, for the batch norm that was folded into it,
and for a convolution that was merged with both.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from torch import fx

from graphopt.ir.graph import Graph, is_pure

Pair = tuple[fx.Node, fx.Node]


def absorbed(node: fx.Node) -> tuple[str, ...]:
    """The paths of the modules that a node stands for beside its own."""
    found: tuple[str, ...] = node.meta.get("absorbed", ())
    return found


def origins(graph: Graph, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The paths of all modules that nodes stand for, each once; for states, their names."""
    paths = (path for node in nodes for path in (graph.where(node), *absorbed(node)))
    return tuple(dict.fromkeys(paths))


def unread(pairs: Sequence[Pair], made: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """The nodes, those of `made` among them, that nobody reads once the second of each pair stands
    for the first."""
    gone, stay = {old for old, _ in pairs}, {new for _, new in pairs}
    stack = [*made, *(one for node in gone for one in node.all_input_nodes)]
    while stack:
        node = stack.pop()
        if node in gone or node in stay or not is_pure(node):
            continue
        if all(user in gone for user in node.users):
            gone.add(node)
            stack += node.all_input_nodes
    return sorted(gone)


def inherit(
    graph: Graph, pairs: Iterable[Pair], made: Iterable[fx.Node], gone: Iterable[fx.Node]
) -> None:
    """Let what was made of the second of each pair absorb the modules of which the first, and what is
    gone with it, leaves no op. Expressions of parameters count on neither side."""
    gone = set(gone)
    fresh = set(made) - gone
    for old, new in pairs:
        heirs = _activations(graph, new, {new, *fresh})
        kept = origins(graph, heirs)
        lost = origins(graph, _activations(graph, old, gone))
        for heir in heirs:
            heir.meta["absorbed"] = absorbed(heir) + tuple(one for one in lost if one not in kept)


def _activations(graph: Graph, node: fx.Node, among: Container[fx.Node]) -> list[fx.Node]:
    """The ops of `among` that `node` is computed from, it included, and that are not constant."""
    found, stack = set(), [node]
    while stack:
        one = stack.pop()
        if one.op != "call_function" or one in found or one not in among:
            continue
        if not graph.is_constant(one):
            found.add(one)
            stack += one.all_input_nodes
    return sorted(found)
