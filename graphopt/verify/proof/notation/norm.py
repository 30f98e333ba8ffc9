"""Index notation of normalizations."""

from __future__ import annotations

from math import prod
from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.verify.proof.notation.base import (
    Index,
    Reader,
    entry,
    exponential,
    unknown,
)
from graphopt.verify.proof.polynomials import sym
from graphopt.verify.proof.terms import Expr, element, number


@entry.register
def _(op: ops.BatchNorm, at: Index, r: Reader) -> Expr:
    if op.uses_batch_statistics:
        return unknown(op, at, r)
    assert op.running_mean is not None and op.running_var is not None
    channel = (at[1],)
    variance = r.at(op.running_var, channel) + number(op.eps)
    r.space.laws["var + eps > 0"] = None
    scale = r.space.power(variance, sp.Rational(-1, 2))
    if op.weight is not None:
        scale = r.space.product(scale, r.at(op.weight, channel))
    result = r.space.product(r.at(op.input, at) - r.at(op.running_mean, channel), scale)
    return result if op.bias is None else result + r.at(op.bias, channel)


def _normalize(op: Any, at: Index, r: Reader, over: Index, reads: Index, centre: bool) -> Expr:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps), statistics over the indices `over`."""
    s = r.space
    count = prod((s.range[v] for v in over), start=sp.Integer(1))
    value = r.at(op.input, at)
    if centre:
        value = value - s.sum(over, r.at(op.input, reads)) * (1 / count)
        apart = tuple(s.index(s.range[v], "m") for v in over)
        swap = dict(zip(over, apart, strict=True))
        other = tuple(sym(i).xreplace(swap) for i in reads)
        inner = r.at(op.input, reads) - s.sum(apart, r.at(op.input, other)) * (1 / count)
    else:
        inner = r.at(op.input, reads)
    square = s.sum(over, s.product(inner, inner)) * (1 / count)
    s.laws["mean square + eps > 0"] = None
    return s.product(value, s.power(square + number(op.eps), sp.Rational(-1, 2)))


@entry.register(ops.LayerNorm)
@entry.register(ops.RMSNorm)
def _(op: Any, at: Index, r: Reader) -> Expr:
    if op.eps is None:
        return unknown(op, at, r)
    last = len(op.normalized_shape)
    over = r.indices(op.input.shape[-last:], "m")
    reads = (*at[: len(at) - last], *over)
    result = _normalize(op, at, r, over, reads, isinstance(op, ops.LayerNorm))
    if op.weight is not None:
        result = r.space.product(result, r.at(op.weight, at[-last:]))
    bias = getattr(op, "bias", None)
    return result if bias is None else result + r.at(bias, at[-last:])


@entry.register
def _(op: ops.GroupNorm, at: Index, r: Reader) -> Expr:
    per = op.input.shape[1] // op.num_groups
    group, _ = r.space.divmod(at[1], per)
    (c,) = r.indices((per,), "m")
    rest = r.indices(op.input.shape[2:], "m")
    over = (c, *rest)
    result = _normalize(op, at, r, over, (at[0], group * per + c, *rest), True)
    if op.weight is not None:
        result = r.space.product(result, r.at(op.weight, (at[1],)))
    return result if op.bias is None else result + r.at(op.bias, (at[1],))


@entry.register
def _(op: ops.Softmax, at: Index, r: Reader) -> Expr:
    dim = op.dim % op.input.ndim
    (j,) = r.indices((op.input.shape[dim],), "j")

    def weight(i: Any) -> Expr:
        return exponential(r.at(op.input, (*at[:dim], i, *at[dim + 1 :])), r)

    return r.space.product(weight(at[dim]), r.space.power(r.space.sum((j,), weight(j)), -1))


@entry.register
def _(op: ops.Dropout, at: Index, r: Reader) -> Expr:
    """In training, a mask of its own for every call."""
    return element(f"Dropout {op.out}", at) if op.train else r.at(op.input, at)
