"""Convolutions and linear maps of integers, whose scales go on into thresholds.

    conv(x, alpha_o B) + b  =  alpha_o conv(x, B) + b,    max_pool(alpha y + b) = alpha max_pool(y) + b

for x and B known to be integers (signs, spikes) and alpha per output channel, not negative: its sign is
part of B. An XNOR convolution has alpha_o = mean |W_o|, B = sign(W). Its dot products are integers that no
summation order rounds, and with a threshold halfway between two integers no comparison of them is a tie.
Source: XNOR-Net (Rastegari et al., arXiv 1603.05279).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import combined, total
from graphopt.ir.integers import Multiples
from graphopt.ir.ops import overload, widen
from graphopt.ir.rewrite import Rewriter
from graphopt.ir.value import Value
from graphopt.passes.thresholds.chain import Chain, sign_and_size
from graphopt.passes.thresholds.facts import Facts


def integral(rw: Rewriter, chain: Chain, facts: Facts) -> tuple[Chain, Multiples | None]:
    """The chain with the scale and bias of a map of integers taken off too, and what its value is known
    to be then: integers small enough that nothing about them is rounded, or nothing."""
    since = len(rw.made)
    found = _integers(rw, chain.value, chain.reader, facts)
    if found is not None:
        known = facts.integers.of(found.value)
        if known is not None and known.unit >= 1 and known.exact_in(found.value.dtype):
            shift = found.shift if found.shift is None else combined(found.shift, chain.scale)
            return dataclasses.replace(
                chain, value=found.value, scale=combined(chain.scale, found.scale),
                shift=total(shift, chain.shift), through=chain.through or found.through,
            ), known  # fmt: skip
    rw.rollback(since)
    return chain, None


def _integers(rw: Rewriter, value: Value, reader: ops.Op, facts: Facts) -> Chain | None:
    """`value` as scale and shift of integers."""
    op, known = value.op, facts.integers.of(value)
    if known is not None and known.unit >= 1:
        return Chain(value, reader)
    if not rw.only_user(value, reader):
        return None
    if isinstance(op, ops.MaxPool):
        found = _integers(rw, op.input, op, facts)
        if found is None:
            return None
        return dataclasses.replace(found, value=rw.emit_like(op, input=found.value), reader=reader)
    if not isinstance(op, (ops.Conv, ops.Linear)) or facts.integers.of(op.input) is None:
        return None
    if isinstance(op, ops.Conv) and op.transposed:
        return None
    split = _split(rw, op.weight, facts)
    if split is None:
        return None
    weight, alpha = split
    if isinstance(alpha, Value) and not facts.not_negative(alpha):  # its sign is an integer too
        sign, alpha = sign_and_size(rw, alpha.reshape(-1, *(1,) * (weight.ndim - 1)))
        weight = weight * sign.to(weight.dtype)
    elif not isinstance(alpha, Value) and alpha is not None and alpha < 0:
        weight, alpha = -weight, -alpha
    ones = (1,) * (op.rank if isinstance(op, ops.Conv) else 0)
    bias = op.bias
    inner = op.out
    if weight != op.weight or bias is not None:
        inner = rw.emit_like(op, weight=weight.to(op.weight.dtype), bias=None)
    if isinstance(alpha, Value):
        alpha = widen(alpha).reshape(*((-1, *ones) if alpha.ndim and alpha.shape[0] != 1 else ()))
    shift = bias if bias is None else widen(bias).reshape(-1, *ones)
    return Chain(inner, reader, alpha, shift, through=alpha is not None)


def _split(rw: Rewriter, weight: Value, facts: Facts) -> tuple[Value, Value | float | None] | None:
    """A weight `[O, ...]` as integers times a scale per output channel."""
    known = facts.integers.of(weight)
    if known is not None and known.unit >= 1:
        return weight, None
    op = weight.op
    if isinstance(op, (ops.Copy, ops.Detach)) or (
        isinstance(op, ops.Cast) and op.input.dtype.is_floating_point
    ):
        return _split(rw, op.input, facts)
    if isinstance(op, ops.Neg):
        found = _split(rw, op.input, facts)
        return None if found is None else (-found[0], found[1])
    if not isinstance(op, (ops.Mul, ops.Div)):
        return None
    pairs = [(op.left, op.right)] + [(op.right, op.left)] * isinstance(op, ops.Mul)
    for one, other in pairs:
        if not isinstance(one, Value) or not one.is_constant or one.shape != weight.shape:
            continue
        found = _split(rw, one, facts)
        if found is None:
            continue
        inner, scale = found
        factor = _per_output(other, weight.ndim)
        if factor is not None:
            if isinstance(op, ops.Div):
                factor = (
                    rw.emit(ops.Reciprocal(factor)) if isinstance(factor, Value) else 1 / factor
                )
            return inner, combined(scale, factor)
        known = facts.integers.of(other)
        if isinstance(op, ops.Mul) and known is not None and known.unit >= 1:
            return inner * other, scale
    return None


def _per_output(factor: Any, ndim: int) -> Any:
    """A factor `[O, 1, ...]`, `[1, ...]` or a number, in at least float32; None for any other."""
    if not isinstance(factor, Value):
        return factor if isinstance(factor, (int, float)) and factor != 0 else None
    while isinstance(op := factor.op, ops.Expand):
        factor = op.input
    shape = (1,) * (ndim - factor.ndim) + factor.shape
    return widen(factor) if all(size == 1 for size in shape[1:]) else None


def between(rw: Rewriter, threshold: Any, known: Multiples, relation: str | None = None) -> Any:
    """The threshold halfway between the integers above and below, which any integer of `known` is above
    or below as it is of `threshold`; equal to a threshold that is an integer.

    With a `relation`, such an integer goes half a step aside, so that > and <, or >= and <=, which is
    what the relation says, are the same as of the threshold.
    """
    limit = known.size + 1
    if not isinstance(threshold, Value):
        at = min(max(float(threshold or 0.0), -limit), limit)
        below, above = float(at // 1), float(-(-at // 1))
        if relation is not None and below == above:
            return below + (0.5 if relation in ("gt", "le") else -0.5)
        return (below + above) / 2
    low, high = (
        rw.emit(ops.Clamp(rw.call(overload(f"{name}.default"), {"self": threshold}), -limit, limit))
        for name in ("floor", "ceil")
    )
    if relation is None:
        return (low + high) * 0.5
    return low + 0.5 if relation in ("gt", "le") else high - 0.5
