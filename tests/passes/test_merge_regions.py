"""merge-regions: what is affine in each token becomes one linear map, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, optimized, tensor
from tests.passes.test_not_exact import acting

SIZE = 24
SHAPES = {
    "kernel": (SIZE,), "scale": (SIZE,), "angle": (SIZE,), "rows": (4, SIZE), "rank": (2, SIZE),
    "blocks": (6, 4, 4), "circulant": (3, 3, 8),
}  # fmt: skip


class Adapted(nn.Module):
    """A linear map with something beside, in front or behind, between two activations."""

    def __init__(self, adapter: Callable[[Adapted, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.adapter = nn.Linear(SIZE, SIZE), adapter
        draw = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw)))
        self.register_buffer("order", torch.randperm(SIZE, generator=draw))
        self.eval().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self, x.sin()).relu()


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """RoAd (arXiv 2409.00119): pairs of features are rotated and stretched."""
    a, b = x.view(-1, 2, 4).unbind(1)
    turned = torch.stack([-b, a], 1).view(x.shape)
    return x * angle.cos() + turned * angle.sin()


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """C3A: a circular convolution of each block with each other one."""
    blocks = torch.fft.fft(x.unflatten(-1, (3, 8)))
    product = torch.einsum("...gx,ygx->...yx", blocks, torch.fft.fft(kernel))
    return torch.fft.ifft(product).real.flatten(-2)


MERGED: dict[str, Callable[[Adapted, Tensor], Tensor]] = {
    "OFT": lambda m, x: m.linear(
        torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (6, 4)), m.blocks).flatten(-2)
    ),
    "RoAd": lambda m, x: rotated(m.linear(x), m.angle),
    "C3A": lambda m, x: m.linear(x) + convolved(x, m.circulant),
    "MiSS": lambda m, x: m.linear(x) + x.unflatten(-1, (6, 4)).sum(-2) @ m.rows,
    "low rank, masked": lambda m, x: m.linear(x) + (x @ m.rank.T * m.scale[:2]) @ m.rank / m.scale[0],
    "spectral filter of permuted features": lambda m, x: m.linear(x) + torch.fft.irfft(
        torch.fft.rfft(x[..., m.order]) * torch.fft.rfft(m.kernel), n=SIZE
    ),
    "running sums, reversed": lambda m, x: m.linear(x) - 0.1 * x.flip(-1).cumsum(-1),
    "heads that trade places": lambda m, x: m.linear(
        x.view(*x.shape[:-1], 4, 6).transpose(-1, -2).flatten(-2).roll(5, -1) * m.scale
    ),
    "neighbours, padded": lambda m, x: m.linear(x)
    + torch.cat([x[..., 1:] - x[..., :-1], m.scale[0] * x[..., :1]], -1),
    "tokens before features": lambda m, x: m.linear(x)
    + torch.matmul(m.rank.T @ m.rank, x.transpose(-1, -2)).transpose(-1, -2),
    "tokens in one axis": lambda m, x: m.linear(x)
    + torch.addmm(m.scale, x.reshape(-1, SIZE), m.rank.T @ m.rank, alpha=0.5).view(x.shape),
    "two in a row": lambda m, x: rotated(m.linear(rotated(x, m.angle) + m.scale), m.kernel) + m.scale,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, SIZE), (2, 5, SIZE), (2, 3, 5, SIZE)], ids=str)
@pytest.mark.parametrize("name", MERGED)
def test_affine_adapter_merges(name: str, shape: tuple[int, ...]) -> None:
    model = Adapted(MERGED[name])
    optimized(model, "tune", shape, passes="canonicalize,merge-regions")
    fast = optimized(model, "deploy", shape, passes="canonicalize,merge-regions,materialize")
    assert calls(fast) == ["sin", "linear", "relu"]


REFUSED: dict[str, tuple[Callable[[Adapted, Tensor], Tensor], str]] = {
    "nonlinear": (
        lambda m, x: m.linear(x) + torch.fft.irfft(torch.fft.rfft(x[..., m.order]).abs(), n=SIZE),
        "Abs is not affine",
    ),
    "gated": (lambda m, x: m.linear(x) + x * (x @ m.scale).unsqueeze(-1), "twice"),
    "mixed tokens": (
        lambda m, x: m.linear(x) + x.flip(1) * m.scale, "mixes its tokens with each other"
    ),
    "per token": (
        lambda m, x: m.linear(x) + x * torch.stack([m.scale, m.kernel, m.angle]),
        "differs from token to token",
    ),
    "laid out differently": (
        lambda m, x: m.linear(x) + x.transpose(1, 2).reshape(x.shape), "tokens"
    ),
    "dropout in training": (
        lambda m, x: m.linear(x) + torch.dropout(x, 0.5, True), "drops at random"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused_with_the_reason(name: str) -> None:
    adapter, reason = REFUSED[name]
    x = torch.randn(2, 3, SIZE, dtype=torch.float64)
    fast = graphopt.optimize(Adapted(adapter), (x,), passes="canonicalize,merge-regions")
    assert [one for one in fast.report.applied if one.rewrite == "merge-region"] == []
    assert any(reason in one.reason for one in fast.report.refused), fast.report.refused


def test_what_would_cost_more_stays() -> None:
    class Reversed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 0.5 * x.flip(-1)).relu()

    assert calls(optimized(Reversed(), "deploy", (2, 3, 2048))) == ["flip", "mul", "add", "relu"]


def test_a_table_does_not_grow() -> None:
    class Tables(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.words, self.more = nn.Embedding(10, 8), nn.Embedding(10, 8)
            self.out = nn.Linear(8, size)
            self.eval().double()

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.out(self.words(tokens) + 0.5 * self.more(tokens))
            return y.relu()

    tokens = torch.randint(0, 10, (3, 7))
    wide, narrow = (graphopt.optimize(Tables(size), (tokens,)) for size in (17, 16))
    assert calls(wide) == ["embedding", "linear", "relu"]
    assert calls(narrow) == ["embedding", "relu"]
    assert tuple(next(iter(narrow.parameters())).shape) == (10, 16)


def calls(model: nn.Module) -> list[str]:
    graph = model.graph_module.graph  # type: ignore[union-attr]
    return [node.target.__name__.partition(".")[0] for node in graph.nodes
            if node.op == "call_function" and "sym" not in node.target.__name__]  # fmt: skip


def test_heads_that_are_joined_are_one_token() -> None:
    """GPT-2 reads the heads of attention as rows of a matrix; an adapter beside it reads tokens."""

    class Joined(nn.Module):
        def __init__(self, low_rank: bool) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)
            self.low_rank = low_rank

        def forward(self, heads: Tensor) -> Tensor:  # [batch, heads, tokens, features]
            x = heads.sin().transpose(1, 2).reshape(heads.shape[0], -1, 16)
            y = torch.addmm(self.bias, x.view(-1, 16), self.weight).view(*x.shape[:-1], 8)
            return (y + self.up(self.down(x)) if self.low_rank else y).relu()

    torch.manual_seed(0)
    for low_rank in (False, True):
        x = torch.randn(2, 4, 5, 4).double()
        model = Joined(low_rank).double().eval()
        fast = graphopt.optimize(model, (x,), passes="canonicalize,merge-regions")
        assert fast.report.rolled_back == []
        assert torch.allclose(fast(x), model(x), atol=1e-13)
        assert acting(fast) == ["sin", "transpose", "reshape", "linear", "relu"]


@pytest.mark.parametrize("passes", ["merge-regions", "canonicalize,merge-regions,canonicalize"])
def test_one_matrix_is_the_weight_as_it_is(passes: str) -> None:
    """The map of an identity through reshapes and one product is that matrix, and takes no product."""
    net = Net(
        lambda net, x: torch.addmm(net.b, x.sin().view(-1, 6), net.w).view(2, 5, 4),
        w=nn.Parameter(tensor(6, 4)), b=nn.Parameter(tensor(4)),
    )  # fmt: skip
    fast = graphopt.optimize(net.eval(), (tensor(2, 5, 6),), passes=passes)
    assert acting(fast)[-1] == "linear"
    assert fast.graph_module is not None
    assert not {"matmul", "mul", "addmm"} & {
        node.target._schema.name.removeprefix("aten::")
        for node in fast.graph_module.graph.nodes if hasattr(node.target, "_schema")
    }  # fmt: skip


def test_integers_are_looked_up_and_nothing_else() -> None:
    """A padding mask of integers is affine arithmetic, but it has no features that a map could mix."""
    net = Net(
        lambda net, x, keep: (x @ net.w) + ((1.0 - keep[:, None, :]) * -9.0).expand(-1, x.shape[1], -1),
        w=nn.Parameter(tensor(4, 5)),
    )  # fmt: skip
    fast = graphopt.optimize(
        net.eval(), (tensor(2, 3, 4), torch.tensor([[1] * 5, [0, 1, 1, 0, 1]]))
    )
    assert fast.report.rolled_back == []
