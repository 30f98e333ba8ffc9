"""Moving a scale and a shift out of a value and into what reads it:
`f(scale * x + shift) = scale' * f(x) + shift'`, and `W (scale * x + shift) + b`.

An identity over the reals for every op with an entry; anything else is no place for it. See
`graphopt.ir.affine`. Behind zero padding `W shift` is only added where real pixels are read: the
border sees less of it, so that it becomes a map over the output positions (`graphopt.ir.borders`).
"""

from __future__ import annotations

from functools import singledispatch
from math import prod
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import (
    Affine,
    kept_axis,
    merged_axis,
    through_homogeneous,
    through_pad,
    through_pool,
    vector,
    written,
)
from graphopt.ir.borders import bias_map
from graphopt.ir.ops import plus, times, widen
from graphopt.ir.ops.base import numel
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.value import Value

Found = tuple[Value, Affine, ops.Op]
NORMS = (ops.LayerNorm, ops.RMSNorm, ops.GroupNorm)


def extract(rw: Rewriter, value: Value, sources: tuple[type, ...]) -> Found:
    """`value` as `scale * y + shift` of some other value y, from the op of `sources` it comes from."""
    op = value.op
    if not isinstance(op, sources):
        rw.match(isinstance(op, _PASSING))
        return _extract(op, rw, sources)
    assert isinstance(op, ops.Op)
    rw.about(op)
    if isinstance(op, ops.BatchNorm):
        rw.require(not op.uses_batch_statistics, "it normalizes with batch statistics")
        inner, by = op.input, Affine(1, *op.scale_and_shift())
    elif isinstance(op, NORMS):
        inner, by = _plain(rw, op)
    else:
        inner, by = written(rw, op)  # type: ignore[arg-type]
    ways = _PASSING if by.shift is None else _AFFINE
    # A norm shifts at no cost: a map over the positions of a padded convolution would cost more.
    padded = by.shift is None or not isinstance(op, NORMS)
    others = [user for user in op.out.users if not _takes_input_side(rw, user, ways, padded)]
    reader = describe(rw.value(others[0])) if others else "an op"
    rw.require(not others, f"its output is also read by {reader}, which cannot take it in")
    return inner, by, op


def _plain(rw: Rewriter, norm: Any) -> tuple[Value, Affine]:
    """A norm without its gain and shift, and these two."""
    scale, shift = norm.weight, getattr(norm, "bias", None)
    rw.match(scale is not None or shift is not None)
    if isinstance(norm, (ops.LayerNorm, ops.RMSNorm)):
        rw.require(len(norm.normalized_shape) == 1, "it normalizes over several axes")
        axis = norm.input.ndim - 1
    else:
        axis = 1
    names = [name for name in ("weight", "bias") if hasattr(norm, name)]
    plain = rw.emit_once(norm.replace(**dict.fromkeys(names)), like=norm)
    return plain, Affine(axis, scale, shift)


def _takes_input_side(rw: Rewriter, user: Any, ways: tuple[type, ...], padded: bool) -> bool:
    """Whether a reader could take in a scale and shift: an affine op, or a way to one; `padded`
    if a convolution that pads with zeros may."""
    op = rw.view(user)
    if isinstance(op, (ops.Conv, ops.Linear)):
        return padded or isinstance(op, ops.Linear) or not op.pads
    return isinstance(op, ways) and all(
        _takes_input_side(rw, one, ways, padded) for one in user.users
    )


# -- into what reads it -------------------------------------------------------------------------


def into_linear(rw: Rewriter, linear: ops.Linear, sources: tuple[type, ...]) -> Value:
    """A linear map that has taken in the scale and shift of its input."""
    value, by, source = extract(rw, linear.input, sources)
    rw.require(
        by.lies_on(linear.input.ndim - 1),
        f"its channels are not the features that {describe(linear.out)} reads",
    )
    weight, bias = linear.weight, linear.bias
    if by.shift is not None:
        shift = vector(by.shift, weight, weight.shape[1])
        response = (widen(weight, shift) * widen(shift, weight)).sum((1,))
        bias = response.to(weight.dtype) if bias is None else plus(bias, response)
    if by.scale is not None:
        weight = times(weight, by.scale)
    folded = rw.emit_like(linear, input=value, weight=weight, bias=bias)
    if isinstance(source, NORMS):  # where they are, gain and shift cost little
        rw.stored_once([linear])
    return folded


def into_conv(rw: Rewriter, conv: ops.Conv, sources: tuple[type, ...]) -> Value:
    """A convolution that has taken in the scale and shift of its input."""
    value, by, source = extract(rw, conv.input, sources)
    rw.require(
        by.lies_on(conv.channel_axis),
        f"its channels are not those that {describe(conv.out)} reads",
    )
    weight = conv.weight if by.scale is None else conv.scale_in(by.scale)
    if by.shift is None:
        return rw.conv_like(conv, input=value, weight=weight)
    shift = vector(by.shift, conv.weight, conv.in_channels)
    if not conv.pads and not conv.transposed:
        kernel = conv.response_kernel(shift)
        response = kernel.sum(tuple(range(1, kernel.ndim)))
        bias = response.to(conv.weight.dtype) if conv.bias is None else plus(conv.bias, response)
        folded = rw.conv_like(conv, input=value, weight=weight, bias=bias)
        if isinstance(source, NORMS):
            rw.stored_once([conv])
        return folded
    before, after = numel(source.out), numel(conv.out)
    rw.require(
        after <= before,
        f"{describe(conv.out)} pads with zeros: the exact correction is a map over its "
        f"{after} outputs, which costs more than {describe(source.out)} over {before} values",
    )
    folded = rw.conv_like(conv, input=value, weight=weight)
    return folded + bias_map(conv, shift, rw)


# -- through what stands between ------------------------------------------------------------------


@singledispatch
def _extract(op: Any, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    raise NotImplementedError


@_extract.register
def _(permute: ops.Permute, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, permute.input, sources)
    axis = None if by.axis is None else permute.dims.index(by.axis)
    return rw.emit_like(permute, input=inner), by.at(axis), source


@_extract.register
def _(reshape: ops.Reshape, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, reshape.input, sources)
    before, after = reshape.input.shape, reshape.out.shape
    axis = None if by.axis is None else kept_axis(before, after, by.axis)
    if by.axis is not None and axis is None:
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
    return rw.emit_like(reshape, input=inner), by.at(axis), source


@_extract.register(ops.AvgPool)
@_extract.register(ops.AdaptiveAvgPool)
@_extract.register(ops.Upsample)
def _(pool: Any, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, pool.input, sources)
    through_pool(pool, rw, by)
    return rw.emit_like(pool, input=inner), by, source


@_extract.register
def _(mean: ops.Mean, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, mean.input, sources)
    axis = by.axis
    rw.require(axis not in mean.dims, f"{describe(mean.out)} averages over the channels")
    if axis is not None and not mean.keepdim:
        axis -= sum(dim < axis for dim in mean.dims)
    return rw.emit_like(mean, input=inner), by.at(axis), source


@_extract.register(ops.Select)
@_extract.register(ops.Slice)
def _(piece: Any, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, piece.input, sources)
    axis, dim = by.axis, piece.dim % piece.input.ndim
    rw.require(axis != dim, f"{describe(piece.out)} leaves channels out")
    if axis is not None and isinstance(piece, ops.Select):
        axis -= dim < axis
    return rw.emit_like(piece, input=inner), by.at(axis), source


@_extract.register
def _(pad: ops.Pad, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    inner, by, source = extract(rw, pad.input, sources)
    through_pad(pad, rw, by)
    return rw.emit_like(pad, input=inner), by, source


@_extract.register(ops.Relu)
@_extract.register(ops.LeakyRelu)
@_extract.register(ops.PRelu)
@_extract.register(ops.MaxPool)
def _(op: Any, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    rw.match(ops.BatchNorm not in sources)  # it shifts
    inner, by, source = extract(rw, op.input, sources)
    rw.match(by.shift is None)
    through_homogeneous(op, rw, by)
    return rw.emit_like(op, input=inner), by, source


@_extract.register(ops.Copy)
@_extract.register(ops.Dropout)
def _(op: Any, rw: Rewriter, sources: tuple[type, ...]) -> Found:
    rw.match(not getattr(op, "train", False))
    return extract(rw, op.input, sources)


_PASSING = tuple(cls for cls in _extract.registry if cls is not object)
_AFFINE = tuple(
    cls for cls in _PASSING if cls not in (ops.Relu, ops.LeakyRelu, ops.PRelu, ops.MaxPool)
)
