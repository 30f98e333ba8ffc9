"""Linear regions: every op that takes part, and random programs of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt

SIZE = 12
Program = list[Callable[["Program_", Tensor], Tensor]]

# Affine in the last axis, which keeps its size; tokens may be moved about on the way.
AFFINE: dict[str, Callable[[Program_, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "matmul": lambda m, x: x @ m.square,
    "matmul from the left": lambda m, x: (m.square @ x.unsqueeze(-1)).squeeze(-1),
    "batched matmul": lambda m, x: (x.unflatten(-1, (3, 1, 4)) @ m.blocks).flatten(-3),
    "addmm": lambda m, x: torch.addmm(m.vector, x.reshape(-1, SIZE), m.square, beta=2).view(x.shape),
    "einsum": lambda m, x: torch.einsum("rkc,...rk->...rc", m.blocks, x.unflatten(-1, (3, 4))).flatten(-2),
    "mul, div": lambda m, x: m.vector * x / m.vector.exp(),
    "add, sub, neg": lambda m, x: 1.0 - (m.vector + x) - (-x),
    "cast": lambda m, x: x.to(torch.complex128).real,
    "clone, dropout": lambda m, x: torch.dropout(x.clone(), 0.5, False),
    "permute": lambda m, x: x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2),
    "tokens last": lambda m, x: (x.movedim(0, -1) * m.vector[:, None]).movedim(-1, 0),
    "tokens in one axis": lambda m, x: x.reshape(-1, SIZE).flip(1).reshape(x.shape),
    "tokens and blocks in one axis": lambda m, x: (x.reshape(-1, 4) @ m.blocks[0]).reshape(x.shape),
    "expand": lambda m, x: x[..., :1].expand(x.shape),
    "slice, cat": lambda m, x: torch.cat([x[..., 5:], 2.0 * x[..., :5]], -1),
    "select, stack": lambda m, x: torch.stack([x[..., i] for i in range(SIZE - 1, -1, -1)], -1),
    "flip": lambda m, x: x.flip(-1),
    "roll": lambda m, x: x.roll(5, -1),
    "cumsum": lambda m, x: x.cumsum(-1),
    "index": lambda m, x: x[..., m.order],
    "index_select": lambda m, x: x.index_select(-1, m.order),
    "repeat_interleave": lambda m, x: x[..., :6].repeat_interleave(2, -1),
    "repeat": lambda m, x: x[..., :4].repeat(*(1,) * (x.ndim - 1), 3),
    "pad": lambda m, x: torch.nn.functional.pad(x[..., 2:], (0, 2)),
    "sum": lambda m, x: x.sum(-1, keepdim=True) * m.vector,
    "mean": lambda m, x: x + x.unflatten(-1, (3, 4)).mean(-2).repeat(*(1,) * (x.ndim - 1), 3),
    "fft": lambda m, x: torch.fft.ifft(torch.fft.fft(x, norm="ortho") * m.vector, norm="ortho").real,
    "rfft": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.vector[:7], n=SIZE),
    "fft2": lambda m, x: torch.fft.fft2(x.unflatten(-1, (3, 4))).imag.flatten(-2) + x,
    "conj": lambda m, x: (torch.fft.fft(x).conj() * 1j).real,
}  # fmt: skip
OTHER: dict[str, Callable[[Program_, Tensor], Tensor]] = {
    "tokens reversed": lambda m, x: x.flip(0),
    "tokens summed": lambda m, x: x + x.sum(0, keepdim=True),
    "tokens joined": lambda m, x: torch.cat([x[1:], x[:1]], 0),
    "tokens traded with features": lambda m, x: x.reshape(SIZE, -1).t().reshape(x.shape),
    "tokens told apart": lambda m, x: x * torch.arange(x.shape[-2]).view(-1, 1),
    "squared": lambda m, x: x * x,
    "rectified": lambda m, x: x.relu(),
    "normalized": lambda m, x: x / x.sum(-1, keepdim=True),
}


class Program_(nn.Module):
    """Steps one after the other, between two activations, beside the input where `beside`."""

    def __init__(self, steps: Program, beside: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.steps, self.beside, self.linear = steps, beside, nn.Linear(SIZE, SIZE)
        self.square = nn.Parameter(torch.randn(SIZE, SIZE, generator=draw))
        self.blocks = nn.Parameter(torch.randn(3, 4, 4, generator=draw))
        self.vector = nn.Parameter(torch.randn(SIZE, generator=draw))
        self.register_buffer("order", torch.randperm(SIZE, generator=draw))
        self.eval().double()

    def forward(self, x: Tensor) -> Tensor:
        x = y = x.sin()
        for step in self.steps:
            y = step(self, y)
        return (y + x if self.beside else y).relu()


def optimized(model: nn.Module, *shape: int) -> graphopt.OptimizedModule:
    """Nothing checks the sites, so that a wrong rule shows in the result."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    fast = graphopt.optimize(
        model, (x,), passes="canonicalize,merge-regions,materialize,canonicalize", validate=False
    )
    assert fast.report.check is not None and fast.report.check.ok, fast.report
    return fast


def calls(fast: graphopt.OptimizedModule) -> list[str]:
    assert fast.graph_module is not None
    return [node.target.__name__.partition(".")[0] for node in fast.graph_module.graph.nodes
            if node.op == "call_function" and "sym" not in node.target.__name__]  # fmt: skip


@pytest.mark.parametrize("name", AFFINE)
def test_op_takes_part(name: str) -> None:
    model = Program_([AFFINE["linear"], AFFINE[name], AFFINE["matmul"]])
    assert calls(optimized(model, 2, 5, SIZE)) == ["sin", "linear", "relu"]


NOT_TURNED = {"cast", "cumsum", "index", "index_select", "repeat_interleave", "repeat", "mean", "fft",
              "rfft", "fft2", "conj"}  # fmt: skip


@pytest.mark.parametrize("name", AFFINE)
def test_cheap_part_is_applied_to_the_matrix(name: str) -> None:
    """In front of a matrix as behind it, no product with the identity written out is needed."""
    for steps in [AFFINE[name], AFFINE["linear"]], [AFFINE["linear"], AFFINE[name]]:
        model = Program_(steps)
        optimized(model, 2, 5, SIZE)
        x = torch.randn(2, 5, SIZE).double()
        tune = graphopt.optimize(model, (x,), passes="canonicalize,merge-regions", validate=False)
        if name in NOT_TURNED and steps[1] is AFFINE["linear"]:
            assert "eye" in calls(tune)
        else:
            assert "eye" not in calls(tune)


@pytest.mark.parametrize("name", OTHER)
def test_op_does_not(name: str) -> None:
    model = Program_([AFFINE["linear"], OTHER[name], AFFINE["matmul"]])
    assert calls(optimized(model, 3, 4, SIZE)) != ["sin", "linear", "relu"]


@given(
    st.lists(st.sampled_from([*AFFINE, *OTHER]), min_size=1, max_size=6), st.booleans(),
    st.sampled_from([(3, 4, SIZE), (4, SIZE), (2, 1, 3, SIZE)]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_programs(names: list[str], beside: bool, shape: tuple[int, ...]) -> None:
    steps = [{**AFFINE, **OTHER}[name] for name in names]
    fast = optimized(Program_(steps, beside), *shape)
    if all(name in AFFINE for name in names):
        assert calls(fast).count("linear") <= 1
