"""Scales and shifts in front of a comparison move into its threshold.

    s x + t > theta   =   sgn(s) x > (theta - t) / |s|      for s != 0,
                          t > theta                         for s = 0: the same with 1 for |s|

for >=, < and <= too: a negative scale turns the comparison around, a scale of zero makes it constant. So
an eval-mode batch norm in front of a spike (MPBN, Guo et al., arXiv 2308.08359), element-wise or per
channel, costs no more than the threshold that was there. What is compared may be read elsewhere, as a
membrane potential is; what is only there to be compared goes away.

The published fold, (theta - bias) sqrt(var) / weight + mean, leaves out the negative and the zero scale and
eps. Spikes are equal but where the source is within rounding of a tie, which the check of every site counts.
Source: reference/transformations.md 2.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import combined, fixed, same_shape, total
from graphopt.ir.ops import widen
from graphopt.ir.rewrite import Rewriter, describe, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

_AROUND = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}
_AFFINE = (ops.BatchNorm, ops.Neg, ops.Mul, ops.Div, ops.Add, ops.Sub)
_COMPARED = "a comparison is no polynomial; tests/passes/test_fold_thresholds.py takes the three signs apart"


@rewrite(unproved=_COMPARED)
def fold_threshold(compare: ops.Compare, rw: Rewriter) -> Value:
    """Scales and shifts in front of a comparison move into what it compares with."""
    rw.match(compare.relation in _AROUND)
    value, threshold, relation = compare.left, compare.right, compare.relation
    if fixed(value):
        value, threshold, relation = threshold, value, _AROUND[relation]
    rw.match(isinstance(value, Value) and value.dtype.is_floating_point)
    assert isinstance(value, Value)
    inner, scale, shift = _collected(rw, value, compare)
    rw.match(shift is not None or not _is_sign(scale))
    if isinstance(threshold, Value) and not threshold.is_constant:
        rw.require(
            not same_shape(threshold.shape, value.shape),
            "the threshold is another value of the same size, which would have to be scaled instead",
        )
    if shift is not None:
        threshold = _wide(threshold) - _wide(shift)
    if isinstance(scale, Value):
        scale = widen(scale)
        zero = rw.emit(ops.Compare(scale, 0.0, "eq"))
        size = rw.emit(ops.Abs(scale)) + zero.to(scale.dtype)
        threshold = _wide(threshold) * rw.emit(ops.Reciprocal(size))
        inner = inner * (scale / size).to(inner.dtype)
    elif scale is not None:
        rw.match(scale != 0)
        threshold = _wide(threshold) / scale
        relation = relation if scale > 0 else _AROUND[relation]
    if isinstance(threshold, Value):
        threshold = threshold.to(value.dtype)
    return rw.emit(ops.Compare(inner, threshold, relation), like=compare)


def _collected(
    rw: Rewriter, value: Value, reader: ops.Op
) -> tuple[Value, Value | float | None, Value | float | None]:
    """x, s and t with s x + t = value, all scales and shifts on the way together."""
    first, scale, shift = value, None, None
    while isinstance(op := value.op, _AFFINE):
        found = _scaled(rw, op)
        if found is None or not _alike(found[0], value):
            break
        if not rw.only_user(value, reader):
            rw.require(
                value != first,
                f"{describe(value)} is read elsewhere too, so it has to be computed",
            )
            break
        value, inner_scale, inner_shift = found
        moved = inner_shift if inner_shift is None else combined(inner_shift, scale)
        scale, shift = combined(scale, inner_scale), total(moved, shift)
        reader = op
    rw.match(value != first)
    return value, scale, shift


def _scaled(rw: Rewriter, op: ops.Op) -> tuple[Value, Any, Any] | None:
    """x, s and t of s x + t, of shapes that broadcast with x, in at least float32; None for s of 1 and
    for t of 0. None for what is no scale and shift by parameters or numbers."""
    if isinstance(op, ops.BatchNorm):
        rw.require(
            not op.uses_batch_statistics,
            f"{describe(op.out)} normalizes with batch statistics; call model.eval() before optimizing",
        )
        shape = (-1, *(1,) * (op.input.ndim - 2))
        scale, shift = op.scale_and_shift()
        return op.input, scale.reshape(*shape), shift.reshape(*shape)
    if isinstance(op, ops.Neg):
        return op.input, -1.0, None
    assert isinstance(op, (ops.Mul, ops.Div, ops.Add, ops.Sub))
    left, right = op.left, op.right
    if fixed(left) and not isinstance(op, ops.Div):
        if isinstance(op, ops.Sub):  # t - x
            return None if fixed(right) else (right, -1.0, _wide(left))  # type: ignore[return-value]
        left, right = right, left
    if fixed(left) or not fixed(right) or isinstance(right, complex):
        return None
    assert isinstance(left, Value)
    if isinstance(op, ops.Add):
        return left, None, _wide(right)
    if isinstance(op, ops.Sub):
        return left, None, -_wide(right)
    if isinstance(right, Value):
        right = widen(right)
        return left, rw.emit(ops.Reciprocal(right)) if isinstance(op, ops.Div) else right, None
    if right == 0:
        return None
    return left, 1 / right if isinstance(op, ops.Div) else right, None


def _alike(inner: Value, value: Value) -> bool:
    return same_shape(inner.shape, value.shape) and inner.dtype == value.dtype


def _is_sign(scale: Any) -> bool:
    """Whether this is what `fold_threshold` leaves of a scale."""
    op = scale.op if isinstance(scale, Value) else None
    while isinstance(op, (ops.Cast, ops.Reshape)):
        op = op.input.op
    if not isinstance(op, ops.Div) or not isinstance(op.right, Value):
        return False
    size = op.right.op
    absolute = size.left.op if isinstance(size, ops.Add) and isinstance(size.left, Value) else None
    return isinstance(absolute, ops.Abs) and absolute.input == op.left


def _wide(one: Any) -> Any:
    return widen(one) if isinstance(one, Value) else one


@dataclasses.dataclass(frozen=True)
class FoldThresholds(RewritePass):
    """Batch norms, scales and shifts in front of comparisons move into thresholds."""

    name = "fold-thresholds"
    rewrites = (fold_threshold,)
