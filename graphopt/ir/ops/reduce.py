"""Sums, means, pooling and interpolation."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import torch

from graphopt.ir.ops.base import Call, Multilinear, Op, hint, numel, op, overload
from graphopt.ir.ops.movement import _dim
from graphopt.ir.value import Value


def _dims(call: Call) -> tuple[int, ...]:
    ndim, dims = call["self"].ndim, call.arguments.get("dim")
    if dims is None or dims == ():
        return tuple(range(ndim))
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted(_dim(dim, ndim) for dim in dims))


@dataclasses.dataclass(frozen=True, eq=False)
class Reduce(Multilinear, Op):
    """Axes `dims` (never negative) summed up or averaged, in `dtype` where given."""

    input: Value
    dims: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        dtype, keepdim = call["dtype"], call.arguments.get("keepdim", False)
        return cls(call["self"], _dims(call), keepdim, dtype, out=call.out)

    @property
    def reduction(self) -> int:
        return prod(hint(self.input.shape[dim]) for dim in self.dims)

    @property
    def flops(self) -> float:
        return float(numel(self.input))


@op("sum.dim_IntList", "sum.default")
class Sum(Reduce):
    """The sum over axes `dims`."""

    input: Value
    dims: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload("sum.dim_IntList"), dim=list(self.dims))


@op("mean.dim", "mean.default")
class Mean(Reduce):
    """The mean over axes `dims`."""

    input: Value
    dims: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload("mean.dim"), dim=list(self.dims))


@op("linalg_vector_norm.default", "linalg_norm.default", "norm.Scalar", "norm.ScalarOpt_dim")
class VectorNorm(Op):
    """The p-norm over axes `dims`: (sum |x|^p)^(1/p) with p = `order`."""

    input: Value
    order: float
    dims: tuple[int, ...]
    keepdim: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        order = call.arguments["p" if "p" in call.arguments else "ord"]
        dims = _dims(call)
        if str(call.target) == "aten.linalg_norm.default" and order is not None and len(dims) > 1:
            return None  # of matrices
        dtype, keepdim = call.arguments.get("dtype"), call.arguments.get("keepdim", False)
        return cls(call["self"], 2 if order is None else order, dims, keepdim, dtype, out=call.out)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(
            overload("linalg_vector_norm.default"), ord=self.order, dim=list(self.dims)
        )

    @property
    def reduction(self) -> int:
        return prod(hint(self.input.shape[dim]) for dim in self.dims)

    @property
    def flops(self) -> float:
        return 2.0 * numel(self.input)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        # A norm, as p >= 1: what the input is off by, it changes by the norm of that at most.
        return run(magnitude) if self.order >= 1 else None


@op("cumsum.default")
class CumSum(Multilinear, Op):
    """Running sums along `dim`."""

    input: Value
    dim: int
    dtype: torch.dtype | None = None

    @property
    def reduction(self) -> int:
        return hint(self.input.shape[self.dim])


@op(*(f"avg_pool{n}d.default" for n in (1, 2, 3)))
class AvgPool(Multilinear, Op):
    """The mean over windows; padded zeros enter it where `count_include_pad`."""

    input: Value
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | int = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload(f"avg_pool{len(self.kernel_size)}d.default"))

    @property
    def rank(self) -> int:
        return int(self.out_rank)

    @property
    def out_rank(self) -> int:
        return len(self.kernel_size)

    @property
    def averages(self) -> bool:
        """Whether the weights of every window add up to one, so that constants pass through."""
        padding = self.padding if isinstance(self.padding, tuple) else (self.padding,)
        padded = any(padding) or self.ceil_mode
        return self.divisor_override is None and not (padded and self.count_include_pad)

    @property
    def reduction(self) -> int:
        return prod(self.kernel_size)


@op(*(f"adaptive_avg_pool{n}d.default" for n in (1, 2, 3)))
class AdaptiveAvgPool(Multilinear, Op):
    """The mean over windows that divide the input into `output_size` parts."""

    input: Value
    output_size: tuple[int, ...]

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload(f"adaptive_avg_pool{len(self.output_size)}d.default"))

    @property
    def rank(self) -> int:
        return len(self.output_size)

    @property
    def reduction(self) -> int:
        return prod(hint(size) for size in self.input.shape[-self.rank :])


@op(*(f"max_pool{n}d.default" for n in (1, 2, 3)))
class MaxPool(Op):
    """The maximum over windows; padding never wins."""

    input: Value
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | int = 0
    dilation: tuple[int, ...] | int = 1
    ceil_mode: bool = False

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(overload(f"max_pool{len(self.kernel_size)}d.default"))

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        return run(magnitude)


@op("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
    "upsample_bilinear2d.vec", "upsample_linear1d.vec", "upsample_trilinear3d.vec",
    "upsample_bicubic2d.vec")  # fmt: skip
class Upsample(Op):
    """Interpolation along the spatial axes; the weights of every output add up to one."""

    input: Value
    output_size: Any = None
    scale_factors: Any = None
    align_corners: bool | None = None
    kind: Any = None

    @classmethod
    def parse(cls, call: Call) -> Op | None:
        return cls(
            call["input"], call["output_size"], call["scale_factors"],
            call.arguments.get("align_corners"), call.target, out=call.out,
        )  # fmt: skip

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(self.kind)

    @property
    def rank(self) -> int:
        return self.input.ndim - 2

    @property
    def reduction(self) -> int:
        return int(4**self.rank)

    def magnitude(self, value: Any, magnitude: Any, run: Any) -> Any:
        if "cubic" not in str(self.kind):
            return run(magnitude)
        # Bicubic weights are negative in places; their absolute sum is below 1.5 per axis.
        return torch.full_like(run(value), 3.0 * float(magnitude(self.input).max()))
