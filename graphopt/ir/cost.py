"""What a graph costs to run: parameters, FLOPs, bytes moved, nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import example_sizes, hint


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals for one run on inputs of the example's size.

    `nodes` counts calls, `flops` counts a multiply-add as two, `bytes` what every call reads and
    writes, `parameters` elements. Parameter-only calls are counted: in Tune mode they run.
    """

    parameters: int
    flops: float
    bytes: int
    nodes: int
    batch_norms: int

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def cost(graph: Graph, inputs: Sequence[Any] = ()) -> Cost:
    """The cost of one run on `inputs` (by default, on inputs as large as the graph was traced with)."""
    sizes: dict[Any, int] = {}
    for node, given in zip(graph.inputs, inputs, strict=False):
        if isinstance(given, torch.Tensor):
            for symbol, size in zip(node.meta["val"].shape, given.shape, strict=True):
                if isinstance(symbol, torch.SymInt):
                    sizes[symbol.node.expr] = size
    with example_sizes(sizes):
        return _cost(graph)


def _cost(graph: Graph) -> Cost:
    flops, moved, norms = 0.0, 0, 0
    calls = graph.calls
    for node in calls:
        op = Builder(graph, node).view(node)
        if op is not None:
            flops += op.flops
            norms += isinstance(op, ops.BatchNorm)
        moved += _bytes(node.meta.get("val"))
        moved += sum(_bytes(one.meta.get("val")) for one in node.all_input_nodes)
    return Cost(graph.parameter_count(), flops, moved, len(calls), norms)


def _bytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count * value.dtype.itemsize
