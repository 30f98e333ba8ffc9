"""Terms of a sum that cancel go away.

    x + (y - x)                 =  y
    y - clamp(x) + clamp(x)     =  y

A straight-through estimator is such a sum: its value is y, a sign or a rounding, and its gradient that of
x, for the y - x in it is detached. What is detached counts as what it is, so this is for Deploy mode,
which gives up such gradients; Tune mode keeps them. Holds for finite x: inf - inf is nan. Source: Bengio et
al., arXiv 1308.3432.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from graphopt.ir import ops
from graphopt.ir.affine import same_shape
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

DEEPEST = 4  # sums within a sum


@rewrite(
    unproved="sums of any depth are too many cases to enumerate; tests/passes/test_binary.py draws them, "
    "and every site is checked"
)
def cancel_terms(op: ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """x + (y - x) = y."""
    rw.match(op.out.dtype.is_floating_point)
    terms = list(_terms(op.out, 1, op.out, DEEPEST))
    left = list(terms)
    for value, sign in terms:
        if (value, sign) in left and (value, -sign) in left:
            left.remove((value, sign))
            left.remove((value, -sign))
    rw.match(left and len(left) < len(terms))
    left.sort(key=lambda one: -one[1])  # the first is added, if any is
    result = left[0][0] if left[0][1] > 0 else -left[0][0]
    for value, sign in left[1:]:
        result = result + value if sign > 0 else result - value
    rw.match(same_shape(result.shape, op.out.shape) and result.dtype == op.out.dtype)
    return result


def _terms(value: Value, sign: int, out: Value, depth: int) -> Iterator[tuple[Value, int]]:
    """The values that are added and subtracted, through sums of the shape and dtype of `out`."""
    value = _attached(value)
    op = value.op
    if isinstance(op, ops.Neg):
        yield from _terms(op.input, -sign, out, depth)
        return
    inside = isinstance(op, (ops.Add, ops.Sub)) and depth
    if inside and value.dtype == out.dtype and same_shape(value.shape, out.shape):
        left, right = op.left, op.right  # type: ignore[union-attr]
        if isinstance(left, Value) and isinstance(right, Value):
            yield from _terms(left, sign, out, depth - 1)
            yield from _terms(right, sign if isinstance(op, ops.Add) else -sign, out, depth - 1)
            return
    yield value, sign


def _attached(value: Value) -> Value:
    while isinstance(op := value.op, (ops.Detach, ops.Copy)):
        value = op.input
    return value


@dataclasses.dataclass(frozen=True)
class CancelTerms(RewritePass):
    """Terms of a sum that cancel go away: straight-through estimators become what they estimate."""

    name = "cancel-terms"
    rewrites = (cancel_terms,)
