"""What a graph costs to run: parameters, FLOPs, bytes moved, nodes; and about how long an op takes.

    seconds = launch + max(FLOPs / rate of this kind of op, bytes / bandwidth)

The rates are in `efficiency.json`, one entry per backend and kind of device, measured by
`python -m benchmarks.efficiency`. They decide which of two ways to compute the same is the faster
one, never what is right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import Op, example_sizes, hint


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
    with example_sizes(sizes_of(graph, inputs)):
        return _cost(graph)


def sizes_of(graph: Graph, inputs: Sequence[Any]) -> dict[Any, int]:
    """The values that the symbols of the graph's inputs have in `inputs`."""
    return {
        symbol.node.expr: size
        for node, given in zip(graph.inputs, inputs, strict=False)
        if isinstance(given, torch.Tensor)
        for symbol, size in zip(node.meta["val"].shape, given.shape, strict=True)
        if isinstance(symbol, torch.SymInt)
    }


def _cost(graph: Graph) -> Cost:
    flops, moved, norms = 0.0, 0, 0
    calls = graph.calls
    for node in calls:
        op = Builder(graph, node).view(node)
        if op is not None:
            flops += op.flops
            norms += op.batch_norms if isinstance(op, ops.Scan) else isinstance(op, ops.BatchNorm)
        moved += bytes_of(node.meta.get("val"))
        moved += sum(bytes_of(one.meta.get("val")) for one in node.all_input_nodes)
    return Cost(graph.parameter_count(), flops, moved, len(calls), norms)


def bytes_of(value: Any) -> int:
    """The bytes of a tensor, or of those in a list; what is no tensor has none."""
    if isinstance(value, (tuple, list)):
        return sum(map(bytes_of, value))
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count * value.dtype.itemsize


# -- how long an op takes -----------------------------------------------------------------------

TABLE = Path(__file__).parent / "efficiency.json"
VIEWS = (ops.Slice, ops.Select, ops.Expand, ops.Permute, ops.Reshape, ops.Detach)
WHOLE_GRAPHS = (
    "openvino",
    "onnxruntime",
)  # compiled, launches cost them little: what "auto" prefers
VIEW = 0.3  # of the time to launch an op: making a view launches nothing


@dataclasses.dataclass(frozen=True)
class Target:
    """What graphs are to be fast on: seconds to launch an op, bytes per second, and FLOPs per second
    of each `kind` of op."""

    name: str
    launch: float
    bandwidth: float
    rates: dict[str, float]

    def seconds(self, op: Op) -> float:
        """About how long an op of the graph takes; nothing if it depends on parameters alone."""
        if op.out.is_constant:
            return 0.0
        if isinstance(op, VIEWS):
            # What reads a slice with gaps copies it first, unless its rows are whole.
            copies = isinstance(op, ops.Slice) and op.dim != op.out.ndim - 1
            return VIEW * self.launch + copies * 2 * bytes_of(op.out.meta) / self.bandwidth
        moved = bytes_of(op.out.meta)
        moved += sum(bytes_of(node.meta.get("val")) for node in op.out.node.all_input_nodes)
        busy = moved / self.bandwidth
        if op.flops and (what := kind(op)):
            busy = max(busy, op.flops / self.rates[what])
        return self.launch + busy


@cache
def target(backend: str = "eager", device: str = "cpu") -> Target:
    """The measured target of a backend on a kind of device, or the nearest one there is."""
    table = json.loads(TABLE.read_text())["targets"]
    measured = "auto" if backend in WHOLE_GRAPHS else backend
    wanted = (f"{measured} {device}", f"eager {device}", "eager cpu")
    name = next(name for name in wanted if name in table)
    return Target(name, **table[name])


def kind(op: Op) -> str:
    """The row of the table that an op is looked up in; empty if it only moves bytes."""
    if isinstance(op, ops.Conv):
        if op.groups > 1:
            return "depthwise" if op.groups == op.in_channels else "grouped"
        return "pointwise" if all(size == 1 for size in op.kernel) else "dense"
    if isinstance(op, (ops.LayerNorm, ops.GroupNorm)):
        return "layer norm"
    if isinstance(op, ops.RMSNorm):
        return "rms norm"
    return "matmul" if isinstance(op, (ops.Linear, ops.Matmul, ops.Addmm)) else ""
