"""What is known of integers in a graph is true of every run, and is known where binary networks need it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor, nn

from graphopt.ir.builder import Builder
from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.integers import Integers, Multiples
from graphopt.ir.interpret import Interpreter
from graphopt.ir.value import Value
from tests.helpers import Net, tensor


def graph_of(body: Any, x: Tensor, **modules: Any) -> Graph:
    return capture(Net(body, **modules).eval(), (x,), {}).graph


def known(graph: Graph, at_hand: bool = False) -> Multiples | None:
    (result,) = graph.output.all_input_nodes
    return Integers(graph, at_hand).of(Value(result, Builder(graph, graph.output)))


WEIGHT = nn.Parameter(tensor(4, 3, 3, 3).float())


@pytest.mark.parametrize(("body", "low", "high", "unit"), [
    (lambda net, x: torch.sign(x), -1, 1, 1),
    (lambda net, x: (x > 0).float() * 2 - 1, -1, 1, 1),
    (lambda net, x: torch.where(x > 0, 3.0, -0.5), -0.5, 3, 0.5),
    (lambda net, x: F.conv2d(x.sign(), net.w.sign(), padding=1), -27, 27, 1),
    (lambda net, x: F.max_pool2d(F.conv2d((x > 0).to(x.dtype), net.w.sign()), 2), -27, 27, 1),
    (lambda net, x: F.pad(x.sign(), (1, 1), value=2.0).flatten(1), -1, 2, 1),
    (lambda net, x: x.sign().sum((1, 2)), -18, 18, 1),
    (lambda net, x: torch.cat([x.sign(), 2 * (x < 1).float()], 1), -1, 2, 1),
    (lambda net, x: (x.sign() - x.heaviside(torch.tensor(0.5))).relu(), 0, 1, 0.5),
    (lambda net, x: x.sign().clamp(-0.5, 2) * 4, -2, 4, 0.5),
])  # fmt: skip
def test_bounds_and_units(body: Any, low: float, high: float, unit: float) -> None:
    assert known(graph_of(body, tensor(2, 3, 6, 6).float(), w=WEIGHT)) == Multiples(low, high, unit)


@pytest.mark.parametrize("body", [
    lambda net, x: x,
    lambda net, x: x.sign() * 0.3,
    lambda net, x: F.conv2d(x.sign(), net.w),
    lambda net, x: F.avg_pool2d(x.sign(), 2),
    lambda net, x: x.sign() / 2,
    lambda net, x: (x.sign() * 1e7).sum(1),  # more than a float32 holds
    lambda net, x: x.sign().sum(0),  # of a batch that may be of any size
])  # fmt: skip
def test_what_is_not_known(body: Any) -> None:
    graph = graph_of(body, tensor(2, 3, 6, 6).float(), w=WEIGHT)
    assert known(graph) is None


def test_parameters_are_known_at_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))
    graph = graph_of(lambda net, x: F.linear(x.sign(), net.w), tensor(4, 3).float(), w=weight)
    assert known(graph) is None
    assert known(graph, at_hand=True) == Multiples(-6, 6, 0.5)


OPS: dict[str, Any] = {
    "conv": lambda net, x: F.conv2d(x, net.w.sign(), padding=1),
    "add": lambda net, x: x + (x > 0.5).to(x.dtype),
    "times": lambda net, x: -1.5 * x,
    "pool": lambda net, x: F.max_pool2d(x, 3, 1, 1),
    "limit": lambda net, x: x.clamp(-3, 2.5),
    "abs": lambda net, x: x.abs() - x,
    "pad": lambda net, x: F.pad(x, (0, 1), value=-1.0)[..., :6],
    "where": lambda net, x: torch.where(x > 1, x, 0.5),
    "reverse": lambda net, x: 1 - x.flip(1),
}


@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=5), st.integers(0, 1000))
def test_what_is_known_is_true(chain: list[str], seed: int) -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.sign(x)
        for kind in chain:
            y = OPS[kind](net, y)
        return y

    x = tensor(2, 3, 6, 6, seed=seed)
    graph = graph_of(body, x, w=nn.Parameter(tensor(3, 3, 3, 3, seed=seed + 1)))
    found = known(graph)
    truth = Interpreter(graph).run([x])[0].detach()
    assert found is not None or any(kind == "times" for kind in chain)
    if found is not None:
        assert bool((truth % found.unit == 0).all())
        assert found.low <= float(truth.min()) and float(truth.max()) <= found.high
