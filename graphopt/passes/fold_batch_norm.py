"""Fold eval-mode batch norms, and per-channel scales and shifts, into the affine maps around them.

    y = s * (W x + b) + t          =  (s W) x + (s b + t)              producer side
    y = W (s * x + t) + b          =  (W s) x + (b + W t)              consumer side

with s = weight / sqrt(var + eps), t = bias - mean * s. Both hold for convolutions of every rank,
grouped and transposed, and for linear maps whose features are the norm's channels; between the norm
and the map may stand sums, concatenations, reorderings, averages (see `graphopt.ir.absorb` and
`graphopt.ir.extract`, which treats the zero-padded border).

Source: Efficient ConvBN Blocks (arXiv 2305.11624).
Only expressions of the original parameters are emitted, so the result still trains (Tune mode);
`materialize` turns them into stored weights (Deploy mode).
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.absorb import absorb
from graphopt.ir.affine import Affine, written
from graphopt.ir.extract import into_conv, into_linear
from graphopt.ir.rewrite import Rewriter, rewrite
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
    return into_linear(rw, linear, (ops.BatchNorm,))


@rewrite
def fold_batch_norm_into_conv(conv: ops.Conv, rw: Rewriter) -> Value:
    """The scale and shift of a batch norm move into the convolution that reads it."""
    return into_conv(rw, conv, (ops.BatchNorm,))


@rewrite
def fold_scale_shift(op: ops.Mul | ops.Div | ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """A per-channel parameter that multiplies or shifts moves into what computes its operand.

    A frozen batch norm, written out as `x * scale + bias`, is two of these.
    """
    value, by = written(rw, op)
    rw.match(by.axis is not None)
    return absorb(rw, value, by, op)


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
