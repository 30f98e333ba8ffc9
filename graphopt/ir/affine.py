"""Scales and shifts, per channel or the same for all, and how axes of channels move.

`graphopt.ir.absorb` moves them towards the inputs, into what computes a value; `graphopt.ir.extract`
moves them out of a value, into what reads it. That scales which are not negative pass
ReLU and its like is used by Nagel et al. (arXiv 1906.04721).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

from graphopt.ir import ops
from graphopt.ir.ops import plus, times, widen
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.sizes import same as same, same_shape as same_shape
from graphopt.ir.value import Value


@dataclasses.dataclass(frozen=True)
class Affine:
    """`x -> scale * x + shift`: vectors of length C along `axis`, or numbers; None for 1 and for 0.

    A number may be a parameter, then without axes. `axis` is None if no vector says which it is:
    numbers scale and shift all axes alike.
    """

    axis: int | None
    scale: Value | float | None
    shift: Value | float | None

    def lies_on(self, axis: int) -> bool:
        return self.axis is None or self.axis == axis

    def at(self, axis: int | None) -> Affine:
        return self if self.axis is None else dataclasses.replace(self, axis=axis)

    def spread(self, repeats: int) -> Affine:
        """Every channel repeated `repeats` times in place (a flattened spatial axis)."""
        if repeats == 1:
            return self
        return self._map(lambda one: one.builder.emit(ops.RepeatInterleave(one, repeats, 0)))

    def part(self, start: int, length: int) -> Affine:
        """The channels `start ... start + length`."""
        return self._map(lambda one: one.narrow(0, start, length))

    def _map(self, change: Callable[[Value], Value]) -> Affine:
        scale, shift = (
            one if one is None or is_number(one) else change(one)  # type: ignore[arg-type]
            for one in (self.scale, self.shift)
        )
        return Affine(self.axis, scale, shift)

    def vectors(self, channels: Any) -> Affine:
        """The same with vectors for numbers, where one of the two is a vector."""
        like = self.scale if isinstance(self.scale, Value) else self.shift
        assert isinstance(like, Value)
        scale, shift = (
            None if one is None else vector(one, like, channels) for one in (self.scale, self.shift)
        )
        return Affine(self.axis, scale, shift)

    def after(self, bias: Value | None, like: Value, channels: Any) -> Value | None:
        """`scale * bias + shift` as a vector, None for zero; `like` is a weight of the same map."""
        if bias is not None and self.scale is not None:
            bias = times(bias, self.scale)
        if self.shift is not None:
            bias = plus(bias, vector(self.shift, like, channels))
        return None if bias is None else bias.to(like.dtype)

    def broadcast(self, one: Value | float, ndim: int) -> Value | float:
        """A scale or shift in the shape in which it applies to a value with `ndim` axes."""
        if is_number(one):
            return one
        shape = [1] * ndim
        assert self.axis is not None and isinstance(one, Value)
        shape[self.axis] = -1
        return one.reshape(*shape)


def is_number(one: Value | float) -> bool:
    """Whether a scale or shift is the same for all channels."""
    return not isinstance(one, Value) or one.ndim == 0


def vector(one: Value | float, like: Value, channels: Any) -> Value:
    """A scale or shift with an entry for each channel, in at least float32."""
    if isinstance(one, Value) and not is_number(one):
        return one
    dtype, device = widen(like).dtype, like.meta.device
    number = 1.0 if isinstance(one, Value) else one
    entries = like.builder.emit(ops.Full((channels,), number, dtype, device))
    return entries * one if isinstance(one, Value) else entries


def combined(left: Value | float | None, right: Value | float | None) -> Value | float | None:
    """The product of two scales, in at least float32."""
    if left is None or right is None:
        return left if right is None else right
    if isinstance(left, Value):
        return times(left, right)
    return times(right, left) if isinstance(right, Value) else left * right


def total(left: Value | float | None, right: Value | float | None) -> Value | float | None:
    """The sum of two scales or shifts, in at least float32; None stands for zero."""
    if left is None or right is None:
        return left if right is None else right
    if isinstance(left, Value) and isinstance(right, Value):
        return widen(left, right) + widen(right, left)
    return right + left if isinstance(right, Value) else left + right


def written(rw: Rewriter, op: ops.Mul | ops.Div | ops.Add | ops.Sub) -> tuple[Value, Affine]:
    """A value that is multiplied or shifted by a number or a per-channel parameter, and by what."""
    value, other = op.left, op.right
    if isinstance(op, (ops.Mul, ops.Add)) and fixed(value):
        value, other = other, value
    rw.match(isinstance(value, Value) and not value.is_constant)
    rw.match(fixed(other) and not isinstance(other, complex))
    assert isinstance(value, Value)
    rw.match(same_shape(value.shape, op.out.shape) and value.dtype == op.out.dtype)
    rw.match(value.dtype.is_floating_point)
    axis: int | None = None
    if isinstance(other, Value):
        sizes = (1,) * (value.ndim - other.ndim) + other.shape
        axes = [axis for axis, size in enumerate(sizes) if size != 1]
        rw.match(len(axes) <= 1)
        axis = axes[0] if axes else None
        found = other.reshape() if axis is None else channel_vector(other, value, axis)
        rw.match(found is not None)
        assert found is not None
        other = found
    assert not isinstance(other, complex)
    if isinstance(op, ops.Mul):
        return value, Affine(axis, other, None)
    if isinstance(op, ops.Div):
        rw.match(isinstance(other, Value) or other != 0)
        inverse = rw.emit(ops.Reciprocal(widen(other))) if isinstance(other, Value) else 1 / other
        return value, Affine(axis, inverse, None)
    return value, Affine(axis, None, other if isinstance(op, ops.Add) else -other)


def fixed(operand: Any) -> bool:
    """Whether an operand is a number or depends on parameters alone."""
    return not isinstance(operand, Value) or operand.is_constant


def keeps_sign(scale: Any) -> bool:
    """Whether a scale is known to be positive (or zero), whatever the parameters are."""
    if not isinstance(scale, Value):
        return scale is None or bool(scale > 0)
    op = scale.op
    if isinstance(op, (ops.Exp, ops.Sigmoid, ops.Sqrt, ops.Rsqrt, ops.Relu, ops.Softplus, ops.Abs)):
        return True
    if isinstance(op, (ops.Mul, ops.Div)):
        return keeps_sign(op.left) and keeps_sign(op.right)
    if isinstance(op, (ops.Reshape, ops.Cast, ops.Expand, ops.Reciprocal)):
        return keeps_sign(op.input)
    return False


# -- what lets a scale or a shift pass -----------------------------------------------------------


def through_pool(pool: Any, rw: Rewriter, by: Affine) -> None:
    """Constants pass a pool if its weights add up to one; padded zeros break that."""
    rw.require(
        by.axis is None or by.axis < pool.input.ndim - pool.rank,
        f"{describe(pool.out)} averages over the channels",
    )
    if isinstance(pool, ops.AvgPool):
        rw.require(
            pool.averages or by.shift is None,
            f"{describe(pool.out)} counts padded zeros (or changes the divisor), so a shift does "
            "not pass it",
        )


def through_pad(pad: ops.Pad, rw: Rewriter, by: Affine) -> None:
    rw.require(by.axis not in pad.axes, f"{describe(pad.out)} pads the channel axis")
    rw.require(
        pad.mode != "constant" or (by.shift is None and (pad.value is None or pad.value == 0)),
        f"{describe(pad.out)} pads with a constant that would have to differ per channel",
    )


def through_homogeneous(op: Any, rw: Rewriter, by: Affine) -> None:
    """f(c x) = c f(x) for c > 0."""
    rw.require(by.shift is None, f"a shift does not pass {describe(op.out)}")
    rw.require(
        keeps_sign(by.scale),
        f"what passes {describe(op.out)} must be positive, whatever the parameters become",
    )


def channel_vector(value: Value, like: Value, axis: int) -> Value | None:
    """A parameter `[1, C, 1, 1]` that broadcasts against `like` as its vector `[C]`, one with a
    single entry as a number; else None."""
    shape = (1,) * (like.ndim - value.ndim) + value.shape
    if len(shape) != like.ndim or any(s != 1 for i, s in enumerate(shape) if i != axis):
        return None
    if shape[axis] == 1:
        return value.reshape()
    return value.reshape(shape[axis]) if isinstance(shape[axis], int) else None


def kept_axis(before: Any, after: Any, axis: int) -> int | None:
    """Where a reshape puts an axis that it neither splits nor merges: the axis of `after` with the
    same size and the same number of elements behind it."""
    behind = prod(before[axis + 1 :])
    for candidate in range(len(after)):
        if same(after[candidate], before[axis]) and same(prod(after[candidate + 1 :]), behind):
            return candidate
    return None


def merged_axis(before: Any, after: Any, axis: int) -> int | None:
    """The axis of `after` that is `axis` merged with static axes right behind it, else None."""
    for last in range(axis + 1, len(before)):
        merged = before[axis : last + 1]
        if not all(isinstance(size, int) for size in merged):
            return None
        behind = prod(before[last + 1 :])
        for candidate in range(len(after)):
            if same(after[candidate], prod(merged)) and same(prod(after[candidate + 1 :]), behind):
                return candidate
    return None
