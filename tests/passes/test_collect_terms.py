"""collect-terms: a sum that reads a value twice, scaled or not, reads it once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from tests.helpers import optimized

IMAGE = (2, 3, 6, 6)
TERMS = ("y", "z", "y * a", "y * 2.0", "s * y", "(y - s)", "norm(y)", "y * s - 1.0", "s * (y - s) * a",
         "z * s", "-3.0 * norm(y)", "y / 2.0", "y * z")  # fmt: skip


class Formula(nn.Module):
    """An expression of two maps `y` and `z` of the input, a vector `s`, a number `a` and a norm."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.s = nn.BatchNorm2d(4), nn.Parameter(torch.randn(4, 1, 1))
        self.a = nn.Parameter(torch.randn(1))
        self.formula: Callable[..., Tensor] = eval(f"lambda y, z, s, a, norm: {text}")
        for one in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            one.data.uniform_(-1, 1)  # type: ignore[union-attr]
        self.eval().double()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.first(x), self.second(x)
        return self.formula(y, z, self.s, self.a, self.norm)


def ops_of(model: nn.Module, *shape: int) -> list[str]:
    optimized(model, "tune", shape)
    found = optimized(model, "deploy", shape)
    return [node.target.__name__.partition(".")[0] for node in found.graph_module.graph.nodes
            if node.op == "call_function"]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "y + y", "y - 0.5 * y", "norm(y) + a * y", "y + (s - 1) * (y - s)", "y * a + (z + s * y)",
        "(z + (y - s) * a) - 1.0 + y", "norm(y) - norm(y)",
    ],
)  # fmt: skip
def test_a_value_that_is_added_twice_takes_in_its_scales(text: str) -> None:
    assert ops_of(Formula(text), *IMAGE) == ["conv2d"]


def test_repbn_and_dora_by_their_definitions() -> None:
    # RepBN: the norm of a patch embedding and alpha times it. DoRA: (m - 1) W x + m B A x on top.
    assert ops_of(Formula("norm(y) + a * y"), *IMAGE) == ["conv2d"]

    class Dora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.m = nn.Linear(6, 5), nn.Parameter(torch.rand(5))
            self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
            self.eval().double()

        def forward(self, x: Tensor) -> Tensor:
            y, delta = self.base(x), self.b(self.a(x)) * 2.0
            norm = (self.base.weight + 2.0 * self.b.weight @ self.a.weight).norm(dim=1)
            scale = self.m / norm
            total: Tensor = y + ((scale - 1) * (y - self.base.bias) + scale * delta)
            return total

    assert ops_of(Dora(), 3, 6) == ["linear"]


@pytest.mark.parametrize(
    "text", ["y * z + y", "y.relu() + y", "y * s + y * s.reshape(1, 1, 4)", "y.mean() + y"]
)
def test_other_factors_stay(text: str) -> None:
    fast = optimized(Formula(text), "deploy", IMAGE, passes="collect-terms")
    assert not fast.report.applied


@given(st.lists(st.sampled_from(TERMS), min_size=2, max_size=4), st.data())
@settings(max_examples=25, deadline=None)
def test_sums_of_random_terms_in_random_order(terms: list[str], data: st.DataObject) -> None:
    torch.manual_seed(0)
    while len(terms) > 1:
        i = data.draw(st.integers(0, len(terms) - 2))
        sign = data.draw(st.sampled_from("+-"))
        terms[i : i + 2] = [f"({terms[i]} {sign} {terms[i + 1]})"]
    fast = graphopt.optimize(
        Formula(terms[0]), (torch.randn(*IMAGE).double(),), passes="collect-terms",
        validate=False,
    )  # fmt: skip
    assert fast.report.check is not None and fast.report.check.ok, fast.report
