"""Products of parameters in their cheapest order.

    W (E - p q)  =  W - (W p) q,        E M = M,        W (p q) = (W p) q

for the identity E and narrow p, q. Adapters that rotate a weight write their rotation out: a product of
reflections E - 2 u u^T (HRA, arXiv 2405.17484) or what a low rank map makes of the identity (the norms of
DoRA, arXiv 2402.09353). Multiplied out, the weight is never multiplied with a dense matrix. Only products
of parameters are touched: they are evaluated at every step of training, and once by `materialize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import same, same_shape
from graphopt.ir.ops.base import hint, numel
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass

LARGEST = 256  # terms and factors of a product that are looked through


@rewrite
def drop_identity_factor(product: ops.Matmul | ops.Linear, rw: Rewriter) -> Value:
    """E M = M, M E = M, and linear(E, W) = W^T."""
    if isinstance(product, ops.Linear):
        rw.match(product.bias is None and isinstance(product.input.op, ops.Eye))
        rw.match(_square(product.input))
        return product.weight.permute(1, 0)
    left, right = product.left, product.right
    rw.match(left.ndim == right.ndim == 2)
    if isinstance(left.op, ops.Eye) and _square(left):
        return right
    rw.match(isinstance(right.op, ops.Eye) and _square(right))
    return left


@rewrite
def multiply_out_right(product: ops.Matmul, rw: Rewriter) -> Value:
    """M (A + B) = M A + M B, M (p q) = (M p) q, M (c A) = c (M A), where that takes fewer FLOPs."""
    left, factor = product.left, product.right.op
    _worthwhile(rw, product, product.right, left.shape[0])
    if isinstance(factor, ops.Matmul):
        return (left @ factor.left) @ factor.right
    return _each(rw, product.right, lambda part: left @ part)


@rewrite
def multiply_out_left(product: ops.Matmul, rw: Rewriter) -> Value:
    """(A + B) M = A M + B M, (p q) M = p (q M), (c A) M = c (A M), where that takes fewer FLOPs."""
    right, factor = product.right, product.left.op
    _worthwhile(rw, product, product.left, right.shape[1])
    if isinstance(factor, ops.Matmul):
        return factor.left @ (factor.right @ right)
    return _each(rw, product.left, lambda part: part @ right)


def _worthwhile(rw: Rewriter, product: ops.Matmul, factor: Value, count: Any) -> None:
    rw.match(product.left.ndim == product.right.ndim == 2)
    rw.worthwhile(
        lambda: product.out.is_constant and _flops(factor, count, {}) < _dense(factor, count)
    )


def _each(rw: Rewriter, factor: Value, times: Callable[[Value], Value]) -> Value:
    """A sum or a multiple of matrices, each of which is multiplied."""
    op: Any = factor.op
    parts = _parts(factor)
    rw.match(parts)
    if len(parts) == 1:
        multiple: Value = times(parts[0]) * op.right
        return multiple
    return rw.emit(op.replace(left=times(parts[0]), right=times(parts[1])))


def _square(matrix: Value) -> bool:
    return same(*matrix.shape)


def _parts(factor: Value) -> list[Value]:
    """The matrices that a factor is the sum or a multiple of, as large as it is: nothing is repeated."""
    op: Any = factor.op
    parts: list[Any] = []
    if isinstance(op, (ops.Add, ops.Sub)):
        parts = [op.left, op.right]
    elif isinstance(op, ops.Mul) and not isinstance(op.right, Value):
        parts = [op.left]
    fit = all(isinstance(one, Value) and same_shape(one.shape, factor.shape) for one in parts)
    return parts if fit else []


def _dense(factor: Value, count: Any) -> float:
    return 2.0 * hint(count) * numel(factor)


def _flops(factor: Value, count: Any, known: dict[Value, float]) -> float:
    """FLOPs of the product of a factor with so many rows or columns, multiplied out where that takes
    fewer; `known` for the factors met so far."""
    if factor not in known:
        op, dense, parts = factor.op, _dense(factor, count), _parts(factor)
        added = dense / max(map(hint, factor.shape)) if parts else 0.0
        if isinstance(op, ops.Matmul) and op.left.ndim == op.right.ndim == 2:
            parts = [op.left, op.right]
        if parts and len(known) < LARGEST:
            known[factor] = dense  # until it is known better
            apart = added + sum(_flops(one, count, known) for one in parts)
            known[factor] = min(dense, apart)
        else:
            known[factor] = 0.0 if isinstance(op, ops.Eye) else dense
    return known[factor]


@dataclasses.dataclass(frozen=True)
class MultiplyOut(RewritePass):
    """Products of parameters with sums and narrow products are multiplied out where that is cheaper."""

    name = "multiply-out"
    rewrites = (drop_identity_factor, multiply_out_right, multiply_out_left)
