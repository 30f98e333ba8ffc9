"""Channels of one range: what a tensor with one scale for all of them needs.

    W2 f(W1 x + b1)  =  (W2 diag(s)) f(diag(1/s) (W1 x + b1)),     f(c y) = c f(y) for every c > 0

    s = 2^round(log2 sqrt(a / w)),   a = max |f| of a channel on the data,   w = max |W2| that reads it

Then the channels of f / s and what reads them have the same range, up to a factor of two: the cross-layer
equalization of Nagel et al. (2019, section 4.1), with the range of the activation in place of that of the row
of W1, whose rows have scales of their own (as Xiao et al., 2023). Powers of two change no bit but where
numbers leave float32. s is 1 where a or w is 0.

Conditions: between the two maps are positively homogeneous activations and pooling alone, every one with a
single reader, and both weights are stored and read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, State
from graphopt.ir.interpret import Interpreter
from graphopt.ir.ops.activation import Activation
from graphopt.passes.precision.measured import copies

POOLS = (ops.MaxPool, ops.AvgPool, ops.AdaptiveAvgPool)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two maps, nodes of a graph, and the value that the second one reads."""

    first: fx.Node
    second: fx.Node
    between: fx.Node


def equalized(graph: Graph, data: Sequence[Sequence[Any]]) -> Graph | None:
    """The same function with scaled weights, node by node like `graph`; None if there is nothing to scale."""
    pairs = pairs_of(graph)
    if not pairs:
        return None
    seen = _Largest(graph, pairs)
    for inputs in data:
        with torch.no_grad():
            seen.run(copies(inputs))
    result = graph.clone()
    for pair, largest in seen.found.items():
        first, second = _view(graph, pair.first), _view(graph, pair.second)
        weight = _stored(graph, second.weight.node)
        groups = second.groups if isinstance(second, ops.Conv) else 1
        factors = factors_of(largest, weight.tensor, groups)
        _scale(result, first.weight.node, partial(_rows, 1 / factors))
        if first.bias is not None:
            _scale(result, first.bias.node, partial(_rows, 1 / factors))
        _scale(result, second.weight.node, partial(_columns, factors, groups))
    return result


def factors_of(largest: Tensor, weight: Tensor, groups: int) -> Tensor:
    """s `[I]`, float64 powers of two, for activations of these largest magnitudes `[I]` and a weight
    `[O, I / groups, ...]` that reads them."""
    blocks = weight.detach().double().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    read = blocks.abs().amax((1, 3)).flatten()
    known = (largest > 0) & (read > 0) & largest.isfinite()
    ratio = torch.where(known, largest / torch.where(known, read, 1.0), 1.0)
    middle = ratio[known].log2().median() if bool(known.any()) else torch.zeros(())
    return torch.where(known, torch.exp2(((ratio.log2() - middle) / 2).round()), 1.0)


def pairs_of(graph: Graph) -> list[Pair]:
    """All pairs, in graph order."""
    found = []
    for node in graph.calls:
        op = _view(graph, node)
        if not _fits(graph, op):
            continue
        between = value = op.input.node
        axis = 1 if isinstance(op, ops.Conv) else op.input.ndim - 1
        while len(value.users) == 1 and _passes(graph, value, axis):
            value = value.all_input_nodes[0]
        first = _view(graph, value)
        same = type(first) is type(op) and _fits(graph, first) and len(value.users) == 1
        if same and (first.bias is None or _once(graph, first.bias.node)):
            found.append(Pair(value, node, between))
    return found


def _passes(graph: Graph, node: fx.Node, channel: int) -> bool:
    """Whether a scale of each entry of an axis goes through."""
    op = _view(graph, node)
    if len(node.all_input_nodes) != 1:
        return False
    if isinstance(op, POOLS):
        return op.input.ndim - op.rank > channel
    return isinstance(op, ops.Dropout) or (isinstance(op, Activation) and op.positively_homogeneous)


def _fits(graph: Graph, op: Any) -> bool:
    if isinstance(op, ops.Conv):
        fits = not op.transposed and op.channel_axis == 1
    else:
        fits = isinstance(op, ops.Linear)
    return fits and _once(graph, op.weight.node)


def _once(graph: Graph, node: fx.Node) -> bool:
    return node.op == "get_attr" and graph.is_constant(node) and len(node.users) == 1


def _view(graph: Graph, node: fx.Node) -> Any:
    return Builder(graph, node).view(node)


def _stored(graph: Graph, node: fx.Node) -> State:
    return graph.states[str(node.target)]


def _rows(factors: Tensor, weight: Tensor) -> Tensor:
    """`weight` `[O, ...]` with every row scaled."""
    return weight * factors.to(weight).view(-1, *(1 for _ in weight.shape[1:]))


def _columns(factors: Tensor, groups: int, weight: Tensor) -> Tensor:
    """`weight` `[O, I / groups, ...]` with what reads each of I channels scaled."""
    parts = factors.to(weight).view(groups, 1, -1)
    spread = parts.expand(-1, len(weight) // groups, -1).flatten(0, 1)
    return weight * spread.view(*spread.shape, *(1 for _ in weight.shape[2:]))


def _scale(graph: Graph, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
    name = str(node.target)
    state = graph.states[name]
    tensor = change(state.tensor.detach())
    if state.kind == "parameter":
        tensor = nn.Parameter(tensor, requires_grad=state.tensor.requires_grad)
    exact = None if state.exact is None else partial(_changed, state.exact, change)
    graph.states[name] = dataclasses.replace(state, tensor=tensor, exact=exact)


def _changed(exact: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(exact())


class _Largest(Interpreter):
    """The largest magnitude of every channel that a pair has between its maps, over runs."""

    def __init__(self, graph: Graph, pairs: Sequence[Pair]) -> None:
        super().__init__(graph, writes=False)
        self.at = {one.between: one for one in pairs}
        self.found: dict[Pair, Tensor] = {}

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        pair = self.at.get(node)
        if pair is not None and value.numel():
            axis = 1 if isinstance(_view(self.graph, pair.second), ops.Conv) else value.ndim - 1
            channels = value.detach().double().abs().movedim(axis, -1)
            largest = channels.reshape(-1, channels.shape[-1]).amax(0)
            before = self.found.get(pair)
            self.found[pair] = largest if before is None else torch.maximum(before, largest)
        return value
