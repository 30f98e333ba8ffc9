"""The reference of a model without some of its layers: the source graph with values in the place of others.

All of the source is run, in float64; where a value is computed that another one stands for, the other one
goes on in its place. Nothing here knows what layers are or how they are left out of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, lift


class Bypassed(Interpreter):
    """Runs a graph with `instead[node]`, an earlier value, in the place of each `node`."""

    def __init__(self, graph: Graph, instead: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(graph, lifted=True, writes=False)
        self.instead = instead
        self._earlier = set(instead.values())
        self._values: dict[fx.Node, Any] = {}

    def run(self, inputs: Sequence[Any], seed: int | None = 0) -> tuple[Any, ...]:
        """The flat outputs."""
        self._values = dict(zip(self.graph.inputs, map(lift, inputs), strict=True))
        for node in self._earlier:
            if node.op == "get_attr":
                self._values[node] = self.state(str(node.target))
        return super().run(inputs, seed)

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        if node in self.instead:
            value = self._values[self.instead[node]]
        if node in self._earlier:
            self._values[node] = value
        return value
