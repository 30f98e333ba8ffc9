"""The specification of `untie`: every reader of a parameter reads one of its own.

Without it, what would store a tied parameter twice is refused, with the reader named.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt
from tests.helpers import assert_equal, output_of
from tests.passes.test_not_exact import acting


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(16, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Tied(nn.Module):
    """A language model that reads its table at both ends, with an adapter on its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = LowRank(nn.Linear(16, 20, bias=False))
        self.head.base.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embed(tokens))))


class Replicated(nn.Module):
    """One layer called twice, with an adapter of its own each time (layer_replication of PEFT)."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        layer = nn.Linear(16, 16)
        self.first = LowRank(layer)
        self.second = self.first if same else LowRank(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 19]])


def optimized(model: nn.Module, x: Tensor, passes: str = "deploy") -> graphopt.OptimizedModule:
    torch.manual_seed(0)
    model = model.double().eval()
    fast = graphopt.optimize(model, (x,), passes=passes)
    assert fast.report.rolled_back == []
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))
    return fast


def refusal(fast: graphopt.OptimizedModule, rewrite: str) -> str:
    (found,) = (one for one in fast.report.refused if one.rewrite == rewrite)
    return found.reason


def sizes(fast: graphopt.OptimizedModule) -> int:
    return sum(one.numel() for one in fast.parameters())


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    # The incumbent merges it into the table too, and says nothing but a warning.
    fast = optimized(Tied(), TOKENS)
    # The inner map goes into the table: as much goes away as comes.
    assert acting(fast) == ["embedding", "relu", "linear", "linear", "add"]
    assert refusal(fast, "merge-linear-branches") == (
        "embed.weight is read by embed too, and would be stored twice (the pass untie gives every "
        "reader its own)"
    )


def test_and_merged_where_that_is_asked_for() -> None:
    fast = optimized(Tied(), TOKENS, "untie,deploy")
    assert acting(fast) == ["embedding", "relu", "linear"]  # the table takes the inner map in too
    assert sizes(fast) == 2 * 20 * 16


def test_replicated_layers_with_an_adapter_each() -> None:
    x = torch.randn(3, 16).double()
    assert acting(optimized(Replicated(), x)).count("add") == 2
    fast = optimized(Replicated(), x, "untie,deploy")
    assert acting(fast) == ["linear", "relu", "linear"]
    assert sizes(fast) == 2 * 16 * 16 + 2 * 16


def test_a_layer_called_twice_merges_once() -> None:
    # Both calls have the same adapter: the merged weight is shared as the weight was.
    fast = optimized(Replicated(same=True), torch.randn(3, 16).double())
    assert acting(fast) == ["linear", "relu", "linear"]
    assert sizes(fast) == 16 * 16 + 16


def test_what_is_not_tied_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    fast = graphopt.optimize(model, (torch.randn(2, 16).double(),), passes="untie")
    assert list(fast.state_dict()) == list(model.state_dict())
    assert fast.report.applied == []


# -- weights stored in a byte per element -----------------------------------------------------------


class Quantized(nn.Module):
    """A linear map with int8 weights and a scale per row, and an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (16, 16), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(16, 1) / 100)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base = nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)
        return (base + self.up(self.down(x))).tanh()


def test_a_quantized_base_stays_quantized() -> None:
    fast = optimized(Quantized(), torch.randn(3, 16).double())
    assert fast.codes.dtype == torch.int8
    assert refusal(fast, "merge-linear-branches").startswith(
        "codes would be stored as torch.float64 (materialize{dequantize=true} before it allows that)"
    )


def test_and_is_expanded_and_merged_where_that_is_asked_for() -> None:
    x = torch.randn(3, 16).double()
    fast = optimized(Quantized(), x, "materialize{dequantize=true},deploy")
    assert acting(fast) == ["linear", "tanh"]
