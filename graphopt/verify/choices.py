"""Comparisons and signs: where rounding decides them, at one site and in a whole model.

A comparison of two values that differ by no more than their rounding bounds is a tie: any correct evaluation
may go either way, and what depends on it may then be anything. Where both sides carry no rounding (small
integers, say, as they were given) they are compared exactly, and it is none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, lift
from graphopt.ir.value import Value
from graphopt.verify.bounds import Site

DECISIONS = (ops.Compare, ops.Sign, ops.Heaviside)
_TARGETS = {
    target
    for target, views in ops.base.TABLE.items()
    if any(issubclass(one, DECISIONS) for one in views)
}
_POINTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.Copy, ops.Detach)


def decides(nodes: Iterable[fx.Node]) -> bool:
    """Whether there are comparisons or signs among nodes."""
    return any(node.target in _TARGETS for node in nodes)


def ties(site: Site, node: fx.Node) -> torch.Tensor | None:
    """Where a value of a site is a tie, or computed element by element from one; None if it does not
    depend on a comparison or sign in that way. What is shared by both sides of a site is none."""
    return _ties(site, node, {})


def _ties(
    site: Site, node: fx.Node, seen: dict[fx.Node, torch.Tensor | None]
) -> torch.Tensor | None:
    if node in seen or not site.counts.get(node):  # freed where nothing decides
        return seen.get(node)
    seen[node] = None
    op = Builder(site.graph, node).view(node)
    if isinstance(op, DECISIONS):
        seen[node] = _decided_by_rounding(site, op)
    elif isinstance(op, _POINTWISE):
        below = [_ties(site, one, seen) for one in node.all_input_nodes]
        found = [one for one in below if one is not None]
        if found:
            shape = torch.as_tensor(site.values[node]).shape
            seen[node] = functools.reduce(torch.logical_or, found).expand(shape)
    return seen[node]


def _decided_by_rounding(site: Site, op: Any) -> torch.Tensor:
    left = op.input if isinstance(op, ops.Sign) else op.left
    right = op.right if isinstance(op, ops.Compare) else 0.0
    found = torch.zeros_like(site.values[op.out.node], dtype=torch.bool)
    sides = [one for one in (left, right) if isinstance(one, Value)]
    bounds = [site.tolerance(one.node) for one in sides]
    if any(one is None for one in bounds):
        return found
    a, b = (
        site.values[one.node] if isinstance(one, Value) else torch.tensor(one, dtype=torch.float64)
        for one in (left, right)
    )
    tied: torch.Tensor = (a - b).abs() <= torch.as_tensor(sum(bounds))
    rounded = found
    for one in sides:
        if site.counts[one.node]:
            rounded = rounded | (site.magnitudes[one.node] > 0)
    return tied & rounded


# -- the whole model --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ties:
    """How many comparisons of a model's run are ties, and which rows of its batch they are in: `[N]`, or
    None where that cannot be told."""

    count: int = 0
    rows: torch.Tensor | None = None

    def spared(self, *runs: Sequence[Any]) -> list[list[Any]]:
        """The outputs of runs without the rows that have ties; nothing if those cannot be told."""
        if not self.count:
            return [list(outputs) for outputs in runs]
        if self.rows is None or not all(self._batched(outputs) for outputs in runs):
            return [[] for _ in runs]
        return [[one[~self.rows] for one in outputs] for outputs in runs]

    def concerned(self, *runs: Sequence[Any]) -> list[list[list[Any]]]:
        """The outputs of runs in every row that has ties; as one row if those cannot be told."""
        if not self.count:
            return []
        if self.rows is None or not all(self._batched(outputs) for outputs in runs):
            return [[list(outputs) for outputs in runs]]
        rows = self.rows.nonzero().flatten().tolist()
        return [[[one[row] for one in outputs] for outputs in runs] for row in rows]

    def _batched(self, outputs: Sequence[Any]) -> bool:
        assert self.rows is not None
        return all(
            isinstance(one, torch.Tensor) and one.ndim > 0 and len(one) == len(self.rows)
            for one in outputs
        )


@torch.no_grad()
def ties_of(graph: Graph, inputs: Sequence[Any]) -> Ties:
    """The ties of one float64 run. A value without a rounding bound makes none."""
    feed = iter(inputs)
    batch = _batch(graph, inputs)
    rows: torch.Tensor | None = None if batch is None else torch.zeros(batch[0], dtype=torch.bool)
    site, count, everywhere = Site(graph, {}), 0, batch is None
    plain = Interpreter(graph, lifted=True, writes=False)
    last = {one: node for node in graph.fx.nodes for one in node.all_input_nodes}
    for node in graph.fx.nodes:
        if node.op in ("placeholder", "get_attr"):
            value = lift(next(feed)) if node.op == "placeholder" else plain.state(str(node.target))
            site.know(node, value)
            continue
        if node.op == "output":
            break
        site.add(node)
        op = Builder(graph, node).view(node)
        if isinstance(op, DECISIONS):
            tied = _decided_by_rounding(site, op)
            count += int(tied.sum())
            axis = None if batch is None else _axis(node, batch)
            if bool(tied.any()):
                everywhere = everywhere or axis is None
                if axis is not None and rows is not None:
                    rows |= tied.movedim(axis, 0).reshape(batch[0], -1).any(1)  # type: ignore[index]
        for used in node.all_input_nodes:
            if last[used] is node:
                site.drop(used)
    return Ties(count, None if everywhere else rows)


def _batch(graph: Graph, inputs: Sequence[Any]) -> tuple[int, str] | None:
    """The number of rows of the inputs and the symbol of it; None if they have no dynamic first axis in
    common."""
    found: set[tuple[int, str]] = set()
    for node, value in zip(graph.inputs, inputs, strict=True):
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor) and fake.ndim and not isinstance(fake.shape[0], int):
            found.add((value.shape[0], str(fake.shape[0])))
    return found.pop() if len(found) == 1 else None


def _axis(node: fx.Node, batch: tuple[int, str]) -> int | None:
    """The axis of a value that runs over the rows of the batch."""
    axes = [axis for axis, size in enumerate(node.meta["val"].shape) if str(size) == batch[1]]
    return axes[0] if len(axes) == 1 else None
