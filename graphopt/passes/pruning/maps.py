"""Linear maps of a graph as a reconstruction sees them: what they read, their weight, what corrects them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels import Groups
from graphopt.ir.graph import Graph
from graphopt.passes.pruning.readers import sums

PRODUCTS = (ops.Linear, ops.Conv, ops.Matmul, ops.Addmm, ops.Einsum)


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A sum over an axis of an input and one of a weight, `channels` and `into`, where the weight is a
    state. `out` is the axis of the output that `bias` is for, if one can be: the entries of axis
    `1 - into` of the weight."""

    op: ops.Op
    input: fx.Node
    channels: int
    weight: fx.Node
    into: int
    out: int | None
    bias: fx.Node | None

    @property
    def node(self) -> fx.Node:
        return self.op.out.node

    @property
    def name(self) -> str:
        return str(self.weight.target)

    @property
    def groups(self) -> int:
        return self.op.groups if isinstance(self.op, ops.Conv) else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.op.kernel if isinstance(self.op, ops.Conv) else ()

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    def columns(self, weight: Tensor) -> Tensor:
        """A view of the weight as `[..., channels of a group, *kernel]`."""
        return weight.movedim(self.into, -1 - len(self.kernel))

    def read(self, value: Tensor) -> Tensor:
        """What the weight is multiplied with, in float64: `[groups, N, channels of a group * taps]`."""
        axis = self.channels
        if isinstance(self.op, ops.Conv) and self.taps > 1:
            value = _patches(self.op, value)
            axis = self.op.channel_axis
        rows = rows_of(value, axis)
        return rows.reshape(len(rows), self.groups, -1).movedim(1, 0)


def _patches(op: ops.Conv, value: Tensor) -> Tensor:
    """What every tap of a kernel sees of every channel: the channels become `channels * taps`."""
    count, taps = value.shape[op.channel_axis], prod(op.kernel)
    one = torch.eye(taps, dtype=value.dtype, device=value.device)
    one = one.reshape((1, taps, *op.kernel) if op.transposed else (taps, 1, *op.kernel))
    weight = one.repeat(count, *(1,) * (op.rank + 1))
    target, arguments = op.replace(bias=None, groups=count).build()
    found: Tensor = target(**{**arguments, "input": value, "weight": weight})
    return found


def rows_of(value: Tensor, axis: int) -> Tensor:
    """`[N, C]` in float64, for a value with C channels on an axis."""
    value = value.movedim(axis, -1)
    return value.reshape(-1, value.shape[-1]).double()


def maps_of(op: ops.Op | None) -> Iterator[LinearMap]:
    if not isinstance(op, PRODUCTS):
        return
    if isinstance(op, ops.Conv) and op.transposed and op.groups > 1:
        return
    for axes in sums(op):
        sides = sorted(axes, key=lambda one: one[0].is_constant)
        if [one.is_constant for one, _ in sides] == [False, True]:
            (x, channels), (weight, into) = sides
            if weight.node.op == "get_attr":
                yield LinearMap(op, x.node, channels, weight.node, into, *_bias(op))


def _bias(op: ops.Op) -> tuple[int | None, fx.Node | None]:
    """The axis of the output that a bias is for, if one can be, and the bias."""
    if isinstance(op, ops.Linear):
        return -1, None if op.bias is None else op.bias.node
    if isinstance(op, ops.Conv):
        return op.channel_axis, None if op.bias is None else op.bias.node
    if isinstance(op, ops.Addmm) and op.alpha == op.beta == op.input.ndim == 1:
        return -1, op.input.node
    if isinstance(op, ops.Matmul) and op.right.is_constant and op.right.ndim == 2:
        return -1, None
    return None, None


def maps(graph: Graph) -> Iterator[LinearMap]:
    builder = Builder(graph, graph.output)
    return (one for node in graph.calls for one in maps_of(builder.view(node)))


def is_own(node: fx.Node | None) -> bool:
    """Whether this is a state that one call alone reads."""
    return node is not None and node.op == "get_attr" and len(node.users) == 1


def constant(graph: Graph, found: LinearMap) -> tuple[fx.Node, int] | None:
    """The state that adds a constant to the output, and its sign: the bias, or the mean of the batch
    norm behind."""
    if found.bias is not None:
        return (found.bias, 1) if is_own(found.bias) else None
    norm = norm_behind(graph, found)
    return None if norm is None else (norm.running_mean.node, -1)


def norm_behind(graph: Graph, found: LinearMap) -> Any:
    """The batch norm that alone reads the output, with states of its own."""
    (user, *others) = found.node.users or (None,)
    norm = None if user is None or others else Builder(graph, graph.output).view(user)
    if not isinstance(norm, ops.BatchNorm) or norm.uses_batch_statistics:
        return None
    states = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    own = all(is_own(one.node) for one in states if one is not None)
    aligned = found.out is not None and found.out % norm.input.ndim == 1
    return norm if own and aligned else None


def untouched(groups: Groups, gone: Collection[int]) -> dict[str, str]:
    """Why the map with a weight of this name is not corrected, or not its mean, for the maps that lose
    inputs."""
    lost, found = groups.lost(gone), {}
    for one in maps(groups.graph):
        if one.into in groups.kept(one.weight, lost):
            if not is_own(one.weight):
                found[one.name] = "its weight is read more than once"
            elif constant(groups.graph, one) is None:
                found[one.name] = "it has no bias of its own to hold a mean"
    return found
