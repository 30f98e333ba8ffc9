"""Groups of coupled entries, by what owns them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import networkx
import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphopt.ir.channels.labels import FIXED, Labels, Layers, Vector
from graphopt.ir.channels.meters import Meter, flops as count_flops
from graphopt.ir.channels.trace import Trace
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

    `parameters` is how many elements they are, `flops` how many fewer the graph takes without them.
    """

    label: int
    parameters: int
    _groups: Groups = dataclasses.field(repr=False, compare=False)

    @property
    def members(self) -> tuple[Member, ...]:
        return self._groups._places.members(self.label)

    @property
    def flops(self) -> float:
        return self._groups.flops(self.label)


class Family(Sequence[Group]):
    """The groups of one width: with the same members but for the entries. `labels` are theirs."""

    def __init__(self, labels: Vector, parameters: Vector, groups: Groups) -> None:
        self.labels, self._parameters, self._groups = labels, parameters, groups

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> Family: ...
    def __getitem__(self, at: int | slice) -> Group | Family:
        if isinstance(at, slice):
            return Family(self.labels[at], self._parameters[at], self._groups)
        return Group(int(self.labels[at]), int(self._parameters[at]), self._groups)


class Groups:
    """The channel groups of a graph."""

    def __init__(self, graph: Graph, free: Collection[str] = ()) -> None:
        self.graph = graph
        self.trace = Trace(graph, free=free)
        if laid_out := self.trace.coupling.laid_out:
            self.trace = Trace(graph, laid_out, free)
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

    @cached_property
    def blocks(self) -> frozenset[int]:
        """The labels of groups that are blocks of finer ones, as heads are of features."""
        found: set[int] = set()
        for grid in self.trace.coupling.grids:
            layers = [set(self.classes[one].tolist()) - {FIXED} for one in grid]
            found.update(*[one for one in layers if one][:-1])
        return frozenset(found)

    def statistics(self, lost: NDArray[np.bool_]) -> list[str]:
        """Where a statistic runs over an axis that loses entries, and so counts those that stay."""
        return [
            f"{node.name} ({self.graph.where(node) or 'the model itself'}): {what}"
            for node, what in self.trace.statistics.items()
            if any(self.kept(one, lost) for one in node.all_input_nodes)
        ]

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

    @cached_property
    def _places(self) -> _Places:
        return _Places(self.states)

    @cached_property
    def _flops(self) -> Meter:
        return count_flops(self)

    def flops(self, *gone: int) -> float:
        """How many fewer FLOPs the graph takes without the groups of these labels, at the sizes of the
        example inputs."""
        lost = np.zeros((2, self.trace.coupling.count), dtype=bool)
        lost[1, list(gone)] = True
        full, left = self._flops.totals(lost)
        return float(full - left)

    def groups(self) -> list[Group]:
        """All groups that a parameter is part of, those that are fixed left out."""
        return [group for family in self.families() for group in family]

    def __str__(self) -> str:
        lines = [f"{len(self.families())} families of channel groups"]
        for family in sorted(self.families(), key=lambda one: -sum(g.parameters for g in one)):
            members = ", ".join(
                f"{one.name}[{one.axis}]"
                + (f" x {len(one.entries)}" if len(one.entries) > 1 else "")
                for one in family[0].members
            )
            costs = f"{family[0].parameters} parameters, {family[0].flops:.3g} FLOPs"
            lines.append(f"{len(family)} groups of {costs}: {members}")
        for (name, axis), reason in self.fixed().items():
            lines.append(f"fixed: {name}[{axis}]: {reason}")
        return "\n".join(lines)

    def families(self) -> list[Family]:
        """Groups with the same members but for the entries: the channels of one width."""
        return [Family(*one, self) for one in self._places.families()]

    def drawn(self) -> networkx.Graph:
        """Parameters and families of groups, an edge where one is part of the other."""
        graph = networkx.Graph()
        for number, family in enumerate(self.families()):
            graph.add_node(
                number, size=len(family), parameters=sum(one.parameters for one in family),
                flops=len(family) * family[0].flops,
            )  # fmt: skip
            for member in family[0].members:
                graph.add_edge(number, member.name, axis=member.axis, entries=len(member.entries))
        return graph


class _Places:
    """Where every label occurs in parameters, sorted by label."""

    def __init__(self, states: Mapping[str, Labels]) -> None:
        self.axes: list[
            tuple[str, int, Vector, Vector]
        ] = []  # name, axis, entries by label, starts
        label, where, number, count, size = [], [], [], [], []
        for name, labels in states.items():
            elements = int(np.prod(labels.shape))
            for axis, layers in labels.axes.items():
                for layer in layers:
                    order, values, ends = _sorted(layer)
                    label.append(values)
                    where.append(np.full(len(values), len(self.axes)))
                    number.append(np.arange(len(values)))
                    count.append(np.diff(ends))
                    size.append(elements // labels.shape[axis] * count[-1])
                    self.axes.append((name, axis, order, ends))
        empty = [np.zeros(0, dtype=np.int64)]
        found = np.concatenate(label or empty)
        order = np.argsort(found, kind="stable")
        order = order[found[order] != FIXED]
        self.where, self.number, self.count, self.size = (
            np.concatenate(one or empty)[order] for one in (where, number, count, size)
        )
        self.labels, starts = np.unique(found[order], return_index=True)
        self.starts = np.append(starts, len(order))

    def _of(self, label: int) -> slice:
        at = int(np.searchsorted(self.labels, label))
        return slice(int(self.starts[at]), int(self.starts[at + 1]))

    def members(self, label: int) -> tuple[Member, ...]:
        found = []
        part = self._of(label)
        for where, number in zip(self.where[part], self.number[part], strict=True):
            name, axis, order, ends = self.axes[where]
            entries = order[ends[number] : ends[number + 1]]
            found.append(Member(name, axis, tuple(entries.tolist())))
        return tuple(found)

    def families(self) -> list[tuple[Vector, Vector]]:
        """Labels of each family, and how many elements each of them is."""
        if not len(self.labels):
            return []
        kinds = self.where * (self.count.max() + 1) + self.count
        sizes = np.add.reduceat(self.size, self.starts[:-1])
        lengths = np.diff(self.starts)
        found: list[Vector] = []
        for length in np.unique(lengths):
            these = np.flatnonzero(lengths == length)
            rows = kinds[self.starts[these][:, None] + np.arange(length)]
            family = _numbered(rows)
            order = np.argsort(family, kind="stable")
            found += np.split(these[order], np.flatnonzero(np.diff(family[order])) + 1)
        found.sort(key=lambda one: int(one[0]))
        return [(self.labels[one], sizes[one]) for one in found]


def _sorted(layer: Vector) -> tuple[Vector, Vector, Vector]:
    """Entries in the order of their labels, the labels, and where the entries of each start and end."""
    count = len(layer)
    if bool((layer[1:] > layer[:-1]).all()):
        return np.arange(count), layer, np.arange(count + 1)
    order = np.argsort(layer, kind="stable")
    values, starts = np.unique(layer[order], return_index=True)
    return order, values, np.append(starts, count)


def _numbered(rows: Vector) -> Vector:
    """A number for each row, the same for the same rows."""
    number = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        kind = np.unique(column, return_inverse=True)[1]
        number = np.unique(number * (kind.max() + 1) + kind, return_inverse=True)[1]
    return number


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


def find_groups(graph: Graph, free: Collection[str] = ()) -> Groups:
    """The channel groups of a graph, at the sizes of its example inputs. With "inputs" or "outputs" in
    `free`, the axes of these are not fixed."""
    return Groups(graph, free)
