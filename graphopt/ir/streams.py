"""Streams: values whose mean along the features none of their readers sees.

A layer norm subtracts the mean of what it reads before anything else. So, with C = I - 1 1^T / d,

    norm(x + y) = norm(C x + C y),    C (W z + b) = (C W) z + C b

and where every reader of a sum is such a norm (the residual stream of a pre-norm transformer), its
writers may leave the mean out from the start. `stream` finds all that hangs together with what a norm
reads, `centred` writes it anew. Sources: SliceGPT (arXiv 2401.15024), Pre-RMSNorm
transformers (2305.14858).
"""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import kept_axis, same
from graphopt.ir.ops import widen
from graphopt.ir.ops.base import Op
from graphopt.ir.rewrite import Declined, Rewriter, describe
from graphopt.ir.value import Value

Place = tuple[Value, int]  # a value, and the axis of it that carries the features


@dataclasses.dataclass(frozen=True)
class Stream:
    """`axes`: where every value carries the features, those before that others are made of;
    `norms`: who reads them, in graph order."""

    axes: dict[Value, int]
    norms: Sequence[ops.LayerNorm]

    @property
    def ops(self) -> list[Op]:
        """What computes the values."""
        found = [value.op for value in self.axes if not value.is_constant]
        return [op for op in found if op is not None]


def stream(rw: Rewriter, norm: ops.LayerNorm) -> Stream:
    """The stream that `norm` reads. Declines if anything but layer norms reads it, or if something
    writes it whose mean cannot be left out."""
    axes: dict[Value, int] = {}
    norms: dict[fx.Node, ops.LayerNorm] = {norm.out.node: norm}
    operands: dict[Value, list[Value]] = {}
    todo: list[Place] = [(norm.input, norm.input.ndim - 1)]
    while todo:
        value, axis = todo.pop()
        if value in axes:
            rw.require(axes[value] == axis, f"{describe(value)} is normalized over two axes")
            continue
        axes[value], operands[value] = axis, []
        if value.is_constant:
            continue
        places = _made_of(rw, value, axis)
        operands[value] = [operand for operand, _ in places]
        todo += places
        for user in value.users:
            reader = rw.view(user)
            if _normalizes(reader, value, axis):
                assert isinstance(reader, ops.LayerNorm)
                norms[user] = reader
            elif (place := _carried(rw, reader, value, axis)) is not None:
                todo.append(place)
            else:
                rw.decline(f"{_reader(rw, user)} sees the mean of {describe(value)}")
    in_order = graphlib.TopologicalSorter(operands).static_order()
    return Stream({value: axes[value] for value in in_order}, [norms[one] for one in sorted(norms)])


def centred(rw: Rewriter, found: Stream) -> dict[Value, Value]:
    """For every value of a stream, the same without its mean along the features."""
    new: dict[Value, Value] = {}
    for value, axis in found.axes.items():
        if value.is_constant:
            new[value] = _without_mean(value, axis)
        elif (op := value.op) is not None and (written := _written(op, rw, axis)) is not None:
            new[value] = written
        else:
            assert op is not None
            new[value] = rw.emit_like(op, **_with(op, new))
    return new


def _with(op: Op, new: dict[Value, Value]) -> dict[str, Any]:
    """The fields of `op` in which operands have been replaced."""

    def mapped(field: Any) -> Any:
        if isinstance(field, tuple):
            return tuple(map(mapped, field))
        return new.get(field, field) if isinstance(field, Value) else field

    return {name: mapped(getattr(op, name)) for name in op.field_names()}


def _normalizes(reader: Op | None, value: Value, axis: int) -> bool:
    """Whether a reader is a norm that subtracts the mean over this very axis first."""
    if not isinstance(reader, ops.LayerNorm) or len(reader.normalized_shape) != 1:
        return False
    parameters = (reader.weight, reader.bias)
    return reader.input == value and value not in parameters and axis == value.ndim - 1


def _carried(rw: Rewriter, reader: Op | None, value: Value, axis: int) -> Place | None:
    """Where the output of a reader carries the features of `value`, if it does."""
    if reader is None:
        return None
    for place in reversed(range(reader.out.ndim if reader.out.is_tensor else 0)):
        try:
            if (value, axis) in _made_of(rw, reader.out, place):
                return reader.out, place
        except Declined:
            continue
    return None


def _reader(rw: Rewriter, node: fx.Node) -> str:
    return "what the model returns" if node.op == "output" else describe(rw.value(node))


# -- writers: where the mean is left out -----------------------------------------------------------


def _written(op: Op, rw: Rewriter, axis: int) -> Value | None:
    """A map of parameters without the mean of its outputs along `axis`, None if `op` is none."""
    if isinstance(op, ops.Conv):
        rw.require(op.groups == 1, f"{describe(op.out)} has groups, over which the mean goes")
        dim = 1 if op.transposed else 0
        bias = None if op.bias is None else _without_mean(op.bias, 0)
        return rw.conv_like(op, weight=_without_mean(op.weight, dim), bias=bias)
    if isinstance(op, ops.Linear):
        bias = None if op.bias is None else _without_mean(op.bias, 0)
        return rw.emit_like(op, weight=_without_mean(op.weight, 0), bias=bias)
    if isinstance(op, ops.Matmul):
        return rw.emit_like(op, right=_without_mean(op.right, op.right.ndim - 1))
    if isinstance(op, ops.Addmm):
        return rw.emit_like(
            op, input=_without_mean(op.input, op.input.ndim - 1),
            right=_without_mean(op.right, op.right.ndim - 1),
        )  # fmt: skip
    if isinstance(op, ops.Embedding):
        return rw.emit_like(op, weight=_without_mean(op.weight, 1))
    return None


def _without_mean(value: Value, axis: int) -> Value:
    """A parameter minus its mean along `axis`, taken in at least float32."""
    wide = widen(value)
    mean = value.builder.emit(ops.Mean(wide, (axis,), True))
    return (wide - mean).to(value.dtype)


def _made_of(rw: Rewriter, value: Value, axis: int) -> list[Place]:
    """The values that carry the features of `value`, from which the mean has to go if it is to go
    from `value`: none for what `_written` writes anew. Declines for anything else."""
    op = value.op
    if not isinstance(op, _WRITTEN):
        rw.decline(f"{describe(value)} has a mean of its own")
    places = _places(op, rw, axis)
    for operand, at in places:
        rw.require(
            same(operand.shape[at], value.shape[axis]),
            f"{describe(operand)} is the same for all features of {describe(value)}",
        )
    return places


@singledispatch
def _places(op: Any, rw: Rewriter, axis: int) -> list[Place]:
    raise NotImplementedError


@_places.register
def _(op: ops.Conv, rw: Rewriter, axis: int) -> list[Place]:
    return _whole(rw, op, axis, op.channel_axis)


@_places.register
def _(op: ops.Embedding, rw: Rewriter, axis: int) -> list[Place]:
    rw.require(op.weight.is_constant, f"{describe(op.out)} looks up no parameter")
    return _whole(rw, op, axis, op.out.ndim - 1)


@_places.register
def _(op: ops.Linear, rw: Rewriter, axis: int) -> list[Place]:
    rw.require(op.weight.is_constant, f"{describe(op.out)} multiplies no parameter")
    return _whole(rw, op, axis, op.out.ndim - 1)


@_places.register(ops.Matmul)
@_places.register(ops.Addmm)
def _(op: ops.Matmul | ops.Addmm, rw: Rewriter, axis: int) -> list[Place]:
    rest = [op.input] if isinstance(op, ops.Addmm) else []
    for one in (op.right, *rest):
        rw.require(
            one.is_constant and one.ndim > 0 and same(one.shape[-1], op.out.shape[-1]),
            f"{describe(op.out)} multiplies or adds no parameter",
        )
    return _whole(rw, op, axis, op.out.ndim - 1)


def _whole(rw: Rewriter, op: Op, axis: int, features: int) -> list[Place]:
    rw.require(
        axis == features,
        f"axis {axis} of {describe(op.out)} is normalized, its features lie on axis {features}",
    )
    return []


# -- what passes the mean on as it is ---------------------------------------------------------------


@_places.register(ops.Add)
@_places.register(ops.Sub)
def _(op: ops.Add | ops.Sub, rw: Rewriter, axis: int) -> list[Place]:
    places = []
    for term in op.operands:
        if not isinstance(term, Value):
            rw.decline(f"{describe(op.out)} adds a number to all features")
        at = axis - (op.out.ndim - term.ndim)
        rw.require(at >= 0, f"{describe(term)} is the same for all features of {describe(op.out)}")
        places.append((term, at))
    return places


@_places.register(ops.Mul)
@_places.register(ops.Div)
def _(op: ops.Mul | ops.Div, rw: Rewriter, axis: int) -> list[Place]:
    """A factor that is the same for all features passes."""
    full = []
    for factor in op.operands:
        if isinstance(factor, Value):
            at = axis - (op.out.ndim - factor.ndim)
            if at >= 0 and not same(factor.shape[at], 1):
                full.append((factor, at))
    rw.require(
        len(full) == 1 and (isinstance(op, ops.Mul) or full[0][0] == op.left),
        f"{describe(op.out)} scales every feature by another factor",
    )
    return full


@_places.register
def _(op: ops.Permute, rw: Rewriter, axis: int) -> list[Place]:
    return [(op.input, op.dims[axis])]


@_places.register
def _(op: ops.Reshape, rw: Rewriter, axis: int) -> list[Place]:
    at = kept_axis(op.out.shape, op.input.shape, axis)
    if at is None:
        rw.decline(f"{describe(op.out)} splits the features or mixes them with other axes")
    return [(op.input, at)]


@_places.register
def _(op: ops.Expand, rw: Rewriter, axis: int) -> list[Place]:
    at = axis - (op.out.ndim - op.input.ndim)
    rw.require(at >= 0, f"{describe(op.out)} repeats its input along the features")
    return [(op.input, at)]


@_places.register
def _(op: ops.Select, rw: Rewriter, axis: int) -> list[Place]:
    dim = op.dim % op.input.ndim
    return [(op.input, axis + (axis >= dim))]


@_places.register(ops.Slice)
@_places.register(ops.IndexSelect)
def _(op: Any, rw: Rewriter, axis: int) -> list[Place]:
    return _aside(rw, op, axis, op.dim % op.input.ndim)


@_places.register
def _(op: ops.Index, rw: Rewriter, axis: int) -> list[Place]:
    if axis < op.dim:
        return [(op.input, axis)]
    rw.require(axis >= op.dim + op.index.ndim, f"{describe(op.out)} picks features")
    return [(op.input, axis - op.index.ndim + 1)]


@_places.register
def _(op: ops.Roll, rw: Rewriter, axis: int) -> list[Place]:
    rw.require(bool(op.dims), f"{describe(op.out)} rolls over all axes")
    return [(op.input, axis)]  # the mean of what is rolled along the features is the same


@_places.register
def _(op: ops.Pad, rw: Rewriter, axis: int) -> list[Place]:
    rw.require(
        op.mode != "constant" or not op.value,
        f"{describe(op.out)} pads with a number, whose mean is not zero",
    )
    return _aside(rw, op, axis, *op.axes)


@_places.register(ops.AvgPool)
@_places.register(ops.AdaptiveAvgPool)
@_places.register(ops.Upsample)
def _(op: Any, rw: Rewriter, axis: int) -> list[Place]:
    return _aside(rw, op, axis, *range(op.input.ndim - op.rank, op.input.ndim))


@_places.register(ops.Mean)
@_places.register(ops.Sum)
def _(op: ops.Mean | ops.Sum, rw: Rewriter, axis: int) -> list[Place]:
    kept = [one for one in range(op.input.ndim) if op.keepdim or one not in op.dims]
    rw.require(kept[axis] not in op.dims, f"{describe(op.out)} is the same for all features")
    return [(op.input, kept[axis])]


@_places.register(ops.Cat)
@_places.register(ops.Stack)
def _(op: ops.Cat | ops.Stack, rw: Rewriter, axis: int) -> list[Place]:
    dim = op.dim % op.out.ndim
    rw.require(dim != axis, f"{describe(op.out)} joins the features of several values")
    at = axis - (isinstance(op, ops.Stack) and dim < axis)
    return [(one, at) for one in op.tensors]


@_places.register(ops.Copy)
@_places.register(ops.Dropout)
def _(op: Any, rw: Rewriter, axis: int) -> list[Place]:
    rw.require(not getattr(op, "train", False), f"{describe(op.out)} drops features at random")
    return [(op.input, axis)]


def _aside(rw: Rewriter, op: Any, axis: int, *touched: int) -> list[Place]:
    """An op that leaves the features alone if it acts on other axes only."""
    rw.require(axis not in touched, f"{describe(op.out)} changes the number of features")
    return [(op.input, axis)]


_WRITTEN = tuple(cls for cls in _places.registry if cls is not object)
