"""Moving a scale and a shift into what computes a value: `scale * f(x) + shift = f'(x)`.

An identity over the reals for every op with an entry; anything else declines with a reason. See
`graphopt.ir.affine`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import (
    Affine,
    channel_vector,
    combined,
    fixed,
    kept_axis,
    same,
    same_shape,
    through_homogeneous,
    through_pad,
    through_pool,
    total,
)
from graphopt.ir.ops import times, widen
from graphopt.ir.rewrite import Declined, Rewriter, describe
from graphopt.ir.value import Value


def absorb(rw: Rewriter, value: Value, by: Affine, reader: ops.Op) -> Value:
    """`by` applied to `value`, moved into what computes it. `reader` must be its only user."""
    if value.is_constant:
        return _on_constant(value, by)
    op = value.op
    if not isinstance(op, _registered()):
        rw.decline(
            f"its input is computed by {describe(value)}, which a scale and shift cannot enter"
        )
    rw.require(
        rw.only_user(value, reader), f"the output of {describe(value)} is used elsewhere too"
    )
    return _absorb(op, rw, by)


def _registered() -> tuple[type, ...]:
    return tuple(cls for cls in _absorb.registry if cls is not object)


def _on_constant(value: Value, by: Affine) -> Value:
    """A parameter-only value scaled and shifted: it broadcasts against the channel axis."""
    result = value
    if by.scale is not None:
        result = times(result, by.broadcast(by.scale, value.ndim))
    if by.shift is not None:
        result = widen(result) + by.broadcast(by.shift, value.ndim)
    return result.to(value.dtype)


@singledispatch
def _absorb(op: Any, rw: Rewriter, by: Affine) -> Value:
    raise NotImplementedError


# -- maps with a weight ---------------------------------------------------------------------------


@_absorb.register
def _(conv: ops.Conv, rw: Rewriter, by: Affine) -> Value:
    rw.require(
        by.lies_on(conv.channel_axis),
        f"the channels of {describe(conv.out)} lie on axis {conv.channel_axis}, not {by.axis}",
    )
    weight = conv.weight if by.scale is None else conv.scale_out(by.scale)
    return rw.conv_like(
        conv, weight=weight, bias=by.after(conv.bias, conv.weight, conv.out_channels)
    )


@_absorb.register
def _(linear: ops.Linear, rw: Rewriter, by: Affine) -> Value:
    last, weight = linear.out.ndim - 1, linear.weight
    rw.require(
        by.lies_on(last),
        f"the features of {describe(linear.out)} lie on axis {last}, the norm's channels on axis "
        f"{by.axis}",
    )
    bias = by.after(linear.bias, weight, weight.shape[0])
    if by.scale is not None:
        rows = by.scale.reshape(-1, 1) if isinstance(by.scale, Value) else by.scale
        weight = times(weight, rows)
    return rw.emit_like(linear, weight=weight, bias=bias)


@_absorb.register
def _(product: ops.Matmul, rw: Rewriter, by: Affine) -> Value:
    if by.axis is None and by.shift is None and not product.right.is_constant:
        return _either(product, rw, by, "left", "right")
    last = product.out.ndim - 1
    rw.require(by.lies_on(last), f"the channels are not the last axis of {describe(product.out)}")
    rw.require(product.right.is_constant, f"no operand of {describe(product.out)} is a parameter")
    right = product.right if by.scale is None else times(product.right, by.scale)
    if by.shift is None:
        return rw.emit_like(product, right=right)
    rw.require(right.ndim == 2, f"{describe(product.out)} is batched and takes no bias")
    bias = by.after(None, right, right.shape[1])
    return rw.emit(ops.Linear(product.left, right.permute(1, 0), bias), like=product)


def _either(op: Any, rw: Rewriter, by: Affine, *operands: str) -> Value:
    """A number into the first of several factors that takes it."""
    rw.require(
        getattr(op, operands[0]) != getattr(op, operands[-1]),
        f"{describe(op.out)} reads the same value twice",
    )
    refusal, start = None, len(rw.made)
    for name in operands:
        try:
            return rw.emit_like(op, **{name: absorb(rw, getattr(op, name), by, op)})
        except Declined as declined:
            refusal = refusal or declined
            rw.rollback(start)
    assert refusal is not None
    raise refusal


@_absorb.register
def _(product: ops.Addmm, rw: Rewriter, by: Affine) -> Value:
    last = product.out.ndim - 1
    rw.require(by.lies_on(last), f"the channels are not the last axis of {describe(product.out)}")
    rw.require(
        product.right.is_constant and product.input.is_constant,
        f"an operand of {describe(product.out)} is not a parameter",
    )
    rw.require(product.beta == 1, f"{describe(product.out)} scales its bias")
    right = product.right if by.scale is None else times(product.right, by.scale)
    return rw.emit_like(product, input=_on_constant(product.input, by.at(product.input.ndim - 1)),
                        right=right)  # fmt: skip


@_absorb.register
def _(norm: ops.BatchNorm, rw: Rewriter, by: Affine) -> Value:
    rw.require(by.lies_on(1), f"the channels of {describe(norm.out)} lie on another axis")
    rw.require(
        not norm.uses_batch_statistics, f"{describe(norm.out)} normalizes with batch statistics"
    )
    scale, shift = norm.scale_and_shift()
    by = Affine(1, combined(scale, by.scale), by.after(shift, shift, norm.out.shape[1]))
    return absorb(rw, norm.input, by, norm)


@_absorb.register
def _(attention: ops.Attention, rw: Rewriter, by: Affine) -> Value:
    """Rows of a softmax add up to one: what is done to the values is done to their averages."""
    rw.require(
        by.lies_on(attention.out.ndim - 1),
        f"the channels are not those of {describe(attention.out)}",
    )
    rw.require(
        by.shift is None or attention.averages,
        f"{describe(attention.out)} masks or drops, so that its weights need not add up to one",
    )
    return rw.emit_like(attention, value=absorb(rw, attention.value, by, attention))


# -- arithmetic ---------------------------------------------------------------------------------


@_absorb.register(ops.Add)
@_absorb.register(ops.Sub)
def _(op: ops.Add | ops.Sub, rw: Rewriter, by: Affine) -> Value:
    # scale * (a - b) + shift = (scale * a + shift) - (scale * b)
    terms = [_aligned(rw, term, op, by) for term in (op.left, op.right)]
    # The shift enters once, with the term that varies with the input if there is one.
    lead = 1 if isinstance(op, ops.Add) and fixed(terms[0]) else 0
    parts = [Affine(by.axis, by.scale, by.shift if i == lead else None) for i in (0, 1)]
    left, right = (
        term if one.scale is None and one.shift is None else _term(rw, term, one, op)
        for term, one in zip(terms, parts, strict=True)
    )
    return rw.emit_like(op, left=left, right=right)


def _term(rw: Rewriter, term: Any, by: Affine, op: ops.Op) -> Any:
    if isinstance(term, Value):
        return absorb(rw, term, by, op)
    return total(combined(by.scale, term), by.shift)


def _aligned(rw: Rewriter, term: Any, op: Any, by: Affine) -> Any:
    """An operand of a sum, with as many axes as the sum; it must span the channel axis or be 1."""
    if not isinstance(term, Value):
        rw.require(by.axis is None, f"a number is added in {describe(op.out)}")
        return term
    missing = op.out.ndim - term.ndim
    if term.is_constant:
        return term.reshape(*(1,) * missing, *term.shape) if missing else term
    rw.require(
        by.axis is None or (missing == 0 and same(term.shape[by.axis], op.out.shape[by.axis])),
        f"an operand of {describe(op.out)} is broadcast over the channels",
    )
    return term


@_absorb.register
def _(mul: ops.Mul, rw: Rewriter, by: Affine) -> Value:
    constant: Any
    other: Any
    constant, other = (mul.left, mul.right) if fixed(mul.left) else (mul.right, mul.left)
    if not isinstance(other, Value) or not fixed(constant):
        rw.require(
            by.axis is None and by.shift is None, f"{describe(mul.out)} multiplies activations"
        )
        return _either(mul, rw, by, "left", "right")
    if not isinstance(constant, Value):
        scale = constant if by.scale is None else combined(by.scale, constant)
    elif by.axis is None and by.shift is None:
        return rw.emit_like(mul, left=other, right=_on_constant(constant, by))
    else:
        rw.require(by.axis is not None, f"a number is added to {describe(mul.out)}")
        assert by.axis is not None
        factor = channel_vector(constant, mul.out, by.axis)
        if factor is None:
            rw.decline(f"the factor of {describe(mul.out)} is not per channel")
        scale = combined(by.scale, factor)
    rw.require(same_shape(other.shape, mul.out.shape), f"{describe(mul.out)} broadcasts its input")
    return absorb(rw, other, Affine(by.axis, scale, by.shift), mul)


@_absorb.register(ops.Relu)
@_absorb.register(ops.LeakyRelu)
@_absorb.register(ops.PRelu)
@_absorb.register(ops.Abs)
@_absorb.register(ops.MaxPool)
def _(op: Any, rw: Rewriter, by: Affine) -> Value:
    through_homogeneous(op, rw, by)
    return rw.emit_like(op, input=absorb(rw, op.input, by, op))


# -- data movement and averages -----------------------------------------------------------------


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
    axis = None if by.axis is None else permute.dims[by.axis]
    return rw.emit_like(permute, input=absorb(rw, permute.input, by.at(axis), permute))


@_absorb.register
def _(reshape: ops.Reshape, rw: Rewriter, by: Affine) -> Value:
    axis = None
    if by.axis is not None:
        axis = kept_axis(reshape.out.shape, reshape.input.shape, by.axis)
        rw.require(axis is not None, f"{describe(reshape.out)} splits or merges the channel axis")
    return rw.emit_like(reshape, input=absorb(rw, reshape.input, by.at(axis), reshape))


@_absorb.register(ops.AvgPool)
@_absorb.register(ops.AdaptiveAvgPool)
@_absorb.register(ops.Upsample)
def _(pool: Any, rw: Rewriter, by: Affine) -> Value:
    through_pool(pool, rw, by)
    return rw.emit_like(pool, input=absorb(rw, pool.input, by, pool))


@_absorb.register
def _(mean: ops.Mean, rw: Rewriter, by: Affine) -> Value:
    axis = by.axis
    if axis is not None and not mean.keepdim:
        axis = [one for one in range(mean.input.ndim) if one not in mean.dims][axis]
    rw.require(axis not in mean.dims, f"{describe(mean.out)} averages over the channels")
    return rw.emit_like(mean, input=absorb(rw, mean.input, by.at(axis), mean))


@_absorb.register
def _(pad: ops.Pad, rw: Rewriter, by: Affine) -> Value:
    through_pad(pad, rw, by)
    return rw.emit_like(pad, input=absorb(rw, pad.input, by, pad))


@_absorb.register
def _(shuffle: ops.PixelShuffle, rw: Rewriter, by: Affine) -> Value:
    rw.require(by.lies_on(shuffle.out.ndim - 3), f"{describe(shuffle.out)} mixes the channel axis")
    inner = absorb(rw, shuffle.input, by.spread(shuffle.upscale_factor**2), shuffle)
    return rw.emit_like(shuffle, input=inner)


@_absorb.register
def _(piece: ops.Slice, rw: Rewriter, by: Affine) -> Value:
    """A part of the channels: the others are scaled by one, and those who read them read them from
    what takes the place of the whole."""
    if piece.dim != by.axis:
        return rw.emit_like(piece, input=absorb(rw, piece.input, by, piece))
    whole, channels = piece.input, piece.input.shape[piece.dim]
    rw.require(isinstance(channels, int), f"{describe(piece.out)} cuts a dynamic size")
    rw.require(piece.step == 1, f"{describe(piece.out)} leaves channels out")
    first, last = _range(piece)
    others = []
    for user in whole.users:
        other = rw.view(user)
        if other is not None and other.out == piece.out:
            continue
        rw.require(
            isinstance(other, ops.Slice) and other.dim == piece.dim and _apart(other, piece),
            f"{describe(whole)} is read by {describe(rw.value(user))} too",
        )
        assert isinstance(other, ops.Slice)
        others.append(other)
    rest = (first, channels - last)
    by = by.vectors(last - first)
    by = Affine(by.axis, _among(by.scale, 1.0, *rest), _among(by.shift, 0.0, *rest))
    op = whole.op
    if not isinstance(op, _registered()):
        rw.decline(
            f"its input is computed by {describe(whole)}, which a scale and shift cannot enter"
        )
    changed = _absorb(op, rw, by)
    for other in others:
        rw.replace(other.out, rw.emit_like(other, input=changed))
    return rw.emit_like(piece, input=changed)


def _range(piece: ops.Slice) -> tuple[Any, Any]:
    """The first entry of a slice and the one after the last."""
    size = piece.input.shape[piece.dim]
    first, last = piece.start or 0, size if piece.end is None else piece.end
    first, last = (one + size if one < 0 else one for one in (first, last))
    return first, size if last > size else last


def _apart(left: ops.Slice, right: ops.Slice) -> bool:
    """Whether two slices have no entry in common."""
    (a, b), (c, d) = _range(left), _range(right)
    return left.step == right.step == 1 and (b <= c or d <= a)


def _among(one: Any, rest: float, before: int, behind: int) -> Value | None:
    """A vector with `rest` for the channels before and behind."""
    if one is None:
        return None
    dtype, device, emit = one.dtype, one.meta.device, one.builder.emit
    ends = [emit(ops.Full((size,), rest, dtype, device)) for size in (before, behind)]
    return Value(emit(ops.Cat((ends[0], one, ends[1]), 0)).node, one.builder)


@_absorb.register(ops.Copy)
@_absorb.register(ops.Dropout)
def _(op: Any, rw: Rewriter, by: Affine) -> Value:
    rw.require(not getattr(op, "train", False), f"{describe(op.out)} drops at random")
    return absorb(rw, op.input, by, op)
