"""Groups of coupled entries, by what owns them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import networkx
import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphopt.ir.channels.labels import FIXED, Labels, Layers, Vector
from graphopt.ir.channels.rules import Trace
from graphopt.ir.graph import Graph


@dataclasses.dataclass(frozen=True)
class Member:
    """Entries of an axis of a parameter."""

    name: str
    axis: int
    entries: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Entries that go away together: those of one channel in all the parameters that know it.

    `parameters` is how many elements they are.
    """

    label: int
    members: tuple[Member, ...]
    parameters: int


class Groups:
    """The channel groups of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.trace = Trace(graph)
        self.classes: Vector = self.trace.coupling.classes()
        self.states = {
            str(node.target): self._classed(self.trace.labels[node])
            for node in graph.fx.nodes if node.op == "get_attr"
        }  # fmt: skip

    def _classed(self, found: Labels) -> Labels:
        """Labels with that of its class for each."""
        axes = {
            axis: tuple(self.classes[layer] for layer in layers)
            for axis, layers in found.axes.items()
        }
        return Labels(found.shape, {axis: one for axis, one in axes.items() if _any(one)})

    def lost(self, gone: Iterable[int]) -> NDArray[np.bool_]:
        """For every label, whether it goes away with the groups of these labels."""
        found = np.zeros(self.trace.coupling.count, dtype=bool)
        found[list(gone)] = True
        return found[self.classes]

    def kept(self, node: fx.Node, lost: NDArray[np.bool_]) -> Any:
        """Which entries of the value of a node stay, for every axis that loses some; of several
        values, a list."""
        found = self.trace.labels.get(node)
        if isinstance(found, list):
            return [{} if one is None else _kept(one, lost) for one in found]
        return {} if found is None else _kept(found, lost)

    def emptied(self, lost: NDArray[np.bool_]) -> Iterator[tuple[fx.Node, int, Layers]]:
        """Axes of values that would lose all entries, with the groups of each entry."""
        for node in self.trace.labels:
            found = self.kept(node, lost)
            values = self.trace.labels[node]
            several = isinstance(found, list)
            for kept, labels in zip(
                found if several else [found], values if several else [values], strict=True
            ):
                for axis, entries in kept.items():
                    if not len(entries):
                        layers = labels.axes[axis]
                        yield node, axis, tuple(self.classes[layer] for layer in layers)

    def fixed(self) -> dict[tuple[str, int], str]:
        """Why an axis of a parameter keeps all its entries."""
        found = {}
        for node in self.graph.fx.nodes:
            if node.op != "get_attr":
                continue
            name, labels = str(node.target), self.trace.labels[node]
            for axis, size in enumerate(labels.shape):
                if size > 1 and axis not in self.states[name].axes and axis not in labels.fresh:
                    known = self.trace.coupling.reasons
                    given = (known.get(int(one)) for layer in labels.layers(axis) for one in layer)
                    reason = labels.reasons.get(axis) or next(filter(None, given), "")
                    found[name, axis] = reason or "it is coupled with what is fixed"
        return found

    def groups(self) -> list[Group]:
        """All groups that a parameter is part of, those that are fixed left out."""
        members: dict[int, list[Member]] = {}
        sizes: dict[int, int] = {}
        for name, labels in self.states.items():
            count = int(np.prod(labels.shape))
            for axis, layers in labels.axes.items():
                for layer in layers:
                    order = np.argsort(layer, kind="stable")
                    values, starts = np.unique(layer[order], return_index=True)
                    for label, entries in zip(values, np.split(order, starts[1:]), strict=True):
                        if label == FIXED:
                            continue
                        members.setdefault(int(label), []).append(
                            Member(name, axis, tuple(entries.tolist()))
                        )
                        sizes[int(label)] = sizes.get(int(label), 0) + (
                            count // labels.shape[axis] * len(entries)
                        )
        return [Group(label, tuple(found), sizes[label]) for label, found in members.items()]

    def __str__(self) -> str:
        lines = [f"{len(self.families())} families of channel groups"]
        for family in sorted(self.families(), key=lambda one: -sum(g.parameters for g in one)):
            members = ", ".join(
                f"{one.name}[{one.axis}]"
                + (f" x {len(one.entries)}" if len(one.entries) > 1 else "")
                for one in family[0].members
            )
            lines.append(f"{len(family)} groups of {family[0].parameters} parameters: {members}")
        for (name, axis), reason in self.fixed().items():
            lines.append(f"fixed: {name}[{axis}]: {reason}")
        return "\n".join(lines)

    def families(self) -> list[list[Group]]:
        """Groups with the same members but for the entries: the channels of one width."""
        found: dict[Any, list[Group]] = {}
        for group in self.groups():
            key = tuple(sorted((one.name, one.axis, len(one.entries)) for one in group.members))
            found.setdefault(key, []).append(group)
        return list(found.values())

    def drawn(self) -> networkx.Graph:
        """Parameters and families of groups, an edge where one is part of the other."""
        graph = networkx.Graph()
        for number, family in enumerate(self.families()):
            graph.add_node(
                number, size=len(family), parameters=sum(one.parameters for one in family)
            )
            for member in family[0].members:
                graph.add_edge(number, member.name, axis=member.axis, entries=len(member.entries))
        return graph


def _kept(labels: Labels, lost: NDArray[np.bool_]) -> dict[int, Vector]:
    found = {}
    for axis, layers in labels.axes.items():
        away = np.zeros(labels.shape[axis], dtype=bool)
        for layer in layers:
            away |= lost[layer]
        if away.any():
            found[axis] = np.flatnonzero(~away)
    return found


def _any(layers: tuple[Vector, ...]) -> bool:
    return any(bool((layer != FIXED).any()) for layer in layers)


def find_groups(graph: Graph) -> Groups:
    """The channel groups of a graph, at the sizes of its example inputs."""
    return Groups(graph)
