"""Long reductions over few rows, cut into chunks that are rows of their own.

    reduce over a b  =  reduce over a of (reduce over b)      for a sum, maximum, minimum, and for the
                                                              mean, whose chunks are of one length

A program reduces whole rows: a few long ones leave most of a GPU idle. Cut, a first kernel has a row
per chunk, with what precedes the reduction, and a second one reduces the chunks' results (float32 for
half types). What follows the reduction is no longer in one kernel with it, so only what takes much
longer than a few launches is cut. The decision is for the sizes that the program is made with; it is
right for all others. The limits are estimates; they were not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sympy import divisors
from torch import Tensor

from graphopt.backends.triton.scalars import HALF
from graphopt.backends.triton.source import PERSISTENT
from graphopt.ir.ops.base import hint

aten = torch.ops.aten

LONG = 4 * PERSISTENT  # a program reads that many values in about the time of two launches
LEAST_CHUNK = 1024  # values that a program has work with
MULTIPROCESSORS = 132  # of a GPU, where there is none to ask


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cut(x: Tensor, dims: Sequence[int]) -> tuple[list[Any], list[int], list[int]] | None:
    """(a shape of x, its axes that are reduced first, those that are then), None to leave x whole.

    The second ones are the outermost of `dims`, the last of them in part: a divisor of it.
    """
    sizes = [int(hint(size)) for size in x.shape]
    length = math.prod(sizes[dim] for dim in dims)
    rows = math.prod(size for dim, size in enumerate(sizes) if dim not in dims)
    if length < LONG or not 0 < 2 * rows <= multiprocessors(x.device):
        return None
    wanted = max(2 * multiprocessors(x.device) // rows, length // PERSISTENT)
    found = [
        (chunks < wanted, abs(chunks - wanted), number, part)
        for number, dim in enumerate(dims)
        for part in (divisors(x.shape[dim]) if isinstance(x.shape[dim], int) else (1, sizes[dim]))
        if 1 < (chunks := part * math.prod(sizes[one] for one in dims[:number]))
        and length >= LEAST_CHUNK * chunks
    ]
    if not found:
        return None
    *_, number, part = min(found)
    shape: list[Any] = []
    first: list[int] = []
    then: list[int] = []
    for axis, size in enumerate(x.shape):
        where = dims.index(axis) if axis in dims else -1
        if axis in dims and where < number:
            then.append(len(shape))
        elif axis in dims and (where > number or part == 1):
            first.append(len(shape))
        elif axis in dims and part == sizes[axis]:
            then.append(len(shape))
        elif axis in dims:
            then.append(len(shape))
            first.append(len(shape) + 1)
            shape.append(part)
            size //= part
        shape.append(size)
    return shape, first, then


def _split(
    reduce: Callable[..., Tensor], x: Tensor, dims: Sequence[int] | None, keepdim: bool,
    result: torch.dtype,
) -> Any:  # fmt: skip
    """`reduce` in two steps; NotImplemented where one does."""
    if not x.ndim or x.dtype.is_complex or result.is_complex:
        return NotImplemented
    dims = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    parts = cut(x, dims)
    if parts is None:
        return NotImplemented
    shape, first, then = parts
    wide = x.to(torch.float32 if result in HALF else result).reshape(shape)
    found = reduce(reduce(wide, first, keepdim=True), then, keepdim=True).to(result)
    return found.reshape([
        1 if dim in dims else size for dim, size in enumerate(x.shape) if keepdim or dim not in dims
    ])  # fmt: skip


def _sum(
    x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *,
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    whole = x.dtype if x.dtype.is_floating_point else torch.int64
    return _split(torch.sum, x, dims, keepdim, dtype or whole)


def _mean(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *,
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    return _split(torch.mean, x, dims, keepdim, dtype or x.dtype)


def _amax(x: Tensor, dims: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _split(torch.amax, x, dims, keepdim, x.dtype)


def _amin(x: Tensor, dims: Sequence[int] = (), keepdim: bool = False) -> Any:
    return _split(torch.amin, x, dims, keepdim, x.dtype)


SPLITS: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _sum, aten.mean.dim: _mean, aten.mean.default: _mean,
    aten.amax.default: _amax, aten.amin.default: _amin,
}  # fmt: skip
