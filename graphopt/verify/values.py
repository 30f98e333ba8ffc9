"""The values of a graph on example inputs, as sites start from them.

A site compares two computations from the values that they share. Those are what the model itself computes, in
its own dtypes, and only then lifted: they take half the time and half the memory of values in float64, and
are as good to start from. Constants are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from graphopt.ir.builder import Builder
from graphopt.ir.cost import bytes_of
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Evaluator, lift, like

DEAR = 4  # operations for each byte of the result


class Values:
    """Computed on demand and kept, up to `limit` bytes; products longest."""

    def __init__(self, graph: Graph, inputs: Sequence[Any], limit: int) -> None:
        self.graph = graph
        self._plain = Evaluator(graph, inputs, lifted=False, limit=limit, dear=self._dear)
        self._exact = Evaluator(graph, limit=limit // 2)

    def lifted(self, node: fx.Node) -> Any:
        """A value in float64."""
        if node.op == "get_attr" or self.graph.is_constant(node):
            return self._exact.evaluate(node)
        return lift(self._plain.evaluate(node))

    def own(self, node: fx.Node) -> Any:
        """A value in its own dtype; of a state, what is stored."""
        return self._plain.evaluate(node)

    def keep(self, node: fx.Node, value: Any) -> None:
        """Take a value in float64 as that of a new node."""
        if self.graph.is_constant(node):
            self._exact.keep(node, value)
        else:
            self._plain.keep(node, like(value, node))

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        """Erased nodes need their values no more."""
        nodes = list(nodes)
        self._plain.forget(nodes)
        self._exact.forget(nodes)

    def _dear(self, node: fx.Node) -> bool:
        op = Builder(self.graph, node).view(node)
        return op is not None and op.flops >= DEAR * bytes_of(node.meta.get("val"))
