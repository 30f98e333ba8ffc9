"""A function as a compiled program in the interpreter, beside its float64 meaning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphopt.backends.triton.compiled import Compiled, Program
from graphopt.ir.capture import capture
from graphopt.module import build
from tests.helpers import Lambda, relative_error

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def compiled(model: Any, *inputs: Tensor) -> Compiled:
    """`model` (a module or a function of tensors) captured as it is, through the Triton backend."""
    module = model if isinstance(model, nn.Module) else Lambda(model)
    return Compiled(build(capture(copy.deepcopy(module), inputs).graph))


def program(fast: Compiled) -> Program:
    (found,) = fast.programs.values()
    return found


def lifted(model: Any, *inputs: Tensor) -> Any:
    """What a model means: its outputs in float64."""
    wide = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
    with torch.no_grad():
        return wide(*(one.double() if one.is_floating_point() else one for one in inputs))


def assert_right(fast: Compiled, model: Any, *inputs: Tensor, bound: float | None = None) -> None:
    """The kernels compute what the model means, to the rounding of the inputs' dtype."""
    with torch.no_grad():
        found = fast(*inputs)
        same = model(*inputs)
    truth = lifted(model, *inputs)
    if bound is None:
        bound = max((BOUND.get(one.dtype, 1e-5) for one in inputs), default=1e-5)
    for a, b, c in zip(*map(pytree.tree_leaves, (found, truth, same)), strict=True):
        assert a.dtype == c.dtype
        error = relative_error(a.double(), b.double())
        assert error <= bound, f"{error:.1e}"


def values(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Both signs, zeros and repeats; whole numbers for integers; both truths."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tuple(shape), generator=generator) * 2
    drawn = torch.where(torch.rand(tuple(shape), generator=generator) < 0.1, 0.0, drawn)
    if dtype == torch.bool:
        return drawn > 0
    return drawn.to(dtype) if dtype.is_floating_point else (drawn * 3).round().to(dtype)
