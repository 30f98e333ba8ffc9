"""Collect the terms of a sum: what is added twice is added once.

    (s * y + a) + (t * y + b)    =    (s + t) * y + (a + b)
    s * y + (t * y + z)          =    (s * y + t * y) + z

with numbers or per-channel parameters s, t, a, b. A value that a sum reads twice keeps every scale in
that sum from moving into what computes it: DoRA adds `(m - 1) W x` to `W x`, RepBN adds `a x` to the
batch norm of x.
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.affine import Affine, combined, fixed, is_number, same_shape, total, written
from graphopt.ir.rewrite import Declined, Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

LONGEST = 4  # ops between a value and the sum


@dataclasses.dataclass(frozen=True)
class Term:
    """`scale * value + shift`, by `made_of`."""

    value: Value
    by: Affine
    made_of: tuple[ops.Op, ...] = ()


@rewrite(
    unproved="two chains of scales and shifts are too many cases to enumerate; tests of random "
    "sums and the validation of every site check it"
)
def collect_terms(op: ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """s y + t y = (s + t) y."""
    rw.match(not fixed(op.left) and not fixed(op.right) and op.out.dtype.is_floating_point)
    assert isinstance(op.left, Value) and isinstance(op.right, Value)
    left, right = _term(rw, op.left, op), _term(rw, op.right, op)
    rw.match(left.value == right.value and same_shape(left.value.shape, op.out.shape))
    axes = {one.by.axis for one in (left, right)} - {None}
    rw.match(len(axes) <= 1)
    by = right.by
    if isinstance(op, ops.Sub):
        scale = -1.0 if by.scale is None else combined(by.scale, -1.0)
        by = Affine(by.axis, scale, None if by.shift is None else combined(by.shift, -1.0))
    one = 1.0 if left.by.scale is None else left.by.scale
    both = Affine(
        next(iter(axes), None),
        total(one, 1.0 if by.scale is None else by.scale), total(left.by.shift, by.shift),
    )  # fmt: skip
    result = left.value * _broadcast(both, both.scale, op.out)
    if both.shift is not None:
        result = result + _broadcast(both, both.shift, op.out)
    rw.pays((op, *left.made_of, *right.made_of), result)
    return result


@rewrite(
    unproved="addition is associative, whatever is added; what else it looks at are too many cases "
    "to enumerate; tests of random sums and the validation of every site check it"
)
def gather_terms(op: ops.Add, rw: Rewriter) -> Value:
    """s y + (t y + z) = (s y + t y) + z."""
    rw.match(not fixed(op.left) and not fixed(op.right))
    for one, other in ((op.left, op.right), (op.right, op.left)):
        assert isinstance(one, Value) and isinstance(other, Value)
        inner = other.op
        if isinstance(inner, ops.Add) and rw.only_user(other, op):
            value = _term(rw, one, op).value
            for term, rest in ((inner.left, inner.right), (inner.right, inner.left)):
                if not fixed(term) and not fixed(rest):
                    assert isinstance(term, Value) and isinstance(rest, Value)
                    rw.match(one.dtype == term.dtype == rest.dtype)
                    if _term(rw, term, inner).value == value:
                        return (one + term) + rest
    rw.decline("no value stands in the sum twice", near=False)


def _term(rw: Rewriter, value: Value, reader: ops.Op) -> Term:
    """A value as another one that is scaled and shifted, as far as only `reader` needs it."""
    found = Term(value, Affine(None, None, None))
    for _ in range(LONGEST):
        op, start = found.value.op, len(rw.made)
        if not isinstance(op, (ops.Mul, ops.Add, ops.Sub, ops.BatchNorm)):
            break
        try:
            rw.match(rw.only_user(found.value, reader))
            inner, by = _step(rw, op)
            axes = {found.by.axis, by.axis} - {None}
            rw.match(len(axes) <= 1)
        except Declined:
            rw.rollback(start)
            break
        # scale * (s x + t) + shift
        shift = by.shift
        if shift is not None and found.by.scale is not None:
            shift = combined(shift, found.by.scale)
        both = Affine(next(iter(axes), None), combined(by.scale, found.by.scale),
                      total(found.by.shift, shift))  # fmt: skip
        found, reader = Term(inner, both, (*found.made_of, op)), op
    return found


def _step(rw: Rewriter, op: ops.Op) -> tuple[Value, Affine]:
    if isinstance(op, ops.BatchNorm):
        rw.match(not op.uses_batch_statistics)
        return op.input, Affine(1, *op.scale_and_shift())
    assert isinstance(op, (ops.Mul, ops.Add, ops.Sub))
    return written(rw, op)


def _broadcast(by: Affine, one: Value | float | None, like: Value) -> Value | float:
    """A scale or shift as it applies to `like`, in its dtype."""
    assert one is not None
    if isinstance(one, Value):
        one = one.to(like.dtype)
    return one if is_number(one) else by.broadcast(one, like.ndim)


@dataclasses.dataclass(frozen=True)
class CollectTerms(RewritePass):
    """What a sum reads twice, scaled or not, is scaled and added once."""

    name = "collect-terms"
    rewrites = (collect_terms, gather_terms)
