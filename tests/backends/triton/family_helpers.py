"""A function's primitive graph, and the same graph with a family's kernels in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from hypothesis import Phase
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.backends.triton.compiled import _assembled
from graphopt.backends.triton.decompose import decompose, fake_inputs
from graphopt.backends.triton.families.common import Found
from graphopt.ir.capture import capture
from graphopt.module import build
from tests.helpers import Lambda, relative_error

# Every example captures a graph, so failing ones are not shrunk.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass
class Matched:
    """What a family finds in a function's graph; calling it runs the kernels."""

    graph: fx.Graph
    found: Found
    run: Callable[..., Any]

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.found.reasons]


def matched(match: Callable[[fx.Graph], Found], function: Any, *inputs: Tensor) -> Matched:
    module = build(capture(Lambda(function), inputs).graph)
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False))
    graph, _ = decompose(module, fake_inputs(module, mode, list(inputs)), mode)
    found = match(graph)
    program = _assembled(module, graph, found.regions, by_operators=False)
    return Matched(graph, found, lambda *args: pytree.tree_leaves(program(*args)))


def assert_right(one: Matched, function: Any, *inputs: Tensor, bound: float | None = None) -> None:
    """The kernels compute what the function means in float64, and have its shapes and dtypes."""
    with torch.no_grad():
        found = one.run(*inputs)
        same = pytree.tree_leaves(function(*inputs))
        wide = (value.double() if value.is_floating_point() else value for value in inputs)
        truth = pytree.tree_leaves(function(*wide))
    if bound is None:
        bound = max(BOUND[value.dtype] for value in inputs if value.is_floating_point())
    for a, b, c in zip(found, truth, same, strict=True):
        assert (a.dtype, a.shape) == (c.dtype, c.shape)
        error = relative_error(a.double(), b.double())
        assert error <= bound, f"{error:.1e}"
