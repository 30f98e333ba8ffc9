"""Which step of an unrolled computation each node belongs to, told by the inputs it depends on.

Steps are numbered by what they read: elements of one tensor (select, unbind, ..), or what the same layers
make of such elements; without such, by what is read outside (every step's outputs depend on more inputs than
those of the step before); or, where every step reads the same, by the operation that reads it: each of its
uses depends on the one before. A node belongs to the step of the last of these that it depends on. What
depends on none belongs to the one step that reads it, or is an invariant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphopt.ir.affine import same_shape

aten = torch.ops.aten
_FILLED = {aten.zeros: 0.0, aten.zeros_like: 0.0, aten.new_zeros: 0.0, aten.ones: 1.0,
           aten.ones_like: 1.0, aten.new_ones: 1.0}  # fmt: skip


class NotSteps(Exception):
    """What looks like steps and is none; the message names the operation."""


def tensor(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name}: expected a tensor, found {value}"
    return value


def components(graph: fx.Graph, is_pointwise: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """The pointwise nodes of each shape that are connected, in graph order; of two nodes at least.
    What is broadcast to them, and read by nothing else, belongs to them."""
    return connected(filter(is_pointwise, graph.nodes))


def connected(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """These nodes, given in graph order, by component; see `components`."""
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in nodes:
        parent[node] = node
        shape = tensor(node).shape
        for read in node.all_input_nodes:
            if read in parent and same_shape(tensor(read).shape, shape):
                parent[find(read)] = find(node)
    for node in reversed(parent):
        readers = {find(user) if user in parent else None for user in node.users}
        if len(readers) == 1 and (reader := readers.pop()) is not None:
            parent[find(node)] = reader
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in parent:
        found[find(node)].append(node)
    return [one for one in found.values() if len(one) > 1]


def layers(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """A component, cut where something outside of it stands between its nodes (a layer between the
    neurons of a residual network): parts, each of which can be computed at once, in order."""
    inside = set(nodes)
    rank: dict[fx.Node, int] = {}
    parts: dict[int, list[fx.Node]] = defaultdict(list)
    started = False
    for node in nodes[0].graph.nodes:
        started = started or node in inside
        if not started or filled(node) is not None:
            continue
        reads = [(rank[one], one in inside) for one in node.all_input_nodes if one in rank]
        if node in inside:
            rank[node] = max((one + (not own) for one, own in reads), default=0)
            parts[rank[node]].append(node)
        elif reads:
            rank[node] = max(one for one, _ in reads)
    return [part for _, one in sorted(parts.items()) for part in connected(one)]


def element(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(tensor, axis, position) if a node is one element of a tensor along an axis, without it."""
    target, args = node.target, node.args
    if target is aten.select.int:
        return args[0], int(args[1]), int(args[2])  # type: ignore
    if getattr(target, "__name__", "") == "getitem" and isinstance(args[0], fx.Node):
        source = args[0]
        if source.target is aten.unbind.int:
            axis = source.args[1] if len(source.args) > 1 else 0
            return source.args[0], axis, args[1]  # type: ignore
    if target in (aten.squeeze.dim, aten.squeeze.dims) and isinstance(args[0], fx.Node):
        cut, axes = args[0], args[1]
        axis = axes[0] if isinstance(axes, (list, tuple)) and len(axes) == 1 else axes
        if cut.target is aten.slice.Tensor and len(cut.args) == 4 and cut.args[1] == axis:
            start, stop = cut.args[2:4]
            if isinstance(start, int) and stop == start + 1:
                return cut.args[0], axis, start  # type: ignore
    return None


MOST_LAYERS = 100  # between an element and what a step reads of it

Series = tuple[Any, int] | None


def series(node: fx.Node, known: dict[Any, Any], depth: int = MOST_LAYERS) -> Series:
    """(which series, position in it) of a value that layers make of an element of a tensor, or of several
    at one position, and of values that are no elements; None for others. `known` keeps these, and a number
    for every series."""
    if node not in known:
        known[node] = _series(node, known, depth)
    return known[node]  # type: ignore[no-any-return]


def _series(node: fx.Node, known: dict[Any, Any], depth: int) -> Series:
    if (found := element(node)) is not None:
        source, axis, position = found
        count = source.meta["val"].shape[axis]
        return (source, axis), position + count if position < 0 else position
    if node.op != "call_function" or not depth or node.meta.get("constant"):
        return None
    reads = {
        one: series(one, known, depth - 1) for one in node.all_input_nodes
        if isinstance(one.meta.get("val"), torch.Tensor)
    }  # fmt: skip
    places = {found[1] for found in reads.values() if found is not None}
    if len(places) != 1:
        return None
    of = {one: found[0] for one, found in reads.items() if found is not None}
    key = node.target, _key(node.args, of), _key(node.kwargs, of)
    return known.setdefault(key, len(known)), places.pop()  # a number: keys share their parts


def _key(value: Any, of: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(one, of) for one in value)
    if isinstance(value, dict):
        return tuple((key, _key(one, of)) for key, one in sorted(value.items()))
    if isinstance(value, fx.Node):
        return of.get(value, value)
    return type(value), repr(value)


def filled(node: Any) -> float | None:
    """The number that a tensor is full of, if the graph says so."""
    packet = getattr(getattr(node, "target", None), "overloadpacket", None)
    if packet in _FILLED:
        return _FILLED[packet]
    if packet in (aten.full, aten.full_like, aten.new_full):
        value = node.args[2 if packet is aten.new_full else 1]
        return value if isinstance(value, (bool, int, float)) else None
    return None


class Steps:
    """The nodes of a component, sorted into steps."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes, self.inside = list(nodes), set(nodes)
        leaves = dict.fromkeys(
            one for node in nodes for one in node.all_input_nodes if one not in self.inside
        )
        self.leaves = [one for one in leaves if isinstance(one.meta.get("val"), torch.Tensor)]
        if len(self.leaves) < len(leaves):
            self.count = 0
            return
        self.constants = {leaf for leaf in self.leaves if filled(leaf) is not None}
        bits = {
            leaf: 0 if leaf in self.constants else 1 << number
            for number, leaf in enumerate(self.leaves)
        }
        masks = self._masks(bits)
        marks = self._marks(masks)
        self.told = bool(marks)  # by the graph itself that these are steps
        marks = marks or self._marks_by_outputs(masks, bits)
        if len(set(marks.values())) < 2:
            marks, bits = self._marks_by_uses(bits)
            masks = self._masks(bits)
        self.count = 1 + max(marks.values(), default=0)
        self.level = self._levels(masks, bits, marks)
        for leaf in [one for one in marks if one not in self.inside]:
            if len({self.level[user] for user in leaf.users if user in self.inside}) > 1:
                del marks[leaf]
        self.level = self._levels(masks, bits, marks)
        self.invariant: set[fx.Node] = set()
        self._place_unmarked(marks)
        self.invariant |= self.constants
        self.body = [node for node in nodes if node not in self.invariant]

    def _masks(self, bits: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """What every node depends on, itself included, as the union of their bits."""
        masks = dict(bits)
        for node in self.nodes:
            masks[node] = bits.get(node, 0)
            for read in node.all_input_nodes:
                masks[node] |= masks[read]
        return masks

    def _place_unmarked(self, marks: dict[fx.Node, int]) -> None:
        """What depends on no marked input belongs to the one step that reads it, or is invariant."""
        spread: dict[fx.Node, set[int]] = {}
        # A first step in which the states are numbers may not do what marks the others.
        starts = any(mark in self.inside for mark in marks) and any(
            self.level[node] < 0 and any(map(self.is_outside, node.users)) for node in self.nodes
        )
        if starts:
            self.count += 1
            self.level = {one: level + (level >= 0) for one, level in self.level.items()}
        first = set(self.nodes) if starts else set()
        for node in (*reversed(self.nodes), *self.leaves):
            if self.level[node] >= 0 and node in self.inside:
                continue
            steps: set[int] = set()
            for user in node.users:
                if user in self.inside:
                    level = self.level[user]
                    steps |= spread[user] if user in spread else {level}
            if node in first and steps <= {0, 1}:
                self.level[node] = 0
                continue
            spread[node] = steps
            if len(steps) == 1 and node not in marks:
                # Before the first step: a formula of the initial state.
                self.level[node] = min(steps) or (-1 if node in self.inside else 0)
            elif len(steps) != 1:
                self.level[node] = min(steps, default=-1)
                self.invariant.add(node)

    def _levels(
        self, masks: dict[fx.Node, int], bits: dict[fx.Node, int], marks: dict[fx.Node, int]
    ) -> dict[fx.Node, int]:
        """The step of every node: of the last marked input that it depends on; -1 without one."""
        marked = sorted(((step, bits[leaf]) for leaf, step in marks.items()), reverse=True)
        return {
            one: next((step for step, bit in marked if masks[one] & bit), -1)
            for one in (*self.leaves, *self.nodes)
        }

    def _marks(self, masks: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """Steps told by inputs that are of one series: the largest such group."""
        groups: dict[Any, dict[int, fx.Node]] = defaultdict(dict)
        known: dict[Any, Any] = {}
        for leaf in self.leaves:
            if (found := series(leaf, known)) is not None:
                groups[found[0]][found[1]] = leaf
        group = max(groups.values(), key=len, default={})
        places = sorted(group)
        if len(places) < 2:
            return {}
        # Time runs backwards if the two last elements meet before the two first do.
        joint = {masks[group[one]] for one in places}
        everything = sum(joint)
        met = {masks[node] & everything for node in self.nodes}
        ends = [masks[group[places[i]]] | masks[group[places[j]]] for i, j in ((0, 1), (-2, -1))]
        if ends[0] not in met and ends[1] in met:
            places.reverse()
        elif ends[0] not in met:
            return {}
        return {group[place]: step for step, place in enumerate(places)}

    def _marks_by_outputs(
        self, masks: dict[fx.Node, int], bits: dict[fx.Node, int]
    ) -> dict[fx.Node, int]:
        """Steps told by what is read outside: each step reads more than the one before."""
        seen = {masks[node] for node in self.nodes if any(map(self.is_outside, node.users))}
        nested = sorted(seen, key=int.bit_count)
        if any(one & two != one for one, two in pairwise(nested)):
            return {}
        firsts = (
            (leaf, next((i for i, mask in enumerate(nested) if mask & bits[leaf]), None))
            for leaf in self.leaves if bits[leaf]
        )  # fmt: skip
        return {leaf: step for leaf, step in firsts if step is not None}

    def _marks_by_uses(
        self, bits: Mapping[fx.Node, int]
    ) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Steps told by the uses of a value that every step reads, each of which depends on the one
        before; and bits for them. Each hands something out, or they are three at least."""
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        of: dict[fx.Node, list[Any]] = defaultdict(list)
        for node in self.nodes:
            if any(one in self.inside for one in node.all_input_nodes):
                for place, one in enumerate(node.all_input_nodes):
                    if one not in self.constants and len(one.users) > 1:
                        key = node.target, _literal_text(node), place, one
                        groups[key].append(node)
                        of[node].append(key)
        best: list[fx.Node] = []
        depth: dict[fx.Node, dict[Any, int]] = {}
        for node in self.nodes:  # how many uses of each group a node depends on
            counts: dict[Any, int] = {}
            for read in node.all_input_nodes:
                for key, number in depth.get(read, {}).items():
                    counts[key] = max(counts.get(key, 0), number)
            for key in of[node]:
                if len(groups[key]) > 1:
                    counts[key] = counts.get(key, 0) + 1
            depth[node] = counts
        for key, group in groups.items():
            if len(group) <= max(len(best), 1):
                continue
            if [depth[node][key] for node in group] == list(range(1, len(group) + 1)):
                best = group
        handed = sum(any(map(self.is_outside, node.users)) for node in self.nodes)
        if len(best) < 2 or (len(best) == 2 and handed < 2):
            return {}, dict(bits)
        shift = len(self.leaves)
        marks = {node: step for step, node in enumerate(best)}
        return marks, {**bits, **{node: 1 << (shift + step) for step, node in enumerate(best)}}

    def between(self) -> fx.Node | None:
        """What a step reads that something outside made of an earlier step."""
        reached: set[fx.Node] = set()
        inside = set(self.body)
        started = False
        for node in self.nodes[0].graph.nodes:
            started = started or node in inside
            if not started or node in inside or node in self.constants:
                continue
            if any(one in reached or one in inside for one in node.all_input_nodes):
                reached.add(node)
                if node in self.leaves or node in self.invariant:
                    return node  # type: ignore[no-any-return]
        return None

    def is_outside(self, user: fx.Node) -> bool:
        """Whether a reader is no part of this; a constant takes no more than the shape."""
        return user not in self.inside and not (
            user in self.constants and all(one in self.inside for one in user.users)
        )

    def owns(self, node: fx.Node, step: int) -> bool:
        return node in self.inside and node not in self.invariant and self.level[node] == step

    def drop(self, node: fx.Node) -> None:
        self.inside.discard(node)
        self.body.remove(node)


def _literal_text(node: fx.Node) -> str:
    parts = [*node.args, *(node.kwargs[key] for key in sorted(node.kwargs))]
    return repr([None if isinstance(one, fx.Node) else (type(one), one) for one in parts])
