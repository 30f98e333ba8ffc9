"""The specification of `open-operators`: operators that are Python code become that code, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes.open_operators import is_open
from tests.helpers import tensor
from tests.ir.test_recurrence import rolled

LIBRARY = torch.library.Library("graphopt_tests", "FRAGMENT")
PASSES = "open-operators,canonicalize"


@torch.library.custom_op("graphopt_tests::leaky", mutates_args=())
def leaky(x: Tensor, v: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    v = v * decay + x.float()
    s = (v >= 1.0).to(x.dtype)
    return s, v - s


@leaky.register_fake
def _(x: Tensor, v: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("graphopt_tests::asks", mutates_args=())
def asks(x: Tensor) -> Tensor:
    return x * 2 if float(x.sum()) > 0 else x * 3


@asks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Calls(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Any:
        if self.name == "asks":
            return torch.ops.graphopt_tests.asks(x) + 1
        s, v = torch.ops.graphopt_tests.leaky(x, torch.zeros_like(x), 0.5)
        return torch.ops.graphopt_tests.leaky(s, v, 0.5)


def targets(fast: Any) -> set[str]:
    return {
        str(node.target) for node in fast.graph_module.graph.nodes if node.op == "call_function"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_becomes_its_code(dtype: torch.dtype):
    model, x = Calls("leaky"), 3 * tensor(4, 6, dtype=dtype)
    fast = graphopt.optimize(model, (x,), passes=PASSES)
    assert not any("graphopt_tests" in one for one in targets(fast))
    assert fast.report.rolled_back == []
    for rows in (1, 4, 9):
        given = 3 * tensor(rows, 6, seed=rows, dtype=dtype)
        for a, b in zip(fast(given), model(given), strict=True):
            assert torch.equal(a, b)


def test_code_that_asks_for_values_stays():
    model, x = Calls("asks"), tensor(4, 6)
    fast = graphopt.optimize(model, (x,), passes=PASSES)
    assert "graphopt_tests.asks.default" in targets(fast)
    assert any("cannot be traced" in one.reason for one in fast.report.refused)
    for given in (x, -x.abs(), x.abs()):
        assert torch.equal(fast(given), model(given))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_picked_from_a_stack(dim: int, place: int):
    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a.sin(), b.cos(), a.exp()], dim).select(dim, place) + 0.5

    graph, _ = rolled(run, tensor(3, 4), tensor(3, 4, seed=2), passes="open-operators{always=true}")
    assert "Stack" not in str(graph)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_picked_from_an_axis_of_one(dim: int):
    def run(a: Tensor) -> Tensor:
        return a.sin().unsqueeze(dim).select(dim, 0) + 0.5

    graph, _ = rolled(run, tensor(3, 4), passes="open-operators{always=true}")
    assert "Select" not in str(graph)


def test_another_axis_is_left():
    def run(a: Tensor) -> Tensor:
        return torch.stack([a, a + 1]).select(1, 0), a.reshape(4, 3).select(0, 0)  # type: ignore[return-value]

    graph, _ = rolled(run, tensor(3, 4), passes="open-operators{always=true}")
    assert str(graph).count("Select") == 2


def test_own_operators_are_not_opened():
    fast = graphopt.optimize(nn.ReLU().eval(), (tensor(2, 3),), passes=PASSES)
    assert not any(map(is_open, fast.graph_module.graph.nodes))
