"""Fold eval-mode batch norms, and per-channel scales and shifts, into the affine maps around them.

    y = s * (W x + b) + t          =  (s W) x + (s b + t)              producer side
    y = W (s * x + t) + b          =  (W s) x + (b + W t)              consumer side

with s = weight / sqrt(var + eps), t = bias - mean * s. Both hold for convolutions of every rank,
grouped and transposed, and for linear maps whose features are the norm's channels; between the norm
and the map may stand sums, concatenations, reorderings, averages (see `graphopt.ir.affine`).

Behind zero padding the consumer side needs W t only where real pixels are read: the border sees
less of it, so it becomes a map over the output positions (`bias_map`), added if that costs less
than the norm did.

Source: Efficient ConvBN Blocks (arXiv 2305.11624); reference formulas in transformations.md 1.
Only expressions of the original parameters are emitted, so the result still trains (Tune mode);
`materialize` turns them into stored weights (Deploy mode).
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.affine import Affine, absorb, channel_vector, extract
from graphopt.ir.ops import plus, times, widen
from graphopt.ir.ops.base import numel
from graphopt.ir.rewrite import Rewriter, describe, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass


@rewrite(explain=True)
def fold_batch_norm(norm: ops.BatchNorm, rw: Rewriter) -> Value:
    """The scale and shift of a batch norm move into what computes its input."""
    rw.require(
        norm.running_mean is not None and norm.running_var is not None,
        "it keeps no running statistics, so it normalizes with batch statistics in eval mode too",
    )
    rw.require(
        not norm.training,
        "it normalizes with batch statistics (training mode); call model.eval() before optimizing",
    )
    scale, shift = norm.scale_and_shift()
    return absorb(rw, norm.input, Affine(1, scale, shift), norm)


@rewrite
def fold_batch_norm_into_linear(linear: ops.Linear, rw: Rewriter) -> Value:
    """The scale and shift of a batch norm move into the linear map that reads it."""
    value, by, _ = extract(rw, linear.input)
    rw.require(
        by.axis == linear.input.ndim - 1,
        f"its channels are not the features that {describe(linear.out)} reads",
    )
    assert by.scale is not None and by.shift is not None  # a norm has both
    weight, bias = linear.weight, linear.bias
    response = (widen(weight, by.shift) * widen(by.shift, weight)).sum((1,))
    bias = response.to(weight.dtype) if bias is None else plus(bias, response)
    return rw.emit_like(linear, input=value, weight=times(weight, by.scale), bias=bias)


@rewrite
def fold_batch_norm_into_conv(conv: ops.Conv, rw: Rewriter) -> Value:
    """The scale and shift of a batch norm move into the convolution that reads it."""
    value, by, norm = extract(rw, conv.input)
    rw.require(
        by.axis == conv.channel_axis,
        f"its channels are not those that {describe(conv.out)} reads",
    )
    assert by.scale is not None and by.shift is not None  # a norm has both
    weight = conv.scale_in(by.scale)
    if not conv.pads and not conv.transposed:
        kernel = conv.response_kernel(by.shift)
        response = kernel.sum(tuple(range(1, kernel.ndim)))
        bias = response.to(conv.weight.dtype) if conv.bias is None else plus(conv.bias, response)
        return rw.conv_like(conv, input=value, weight=weight, bias=bias)
    before, after = numel(norm.out), numel(conv.out)
    rw.require(
        after <= before,
        f"{describe(conv.out)} pads with zeros: the exact correction is a map over its "
        f"{after} outputs, which costs more than this norm over {before} values",
    )
    folded = rw.conv_like(conv, input=value, weight=weight)
    return folded + bias_map(conv, by.shift, rw)


def bias_map(conv: ops.Conv, constant: Value, rw: Rewriter) -> Value:
    """What `conv` (without bias) makes of an input that is `constant[i]` at every real pixel of
    channel i, borders included: `[1, O, *out_spatial]`."""
    spatial = conv.input.shape[conv.channel_axis + 1 :]
    rw.require(
        all(isinstance(size, int) for size in spatial),
        f"{describe(conv.out)} pads with zeros and its spatial size is dynamic",
    )
    ones = (1,) * len(spatial)
    if conv.transposed:
        image = constant.reshape(1, conv.in_channels, *ones).expand(1, conv.in_channels, *spatial)
        response = ops.Conv(
            image, widen(conv.weight, image), None, conv.stride, conv.padding, conv.dilation,
            conv.groups, True, conv.output_padding,
        )  # fmt: skip
    else:
        kernel = conv.response_kernel(constant)
        device = kernel.meta.device
        image = rw.emit(ops.Full((1, 1, *spatial), 1.0, kernel.dtype, device))
        response = ops.Conv(image, kernel, None, conv.stride, conv.padding, conv.dilation)
    return rw.emit(response).to(conv.out.dtype)


@rewrite
def fold_scale_shift(op: ops.Mul | ops.Div | ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """A per-channel parameter that multiplies or shifts moves into what computes its operand.

    A frozen batch norm, written out as `x * scale + bias`, is two of these.
    """
    value, parameter = op.left, op.right
    if isinstance(op, (ops.Mul, ops.Add)) and isinstance(value, Value) and value.is_constant:
        value, parameter = parameter, value
    rw.match(isinstance(value, Value) and isinstance(parameter, Value))
    assert isinstance(value, Value) and isinstance(parameter, Value)
    rw.match(parameter.is_constant and not value.is_constant)
    rw.match(value.shape == op.out.shape and value.dtype == op.out.dtype)
    axes = [axis for axis, size in enumerate(_padded(parameter, value)) if size != 1]
    rw.match(len(axes) == 1)
    vector = channel_vector(parameter, value, axes[0])
    rw.match(vector is not None)
    assert vector is not None
    if isinstance(op, ops.Mul):
        by = Affine(axes[0], vector, None)
    elif isinstance(op, ops.Div):
        by = Affine(axes[0], rw.emit(ops.Reciprocal(widen(vector))), None)
    else:
        by = Affine(axes[0], None, vector if isinstance(op, ops.Add) else -vector)
    return absorb(rw, value, by, op)


def _padded(parameter: Value, value: Value) -> tuple[int, ...]:
    return (1,) * (value.ndim - parameter.ndim) + parameter.shape


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Batch norms and per-channel scales move into the convolutions and linear maps around them."""

    name = "fold-batch-norm"
    rewrites = (
        fold_batch_norm,
        fold_batch_norm_into_linear,
        fold_batch_norm_into_conv,
        fold_scale_shift,
    )
