"""The reference of the contract `Masked`: the source graph at its full size, with masks.

After every op, the entries of its result that would go away are set to zero. Where a statistic runs over
an axis with masked entries (the mean and variance of a norm, softmax, a mean), those that stay are
counted, and only those. Nothing here knows how groups are removed from a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels.groups import Groups
from graphopt.ir.interpret import Interpreter

_STATISTICS = (ops.LayerNorm, ops.RMSNorm, ops.GroupNorm, ops.Softmax, ops.LogSoftmax, ops.Mean)


class Masked(Interpreter):
    """Runs the graph of `groups` as if the groups with the labels `gone` were not there, in float64."""

    def __init__(self, groups: Groups, gone: Iterable[int]) -> None:
        super().__init__(groups.graph, lifted=True, writes=False)
        self.groups = groups
        self.lost = groups.lost(gone)
        self._builder = Builder(groups.graph, groups.graph.output)

    def call(self, node: fx.Node, env: Any) -> Any:
        kept = self.groups.kept(node, self.lost)
        op = self._builder.view(node) if isinstance(node.target, torch._ops.OpOverload) else None
        if isinstance(op, _STATISTICS) and (
            inner := self.groups.kept(op.input.node, self.lost)  # type: ignore[attr-defined]
        ):
            return self._over_kept(op, env, inner)
        value = super().call(node, env)
        if isinstance(kept, list):
            return type(value)(map(_masked, value, kept))
        return _masked(value, kept)

    def _over_kept(self, op: Any, env: Any, kept: dict[int, Any]) -> Tensor:
        """A statistic of the entries that stay, spread out to the full size again."""
        x: Tensor = env[op.input.node]
        shape, index = list(x.shape), {axis: torch.from_numpy(one) for axis, one in kept.items()}
        narrow = x
        for axis, entries in index.items():
            narrow = narrow.index_select(axis, entries)
        run = _KERNELS[type(op)]
        result = run(op, narrow, _narrowed(op, env, index))
        if isinstance(op, ops.Mean):
            dims = {dim % x.ndim for dim in op.dims}
            shape = [1 if axis in dims else size for axis, size in enumerate(shape)]
            result = result.reshape(
                [1 if axis in dims else narrow.shape[axis] for axis in range(x.ndim)]
            )
            index = {axis: one for axis, one in index.items() if axis not in dims}
        for axis, entries in index.items():
            wide = result.new_zeros(
                [shape[axis] if i == axis else size for i, size in enumerate(result.shape)]
            )
            result = wide.index_copy(axis, entries, result)
        if isinstance(op, ops.Mean) and not op.keepdim:
            result = result.reshape([size for axis, size in enumerate(shape) if axis not in dims])
        return result


def _masked(value: Any, kept: dict[int, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    for axis, entries in kept.items():
        mask = torch.zeros(value.shape[axis], dtype=torch.bool)
        mask[torch.from_numpy(entries)] = True
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        value = torch.where(mask.view(shape), value, torch.zeros((), dtype=value.dtype))
    return value


def _narrowed(op: Any, env: Any, index: dict[int, Tensor]) -> list[Tensor | None]:
    """Weight and bias of a norm, cut to what stays."""
    found: list[Tensor | None] = []
    for value in (getattr(op, "weight", None), getattr(op, "bias", None)):
        one = None if value is None else env[value.node]
        if one is not None:
            first = 1 if isinstance(op, ops.GroupNorm) else op.input.ndim - one.ndim
            for axis, entries in index.items():
                if 0 <= axis - first < one.ndim:
                    one = one.index_select(axis - first, entries)
        found.append(one)
    return found


def _layer_norm(op: Any, x: Tensor, vectors: list[Tensor | None]) -> Tensor:
    shape = x.shape[-len(op.normalized_shape) :]
    return torch.nn.functional.layer_norm(x, list(shape), vectors[0], vectors[1], op.eps)


def _rms_norm(op: Any, x: Tensor, vectors: list[Tensor | None]) -> Tensor:
    shape = list(x.shape[-len(op.normalized_shape) :])
    eps = torch.finfo(op.out.dtype).eps if op.eps is None else op.eps
    return torch.nn.functional.rms_norm(x, shape, vectors[0], eps)


def _group_norm(op: Any, x: Tensor, vectors: list[Tensor | None]) -> Tensor:
    groups = x.shape[1] if op.num_groups == op.input.shape[1] else op.num_groups
    return torch.nn.functional.group_norm(x, groups, vectors[0], vectors[1], op.eps)


_KERNELS: dict[type, Callable[[Any, Tensor, list[Tensor | None]], Tensor]] = {
    ops.LayerNorm: _layer_norm,
    ops.RMSNorm: _rms_norm,
    ops.GroupNorm: _group_norm,
    ops.Softmax: lambda op, x, _: x.softmax(op.dim),
    ops.LogSoftmax: lambda op, x, _: x.log_softmax(op.dim),
    ops.Mean: lambda op, x, _: x.mean(op.dims, keepdim=True),
}
