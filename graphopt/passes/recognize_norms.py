"""Norms that are written as formulas become one op.

    x / sqrt(mean(x^2) + eps)  =  rms_norm(x)
    c / sqrt(mean(c^2) + eps)  =  layer_norm(x),    c = x - mean(x)

over the last axis. A gain and a shift behind them are left to `absorb-scales`.
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass


@rewrite
def recognize_norm(op: ops.Mul | ops.Div, rw: Rewriter) -> Value:
    """A value over the root of its mean square is its RMS norm, or the layer norm of what it centres."""
    value, root = _quotient(rw, op)
    rw.match(rw.only_user(root, op))
    moment, eps = _shifted(rw, root)
    rw.match(_square(rw, _mean(rw, moment)) == value)
    width = value.shape[-1]
    rw.match(isinstance(width, int) and value.dtype == op.out.dtype)
    if (whole := _centred(rw, value)) is not None:
        return rw.emit(ops.LayerNorm(whole, (width,), None, None, eps), like=op)
    return rw.emit(ops.RMSNorm(value, (width,), None, eps), like=op)


def _quotient(rw: Rewriter, op: ops.Mul | ops.Div) -> tuple[Value, Value]:
    """x and the root of `x / sqrt(z)` or `x * rsqrt(z)`."""
    pairs = [(op.left, op.right), (op.right, op.left)][: 1 if isinstance(op, ops.Div) else 2]
    kind = ops.Sqrt if isinstance(op, ops.Div) else ops.Rsqrt
    for value, root in pairs:
        if isinstance(value, Value) and isinstance(root, Value) and isinstance(root.op, kind):
            return value, root
    rw.decline("no value is divided by a root", near=False)


def _shifted(rw: Rewriter, root: Value) -> tuple[Value, float]:
    """z and eps of a root of `z + eps`."""
    inner = root.op
    assert isinstance(inner, (ops.Sqrt, ops.Rsqrt))
    total = rw.producer(inner.input, ops.Add)
    for term, number in ((total.left, total.right), (total.right, total.left)):
        if isinstance(term, Value) and not isinstance(number, (Value, complex)):
            return term, number
    rw.decline("no number is added under the root", near=False)


def _mean(rw: Rewriter, value: Value) -> Value:
    """What is averaged over the last axis, which stays as one of size 1."""
    mean = rw.producer(value, ops.Mean)
    rw.match(mean.keepdim and mean.dims == (mean.input.ndim - 1,))
    return mean.input


def _square(rw: Rewriter, value: Value) -> Value:
    """x of `x^2`."""
    op = value.op
    if isinstance(op, ops.Pow):
        rw.match(op.exponent == 2 and isinstance(op.input, Value))
        return op.input
    rw.match(isinstance(op, ops.Mul))
    assert isinstance(op, ops.Mul)
    rw.match(isinstance(op.left, Value) and op.left == op.right)
    assert isinstance(op.left, Value)
    return op.left


def _centred(rw: Rewriter, value: Value) -> Value | None:
    """x of `x - mean(x)` over the last axis, None if that is not what computes `value`."""
    op = value.op
    if not (isinstance(op, ops.Sub) and isinstance(op.left, Value) and isinstance(op.right, Value)):
        return None
    mean = op.right.op
    if not isinstance(mean, ops.Mean) or mean.input != op.left or not mean.keepdim:
        return None
    return op.left if mean.dims == (op.left.ndim - 1,) else None


@dataclasses.dataclass(frozen=True)
class RecognizeNorms(RewritePass):
    """Formulas of layer norms and RMS norms become norms."""

    name = "recognize-norms"
    rewrites = (recognize_norm,)
