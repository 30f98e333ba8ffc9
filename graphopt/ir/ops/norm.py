"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir.ops.affine import widen
from graphopt.ir.ops.base import Call, Op, numel, op, overload
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

        def column(vector: Value | None, of: Any, default: float) -> Any:
            if vector is None:
                return default
            return of(vector).reshape(-1, *(1,) * (self.input.ndim - 2))

        assert self.running_var is not None
        # |x| s + |mean| s + |bias|, with the rounding of var + eps carried by its own ratio.
        inverse = (column(self.running_var, value, 0.0) + self.eps).rsqrt()
        scale = column(self.weight, magnitude, 1.0) * inverse
        centred = magnitude(self.input) + column(self.running_mean, magnitude, 0.0)
        return centred * scale + column(self.bias, magnitude, 0.0)


@op("layer_norm.default")
class LayerNorm(Op):
    """Mean and variance over the last `len(normalized_shape)` axes."""

    input: Value
    normalized_shape: tuple[int, ...]
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5
    cudnn_enable: bool = True


@op("group_norm.default")
class GroupNorm(Op):
    """Mean and variance per sample over each of `num_groups` groups of channels."""

    input: Value
    num_groups: int
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5
    cudnn_enabled: bool = True


@op("rms_norm.default")
class RMSNorm(Op):
    """`input / sqrt(mean(input^2) + eps) * weight` over the last axes."""

    input: Value
    normalized_shape: tuple[int, ...]
    weight: Value | None = None
    eps: float | None = None


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
