"""The specification of `absorb-scales` on norms: gain and shift move into every map that reads them.

    W (norm(x) * gain + shift) + b  =  (W gain) norm(x) + (b + W shift)

All readers have to take them in: a skip that reads the norm (post-norm), a padded convolution, which sees
less of the shift at its border, or a head whose weight is tied keeps them where they are.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, output_of, prepare, reasons, tensor

aten = torch.ops.aten
TOKENS = (3, 5, 8)
IMAGE = (3, 8, 5, 5)


def norms(fast: graphopt.OptimizedModule) -> list[int]:
    """For every norm that is computed, how many parameters it reads."""
    nodes = fast.graph_module.graph.find_nodes
    kinds = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
    found = [node for kind in kinds for node in nodes(op="call_function", target=kind)]
    return [len(node.all_input_nodes) - 1 for node in found]


def drawn(model: nn.Module) -> nn.Module:
    """In float64, gains of both signs with a zero, shifts."""
    for module in prepare(model).modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -2, 2).view(-1).data[0] = 0
    return model


def check(model: nn.Module, left: list[int], *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    drawn(model)
    inputs = [tensor(*shape) for shape in shapes or (TOKENS,)]
    for mode in ("tune", "deploy"):
        fast = graphopt.optimize(model, tuple(inputs), mode=mode)
        assert norms(fast) == left, reasons(fast)
        assert_equal(output_of(fast, inputs), output_of(model, inputs))
    return fast


def maps(body, **modules) -> nn.Module:
    return Net(body, **{"norm": nn.LayerNorm(8), "a": nn.Linear(8, 4), "b": nn.Linear(8, 4, bias=False),
                        **modules})  # fmt: skip


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8, bias=False)]
)
def test_every_map_that_reads_a_norm_takes_it_in(norm):
    check(maps(lambda net, x: net.a(net.norm(x)) * net.b(net.norm(x)), norm=norm), [0])
    once = maps(lambda net, x: (lambda y: net.a(y) * net.b(y))(net.norm(x)), norm=norm)
    check(once, [0])


def test_one_token_of_a_norm():
    check(maps(lambda net, x: net.a(net.norm(x)[:, 0])), [0])
    check(maps(lambda net, x: net.a(net.norm(x)[:, 1:].mean(1))), [0])


def test_a_gain_written_as_one_plus_a_weight():
    """As Gemma has it, from the ops."""

    class Gemma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))
            self.a = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return self.a(
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)
            )

    model, x = prepare(Gemma()), tensor(*TOKENS)
    fast = graphopt.optimize(model, (x,))
    assert [name for name, _ in fast.named_parameters()] == ["a.weight"]
    assert_equal(fast(x), model(x))


def test_groups_of_channels_and_a_convolution():
    group = nn.GroupNorm(2, 8)
    check(Net(lambda net, x: net.c(net.norm(x)), norm=group, c=nn.Conv2d(8, 4, 1)), [0], IMAGE)
    check(Net(lambda net, x: net.c(net.norm(x)), norm=group, c=nn.Conv2d(8, 4, 3)), [0], IMAGE)


REFUSED = {
    "another reader": (
        maps(lambda net, x: (lambda y: net.a(y).sum() + y)(net.norm(x))),
        TOKENS, "cannot take it in",
    ),
    "a skip behind the norm": (
        maps(lambda net, x: (lambda y: y + net.c(net.a(y).relu()))(net.norm(x)), c=nn.Linear(4, 8)),
        TOKENS, "cannot take it in",
    ),
    "zero padding": (
        Net(lambda net, x: net.c(net.norm(x)), norm=nn.GroupNorm(2, 8), c=nn.Conv2d(8, 4, 3, padding=1)),
        IMAGE, "cannot take it in",
    ),
    "several axes": (
        maps(lambda net, x: net.a(net.norm(x)), norm=nn.LayerNorm((5, 8))),
        TOKENS, "several axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_keeps_its_gain(name):
    model, shape, reason = REFUSED[name]
    fast = check(model, [2], shape)
    assert reason in reasons(fast)


def test_a_tied_head_keeps_its_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.norm(self.table(ids)))

    model, ids = drawn(Tied()), torch.randint(11, (3, 5))
    fast = graphopt.optimize(model, (ids,))
    assert norms(fast) == [2] and "stored twice" in reasons(fast)
    assert_equal(fast(ids), model(ids))


class Normalized(nn.Module):
    """Attention over normalized queries and keys, as they are or turned by `rotate`."""

    def __init__(self, norm: type[nn.Module], rotate: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm_q, self.norm_k = norm(4), norm(4, eps=1e-3)
        self.rotate = rotate

    def forward(self, x):
        q, k, v = (one.unflatten(-1, (2, 4)) for one in (self.query(x), self.key(x), x))
        q, k, v = (one.mT.mT.transpose(1, 2) for one in (self.norm_q(q), self.norm_k(k), v))
        if self.rotate:
            q, k = (torch.cat([-one[..., 2:], one[..., :2]], -1) * 0.5 + one for one in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v).sin()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_queries_and_keys_share_one_gain(norm):
    """softmax(q (g k + b)^T) = softmax((g q) k^T); the shift of the queries stays."""
    fast = check(Normalized(norm), [0, 2 if norm is nn.LayerNorm else 1])
    assert "norm_k.weight" not in dict(fast.named_parameters())


def test_what_is_rotated_keeps_both_gains():
    check(Normalized(nn.RMSNorm, rotate=True), [1, 1])


def dyt(net, x):
    return net.b(torch.tanh(net.alpha * net.a(x).mT.mT) * net.gamma + net.beta)


def power_norm(net, x):
    """In groups of two features, as in eval mode: phi is a running mean square."""
    g = x.unflatten(-1, (4, 2))
    g = (g * torch.rsqrt(g.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
    return net.b(g / torch.sqrt(net.phi.abs() + 1e-5) * net.gamma + net.beta)


def evonorm_s0(net, x):
    grouped = x.unflatten(1, (2, 4)).flatten(2)
    deviation = (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = (x * torch.sigmoid(net.v * x)).unflatten(1, (2, 4)).flatten(2) / deviation
    return net.c(normed.reshape_as(x) * net.gamma.view(-1, 1, 1) + net.beta.view(-1, 1, 1))


def repbn(net, x):
    y = x.mT
    return net.b((net.bn(y) + net.alpha * y).mT)


OTHERS = {
    "DyT: gain and shift into the next map, alpha into the one before": (dyt, TOKENS, {"a", "b"}),
    "PowerNorm: running mean square, gain and shift": (power_norm, TOKENS, {"b"}),
    "EvoNorm S0: gain and shift": (evonorm_s0, IMAGE, {"c", "v"}),
    "RepBN: statistics, gain, shift and skip": (repbn, TOKENS, {"b"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_static_parts_of_other_norms(name):
    body, shape, left = OTHERS[name]
    vectors = {one: nn.Parameter(torch.randn(8)) for one in ("gamma", "beta", "phi")}
    model = prepare(
        Net(body, **vectors, alpha=nn.Parameter(torch.tensor(0.7)), v=nn.Parameter(torch.tensor(1.3)),
            a=nn.Linear(8, 8), b=nn.Linear(8, 4, bias=False), c=nn.Conv2d(8, 4, 1, bias=False),
            bn=nn.BatchNorm1d(8))
    )  # fmt: skip
    x = tensor(*shape)
    fast = graphopt.optimize(model, (x,))
    assert {one.split(".")[0] for one, _ in fast.named_parameters()} == left, reasons(fast)
    assert not list(fast.named_buffers())
    assert_equal(fast(x), model(x))
