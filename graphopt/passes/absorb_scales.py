"""Numbers, per-channel scales and shifts in front of maps, and biases of attention move into weights.

    c (W x + b)                     =  (c W) x + c b
    W (s x + t) + b                 =  (W s) x + (b + W t)
    softmax(q (k + 1 b^T)^T) v      =  softmax(q k^T) v
    softmax(a) (v + 1 b^T)          =  softmax(a) v + 1 b^T

The last two because all scores of a query grow by the same number, and its weights add up to one. The gain of
normalized keys moves into the queries', softmax(q (g k)^T) = softmax((g q) k^T).
Scales that are not negative also pass ReLU and its relatives, and maxima. Where zero padding meets a
shift, see `graphopt.ir.extract`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

from graphopt.ir import ops
from graphopt.ir.absorb import absorb
from graphopt.ir.affine import same, written
from graphopt.ir.extract import NORMS, into_conv, into_linear
from graphopt.ir.ops import plus, times, widen
from graphopt.ir.rewrite import Rewriter, describe, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

_SOURCES = (ops.Mul, ops.Div, ops.Add, ops.Sub, *NORMS)


@rewrite
def absorb_number(op: ops.Mul | ops.Div | ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """A number that multiplies or shifts moves into what computes its operand."""
    value, by = written(rw, op)
    rw.match(by.axis is None)
    return absorb(rw, value, by, op)


@rewrite
def absorb_into_linear(linear: ops.Linear, rw: Rewriter) -> Value:
    """Scales and shifts of what a linear map reads move into it, a norm's gain and shift too."""
    return into_linear(rw, linear, _SOURCES)


@rewrite
def absorb_into_conv(conv: ops.Conv, rw: Rewriter) -> Value:
    """Scales and shifts of what a convolution reads move into it: a mean and a standard deviation,
    for example, or a norm's gain and shift."""
    return into_conv(rw, conv, _SOURCES)


@rewrite
def drop_key_bias(attention: ops.Attention, rw: Rewriter) -> Value:
    """softmax(q (k + 1 b^T)^T) = softmax(q k^T)."""
    rw.match(attention.key != attention.value and attention.key != attention.query)
    key, axes, _ = _unbiased(rw, attention.key, attention)
    rw.match(attention.key.ndim - 2 not in axes)
    return rw.emit_like(attention, key=key)


@rewrite
def move_key_gain(attention: ops.Attention, rw: Rewriter) -> Value:
    """softmax(q (g k)^T) = softmax((g q) k^T): one gain for two, where queries and keys are normalized
    and nothing rotates them in between."""
    rw.match(attention.key != attention.value and attention.key != attention.query)
    gains: list[Value] = []

    def plain(norm: Any) -> Value:
        gains.append(norm.weight)
        return _rescaled(rw, norm, None)

    key = _norm_behind(rw, attention.key, attention, plain)
    query = _norm_behind(rw, attention.query, attention, lambda norm: _rescaled(rw, norm, gains[0]))
    return rw.emit_like(attention, query=query, key=key)


def _norm_behind(
    rw: Rewriter, value: Value, reader: ops.Op, change: Callable[[Any], Value]
) -> Value:
    """`value`, which a norm of its features computes, with what `change` makes of the norm."""
    op = value.op
    rw.match(rw.only_user(value, reader))
    if isinstance(op, (ops.Permute, ops.Reshape)):
        last = op.input.ndim - 1
        kept = (
            op.dims[-1] == last if isinstance(op, ops.Permute)
            else same(op.out.shape[-1], op.input.shape[-1])
        )  # fmt: skip
        rw.match(kept)
        return rw.emit_like(op, input=_norm_behind(rw, op.input, op, change))
    rw.match(isinstance(op, (ops.LayerNorm, ops.RMSNorm)))
    assert isinstance(op, (ops.LayerNorm, ops.RMSNorm))
    rw.match(len(op.normalized_shape) == 1 and op.weight is not None)
    return change(op)


def _rescaled(rw: Rewriter, norm: Any, gain: Value | None) -> Value:
    """A norm with its gain and shift times another gain, or without both: the shift of a key adds the
    same to all scores of a query."""
    old = {name: getattr(norm, name) for name in ("weight", "bias") if hasattr(norm, name)}
    new = {
        name: None if gain is None or one is None else times(one, gain).to(one.dtype)
        for name, one in old.items()
    }
    return rw.emit_like(norm, **new)


@rewrite
def move_value_bias(outer: ops.Linear, rw: Rewriter) -> Value:
    """W (softmax(a) (v + 1 b^T)) = W softmax(a) v + 1 (W b)^T."""
    rw.match(isinstance(outer.input.op, (ops.Attention, ops.Permute, ops.Reshape)))
    value, axes, bias = _unbiased(rw, outer.input, outer, through=True)
    rw.match(axes == (outer.input.ndim - 1,))
    moved = (widen(outer.weight, bias) * widen(bias, outer.weight)).sum((1,))
    both = moved.to(outer.weight.dtype) if outer.bias is None else plus(outer.bias, moved)
    return rw.emit_like(outer, input=value, bias=both)


def _unbiased(
    rw: Rewriter, value: Value, reader: ops.Op, through: bool = False
) -> tuple[Value, tuple[int, ...], Value]:
    """`value` without the bias of the linear map that computes it, the bias, and the axes along
    which it lies, in order; `through` an attention that averages such values."""
    op = value.op
    rw.match(rw.only_user(value, reader))
    if isinstance(op, ops.Attention) and through:
        inner, axes, bias = _unbiased(rw, op.value, op)
        rw.match(op.value.ndim - 2 not in axes)
        rw.require(
            op.averages,
            f"{describe(op.out)} masks or drops, so that its weights need not add up to one",
        )
        return rw.emit_like(op, value=inner), axes, bias
    if isinstance(op, ops.Permute):
        inner, axes, bias = _unbiased(rw, op.input, op, through)
        return rw.emit_like(op, input=inner), tuple(map(op.dims.index, axes)), bias
    if isinstance(op, ops.Reshape):
        inner, axes, bias = _unbiased(rw, op.input, op, through)
        return rw.emit_like(op, input=inner), _regrouped(rw, op, axes), bias
    rw.match(isinstance(op, ops.Linear) and not through)
    assert isinstance(op, ops.Linear)
    rw.match(op.bias is not None)
    assert op.bias is not None
    return rw.emit_like(op, bias=None), (op.out.ndim - 1,), op.bias


def _regrouped(rw: Rewriter, op: ops.Reshape, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes over which a reshape spreads neighbouring axes that it keeps together."""
    before, after = op.input.shape, op.out.shape
    first, last = axes[0], axes[-1] + 1
    rw.match(axes == tuple(range(first, last)))
    size, behind = prod(before[first:last]), prod(before[last:])
    for stop in range(len(after), 0, -1):
        if same(prod(after[stop:]), behind):
            for start in range(stop - 1, -1, -1):
                if same(prod(after[start:stop]), size):
                    return tuple(range(start, stop))
    rw.decline(f"{describe(op.out)} mixes features with other axes", near=False)


@dataclasses.dataclass(frozen=True)
class AbsorbScales(RewritePass):
    """Numbers, scales, shifts and biases of attention move into the weights around them."""

    name = "absorb-scales"
    rewrites = (
        absorb_number, absorb_into_linear, absorb_into_conv, drop_key_bias, move_key_gain,
        move_value_bias,
    )  # fmt: skip
