"""Linear regions: parts of a graph that are one affine map of every token.

A token is what stands at one place of all axes of a value but the last one. A region from `start` to
`end` is an affine map of tokens if every op in it is affine in what depends on `start`, and treats
every token alone: products with parameters, sums, data movement within a token, Fourier transforms.
Then, with E the tokens of the identity matrix,

    end = W start + b,    b = region(0),    W^T = region(E) - b,

two expressions of parameters alone, which `materialize` evaluates. No form of the map is known
beforehand: a method published tomorrow is a region like any other.

A region that starts from integers, which rows of tables take the place of, is a table itself: what it
makes of all rows at once.

To see that tokens stay apart, every axis of every value in the region is labelled with the axes of
`start` whose entries it runs over; an axis without labels belongs to the inside of a token. The first
axis of `start` is the one that runs over the tokens of the identity; the others shrink to 1.
"""

from __future__ import annotations

from math import prod
from typing import Any

import networkx

from graphopt.ir import ops
from graphopt.ir.rewrite import Declined, Rewriter, describe
from graphopt.ir.tokens import AFFINE, INSIDE, Axis, Labels, Step, Tokens, is_full, step
from graphopt.ir.transpose import Transpose, cheaper
from graphopt.ir.value import Value

LARGEST = 64  # ops of a region


class Region:
    """What depends on `start`, label by label; asking for labels declines where it is not affine.

    A token of the start is its last axis, or its last `inside` axes: heads and their features. With
    `channels` it is axis 1: the channels of a pixel.
    """

    def __init__(self, rw: Rewriter, start: Value, inside: int = 1, channels: bool = False) -> None:
        self.rw, self.start, self.inside, self.channels = rw, start, inside, channels
        self.steps: dict[Any, Step] = {}
        axes = start.ndim - inside if start.dtype.is_floating_point else start.ndim
        rw.match(axes >= 1)
        tokens = [Axis((axis,)) for axis in range(axes)]
        if channels:
            tokens = [Axis((axis,)) for axis in range(start.ndim) if axis != 1]
        self.tokens = (*tokens[:1], INSIDE, *tokens[1:]) if channels else (*tokens, INSIDE)

    def labels(self, value: Value) -> Labels:
        """The labels of a value that depends on the start."""
        if value == self.start:
            self.rw.match(self.start.dtype.is_floating_point)  # others are looked up in a table
            return self.tokens if self.channels else (*self.tokens[:-1], *(INSIDE,) * self.inside)
        if value.node not in self.steps:
            op = value.op
            if op is None or not isinstance(op, AFFINE):
                self.rw.decline(f"{describe(value)} is not affine")
            assert op is not None
            self.rw.require(len(self.steps) < LARGEST, "the region is too large")
            self.steps[value.node] = step(op, self)
        return self.steps[value.node].labels

    def affine(self, end: Value) -> tuple[Value, Value | None]:
        """`W` `[out, in]` and `b` `[out]` or None of the map from the start to `end`."""
        size, width = self._width(end), self.width()
        weight = self._turned(end, size) if cheaper(self, end, width, size) else None
        if weight is None:
            rows = Tokens(self, width, identity=True).dense(end)
            self.rw.require(rows is not None, f"{describe(end)} does not depend on its input")
            assert rows is not None
            weight = rows.reshape(width, size).permute(1, 0)
        shift = Tokens(self, 1, identity=False).at(end)
        return weight.to(end.dtype), None if shift is None else shift.reshape(size).to(end.dtype)

    def _turned(self, end: Value, size: int) -> Value | None:
        """`W` from its rows; None if an op of the region cannot be turned around."""
        since = len(self.rw.made)
        try:
            return Transpose(self, end, size).weight()
        except Declined:
            self.rw.rollback(since)
            return None

    def width(self) -> int:
        """The number of features of the start."""
        sizes = self.start.shape[1:2] if self.channels else self.start.shape[-self.inside :]
        self.rw.match(all(isinstance(one, int) for one in sizes))
        return prod(sizes)

    def input(self) -> Value:
        """The start, with its tokens along the last axis."""
        if self.inside == 1:
            return self.start
        *tokens, width = *self.start.shape[: -self.inside], prod(self.start.shape[-self.inside :])
        self.rw.match(sum(not isinstance(one, int) for one in tokens) <= 1)
        return self.start.reshape(*(one if isinstance(one, int) else -1 for one in tokens), width)

    def table(self, end: Value) -> Value:
        """What `end` is for each row of the tables that the region looks up."""
        size = self._width(end)
        tables = [step.op for step in self.steps.values() if isinstance(step.op, ops.Embedding)]
        rows = tables[0].weight.shape[0]
        self.rw.match(all(one.weight.shape[0] == rows for one in tables))
        found = Tokens(self, rows, identity=False).at(end)
        return found.reshape(rows, size).to(end.dtype)  # type: ignore[no-any-return]

    def _width(self, end: Value) -> int:
        """The number of features of `end`, which must have the tokens of the start."""
        self.rw.require(
            self.labels(end) == self.tokens, f"{describe(end)} lays its tokens out in another way"
        )
        size = end.shape[1 if self.channels else -1]
        self.rw.match(isinstance(size, int))
        return size  # type: ignore[no-any-return]


def starts(rw: Rewriter, end: Value) -> list[Value]:
    """The values that all ways to `end` lead through, nearest first, as far as ops are affine."""
    graph = networkx.DiGraph()
    source = object()
    stack, seen = [end], {end.node: end}
    while stack:
        value = stack.pop()
        op = value.op
        inputs = []
        if isinstance(op, AFFINE) and len(seen) < 2 * LARGEST:
            inputs = [one for one in map(rw.value, value.node.all_input_nodes)
                      if one.is_tensor and not one.is_constant and not is_full(one)]  # fmt: skip
        for one in inputs:
            graph.add_edge(value.node, one.node)
            if one.node not in seen:
                seen[one.node] = one
                stack.append(one)
        if not inputs:
            graph.add_edge(value.node, source)
    above = networkx.immediate_dominators(graph, end.node)
    found, at = [], above.get(source)
    while at is not None and at is not end.node:
        found.append(seen[at])
        at = above[at]
    return found[::-1]


def obstacle(rw: Rewriter, value: Value, start: Value) -> Value | None:
    """What is not affine between `start` and `value`, the first of it; None if `value` depends on
    something else too, or on too much to tell."""
    found, stack, seen = None, [value], {start.node}
    while stack:
        one = stack.pop()
        if one.node in seen or one.is_constant or is_full(one) or not one.is_tensor:
            continue
        seen.add(one.node)
        inputs = one.node.all_input_nodes
        if not inputs or len(seen) > LARGEST:
            return None
        if not isinstance(one.op, AFFINE) and (found is None or one.node < found.node):
            found = one
        stack += map(rw.value, inputs)
    return found
