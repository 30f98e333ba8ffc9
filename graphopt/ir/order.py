"""The order of calls: which it must keep, and how to change the rest."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from graphopt.ir.graph import Graph, GraphError, is_random, written


def kept_in_order(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of calls of which the first must stay before the second, though the second does not read it:
    random ones, and those that touch memory that is written."""
    yield from _neighbours([node for node in graph.calls if is_random(node)])
    sources = {one for node in graph.calls for one in written(node)}
    for source in sources:
        touching, stack = set(), [source]
        while stack:
            for user in stack.pop().users:
                if user.op == "call_function" and user not in touching:
                    touching.add(user)
                    if _is_view(user):
                        stack.append(user)
        yield from _neighbours(sorted(touching))


def _neighbours(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    return itertools.pairwise(nodes)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(one.alias_info is not None for one in schema.returns)


def bring_together(graph: Graph, classes: Iterable[tuple[fx.Node, ...]]) -> None:
    """Move calls so that the members of each class stand one behind the other, and nothing else unless
    it must.

    Raises:
        GraphError: if classes depend on each other in a circle.
    """
    groups: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for members in classes:
        groups.update(dict.fromkeys(members, members))
    before: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for first, second in kept_in_order(graph):
        before[second].append(first)
    calls = graph.calls
    done: set[fx.Node] = set()
    open_: set[fx.Node] = set()  # first members of what waits for what it reads
    order: list[fx.Node] = []
    for root in calls:
        stack = [root]
        while stack:
            group = groups.get(stack[-1], (stack[-1],))
            if group[0] in done:
                stack.pop()
                continue
            missing = [
                one for node in group for one in (*node.all_input_nodes, *before[node])
                if one.op == "call_function" and one not in done
            ]  # fmt: skip
            if missing:
                open_.add(group[0])
                if any(groups.get(one, (one,))[0] in open_ for one in missing):
                    raise GraphError(
                        f"{group[0].name} and what it is to run with depend on each other"
                    )
                stack += reversed(missing)
            else:
                stack.pop()
                done.update(group)
                open_.discard(group[0])
                order += group
    if order != calls:
        last = graph.output
        for node in order:
            last.prepend(node)
        graph._first = None  # states are read before the first call
