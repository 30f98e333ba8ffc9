"""A layered drawing of what is inside one module, top to bottom.

Sugiyama, Tagawa, Toda: Methods for visual understanding of hierarchical system structures (1981). Layers
are longest paths; an edge over several layers runs through one free place in each, which all readers of
the same value share; places are ordered by the mean position of their neighbours (barycenters). An edge
over very many, or against the order of the program, as a module that is called twice may have, is drawn
aside (`back`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import networkx as nx

from graphopt.report.html.tree import ENTRY, EXIT, Inner, Module

SWEEPS = 4
NEAR, FAR = 12, 60  # layers that an edge may always, and may at most, pass through
THROUGH = 20_000  # about as many places that edges pass through are drawn in one module
Place = Hashable  # a child, a border, or ("through", source, layer)


@dataclasses.dataclass(frozen=True)
class Layers:
    """`rows` of places; None is one that an edge runs through. `links[r]` are the edges from row r to
    the next, as pairs of positions in them. `back` are the edges drawn aside."""

    rows: list[list[Inner | None]]
    links: list[list[tuple[int, int]]]
    back: list[tuple[Inner, Inner]]


def layers(module: Module) -> Layers:
    """The drawing of one module."""
    row = _rows(module)
    far = min(FAR, max(NEAR, THROUGH // max(1, len(module.edges))))
    forward = nx.DiGraph()
    forward.add_nodes_from(row)
    back = []
    reach: dict[Place, int] = {}  # how far below the value of a place is read
    for a, b in module.edges:
        if 0 < row[b] - row[a] <= far:
            reach[a] = max(reach.get(a, 0), row[b])
        else:
            back.append((a, b))
    place = dict(row)
    for source, last in reach.items():
        for r in range(row[source] + 1, last):
            place[("through", source, r)] = r
    for a, b in module.edges:
        if 0 < row[b] - row[a] <= far:
            path = [a, *(("through", a, r) for r in range(row[a] + 1, row[b])), b]
            nx.add_path(forward, path)
    rows = _ordered(forward, place)
    position = {one: k for line in rows for k, one in enumerate(line)}
    links: list[list[tuple[int, int]]] = [[] for _ in rows]
    for a, b in forward.edges:
        links[place[a]].append((position[a], position[b]))
    return Layers(
        [[None if isinstance(one, tuple) else one for one in line] for line in rows],  # type: ignore[misc]
        [sorted(one) for one in links], back,
    )  # fmt: skip


def _rows(module: Module) -> dict[Place, int]:
    """The layer of every child and of the borders that are used. What reads nothing stands directly above
    its first reader."""
    used = {end for edge in module.edges for end in edge}
    order: list[Place] = [ENTRY] if ENTRY in used else []
    order += module.children
    order += [EXIT] if EXIT in used else []
    rank = {one: k for k, one in enumerate(order)}
    graph = nx.DiGraph()
    graph.add_nodes_from(order)
    graph.add_edges_from((a, b) for a, b in module.edges if rank[a] < rank[b])
    if not module.edges:
        nx.add_path(graph, order)  # of reports without edges: the order of the program
    row = {one: k for k, line in enumerate(nx.topological_generations(graph)) for one in line}
    for one in reversed(order):
        if one != ENTRY and not graph.in_degree(one) and graph.out_degree(one):
            row[one] = max(row[one], min(row[b] for _, b in graph.out_edges(one)) - 1)
    if EXIT in used:
        row[EXIT] = 1 + max(k for one, k in row.items() if one != EXIT)
    return row


def _ordered(graph: nx.DiGraph, place: Mapping[Place, int]) -> list[list[Place]]:
    rows: list[list[Place]] = [[] for _ in range(1 + max(place.values(), default=-1))]
    for one, r in place.items():
        rows[r].append(one)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        near = graph.predecessors if down else graph.successors
        position = _positions(rows)
        for line in rows if down else reversed(rows):
            own = {one: position[one] for one in line}
            center = {one: _mean([position[b] for b in near(one)], own[one]) for one in line}
            line.sort(key=lambda one: (center[one], own[one]))
            position.update(_positions([line]))
    return rows


def _positions(rows: Sequence[Sequence[Place]]) -> dict[Place, float]:
    return {one: (k + 0.5) / len(line) for line in rows for k, one in enumerate(line)}


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
