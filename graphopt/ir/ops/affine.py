"""Convolution of every kind, and matrix products."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import torch

from graphopt.ir.ops.base import Call, Multilinear, Op, hint, numel, op, overload
from graphopt.ir.value import Value

_CONV = {n: overload(f"conv{n}d.default") for n in (1, 2, 3)}
_CONV_NAMED_PADDING = {n: overload(f"conv{n}d.padding") for n in (1, 2, 3)}
_CONV_TRANSPOSE = {
    1: overload("conv_transpose1d.default"),
    2: overload("conv_transpose2d.input"),
    3: overload("conv_transpose3d.input"),
}


def widen(value: Value, *others: Value) -> Value:
    """`value` in the dtype that weight arithmetic runs in: at least float32."""
    dtype = torch.float32
    for one in (value, *others):
        dtype = torch.promote_types(dtype, one.dtype)
    return value.to(dtype)


def times(weight: Value, factor: Value | float) -> Value:
    """`weight * factor`, computed in at least float32, in the dtype of `weight`."""
    if not isinstance(factor, Value):
        return (widen(weight) * factor).to(weight.dtype)
    return (widen(weight, factor) * widen(factor, weight)).to(weight.dtype)


def plus(left: Value | None, right: Value | None) -> Value | None:
    """`left + right` in at least float32, in the dtype of `left`; None stands for zero."""
    if left is None or right is None:
        return left if right is None else right
    return (widen(left, right) + widen(right, left)).to(left.dtype)


FEW = 4  # output channels of a group
TINY = 1e-150  # squares of what is smaller underflow


def length(bound: torch.Tensor, axes: int | tuple[int, ...]) -> torch.Tensor:
    """The 2-norm of absolute values over axes, which stay. By Cauchy and Schwarz a sum of products is at
    most the product of two of them: a bound that takes no product of matrices."""
    found: torch.Tensor = torch.linalg.vector_norm(bound.double(), dim=axes, keepdim=True)
    return found + TINY * sqrt(bound.numel() / max(found.numel(), 1))


def strided(*bounds: torch.Tensor) -> bool:
    return all(one.layout is torch.strided for one in bounds)


@op(
    *(f"conv{n}d.default" for n in (1, 2, 3)),
    *(f"conv{n}d.padding" for n in (1, 2, 3)),
    "conv_transpose1d.default",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution.default",
)
class Conv(Multilinear, Op):
    """Convolution of rank 1 to 3, plain or transposed, grouped or not.

    `input` is `[N, I, *spatial]` (or unbatched, without N); `weight` is `[O, I/groups, *kernel]`,
    transposed `[I, O/groups, *kernel]`; `bias` is `[O]` or None. `padding` counts zeros on both
    sides of each axis, or is the string "same" where the two sides differ.
    """

    input: Value
    weight: Value
    bias: Value | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        weight = call["weight"]
        if not isinstance(weight, Value):
            return None
        rank = weight.ndim - 2
        transposed = call.arguments.get("transposed", "transpose" in str(call.target))

        def spread(sizes: Any) -> tuple[int, ...]:
            sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
            return tuple(sizes * rank if len(sizes) == 1 else sizes)

        padding, dilation = call["padding"], spread(call["dilation"])
        if padding == "valid":
            padding = (0,) * rank
        elif padding == "same":
            total = [d * (hint(k) - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if all(one % 2 == 0 for one in total):
                padding = tuple(one // 2 for one in total)
        else:
            padding = spread(padding)
        output_padding = spread(call.arguments.get("output_padding", 0))
        geometry = (*spread(call["stride"]), *dilation, *output_padding)
        if any(not isinstance(size, int) for size in (*geometry, *padding) if size != padding):
            if not isinstance(padding, str):
                return None
        return cls(
            call["input"], weight, call["bias"], spread(call["stride"]), padding, dilation,
            call["groups"], transposed, output_padding if transposed else (), out=call.out,
        )  # fmt: skip

    def build(self) -> tuple[Any, dict[str, Any]]:
        if self.transposed:
            return self.call(
                _CONV_TRANSPOSE[self.rank], output_padding=self.output_padding or (0,) * self.rank
            )
        table = _CONV_NAMED_PADDING if isinstance(self.padding, str) else _CONV
        return self.call(table[self.rank])

    @property
    def rank(self) -> int:
        return self.weight.ndim - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def channel_axis(self) -> int:
        """The channel axis of input and output: 1, or 0 for an unbatched input."""
        return self.input.ndim - self.rank - 1

    @property
    def out_channels(self) -> int:
        shape = self.weight.shape
        return shape[1] * self.groups if self.transposed else shape[0]  # type: ignore[no-any-return]

    @property
    def in_channels(self) -> int:
        shape = self.weight.shape
        return shape[0] if self.transposed else shape[1] * self.groups  # type: ignore[no-any-return]

    @property
    def pads(self) -> bool:
        """Whether any border position reads padded zeros."""
        return isinstance(self.padding, str) or any(self.padding)

    @property
    def reduction(self) -> int:
        return hint(prod(self.weight.shape[2:]) * self.in_channels // self.groups)

    @property
    def flops(self) -> float:
        taps = prod(self.kernel)
        if self.transposed:
            return 2.0 * numel(self.input) * hint(self.weight.shape[1]) * taps
        return 2.0 * numel(self.out) * hint(self.weight.shape[1]) * taps

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        weight = magnitude(self.weight)
        per_group = weight.shape[0] // self.groups
        if self.transposed or per_group < FEW or self.input == self.weight or not strided(weight):
            return run(magnitude)
        ones, no_bias = torch.ones_like(weight[::per_group]), weight.new_zeros(self.groups)
        squares = {self.input: (magnitude(self.input) + TINY).square(), self.weight: ones}
        windows = run(lambda one: squares.get(one, no_bias)).sqrt()
        windows = windows.repeat_interleave(per_group, self.channel_axis)
        shape = (-1,) + (1,) * self.rank
        bound = windows * length(weight, tuple(range(1, weight.ndim))).reshape(shape)
        return bound if self.bias is None else bound + magnitude(self.bias).reshape(shape)

    def scale_out(self, factor: Value | float) -> Value:
        """The weight with output channel o multiplied by `factor[o]`."""
        ones = (1,) * self.rank
        if not isinstance(factor, Value) or factor.ndim == 0:
            return times(self.weight, factor)
        if not self.transposed:
            return times(self.weight, factor.reshape(self.out_channels, 1, *ones))
        groups, per = self.groups, self.weight.shape[1]
        if groups == 1:
            return times(self.weight, factor.reshape(1, per, *ones))
        grouped = self.weight.reshape(groups, self.in_channels // groups, per, *self.kernel)
        scaled = times(grouped, factor.reshape(groups, 1, per, *ones))
        return scaled.reshape(self.in_channels, per, *self.kernel)

    def scale_in(self, factor: Value | float) -> Value:
        """The weight with input channel i multiplied by `factor[i]`."""
        ones = (1,) * self.rank
        if not isinstance(factor, Value) or factor.ndim == 0:
            return times(self.weight, factor)
        if self.transposed:
            return times(self.weight, factor.reshape(self.in_channels, 1, *ones))
        return times(self.weight, self._per_output(factor).reshape(*self.weight.shape[:2], *ones))

    def _per_output(self, vector: Value) -> Value:
        """`vector[I]` laid out as `[1 or O, I/groups]`, row o holding its group's entries."""
        groups, per = self.groups, self.weight.shape[1]
        if groups == 1:
            return vector.reshape(1, per).expand(self.out_channels, per)
        rows = self.out_channels // groups
        return vector.reshape(groups, 1, per).expand(groups, rows, per).reshape(-1, per)

    def response_kernel(self, constant: Value) -> Value:
        """`K[o] = sum_i weight[o, i] * constant[i]`, shape `[O, 1, *kernel]` (not transposed)."""
        return widen(self.scale_in(constant)).sum((1,), keepdim=True)


@op("linear.default")
class Linear(Multilinear, Op):
    """`input @ weight.T + bias`; `input` is `[*, I]`, `weight` is `[O, I]`, `bias` `[O]` or None."""

    input: Value
    weight: Value
    bias: Value | None = None

    @property
    def reduction(self) -> int:
        return hint(self.weight.shape[-1])

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.out) * hint(self.weight.shape[-1])

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        input, weight = magnitude(self.input), magnitude(self.weight)
        if weight.ndim != 2 or not strided(input, weight):
            return run(magnitude)
        bound = length(input, -1) * length(weight, -1).flatten()
        return bound if self.bias is None else bound + magnitude(self.bias)


@op("matmul.default", "mm.default", "bmm.default")
class Matmul(Multilinear, Op):
    """`left @ right` with broadcasting of leading axes."""

    rename = {"self": "left", "other": "right", "mat2": "right"}  # noqa: RUF012
    left: Value
    right: Value

    @property
    def reduction(self) -> int:
        return hint(self.left.shape[-1])

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.out) * hint(self.left.shape[-1])

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        left, right = magnitude(self.left), magnitude(self.right)
        if min(left.ndim, right.ndim) < 2 or not strided(left, right):
            return run(magnitude)
        return length(left, -1) * length(right, -2)


@op("addmm.default", "baddbmm.default")
class Addmm(Multilinear, Op):
    """`beta * input + alpha * (left @ right)`."""

    rename = {  # noqa: RUF012
        "self": "input", "mat1": "left", "mat2": "right", "batch1": "left", "batch2": "right",
    }  # fmt: skip
    input: Value
    left: Value
    right: Value
    beta: float = 1
    alpha: float = 1

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(self.targets[0] if self.left.ndim == 2 else self.targets[1])

    @property
    def reduction(self) -> int:
        return hint(self.left.shape[-1]) + 1

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.out) * hint(self.left.shape[-1])

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        left, right = magnitude(self.left), magnitude(self.right)
        if not strided(left, right):
            return run(magnitude) if self.beta >= 0 and self.alpha >= 0 else None
        product = length(left, -1) * length(right, -2)
        return abs(self.beta) * magnitude(self.input) + abs(self.alpha) * product


@op("einsum.default")
class Einsum(Op):
    """Einstein summation; `path` only chooses the order of contraction."""

    equation: str
    tensors: tuple[Value, ...]
    path: Any = None

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(magnitude)

    @property
    def reduction(self) -> int:
        return max((numel(one) for one in self.tensors), default=1)

    @property
    def flops(self) -> float:
        sizes: dict[str, int] = {}
        for letters, tensor in zip(self.equation.replace(" ", "").split("->")[0].split(","),
                                   self.tensors, strict=False):  # fmt: skip
            sizes.update(zip(letters, map(hint, tensor.shape), strict=False))
        return 2.0 * prod(sizes.values())


@op("scaled_dot_product_attention.default")
class Attention(Op):
    """`softmax(query @ key.T * scale + mask) @ value`, over the last two axes."""

    query: Value
    key: Value
    value: Value
    attn_mask: Value | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def averages(self) -> bool:
        """Whether the weights of every query add up to one, whatever is masked."""
        return self.attn_mask is None and not self.dropout_p

    @property
    def reduction(self) -> int:
        return hint(self.query.shape[-1]) + hint(self.key.shape[-2])

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.query) * hint(self.key.shape[-2]) * 2

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        """Weights p of scores s vary by p (ds - sum(p ds)), and add up to at most one: where a mask
        leaves none, they vary by none."""
        if self.dropout_p:
            return None
        scale = hint(self.query.shape[-1]) ** -0.5 if self.scale is None else abs(self.scale)
        query, key, values = map(magnitude, (self.query, self.key, self.value))
        if self.enable_gqa:
            repeats = hint(query.shape[-3]) // hint(key.shape[-3])
            key, values = (one.repeat_interleave(repeats, -3) for one in (key, values))
        mask = None if self.attn_mask is None else value(self.attn_mask)
        if mask is None or mask.dtype == torch.bool:  # others are added, and may be anything
            key = length(key, -1)
            if mask is not None:  # what no query sees has no part in it
                hidden = ~mask.any(-2, keepdim=True).mT
                key, values = torch.where(hidden, 0.0, key), torch.where(hidden, 0.0, values)
            spread = scale * length(query, -1) * key.amax(-2, keepdim=True)
            return (1 + 2 * spread) * values.amax(-2, keepdim=True)
        added = torch.where(mask.isinf(), 0.0, magnitude(self.attn_mask))
        scores = query @ key.mT * scale + added
        one_hot = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
        weights = torch.nn.functional.scaled_dot_product_attention(
            value(self.query), value(self.key),
            one_hot.expand(*value(self.key).shape[:-2], *one_hot.shape), mask, 0.0, self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip
        average = weights * (1 + scores + (weights * scores).sum(-1, keepdim=True))
        return average @ values


@op("embedding.default")
class Embedding(Multilinear, Op):
    """Rows of `weight` `[rows, width]` picked by the integers `indices`."""

    weight: Value
    indices: Value
    padding_idx: int = -1
    scale_grad_by_freq: bool = False
    sparse: bool = False
