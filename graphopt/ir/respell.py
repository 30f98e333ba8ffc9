"""Data movement in the words of the op views, where an op does it for the sizes that it is called with.

unfold(x, axis, 1, 1)           =  x with one more axis of size 1
col2im of windows of one pixel  =  x with its pixels in rows and columns
scatter(zeros, i, src)          =  the entries of src, and zeros, by the inverse of i    (i distinct)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same
from graphopt.ir.builder import Builder
from graphopt.ir.graph import State
from graphopt.ir.interpret import Evaluator
from graphopt.ir.value import Value


def respelled(builder: Builder, node: fx.Node) -> Value | None:
    """The same value by ops that have views, emitted; None if there is no other way to say it."""
    aten = torch.ops.aten
    args: Any = node.args
    if node.target is aten.unfold.default and args[2:] == (1, 1):
        return builder.value(args[0]).reshape(*_sizes(node))
    if node.target is aten.col2im.default:
        kernel, padding, stride = (set(args[at]) for at in (2, 4, 5))
        if kernel == stride == {1} and padding == {0}:
            return builder.value(args[0]).reshape(*_sizes(node))
    if node.target is aten.scatter.src and len(args) == 4:
        return _scattered(builder, *args)
    return None


def _sizes(node: fx.Node) -> list[Any]:
    """The shape of a node, with -1 for the one size that is a symbol."""
    return [one if isinstance(one, int) else -1 for one in node.meta["val"].shape]


def _scattered(
    builder: Builder, into: fx.Node, dim: int, index: fx.Node, source: fx.Node
) -> Value | None:
    """`source` at the places that a constant `index` gives it along `dim`, and zeros beside."""
    zeros, places, given = (builder.value(one) for one in (into, index, source))
    dim, count = dim % zeros.ndim, zeros.shape[dim]
    full = zeros.op
    if not (isinstance(full, ops.Full) and full.fill_value == 0 and isinstance(count, int)):
        return None
    if isinstance(places.op, ops.Expand):
        places = places.op.input
    shape = (1,) * (zeros.ndim - places.ndim) + tuple(places.shape)
    alike = all(same(one, 1) for axis, one in enumerate(shape) if axis != dim)
    if not (places.is_constant and alike):
        return None
    for axis in range(zeros.ndim):
        if axis != dim and not same(given.shape[axis], zeros.shape[axis]):
            return None
    found = Evaluator(builder.graph).evaluate(places.node).flatten()
    if len(set(found.tolist())) < len(found) or not same(given.shape[dim], len(found)):
        return None
    inverse = torch.full((count,), len(found), dtype=torch.int64, device=found.device)
    inverse[found] = torch.arange(len(found), device=found.device)
    if len(found) < count:
        after = (0, 0) * (zeros.ndim - 1 - dim) + (0, 1)
        given = builder.emit(ops.Pad(given, after, "constant", None))
    state = State(inverse, "constant")
    read = builder.value(builder.graph.add_state("places", state))
    return builder.emit(ops.IndexSelect(given, dim, read))
