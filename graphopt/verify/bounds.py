"""A-priori rounding bounds for one site.

Running the site on absolute values gives A; then for any order of summation
|computed - exact| <= gamma_n(u) * A with gamma_k = k u / (1 - k u), where n counts the rounding
errors along the longest path. Two correct evaluations differ by at most the sum of their bounds.
Source: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, is_getitem
from graphopt.ir.value import Value

UNIT_ROUNDOFF = 2.0**-53
# Roundings per op besides its sum: the product, the bias, and slack for libm's functions.
ROUNDINGS_PER_OP = 4
# Where values underflow, errors are absolute: this much more magnitude covers them.
UNDERFLOW = 2.0**-1000


def gamma(count: float) -> float:
    return count * UNIT_ROUNDOFF / (1 - count * UNIT_ROUNDOFF)


class Site:
    """The values, magnitudes and rounding counts of the nodes of a site, from its cut upwards."""

    def __init__(self, graph: Graph, known: Mapping[fx.Node, Any]) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = dict(known)
        self.magnitudes: dict[fx.Node, Any] = {node: _abs(value) for node, value in known.items()}
        self.counts: dict[fx.Node, int] = dict.fromkeys(known, 0)
        self.unknown: str = ""
        self._interpreter = Interpreter(graph, lifted=True, writes=False)

    def add(self, node: fx.Node) -> None:
        """Evaluate one node whose inputs are known."""
        value = self._interpreter.call(node, self.values)
        self.values[node] = value
        below = max((self.counts[one] for one in node.all_input_nodes), default=0)
        if is_getitem(node):
            whole = self.magnitudes[node.args[0]]  # type: ignore[index]
            self.magnitudes[node] = None if whole is None else whole[node.args[1]]
            self.counts[node] = below
            return
        op = Builder(self.graph, node).view(node)
        self.counts[node] = below + ROUNDINGS_PER_OP + (op.reduction if op is not None else 1)
        bound = None
        if not _is_floating(value):
            bound = _abs(value)  # integers and booleans carry no rounding
        elif op is not None and all(
            self.magnitudes[one] is not None for one in node.all_input_nodes
        ):
            bound = op.magnitude(
                lambda v: self.values[v.node],
                lambda v: self.magnitudes[v.node],
                lambda pick: self._rerun(node, pick),
            )
        if bound is None and not self.unknown:
            self.unknown = str(node.target)
        self.magnitudes[node] = bound

    def _rerun(self, node: fx.Node, pick: Any) -> Any:
        builder = Builder(self.graph, node)
        env = {one: pick(Value(one, builder)) for one in node.all_input_nodes}
        return self._interpreter.call(node, env)

    def tolerance(self, node: fx.Node) -> Any:
        magnitude = self.magnitudes[node]
        return None if magnitude is None else gamma(self.counts[node]) * (magnitude + UNDERFLOW)


def _abs(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.abs() if value.dtype is not torch.bool else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_abs, value))
    return value


def _is_floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_is_floating, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
