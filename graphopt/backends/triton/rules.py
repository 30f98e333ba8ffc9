"""Formulas of ops that are sums and pointwise ops underneath, over torch's own functions.

Half types are computed in float32, as torch does. A rule returns NotImplemented where it does not
apply. Variances are of centered values, never a difference of two large sums.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {}


def rule(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _wide(x: Tensor) -> Tensor:
    """Half types as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _result(x: Tensor, dtype: torch.dtype | bool | None) -> torch.dtype:
    """What a softmax gives; the private ops say only whether halves become float32."""
    if dtype is True:
        return torch.float32
    return dtype if isinstance(dtype, torch.dtype) else x.dtype


@rule(aten.softmax.int, aten._softmax.default)
def softmax(x: Tensor, dim: int, dtype: torch.dtype | bool | None = None) -> Any:
    """exp(x - max x) / sum exp(x - max x)"""
    result = _result(x, dtype)
    if not result.is_floating_point:
        return NotImplemented
    x = _wide(x.to(result))
    power = (x - x.amax(dim, keepdim=True)).exp()
    return (power / power.sum(dim, keepdim=True)).to(result)


@rule(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(x: Tensor, dim: int, dtype: torch.dtype | bool | None = None) -> Any:
    """x - max x - log sum exp(x - max x)"""
    result = _result(x, dtype)
    if not result.is_floating_point:
        return NotImplemented
    x = _wide(x.to(result))
    shifted = x - x.amax(dim, keepdim=True)
    return (shifted - shifted.exp().sum(dim, keepdim=True).log()).to(result)


def _normalized(x: Tensor, dims: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps), the mean and the reciprocal deviation."""
    mean = x.mean(list(dims), keepdim=True)
    centered = x - mean
    scale = ((centered * centered).mean(list(dims), keepdim=True) + eps).rsqrt()
    return centered * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, scale = _normalized(_wide(x), list(range(-len(shape), 0)), eps)
    return _affine(y, weight, bias).to(x.dtype), mean, scale


@rule(aten.layer_norm.default)
def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> Any:  # fmt: skip
    return _layer_norm(x, shape, weight, bias, eps)[0]


RULES[aten.native_layer_norm.default] = _layer_norm


@rule(aten.rms_norm.default)
def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """x / sqrt(mean x^2 + eps) * weight"""
    wide = _wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = ((wide * wide).mean(list(range(-len(shape), 0)), keepdim=True) + eps).rsqrt()
    return _affine(wide * scale, weight, None).to(x.dtype)


def _per_channel(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A value per channel, to broadcast over [N, C, ...]."""
    return None if value is None else _channelwise(value, x)


def _channelwise(value: Tensor, x: Tensor) -> Tensor:
    return _wide(value).reshape([-1] + [1] * (x.ndim - 2))


@rule(aten.group_norm.default)
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> Any:  # fmt: skip
    wide = _wide(x).reshape(x.shape[0], groups, -1)
    y = _normalized(wide, [-1], eps)[0].reshape(x.shape)
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)


@rule(aten.batch_norm.default)
def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Any:  # fmt: skip
    """(x - mean) * weight / sqrt(var + eps) + bias; statistics of the batch are the framework's."""
    if training or mean is None or var is None:
        return NotImplemented
    scale = (_wide(var) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    centered = _wide(x) - _channelwise(mean, x)
    return _affine(centered, _per_channel(scale, x), _per_channel(bias, x)).to(x.dtype)


@rule(aten.instance_norm.default)
def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    use_input: bool, momentum: float, eps: float, cudnn: bool,
) -> Any:  # fmt: skip
    if not use_input:
        return batch_norm(x, weight, bias, mean, var, False, momentum, eps, cudnn)
    if mean is not None:
        return NotImplemented  # it writes the running statistics
    y = _normalized(_wide(x), list(range(2, x.ndim)), eps)[0]
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)


@rule(aten.var.correction)
def var(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: Any = 1, keepdim: bool = False
) -> Any:
    if not x.dtype.is_floating_point or correction is None:
        return NotImplemented
    dims = list(dims) if dims else list(range(x.ndim))
    wide = _wide(x)
    centered = wide - wide.mean(dims, keepdim=True)
    count = math.prod(x.shape[dim] for dim in dims)
    return ((centered * centered).sum(dims, keepdim) / (count - correction)).to(x.dtype)


@rule(aten.std.correction)
def std(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: Any = 1, keepdim: bool = False
) -> Any:
    found = var(x, dims, correction=correction, keepdim=keepdim)
    return found if found is NotImplemented else found.sqrt()


@rule(aten.var_mean.correction)
def var_mean(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: Any = 1, keepdim: bool = False
) -> Any:
    found = var(x, dims, correction=correction, keepdim=keepdim)
    every = list(dims) if dims else list(range(x.ndim))
    return found if found is NotImplemented else (found, x.mean(every, keepdim))


@rule(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default)
def adaptive_average(x: Tensor, size: Sequence[int]) -> Any:
    """The mean of everything, where one value per channel is asked for."""
    if any(one != 1 for one in size):
        return NotImplemented
    return x.mean(list(range(-len(size), 0)), keepdim=True)


@rule(aten.split_with_sizes.default)
def split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@rule(aten.chunk.default)
def chunk(x: Tensor, chunks: int, dim: int = 0) -> Any:
    return x.split(max((x.shape[dim] + chunks - 1) // chunks, 1), dim)


@rule(aten.stack.default)
def stack(parts: Sequence[Tensor], dim: int = 0) -> Any:
    return torch.cat([one.unsqueeze(dim) for one in parts], dim)


@rule(aten.sum.default)
def total(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return x.sum(list(range(x.ndim)), dtype=dtype) if x.ndim else NotImplemented


@rule(aten.linalg_vector_norm.default)
def vector_norm(
    x: Tensor, order: float = 2, dims: Sequence[int] | None = None, keepdim: bool = False, *,
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """(sum |x|^p)^(1/p) for p = 1 and 2, max |x| for p = inf"""
    if order not in (1, 2, math.inf) or not x.dtype.is_floating_point or not x.ndim:
        return NotImplemented
    dims = list(dims) if dims else list(range(x.ndim))
    wide = _wide(x if dtype is None else x.to(dtype))
    if order == 2:
        found = (wide * wide).sum(dims, keepdim).sqrt()
    else:
        found = wide.abs().sum(dims, keepdim) if order == 1 else wide.abs().amax(dims, keepdim)
    return found.to(dtype or x.dtype)


@rule(aten.slice_scatter.default)
def slice_scatter(
    x: Tensor, part: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    """x with x[start:end] replaced: where(start <= position < end, the part, x)

    x is read once, at the same place: a chain of such writes stays a chain.
    """
    size = x.shape[dim]
    if not all(isinstance(one, int) or one is None for one in (start, end)) or step != 1:
        return NotImplemented
    if start in (None, 0) and (end is None or end == sys.maxsize):
        return part.expand(x.shape).to(x.dtype)
    if not isinstance(size, int):
        return NotImplemented
    first, last, _ = slice(start, end).indices(size)
    if first >= last:
        return x
    after = x.ndim - 1 - dim % x.ndim
    position = torch.arange(size, device=x.device).reshape([-1] + [1] * after)
    padded = F.pad(part.to(x.dtype), [0, 0] * after + [first, size - last])
    return torch.where((position >= first) & (position < last), padded, x)


@rule(aten.select_scatter.default)
def select_scatter(x: Tensor, part: Tensor, dim: int, index: int) -> Any:
    size = x.shape[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return NotImplemented
    at = index % size
    return slice_scatter(x, part.unsqueeze(dim), dim, at, at + 1)


@rule(aten.copy.default)
def copied(x: Tensor, values: Tensor, non_blocking: bool = False) -> Any:
    return values.to(x.dtype).expand(x.shape) if values.device == x.device else NotImplemented


@rule(aten.expand_as.default)
def expand_as(x: Tensor, like: Tensor) -> Any:
    return x.expand(like.shape)


@rule(aten.unbind.int)
def unbind(x: Tensor, dim: int = 0) -> Any:
    return [x.select(dim, index) for index in range(x.shape[dim])]


@rule(aten.full_like.default)
def full_like(
    x: Tensor, value: Any, *, dtype: torch.dtype | None = None,
    device: torch.device | None = None, **rest: Any,
) -> Any:  # fmt: skip
    """A new tensor of x's sizes: nothing reads x itself, so no kernel needs to be given it."""
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=device or x.device)


@rule(aten.zeros_like.default)
def zeros_like(x: Tensor, **options: Any) -> Any:
    return full_like(x, 0, **options)


@rule(aten.ones_like.default)
def ones_like(x: Tensor, **options: Any) -> Any:
    return full_like(x, 1, **options)
