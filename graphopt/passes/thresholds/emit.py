"""Writing the sign of `g x - tau`, with g of -1, 0 and 1 and tau per channel, without a product.

    sign(g x - tau)  =  sign(x'),                    x' = g x - tau, which a map that computes x takes in
                     =  f sign(x - theta)            f taken in by the maps that read it
                     =  sign(x - tau)                where g is 1

with f = g, theta = g tau, but f = sign(-tau), theta below everything for g = 0. Where tau is computed in the
run, f = 1 for g = 0 and theta is beyond everything on the side of tau, so that f is a parameter.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.absorb import absorb
from graphopt.ir.affine import Affine, channel_vector
from graphopt.ir.integers import Multiples
from graphopt.ir.ops import widen
from graphopt.ir.rewrite import Declined, Rewriter, describe
from graphopt.ir.value import Value
from graphopt.passes.thresholds.chain import Chain


def sign_of(
    rw: Rewriter, chain: Chain, sign: Any, moved: Any, known: Multiples | None, like: ops.Op,
    into_map: bool = False,
) -> Value:  # fmt: skip
    """The sign of `sign * value - moved`, in the first of the ways above that this place allows. The shift
    goes into the map that computes the value if that is possible; `into_map` requires it."""
    value = chain.value
    moved = None if not isinstance(moved, Value) and not moved else moved
    if sign is None and moved is None:
        return rw.emit(ops.Sign(value), like=like)
    since = len(rw.made)
    try:
        return rw.emit(ops.Sign(_taken_in(rw, chain, sign, moved)), like=like)
    except Declined:
        rw.rollback(since)
    if isinstance(sign, Value):
        return _turned(rw, chain, sign, moved, known, like, into_map)
    rw.match(not into_map)
    if moved is None:
        return -rw.emit(ops.Sign(value), like=like)
    at = moved.to(value.dtype) if isinstance(moved, Value) else moved
    shifted = value - at if sign is None else rw.emit(ops.Sub(-at, value))
    result = rw.emit(ops.Sign(shifted), like=like)
    if chain.at_run_time:
        rw.pays((*chain.off, like), result)
    return result


def _turned(
    rw: Rewriter, chain: Chain, sign: Value, moved: Any, known: Multiples | None, like: ops.Op,
    into_map: bool,
) -> Value:  # fmt: skip
    """f sign(x - theta)."""
    value = chain.value
    axis, _ = _vector(rw, sign, value)
    rw.require(
        axis is not None and _takes_factor(rw, like.out, axis),
        f"{describe(value)} would have to be multiplied by the signs of the scale, which neither what "
        "computes it nor what reads the result takes in",
    )
    if not isinstance(moved, Value):
        moved = rw.emit(ops.Full((), moved or 0.0, sign.dtype, sign.meta.device))
    zero = rw.emit(ops.Compare(sign, 0.0, "eq"))
    far = torch.finfo(value.dtype).max if known is None else known.size + 1
    if moved.is_constant:
        factor = rw.emit(ops.Where(zero, rw.emit(ops.Sign(-moved)), sign))
        beyond: Any = -far
    else:
        factor = sign + zero.to(sign.dtype)
        beyond = rw.emit(ops.Sign(moved)) * far
    moved = rw.emit(ops.Where(zero, beyond, moved * sign)).to(sign.dtype)
    since = len(rw.made)
    try:
        shifted = _taken_in(rw, chain, None, moved)
    except Declined:
        rw.rollback(since)
        rw.match(not into_map)
        shifted = value - moved.to(value.dtype)
    result = rw.emit(ops.Sign(shifted), like=like)
    if chain.at_run_time:
        rw.pays((*chain.off, like), result)
    return result * factor.to(value.dtype)


def turned(rw: Rewriter, chain: Chain, sign: Value) -> Value:
    """`sign * value`, as a product if the map that computes the value cannot take it in."""
    since = len(rw.made)
    try:
        return _taken_in(rw, chain, sign, None)
    except Declined:
        rw.rollback(since)
        return chain.value * sign.to(chain.value.dtype)


def _taken_in(rw: Rewriter, chain: Chain, sign: Any, moved: Any) -> Value:
    """`sign * value - moved` as what computes the value computes it; declines if it cannot."""
    value, found = chain.value, []
    for one in (sign, moved):
        rw.match(not isinstance(one, Value) or one.is_constant)
        found.append(_vector(rw, one, value) if isinstance(one, Value) else (None, one))
    axes = {axis for axis, _ in found} - {None}
    rw.match(len(axes) <= 1)
    (_, scale), (_, shift) = found
    by = Affine(next(iter(axes), None), scale, None if shift is None else -shift)
    reader = chain.reader
    if value.node in rw.made:  # nobody reads it yet
        reader = rw.emit(ops.Neg(value)).op  # type: ignore[assignment]
    return _through_pool(rw, value, by, reader)


def _through_pool(rw: Rewriter, value: Value, by: Affine, reader: ops.Op) -> Value:
    """As `absorb`, and a shift passes a maximum: max(x) + t = max(x + t)."""
    op = value.op
    if not isinstance(op, ops.MaxPool) or by.scale is not None:
        return absorb(rw, value, by, reader)
    rw.match(rw.only_user(value, reader))
    return rw.emit_like(op, input=_through_pool(rw, op.input, by, op))


def _vector(rw: Rewriter, one: Value, like: Value) -> tuple[int | None, Value]:
    """The axis along which a parameter lies, and its entries; declines if it is no vector."""
    sizes = (1,) * (like.ndim - one.ndim) + one.shape
    axes = [axis for axis, size in enumerate(sizes) if size != 1]
    rw.match(len(axes) <= 1)
    if not axes:
        return None, one.reshape()
    found = channel_vector(one, like, axes[0])
    rw.match(found is not None)
    assert found is not None
    return axes[0], widen(found)


def _takes_factor(rw: Rewriter, value: Value, axis: int) -> bool:
    """Whether all that reads a value are maps that take in a factor per channel of it."""

    def takes(user: Any) -> bool:
        op = rw.view(user)
        if isinstance(op, ops.Conv):
            return op.input == value and op.weight.is_constant and op.channel_axis == axis
        if isinstance(op, ops.Linear):
            return op.input == value and op.weight.is_constant and axis == value.ndim - 1
        if isinstance(op, ops.Reshape):
            return axis == 1 and op.out.ndim == 2 and _all_linear(rw, op.out)
        return False

    return bool(value.users) and all(map(takes, value.users))


def _all_linear(rw: Rewriter, value: Value) -> bool:
    return bool(value.users) and all(isinstance(rw.view(one), ops.Linear) for one in value.users)
