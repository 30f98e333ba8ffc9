"""Graphs without some of their steps, and how much a model changes with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.blocks import Block, Step
from graphopt.ir.builder import Builder, infer
from graphopt.ir.driver import shared_memory
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.passes.pruning.evidence import Loss, batches

Pair = tuple[fx.Node, fx.Node]


# -- the graph without some steps -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shorter:
    """A graph without some steps of a source, whose nodes have `twins` in it; `instead` has the start of
    a step for its end."""

    graph: Graph
    twins: dict[fx.Node, fx.Node]
    instead: dict[fx.Node, fx.Node]

    def has(self, block: Block) -> bool:
        return not any(self.twins[one.sum]._erased for one in block.steps)

    def value(self, node: fx.Node) -> fx.Node:
        """What stands for a value of the source."""
        twin = self.twins[node]
        while twin in self.instead:
            twin = self.instead[twin]
        return twin


def without(source: Graph, steps: Sequence[Step]) -> Shorter:
    """Another graph, with the start of every step in place of its end; what nobody reads then is gone."""
    graph = source.clone()
    found = Shorter(graph, dict(zip(source.fx.nodes, graph.fx.nodes, strict=True)), {})
    for step in sorted(steps, key=lambda one: one.end):
        start, end = found.value(step.start), found.twins[step.end]
        if shared_memory(end, start):  # the caller may write to one of two outputs, or to an output
            builder = Builder(graph, end)
            same = {"self": builder.value(start)}
            start = builder.call(torch.ops.aten.clone.default, same).node
        end.replace_all_uses_with(start)
        found.instead[end] = start
    graph.eliminate_dead_code()
    _forget_states(graph, _read(source) - _read(graph))
    if any(_strides(step.start) != _strides(step.end) for step in steps):
        for node in graph.calls:
            node.meta["val"] = infer(graph, node.target, node.args, node.kwargs)
    return found


def _strides(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].stride()))


def _forget_states(graph: Graph, unread: set[str]) -> None:
    """Forget states, and what else modules have that nobody reads any more (counters of batches)."""
    stay = {_module(name) for name in _read(graph)}
    modules = {_module(name) for name in unread} - stay
    unread = unread | {name for name in graph.states if _module(name) in modules}
    graph.states = {name: one for name, one in graph.states.items() if name not in unread}
    graph.aliases = {name: twin for name, twin in graph.aliases.items() if twin not in unread}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _read(graph: Graph) -> set[str]:
    return {str(node.target) for node in graph.fx.nodes if node.op == "get_attr" and node.users}


# -- what it changes --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a model and shorter ones do on the caller's data: batches of (inputs, target), and
    loss(output, target), a scalar, if there is one."""

    source: Graph
    data: Sequence[tuple[Any, Any]] = ()
    loss: Loss | None = None

    @property
    def metric(self) -> str:
        return (
            "relative error on the data"
            if self.loss is None
            else "increase of the loss on the data"
        )

    def error(self, graph: Graph) -> float:
        """By how much the mean loss exceeds that of the source; without a loss, the relative error of
        the floating outputs, in the 2-norm over all batches."""
        if self.loss is not None:
            return _finite(self._loss(graph) - self._source_loss)
        away = size = 0.0
        for (inputs, _), truth in zip(self.batches("an error"), self._truth, strict=True):
            for found, true in zip(_outputs(graph, inputs), truth, strict=True):
                away += float((found - true).square().sum())
                size += float(true.square().sum())
        return _finite(math.sqrt(away / (size or 1.0)))

    def _loss(self, graph: Graph) -> float:
        assert self.loss is not None
        losses = []
        for inputs, target in self.batches("a loss"):
            with torch.no_grad():
                flat = Interpreter(graph, writes=False).run(inputs)
                output = pytree.tree_unflatten(list(flat), graph.signature.out_spec)
                losses.append(float(self.loss(output, target)))
        return sum(losses) / len(losses)

    @cached_property
    def _source_loss(self) -> float:
        return self._loss(self.source)

    @cached_property
    def _truth(self) -> list[list[Tensor]]:
        return [_outputs(self.source, inputs) for inputs, _ in self.batches("an error")]

    def distances(
        self, graph: Graph, pairs: Sequence[Pair], axes: Sequence[int | None]
    ) -> list[float]:
        """The mean of `angular_distance` between the values of each pair."""
        totals, counts = [0.0] * len(pairs), [0] * len(pairs)
        wanted = {node for pair in pairs for node in pair}
        for inputs, _ in self.batches("similarity"):
            values = _values(graph, inputs, wanted)
            for number, ((start, end), axis) in enumerate(zip(pairs, axes, strict=True)):
                found = angular_distance(values[start], values[end], axis)
                totals[number] += float(found.sum())
                counts[number] += found.numel()
        return [_finite(total / count) for total, count in zip(totals, counts, strict=True)]

    def batches(self, needed_by: str) -> Iterator[tuple[list[Any], Any]]:
        return batches(self.source, self.data, needed_by)


def angular_distance(one: Tensor, other: Tensor, axis: int | None) -> Tensor:
    """arccos(cos(one, other)) / pi in [0, 1], along an axis, or over all axes but the first; 0 where both
    are equal (arXiv 2403.17887, equation 7)."""
    a, b = one.double(), other.reshape(one.shape).double()
    if axis is None:
        a, b, axis = a.reshape(len(a), -1), b.reshape(len(b), -1), 1
    norms = a.norm(dim=axis) * b.norm(dim=axis)
    cosine = (a * b).sum(axis) / norms.clamp(min=torch.finfo(torch.float64).tiny)
    cosine = torch.where((a == b).all(axis), 1.0, cosine)
    return cosine.clamp(-1, 1).arccos() / math.pi


_CHANNELS_AT_ONE = (ops.Conv, ops.BatchNorm, ops.GroupNorm)
_CHANNELS_LAST = (ops.Linear, ops.Addmm, ops.LayerNorm, ops.RMSNorm)


def feature_axis(graph: Graph, block: Block) -> int | None:
    """The axis of the features of a stream: that along which the first op in the block acts which has
    parameters of a known axis (of convolutions and batch norms the first, of linear maps and layer norms
    the last one). None if there is no such op, or the value has no other axis."""
    builder = Builder(graph, graph.output)
    if block.start.meta["val"].ndim < 2:
        return None
    for node in block.steps[0].inside:
        op = builder.view(node)
        if isinstance(op, _CHANNELS_AT_ONE):
            return 1
        if isinstance(op, _CHANNELS_LAST):
            return -1
    return None


class _Watch(Interpreter):
    """Remembers the values of some calls."""

    def __init__(self, graph: Graph, see: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(graph, writes=False)
        self._see = see

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        self._see(node, value)
        return value


def _values(graph: Graph, inputs: Sequence[Any], wanted: set[fx.Node]) -> dict[fx.Node, Any]:
    found = dict(zip(graph.inputs, inputs, strict=True))

    def see(node: fx.Node, value: Any) -> None:
        if node in wanted:
            found[node] = value

    with torch.no_grad():
        _Watch(graph, see).run(inputs)
    return found


def _outputs(graph: Graph, inputs: Sequence[Any]) -> list[Tensor]:
    """The floating outputs of a graph in its own dtypes, as float64."""
    with torch.no_grad():
        found = Interpreter(graph, writes=False).run(inputs)
    return [one.double() for one in found if isinstance(one, Tensor) and one.is_floating_point()]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
