"""Which values of a graph depend on which, for questions about any two of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphopt.ir.affine import same_shape
from graphopt.ir.graph import Graph


class Dependence:
    """What depends on what, directly or not. Constants depend on nothing and nothing on them; the size
    of a value depends on what the value is computed from, but not on the value."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes = list(graph.nodes)
        self.order = {node: position for position, node in enumerate(self._nodes)}
        self._above: list[int] = []  # of every node, as bits by position, itself included
        self._floating = 0
        for position, node in enumerate(self._nodes):
            bits = 0
            if not graph.is_constant(node):
                bits = 1 << position
                for one in node.all_input_nodes:
                    above = self._above[self.order[one]]
                    size_of = is_value(one) and not is_value(node)
                    bits |= above & ~(1 << self.order[one]) if size_of else above
                self._floating |= is_floating(node) << position
            self._above.append(bits)

    def on(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether `node` depends on `other`, or is it."""
        return bool(self._above[self.order[node]] >> self.order[other] & 1)

    def varies(self, node: fx.Node) -> bool:
        """Whether it is no constant."""
        return bool(self._above[self.order[node]])

    def meet(self, one: fx.Node, other: fx.Node) -> fx.Node | None:
        """The last floating tensor that both depend on, or are."""
        common = self._above[self.order[one]] & self._above[self.order[other]] & self._floating
        return self._nodes[common.bit_length() - 1] if common else None

    def between(self, start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """What depends on `start` and is needed for `end`, `end` included, in graph order."""
        some = self._nodes[self.order[start] + 1 : self.order[end] + 1]
        return tuple(one for one in some if self.on(one, start) and self.on(end, one))

    def parameters(self, nodes: Iterable[fx.Node]) -> frozenset[str]:
        """The parameters that some values are computed with, directly or through constants."""
        states, stack = self.graph.states, list(nodes)
        seen = set(stack)
        while stack:
            for one in stack.pop().all_input_nodes:
                if one not in seen and (one.op == "get_attr" or not self.varies(one)):
                    seen.add(one)
                    stack.append(one)
        names = (str(node.target) for node in seen if node.op == "get_attr")
        return frozenset(name for name in names if states[name].kind == "parameter")


def is_value(node: fx.Node) -> bool:
    """A tensor or several, rather than a size."""
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def same_type(one: fx.Node, other: fx.Node) -> bool:
    """Whether two are tensors of one shape and dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)
