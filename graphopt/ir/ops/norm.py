"""Normalizations."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from graphopt.ir.ops.affine import widen
from graphopt.ir.ops.base import Call, Op, hint, numel, op, overload
from graphopt.ir.value import Value


@op(
    "batch_norm.default",
    "_native_batch_norm_legit_no_training.default",
    "instance_norm.default",
)
class BatchNorm(Op):
    """`(input - mean) / sqrt(var + eps) * weight + bias` per channel of axis 1.

    With `training` the statistics are those of the batch (and `running_mean`, `running_var`, where
    given, are updated in place). An instance norm that uses its running statistics is this very op.
    `weight` and `bias` are `[C]` or None; `running_mean` and `running_var` `[C]` or None.
    """

    input: Value
    weight: Value | None
    bias: Value | None
    running_mean: Value | None
    running_var: Value | None
    training: bool
    momentum: float
    eps: float

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        training = call.arguments.get("training", False)
        if "instance_norm" in str(call.target):
            if call["use_input_stats"]:
                return None
            training = False
        elif "no_training" in str(call.target):
            return None  # three outputs; capture does not produce it
        return cls(
            call["input"], call["weight"], call["bias"], call["running_mean"], call["running_var"],
            training, call["momentum"], call["eps"], out=call.out,
        )  # fmt: skip

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload("batch_norm.default"), cudnn_enabled=True)

    @property
    def uses_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None or self.running_var is None

    def scale_and_shift(self) -> tuple[Value, Value]:
        """`scale = weight / sqrt(var + eps)`, `shift = bias - mean * scale`; both `[C]`, at least
        float32. Source: the definition; Efficient ConvBN Blocks (arXiv 2305.11624), section 3."""
        assert self.running_mean is not None and self.running_var is not None
        scale = (widen(self.running_var) + self.eps).rsqrt()
        if self.weight is not None:
            scale = widen(self.weight) * scale
        shift = widen(self.running_mean) * scale
        return scale, -shift if self.bias is None else widen(self.bias) - shift

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.out)

    @property
    def reduction(self) -> int:
        return 4

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        if self.uses_batch_statistics:
            return None

        assert self.running_var is not None
        # |x| s + |mean| s + |bias|, with the rounding of var + eps carried by its own ratio.
        rest = self.input.ndim - 2
        inverse = (_column(self.running_var, value, rest) + self.eps).rsqrt()
        scale = _column(self.weight, magnitude, rest, 1.0) * inverse
        centred = magnitude(self.input) + _column(self.running_mean, magnitude, rest)
        return centred * scale + _column(self.bias, magnitude, rest)


def _column(vector: Value | None, of: Any, rest: int, default: float = 0.0) -> Any:
    """What is known of a vector over the channels, to broadcast with `rest` axes behind them."""
    return default if vector is None else of(vector).reshape(-1, *(1,) * rest)


def _normalized(x: Any, a: Any, eps: float | None, count: int, centre: bool) -> Any:
    """The bound of (x - mean) / sqrt(mean((x - mean)^2) + eps) over the last `count` axes, for x with
    the bound a: its derivative applied to a, and its own rounding.

    dy = (dx - mean(dx)) / s - y mean(y dx) / s, with s the square root.
    """
    dims = tuple(range(-count, 0))
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    mean = x.mean(dims, keepdim=True) if centre else 0.0
    inverse = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    y = ((x - mean) * inverse).abs()
    moved = a + a.mean(dims, keepdim=True) if centre else a
    return 2 * (moved * inverse + y * ((y * moved).mean(dims, keepdim=True) * inverse + 1))


def _flops(op: Any, centres: bool) -> float:
    """Squared, summed and scaled; with `centres`, summed and subtracted before; gain and shift."""
    parameters = (op.weight, getattr(op, "bias", None))
    each = 5 if centres else 3
    return float(numel(op.out)) * (each + sum(one is not None for one in parameters))


def _over_last_axes(op: Any, value: Any, magnitude: Any, centre: bool) -> Any:
    count = len(op.normalized_shape)
    bound = _normalized(value(op.input), magnitude(op.input), op.eps, count, centre)
    if op.weight is not None:
        bound = bound * magnitude(op.weight)
    bias = getattr(op, "bias", None)
    return bound if bias is None else bound + magnitude(bias)


@op("layer_norm.default")
class LayerNorm(Op):
    """Mean and variance over the last `len(normalized_shape)` axes."""

    input: Value
    normalized_shape: tuple[int, ...]
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5
    cudnn_enable: bool = True

    @property
    def flops(self) -> float:
        return _flops(self, True)

    @property
    def reduction(self) -> int:
        return prod(map(hint, self.normalized_shape))

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _over_last_axes(self, value, magnitude, True)


@op("group_norm.default")
class GroupNorm(Op):
    """Mean and variance per sample over each of `num_groups` groups of channels."""

    input: Value
    num_groups: int
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5
    cudnn_enabled: bool = True

    @property
    def flops(self) -> float:
        return _flops(self, True)

    @property
    def reduction(self) -> int:
        return prod(map(hint, self.input.shape[1:])) // self.num_groups

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        x = value(self.input)
        apart = x.shape[0], self.num_groups, -1
        bound = _normalized(
            x.reshape(apart), magnitude(self.input).reshape(apart), self.eps, 1, True
        )
        rest = self.input.ndim - 2
        bound = bound.reshape(x.shape) * _column(self.weight, magnitude, rest, 1.0)
        return bound + _column(self.bias, magnitude, rest)


@op("rms_norm.default")
class RMSNorm(Op):
    """`input / sqrt(mean(input^2) + eps) * weight` over the last axes."""

    input: Value
    normalized_shape: tuple[int, ...]
    weight: Value | None = None
    eps: float | None = None

    @property
    def flops(self) -> float:
        return _flops(self, False)

    @property
    def reduction(self) -> int:
        return prod(map(hint, self.normalized_shape))

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return _over_last_axes(self, value, magnitude, False)


@op("instance_norm.default")
class InstanceNorm(Op):
    """Mean and variance per sample and channel; with running statistics see `BatchNorm`."""

    input: Value
    weight: Value | None
    bias: Value | None
    running_mean: Value | None
    running_var: Value | None
    use_input_stats: bool
    momentum: float
    eps: float
    cudnn_enabled: bool


@op("softmax.int", "_softmax.default")
class Softmax(Op):
    """`exp(input) / sum(exp(input))` along `dim`, computed in `dtype` where given."""

    input: Value
    dim: int
    dtype: torch.dtype | None = None

    @property
    def reduction(self) -> int:
        return hint(self.input.shape[self.dim])

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        y, a = run(value), magnitude(self.input)
        a = torch.where(y == 0, 0.0, a)  # where a mask says minus infinity, too
        return y * (a + (y * a).sum(self.dim, keepdim=True) + 1)  # dy = y (dx - sum(y dx))


@op("log_softmax.int")
class LogSoftmax(Op):
    """The logarithm of softmax along `dim`."""

    input: Value
    dim: int
    dtype: torch.dtype | None = None


@op("dropout.default", "feature_dropout.default", "alpha_dropout.default",
    "feature_alpha_dropout.default")  # fmt: skip
class Dropout(Op):
    """Random zeros with probability `p` when `train`; the identity otherwise."""

    input: Value
    p: float
    train: bool

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return None if self.train else magnitude(self.input)
