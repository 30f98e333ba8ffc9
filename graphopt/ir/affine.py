"""Moving a per-channel affine map through the ops around it.

    absorb:  scale * f(x) + shift  =  f'(x)        into what computes a value (towards the inputs)
    extract: f(scale * x + shift)  =  scale' * f(x) + shift'   out of what a value passes through

Both are identities over the reals for every op listed; anything else declines with a reason.
A map is `Affine(axis, scale, shift)`: vectors of length C along `axis`, None for 1 and for 0.
Source of the conditions: reference/transformations.md sections 1.2 to 1.5.
"""

from __future__ import annotations

import dataclasses
from functools import singledispatch
from math import prod
from typing import Any

from graphopt.ir import ops
from graphopt.ir.ops import plus, times, widen
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.value import Value


@dataclasses.dataclass(frozen=True)
class Affine:
    """`x -> scale * x + shift` along `axis`."""

    axis: int
    scale: Value | None
    shift: Value | None

    def at(self, axis: int) -> Affine:
        return dataclasses.replace(self, axis=axis)

    def spread(self, repeats: int) -> Affine:
        """Every channel repeated `repeats` times in place (a flattened spatial axis)."""
        if repeats == 1:
            return self

        def repeat(vector: Value | None) -> Value | None:
            if vector is None:
                return None
            return vector.builder.emit(ops.RepeatInterleave(vector, repeats, 0))

        return Affine(self.axis, repeat(self.scale), repeat(self.shift))

    def part(self, start: int, length: int) -> Affine:
        """The channels `start ... start + length`."""

        def narrow(vector: Value | None) -> Value | None:
            return None if vector is None else vector.narrow(0, start, length)

        return Affine(self.axis, narrow(self.scale), narrow(self.shift))

    def after(self, bias: Value | None) -> Value | None:
        """`scale * bias + shift`, None for zero."""
        if bias is not None and self.scale is not None:
            bias = times(bias, self.scale)
        if bias is None:
            return self.shift
        return plus(bias, self.shift)

    def broadcast(self, vector: Value, ndim: int) -> Value:
        shape = [1] * ndim
        shape[self.axis] = -1
        return vector.reshape(*shape)


# -- absorb -------------------------------------------------------------------------------------


def absorb(rw: Rewriter, value: Value, by: Affine, reader: ops.Op) -> Value:
    """`by` applied to `value`, moved into what computes it. `reader` must be its only user."""
    if value.is_constant:
        return _on_constant(value, by)
    op = value.op
    if not isinstance(op, _registered(_absorb)):
        rw.decline(
            f"its input is computed by {describe(value)}, which a scale and shift cannot enter"
        )
    rw.require(
        rw.only_user(value, reader), f"the output of {describe(value)} is used elsewhere too"
    )
    return _absorb(op, rw, by)


def _registered(table: Any) -> tuple[type, ...]:
    """The op views that a `singledispatch` table has an entry for."""
    return tuple(cls for cls in table.registry if cls is not object)


def _on_constant(value: Value, by: Affine) -> Value:
    """A parameter-only value scaled and shifted: it broadcasts against the channel axis."""
    result = value
    if by.scale is not None:
        result = times(result, by.broadcast(by.scale, value.ndim))
    if by.shift is not None:
        result = plus(widen(result), by.broadcast(by.shift, value.ndim))  # type: ignore[assignment]
    return result.to(value.dtype)


@singledispatch
def _absorb(op: Any, rw: Rewriter, by: Affine) -> Value:
    raise NotImplementedError


@_absorb.register
def _(conv: ops.Conv, rw: Rewriter, by: Affine) -> Value:
    rw.require(
        by.axis == conv.channel_axis,
        f"the channels of {describe(conv.out)} lie on axis {conv.channel_axis}, not {by.axis}",
    )
    weight = conv.weight if by.scale is None else conv.scale_out(by.scale)
    bias = by.after(conv.bias)
    return rw.conv_like(conv, weight=weight, bias=_as(bias, conv.weight))


@_absorb.register
def _(linear: ops.Linear, rw: Rewriter, by: Affine) -> Value:
    last = linear.out.ndim - 1
    rw.require(
        by.axis == last,
        f"the features of {describe(linear.out)} lie on axis {last}, the norm's channels on axis "
        f"{by.axis}",
    )
    weight = linear.weight if by.scale is None else times(linear.weight, by.scale.reshape(-1, 1))
    return rw.emit_like(linear, weight=weight, bias=_as(by.after(linear.bias), linear.weight))


@_absorb.register
def _(product: ops.Matmul, rw: Rewriter, by: Affine) -> Value:
    last = product.out.ndim - 1
    rw.require(by.axis == last, f"the channels are not the last axis of {describe(product.out)}")
    rw.require(product.right.is_constant, f"no operand of {describe(product.out)} is a parameter")
    right = product.right if by.scale is None else times(product.right, by.scale)
    if by.shift is None:
        return rw.emit_like(product, right=right)
    rw.require(right.ndim == 2, f"{describe(product.out)} is batched and takes no bias")
    bias = by.shift.to(right.dtype)
    return rw.emit(ops.Linear(product.left, right.permute(1, 0), bias), like=product)


@_absorb.register
def _(product: ops.Addmm, rw: Rewriter, by: Affine) -> Value:
    last = product.out.ndim - 1
    rw.require(by.axis == last, f"the channels are not the last axis of {describe(product.out)}")
    rw.require(
        product.right.is_constant and product.input.is_constant,
        f"an operand of {describe(product.out)} is not a parameter",
    )
    rw.require(
        product.beta == 1 and product.alpha == 1, f"{describe(product.out)} scales its terms"
    )
    right = product.right if by.scale is None else times(product.right, by.scale)
    return rw.emit_like(product, input=_on_constant(product.input, by.at(product.input.ndim - 1)),
                        right=right)  # fmt: skip


@_absorb.register
def _(norm: ops.BatchNorm, rw: Rewriter, by: Affine) -> Value:
    rw.require(by.axis == 1, f"the channels of {describe(norm.out)} lie on another axis")
    rw.require(
        not norm.uses_batch_statistics, f"{describe(norm.out)} normalizes with batch statistics"
    )
    inner = Affine(1, *norm.scale_and_shift())
    scale = inner.scale if by.scale is None else times(inner.scale, by.scale)  # type: ignore[arg-type]
    return absorb(rw, norm.input, Affine(1, scale, by.after(inner.shift)), norm)


@_absorb.register
def _(add: ops.Add, rw: Rewriter, by: Affine) -> Value:
    return _sum(add, rw, by, by)


@_absorb.register
def _(sub: ops.Sub, rw: Rewriter, by: Affine) -> Value:
    # scale * (a - b) + shift = (scale * a + shift) - (scale * b)
    return _sum(sub, rw, by, by)


def _sum(op: ops.Add | ops.Sub, rw: Rewriter, by: Affine, first: Affine) -> Value:
    terms = [_aligned(rw, term, op, by) for term in (op.left, op.right)]
    # The shift enters once, with the term that varies with the input if there is one.
    lead = 1 if isinstance(op, ops.Add) and _fixed(terms[0]) else 0
    parts = [Affine(by.axis, by.scale, by.shift if i == lead else None) for i in (0, 1)]
    left, right = (
        term if one.scale is None and one.shift is None else absorb(rw, term, one, op)
        for term, one in zip(terms, parts, strict=True)
    )
    return rw.emit_like(op, left=left, right=right)


def _fixed(term: Any) -> bool:
    return not isinstance(term, Value) or term.is_constant


def _aligned(rw: Rewriter, term: Any, op: Any, by: Affine) -> Value:
    """An operand of a sum, with as many axes as the sum; it must span the channel axis or be 1."""
    if not isinstance(term, Value):
        rw.decline(f"a number is added in {describe(op.out)}")
    missing = op.out.ndim - term.ndim
    if term.is_constant:
        return term.reshape(*(1,) * missing, *term.shape) if missing else term
    rw.require(
        missing == 0 and _same(term.shape[by.axis], op.out.shape[by.axis]),
        f"an operand of {describe(op.out)} is broadcast over the channels",
    )
    return term


@_absorb.register
def _(mul: ops.Mul, rw: Rewriter, by: Affine) -> Value:
    constant, other = (mul.left, mul.right) if _fixed(mul.left) else (mul.right, mul.left)
    if not isinstance(other, Value) or not _fixed(constant):
        rw.decline(f"{describe(mul.out)} multiplies activations")
    if not isinstance(constant, Value):
        rw.require(by.scale is not None, f"{describe(mul.out)} scales by a number")
        scale = widen(by.scale) * constant  # type: ignore[arg-type]
    else:
        factor = channel_vector(constant, mul.out, by.axis)
        if factor is None:
            rw.decline(f"the factor of {describe(mul.out)} is not per channel")
        scale = factor if by.scale is None else times(by.scale, factor)
    rw.require(_same_shape(other.shape, mul.out.shape), f"{describe(mul.out)} broadcasts its input")
    return absorb(rw, other, Affine(by.axis, scale, by.shift), mul)


@_absorb.register
def _(cat: ops.Cat, rw: Rewriter, by: Affine) -> Value:
    pieces, start = [], 0
    for tensor in cat.tensors:
        share = by
        if cat.dim == by.axis:
            size = tensor.shape[cat.dim]
            rw.require(isinstance(size, int), f"a piece of {describe(cat.out)} has a dynamic size")
            share = by.part(start, size)
            start += size
        pieces.append(absorb(rw, tensor, share, cat))
    return rw.emit_like(cat, tensors=tuple(pieces))


@_absorb.register
def _(permute: ops.Permute, rw: Rewriter, by: Affine) -> Value:
    inner = absorb(rw, permute.input, by.at(permute.dims[by.axis]), permute)
    return rw.emit_like(permute, input=inner)


@_absorb.register
def _(reshape: ops.Reshape, rw: Rewriter, by: Affine) -> Value:
    axis = kept_axis(reshape.out.shape, reshape.input.shape, by.axis)
    rw.require(axis is not None, f"{describe(reshape.out)} splits or merges the channel axis")
    return rw.emit_like(reshape, input=absorb(rw, reshape.input, by.at(axis), reshape))  # type: ignore[arg-type]


@_absorb.register(ops.AvgPool)
@_absorb.register(ops.AdaptiveAvgPool)
@_absorb.register(ops.Upsample)
def _(pool: Any, rw: Rewriter, by: Affine) -> Value:
    _through_pool(pool, rw, by)
    return rw.emit_like(pool, input=absorb(rw, pool.input, by, pool))


@_absorb.register
def _(mean: ops.Mean, rw: Rewriter, by: Affine) -> Value:
    kept = [axis for axis in range(mean.input.ndim) if axis not in mean.dims]
    axis = by.axis if mean.keepdim else kept[by.axis]
    rw.require(axis not in mean.dims, f"{describe(mean.out)} averages over the channels")
    return rw.emit_like(mean, input=absorb(rw, mean.input, by.at(axis), mean))


@_absorb.register
def _(pad: ops.Pad, rw: Rewriter, by: Affine) -> Value:
    _through_pad(pad, rw, by)
    return rw.emit_like(pad, input=absorb(rw, pad.input, by, pad))


@_absorb.register
def _(shuffle: ops.PixelShuffle, rw: Rewriter, by: Affine) -> Value:
    rw.require(by.axis == shuffle.out.ndim - 3, f"{describe(shuffle.out)} mixes the channel axis")
    inner = absorb(rw, shuffle.input, by.spread(shuffle.upscale_factor**2), shuffle)
    return rw.emit_like(shuffle, input=inner)


@_absorb.register(ops.Copy)
@_absorb.register(ops.Dropout)
def _(op: Any, rw: Rewriter, by: Affine) -> Value:
    rw.require(not getattr(op, "train", False), f"{describe(op.out)} drops at random")
    return absorb(rw, op.input, by, op)


# -- extract ------------------------------------------------------------------------------------


def extract(rw: Rewriter, value: Value) -> tuple[Value, Affine, ops.BatchNorm]:
    """`value` as `scale * y + shift` of some other value y, from the batch norm it comes from."""
    op = value.op
    rw.match(isinstance(op, _registered(_extract)))
    return _extract(op, rw)  # type: ignore[no-any-return]


@singledispatch
def _extract(op: Any, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    raise NotImplementedError


@_extract.register
def _(norm: ops.BatchNorm, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    rw.about(norm)
    rw.require(not norm.uses_batch_statistics, "it normalizes with batch statistics")
    others = [user for user in norm.out.users if not _takes_input_side(rw, user)]
    rw.require(
        not others,
        "its output is also read by "
        + (describe(rw.value(others[0])) if others else "")
        + ", which cannot take it in",
    )
    return norm.input, Affine(1, *norm.scale_and_shift()), norm


def _takes_input_side(rw: Rewriter, user: Any) -> bool:
    """Whether a reader of a norm could take the norm in: an affine op, or a way to one."""
    op = rw.view(user)
    if isinstance(op, (ops.Conv, ops.Linear)):
        return True
    return isinstance(op, _registered(_extract)) and all(
        _takes_input_side(rw, u) for u in user.users
    )


def _passed(rw: Rewriter, op: Any, inner: Value, by: Affine) -> Value:
    return rw.emit_like(op, input=inner)


@_extract.register
def _(permute: ops.Permute, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    inner, by, norm = extract(rw, permute.input)
    return _passed(rw, permute, inner, by), by.at(permute.dims.index(by.axis)), norm


@_extract.register
def _(reshape: ops.Reshape, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    inner, by, norm = extract(rw, reshape.input)
    before, after = reshape.input.shape, reshape.out.shape
    axis = kept_axis(before, after, by.axis)
    if axis is None:
        # Channels followed by fixed axes, merged into one: flatten(C, H, W).
        axis = merged_axis(before, after, by.axis)
        rw.require(axis is not None, f"{describe(reshape.out)} splits or mixes the channel axis")
        sizes = [before[by.axis]]
        repeats = 1
        for size in before[by.axis + 1 :]:
            if prod(sizes) == after[axis]:  # type: ignore[index]
                break
            sizes.append(size)
            repeats *= size
        by = by.spread(repeats)
    return _passed(rw, reshape, inner, by), by.at(axis), norm  # type: ignore[arg-type]


@_extract.register(ops.AvgPool)
@_extract.register(ops.AdaptiveAvgPool)
@_extract.register(ops.Upsample)
def _(pool: Any, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    inner, by, norm = extract(rw, pool.input)
    _through_pool(pool, rw, by)
    return _passed(rw, pool, inner, by), by, norm


@_extract.register
def _(mean: ops.Mean, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    inner, by, norm = extract(rw, mean.input)
    rw.require(by.axis not in mean.dims, f"{describe(mean.out)} averages over the channels")
    axis = by.axis if mean.keepdim else by.axis - sum(dim < by.axis for dim in mean.dims)
    return _passed(rw, mean, inner, by), by.at(axis), norm


@_extract.register
def _(pad: ops.Pad, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    inner, by, norm = extract(rw, pad.input)
    _through_pad(pad, rw, by)
    return _passed(rw, pad, inner, by), by, norm


@_extract.register(ops.Copy)
@_extract.register(ops.Dropout)
def _(op: Any, rw: Rewriter) -> tuple[Value, Affine, ops.BatchNorm]:
    rw.match(not getattr(op, "train", False))
    return extract(rw, op.input)


# -- conditions both directions share -----------------------------------------------------------


def _through_pool(pool: Any, rw: Rewriter, by: Affine) -> None:
    """Constants pass a pool if its weights add up to one; padded zeros break that."""
    rw.require(
        by.axis < pool.input.ndim - pool.rank, f"{describe(pool.out)} averages over the channels"
    )
    if isinstance(pool, ops.AvgPool):
        rw.require(
            pool.averages or by.shift is None,
            f"{describe(pool.out)} counts padded zeros (or changes the divisor), so a shift does "
            "not pass it",
        )


def _through_pad(pad: ops.Pad, rw: Rewriter, by: Affine) -> None:
    rw.require(by.axis not in pad.axes, f"{describe(pad.out)} pads the channel axis")
    rw.require(
        pad.mode != "constant" or (by.shift is None and (pad.value is None or pad.value == 0)),
        f"{describe(pad.out)} pads with a constant that would have to differ per channel",
    )


def channel_vector(value: Value, like: Value, axis: int) -> Value | None:
    """A parameter `[1, C, 1, 1]` that broadcasts against `like` as its vector `[C]`, else None."""
    shape = (1,) * (like.ndim - value.ndim) + value.shape
    if len(shape) != like.ndim or any(s != 1 for i, s in enumerate(shape) if i != axis):
        return None
    return value.reshape(shape[axis]) if isinstance(shape[axis], int) else None


def kept_axis(before: Any, after: Any, axis: int) -> int | None:
    """Where a reshape puts an axis that it neither splits nor merges: the axis of `after` with the
    same size and the same number of elements behind it."""
    behind = prod(before[axis + 1 :])
    for candidate in range(len(after)):
        if _same(after[candidate], before[axis]) and _same(prod(after[candidate + 1 :]), behind):
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
            if _same(after[candidate], prod(merged)) and _same(
                prod(after[candidate + 1 :]), behind
            ):
                return candidate
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal sizes for every dynamic size, decided without adding guards."""
    left = getattr(getattr(a, "node", None), "expr", a)
    right = getattr(getattr(b, "node", None), "expr", b)
    return bool(left == right)


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _as(value: Value | None, like: Value) -> Value | None:
    return None if value is None else value.to(like.dtype)
