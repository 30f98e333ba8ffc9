"""The batch norms of a graph that can be adapted."""

from __future__ import annotations

import dataclasses
import math

from torch import fx

from graphopt.adaptation.statistics import Statistics
from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.driver import Record
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import hint
from graphopt.training.swaps.swapping import value_of

PER_INSTANCE = ("adamixbn", "unmix-tns")  # these need statistics of every instance


class AdaptError(ValueError):
    """Options or batches that cannot be used, or a model without batch norms that can be adapted."""


@dataclasses.dataclass
class AdaptReport:
    """The norms that were adapted and those that keep the source's statistics. Records have `where`
    (module path in the source model), `node` and `reason`."""

    adapted: list[Record] = dataclasses.field(default_factory=list)
    kept: list[Record] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  adapted    {len(self.adapted)}"]
        lines += [f"    {one.rewrite} at {one.where or one.node}" for one in self.adapted]
        lines += [f"  kept       {len(self.kept)}"]
        lines += [f"    {one.where or one.node}: {one.reason}" for one in self.kept]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Site:
    """A batch norm in the graph, once for every place where a module is called."""

    op: ops.BatchNorm
    source: Statistics

    @property
    def node(self) -> fx.Node:
        return self.op.out.node


def find(graph: Graph) -> list[Site]:
    """The batch norms of a graph in the order in which they are computed.

    Raises:
        AdaptError: if there is none, or one without fixed running statistics.
    """
    found = []
    for node in graph.calls:
        op = Builder(graph, node).view(node)
        if not isinstance(op, ops.BatchNorm):
            continue
        where = graph.where(node) or node.name
        if op.uses_batch_statistics:
            raise AdaptError(
                f"{where} normalizes with the statistics of the batch at hand in eval mode too: it has "
                "none of the source that could be adapted"
            )
        assert op.running_mean is not None and op.running_var is not None
        statistics = op.running_mean.node, op.running_var.node
        if not all(map(graph.is_constant, statistics)):
            raise AdaptError(
                f"{where}: its running statistics are computed or written in every call"
            )
        mean, var = (value_of(graph, one).detach() for one in statistics)
        found.append(Site(op, (mean, var)))
    if not found:
        raise AdaptError("the model has no batch norm with running statistics")
    return found


def adaptable(
    graph: Graph, site: Site, method: str, online: bool, report: AdaptReport
) -> bool:  # fmt: skip
    positions = math.prod(map(hint, site.op.input.shape[2:]))
    reason = ""
    if method in PER_INSTANCE and site.op.input.ndim < 3:
        reason = "an instance has one value per channel only; it keeps the source's statistics"
    elif method == "adamixbn" and positions < 2:
        reason = (
            "an instance has 1 position, and a variance needs at least 2; it keeps the source's"
        )
    name = f"adapt-norm{{method={method}{',online' if online else ''}}}"
    record = Record(name, graph.where(site.node), "Calibrated", reason, node=site.node.name)
    (report.kept if reason else report.adapted).append(record)
    return not reason
