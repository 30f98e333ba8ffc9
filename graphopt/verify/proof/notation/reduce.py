"""Index notation of sums, averages and interpolation."""

from __future__ import annotations

import math
from math import prod
from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.verify.proof.notation.base import (
    Index,
    Reader,
    ShapeError,
    Sizes,
    _axes,
    _spread,
    entry,
    literally,
    sizes,
    unknown,
)
from graphopt.verify.proof.polynomials import sym
from graphopt.verify.proof.terms import Expr, Inside, element, factor, number


@sizes.register
def _(op: ops.Reduce | ops.VectorNorm) -> Sizes:
    dims = _axes(op.dims, op.input.ndim)
    return tuple(
        1 if axis in dims else size
        for axis, size in enumerate(op.input.shape) if op.keepdim or axis not in dims
    )  # fmt: skip


@entry.register
def _(op: ops.Reduce, at: Index, r: Reader) -> Expr:
    dims = _axes(op.dims, op.input.ndim)
    over = r.indices([op.input.shape[dim] for dim in dims], "j")
    summed = dict(zip(dims, over, strict=True))
    kept = iter(at)
    reads = []
    for axis in range(op.input.ndim):
        if axis in summed:
            reads.append(summed[axis])
            if op.keepdim:
                next(kept)
        else:
            reads.append(next(kept))
    result = r.space.sum(over, r.at(op.input, tuple(reads)))
    if isinstance(op, ops.Mean):
        count = prod((sym(op.input.shape[dim]) for dim in dims), start=sp.Integer(1))
        result = result * (1 / count)
    return result


@entry.register
def _(op: ops.CumSum, at: Index, r: Reader) -> Expr:
    dim = op.dim % len(at)
    size = op.input.shape[dim]
    (j,) = r.indices((size,), "j")
    until = factor(Inside(at[dim] - j, sym(size)))
    read = r.at(op.input, (*at[:dim], j, *at[dim + 1 :]))
    return r.space.sum((j,), r.space.product(until, read))


def _window(op: Any) -> tuple[Sizes, Sizes, Sizes]:
    name = next(name for name in ("avg_pool", "max_pool") if name in str(op.targets[0]))
    rank = op.input.ndim - 2 if len(op.kernel_size) == 1 else len(op.kernel_size)
    if op.out is not None and op.out.node.op == "call_function" and name in str(op.out.node.target):
        rank = int(str(op.out.node.target).partition(name)[2][0])
    kernel = _spread(op.kernel_size, rank)
    return kernel, _spread(op.stride or kernel, rank), _spread(op.padding, rank)


@sizes.register(ops.AvgPool)
@sizes.register(ops.MaxPool)
def _(op: Any) -> Sizes:
    if op.ceil_mode:
        raise ShapeError("ceil_mode has no index notation")
    kernel, stride, padding = _window(op)
    lead = op.input.ndim - len(kernel)
    dilation = _spread(getattr(op, "dilation", 1), len(kernel))
    space = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            op.input.shape[lead:], kernel, stride, padding, dilation, strict=True
        )
    ]
    return (*op.input.shape[:lead], *space)


@entry.register
def _(op: ops.AvgPool, at: Index, r: Reader) -> Expr:
    kernel, stride, padding = _window(op)
    lead = op.input.ndim - len(kernel)
    image = op.input.shape[lead:]

    def places(k: Index) -> Index:
        return tuple(
            sym(s) * p + j - sym(a)
            for p, j, s, a in zip(at[lead:], k, stride, padding, strict=True)
        )

    def masks(source: Index) -> list[Expr]:
        return [
            factor(Inside(i, sym(size)))
            for i, size, a in zip(source, image, padding, strict=True) if not literally(a, 0)
        ]  # fmt: skip

    k = r.indices(kernel, "k")
    source = places(k)
    padded = {lead + i: size for i, size in enumerate(image)}
    sure = tuple(lead + i for i, a in enumerate(padding) if literally(a, 0))
    total = r.space.sum(k, r.masked(op.input, (*at[:lead], *source), padded, sure))
    if op.divisor_override is not None:
        return r.space.product(total, number(1 / sym(op.divisor_override)))
    if op.count_include_pad:
        whole = prod(map(sym, kernel), start=sp.Integer(1))
        return r.space.product(total, number(1 / whole))
    j = r.indices(kernel, "k")
    count = r.space.sum(j, r.space.product(*masks(places(j))))
    return r.space.product(total, r.space.power(count, -1))


@sizes.register
def _(op: ops.AdaptiveAvgPool) -> Sizes:
    return (*op.input.shape[: op.input.ndim - op.rank], *op.output_size)


@sizes.register
def _(op: ops.Upsample) -> Sizes:
    if op.output_size is not None:
        return (*op.input.shape[:2], *op.output_size)
    scaled = [
        n * int(k) if float(k).is_integer() else math.floor(n * k)
        for n, k in zip(op.input.shape[2:], op.scale_factors, strict=True)
    ]
    return (*op.input.shape[:2], *scaled)


@entry.register(ops.AdaptiveAvgPool)
@entry.register(ops.Upsample)
def _(op: Any, at: Index, r: Reader) -> Expr:
    """Separate unknown weights along each axis, which add up to 1."""
    lead = op.input.ndim - op.rank
    image = op.input.shape[lead:]
    over = r.indices(image, "j")
    options = (getattr(op, name, None) for name in ("kind", "align_corners", "scale_factors"))
    kind = " ".join(map(str, (type(op).__name__, *options)))
    weights = [
        element(f"{kind}:{sym(size)}->{sym(to)}", (p, j), sym(size))
        for size, to, p, j in zip(image, sizes(op)[lead:], at[lead:], over, strict=True)
    ]
    return r.space.sum(over, r.space.product(*weights, r.at(op.input, (*at[:lead], *over))))


@entry.register
def _(op: ops.MaxPool, at: Index, r: Reader) -> Expr:
    return unknown(op, at, r, homogeneous=True)
