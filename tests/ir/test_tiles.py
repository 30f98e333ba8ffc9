"""Evaluating a parameter expression by blocks of rows gives what evaluating it as a whole gives, and
changes no parameter: blocks are written over only where nothing reads them any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir import tiles
from graphopt.ir.capture import capture
from graphopt.ir.interpret import Evaluator
from graphopt.ir.tiles import Tiles
from tests.helpers import Net, snapshot, tensor

ROWS, COLUMNS, RANK = 50, 64, 2


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCK", 20 * COLUMNS)  # 20 rows, so that the last block is shorter
        patch.setattr(tiles, "LEAST", 1)
        yield


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    shapes = {"w": (ROWS, COLUMNS), "v": (ROWS, COLUMNS), "b": (ROWS, RANK), "a": (RANK, COLUMNS),
              "m": (ROWS, 1), "g": (COLUMNS,), "square": (COLUMNS, COLUMNS)}  # fmt: skip
    return {
        name: nn.Parameter(tensor(*shape, seed=seed).to(dtype))
        for seed, (name, shape) in enumerate(shapes.items())
    }


def assert_same(expression: Callable[[Any], Tensor], dtype: torch.dtype = torch.float32) -> None:
    """By blocks, rounded once, against as a whole in float64."""
    net = Net(lambda net, x: x.sum() + expression(net), **weights(dtype)).eval()
    unchanged = snapshot(net)
    graph = capture(net, (torch.ones(2, dtype=dtype),), {}).graph
    constants, twin = graph.constants()
    (result,) = graph.output.all_input_nodes
    (sought,) = (one for one in result.all_input_nodes if graph.is_constant(one))
    node = twin[sought]
    exact = Evaluator(constants).evaluate(node)
    found = Tiles(constants, Evaluator(constants)).rounded(node)
    assert found is not None, "blocks were not used"
    assert found.dtype == dtype
    limit = (1 + 1e-6) * torch.finfo(dtype).eps / 2 * exact.abs() + 1e-12
    assert bool(((found.double() - exact).abs() <= limit).all())
    unchanged()


def dora(net: Any) -> Tensor:
    full = net.w + 2.0 * (net.b @ net.a).detach()
    norm = torch.linalg.norm(full, dim=1).detach()
    return full * (net.m.reshape(-1) / norm).reshape(1, -1).reshape(-1).reshape(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("expression", [
    lambda net: net.w + 2.0 * (net.b @ net.a),
    lambda net: net.b @ net.a + net.w,
    lambda net: (net.w + net.b @ net.a) + (net.w - net.b @ net.a),  # both are read again
    lambda net: (net.w + net.w) * net.w,
    lambda net: net.w + (net.b @ net.a) * (net.b @ net.a),
    lambda net: (net.w.reshape(ROWS, 2, COLUMNS // 2) * 2.0).reshape(ROWS, COLUMNS) + net.w,
    lambda net: net.w * 2.0 + (net.w * 2.0) @ net.square,
    lambda net: (lambda x: x + x @ net.square)(net.w * 2.0),
    lambda net: net.w.detach() + net.w.detach() * 3.0,
    lambda net: torch.cat([net.w + net.b @ net.a, net.v * net.g]),
    lambda net: net.w / net.w.pow(2).sum(1, keepdim=True).sqrt() * net.m,
    lambda net: net.w * (net.v + net.b @ net.a).sum(1).sum() + net.v,  # a sum of sums of rows
    dora,
])  # fmt: skip
def test_blocks_are_the_whole(expression: Callable[[Any], Tensor], dtype: torch.dtype) -> None:
    assert_same(expression, dtype)


@st.composite
def expressions(draw: st.DrawFn) -> Callable[[Any], Tensor]:
    """Programs of up to eight lines; every line reads any of the values before it, once or twice."""
    picked = [(draw(st.sampled_from(["add", "sub", "mul", "reshape", "detach", "scale", "product"])),
               draw(st.integers(0, 20)), draw(st.integers(0, 20)))
              for _ in range(draw(st.integers(2, 8)))]  # fmt: skip

    def program(net: Any) -> Tensor:
        values = [net.w, net.v, net.m, net.g]
        for name, i, j in picked:
            one, other = values[i % len(values)], values[j % len(values)]
            if name in ("add", "sub", "mul"):
                values.append(getattr(torch, name)(one, other))
            elif name == "reshape":
                full = one.expand(ROWS, COLUMNS)
                values.append(full.reshape(ROWS, 2, COLUMNS // 2).reshape(ROWS, COLUMNS))
            elif name == "detach":
                values.append(one.detach())
            elif name == "scale":
                values.append(one * 0.5)
            else:
                values.append(one + (net.b @ net.a) * 0.25)
        return values[-1] + net.w

    return program


@settings(max_examples=60)
@given(expressions())
def test_what_is_written_over_is_not_needed(program: Callable[[Any], Tensor]) -> None:
    assert_same(program)


@pytest.mark.parametrize("norm", [
    lambda x: torch.linalg.norm(x, dim=1, keepdim=True),
    lambda x: torch.linalg.vector_norm(x, ord=3, dim=1, keepdim=True),
    lambda x: x.norm(p=1, dim=1, keepdim=True),
    lambda x: x.abs().amax(1, keepdim=True),
    lambda x: x.mean(1, keepdim=True),
])  # fmt: skip
def test_statistics_of_blocks_pass_the_check(norm: Callable[[Tensor], Tensor]) -> None:
    """Sums by blocks round differently: the check needs a bound for whatever is taken by blocks."""
    net = Net(lambda net, x: x @ (net.w / norm(net.w + net.b @ net.a)), **weights()).eval()
    fast = graphopt.optimize(net, (torch.ones(2, ROWS),), passes=["materialize"])
    assert not fast.report.rolled_back
    assert [one.rewrite for one in fast.report.applied] == ["materialize"]
