"""Which maps of a graph are quantized, and which of its values stand between integers.

A map reads one activation and a constant weight. What it reads becomes integers where the map before it can
write them: in front of reshapes and max pooling, which commute with rounding, and in a sum behind a map on
both sides, so that an integer kernel reads and writes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.coded import compressed
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import hint
from graphopt.ir.sizes import same_shape
from graphopt.ir.value import Value
from graphopt.passes.precision.narrowing import Narrowing

LEAST_PRODUCTS = 1 << 18  # of a map, for one input; measured in docs/int8.md
ACTIVATIONS = (
    ops.Relu, ops.LeakyRelu, ops.Clamp, ops.Gelu, ops.Silu, ops.Sigmoid, ops.Tanh, ops.Hardswish,
    ops.Hardsigmoid,
)  # fmt: skip
MOVING = (ops.Reshape, ops.Permute, ops.MaxPool, ops.Dropout, ops.Detach, ops.Copy)
Map = ops.Conv | ops.Linear


def decisions(graph: Graph) -> dict[fx.Node, fx.Node]:
    """What a comparison, a rounding or a loop depends on, and which: as `lower-precision` has it."""
    found = Narrowing(graph, torch.bfloat16, "bf16", False)
    return {found.origin[one]: found.origin[by] for one, by in found.decisions.items()}


class Places:
    """`maps` of a graph, and what follows from them."""

    def __init__(self, graph: Graph, maps: Collection[fx.Node]) -> None:
        self.graph = graph
        self.maps = set(maps)

    def view(self, node: fx.Node) -> ops.Op | None:
        return Builder(self.graph, node).view(node)

    def source(self, node: fx.Node) -> fx.Node:
        """What a map reads."""
        op = self.view(node)
        assert isinstance(op, ops.Conv | ops.Linear)
        return op.input.node

    def root(self, value: fx.Node) -> fx.Node:
        """The value that becomes integers in place of one: in front of data movement behind a map."""
        found = value
        while isinstance(self.view(found), MOVING):
            found = found.all_input_nodes[0]
        return found if self.map_behind(found) is not None else value

    def map_behind(self, value: fx.Node) -> fx.Node | None:
        """The map that can write a value: itself, with a sum or an activation or both after it."""
        op = self.view(value)
        if isinstance(op, ACTIVATIONS):
            value = op.input.node  # type: ignore[attr-defined]
            if len(value.users) > 1:
                return None
        if value in self.maps:
            return value
        sides = self.sides(value)
        if sides is None:
            return None
        mapped = [one for one in sides if one in self.maps and len(one.users) == 1]
        convolutions = [one for one in mapped if isinstance(self.view(one), ops.Conv)]
        return max(convolutions, default=None)  # the last

    def sides(self, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two activations of equal shape that a value is the sum of."""
        op = self.view(value)
        if not isinstance(op, ops.Add):
            return None
        left, right = op.left, op.right
        if not (isinstance(left, Value) and isinstance(right, Value)) or left.node is right.node:
            return None
        if self.graph.is_constant(left.node) or self.graph.is_constant(right.node):
            return None
        same = same_shape(left.shape, right.shape) and left.dtype == right.dtype
        return (left.node, right.node) if same else None

    def other_side(self, value: fx.Node) -> fx.Node | None:
        """What is added to a map where it writes a value."""
        behind = self.map_behind(value)
        if isinstance(self.view(value), ACTIVATIONS):
            value = value.all_input_nodes[0]
        sides = self.sides(value)
        if behind is None or sides is None or value in self.maps:
            return None
        return sides[0] if sides[1] is behind else sides[1]

    @cached_property
    def values(self) -> set[fx.Node]:
        """All values that become integers: what the maps read, and what is added behind them."""
        found: set[fx.Node] = set()
        stack = [
            one for node in self.maps for one in (self.source(node), self.root(self.source(node)))
        ]
        while stack:
            value = stack.pop()
            if value in found:
                continue
            found.add(value)
            other = self.other_side(value)
            if other is not None and self.map_behind(self.root(other)) is not None:
                stack += other, self.root(other)
        return found

    def reads_integers(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether a reader of a value in `values` reads what its integers stand for."""
        if user in self.maps:
            return self.source(user) is value
        if self.map_behind(self.root(value)) is None:
            return False
        if isinstance(self.view(user), ops.Add):
            return self.sides(user) is not None and self._written(user)
        return self._leads(user)

    def _written(self, total: fx.Node) -> bool:
        """Whether a sum, or an activation of it, becomes integers."""
        return total in self.values or any(
            one in self.values and isinstance(self.view(one), ACTIVATIONS) for one in total.users
        )

    def _leads(self, user: fx.Node) -> bool:
        """Whether data movement ends in what becomes integers."""
        if not isinstance(self.view(user), MOVING):
            return False
        return user in self.values or any(map(self._leads, user.users))


def candidates(graph: Graph, slow: bool) -> tuple[list[fx.Node], dict[fx.Node, str]]:
    """The maps that integers can compute, in graph order, also those that they compute no faster if `slow`;
    and why others stay as they are."""
    found, refused, deciding = [], {}, decisions(graph)
    for node in graph.calls:
        if graph.is_constant(node):
            continue
        op = Builder(graph, node).view(node)
        if isinstance(op, (ops.Matmul, ops.Attention, ops.Einsum, ops.Embedding, ops.Addmm)):
            refused[node] = f"{type(op).__name__}: expected a convolution or a linear map"
        if not isinstance(op, ops.Conv | ops.Linear):
            continue
        if node in deciding:
            refused[node] = f"{deciding[node].name} decides by what it computes"
        elif reason := _unfit(graph, op) or ("" if slow else _slow(op)):
            refused[node] = reason
        else:
            found.append(node)
    return found, refused


def _unfit(graph: Graph, op: Map) -> str:
    """Why a map is not for integers; empty if it is."""
    weight = op.weight.node
    if not graph.is_constant(weight):
        return "its weight is computed from the inputs"
    if op.bias is not None and not graph.is_constant(op.bias.node):
        return "its bias is computed from the inputs"
    if graph.is_constant(op.input.node):
        return "its input is constant"
    if compressed(weight) is not None:
        return "its weight is stored as integer codes"
    shape = [hint(one) for one in op.weight.shape]
    if isinstance(op, ops.Conv):
        if op.transposed:
            return "it is a transposed convolution"
        if len(shape) != 4 or op.input.ndim != 4:
            return f"it is a convolution of rank {len(shape) - 2}, expected 2, with a batch"
        if isinstance(op.padding, str):
            return "its padding differs from side to side"
    elif len(shape) != 2:
        return f"its weight has {len(shape)} axes, expected 2"
    return ""


def _slow(op: Map) -> str:
    """Why integers are no faster for a map; empty if they are."""
    shape, out = op.weight.shape, op.out.shape
    places = out[2:] if isinstance(op, ops.Conv) else out[1:-1]
    products = math.prod(map(hint, (*shape, *places)))
    if products < LEAST_PRODUCTS:
        return f"its {products} products of an input take less time than rounding does"
    return ""
