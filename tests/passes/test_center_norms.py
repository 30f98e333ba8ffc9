"""The specification of `center-norms`: a layer norm does not see the mean of what it reads.

    norm(x + W z + b)  =  rms(C x + (C W) z + C b),    C = I - 1 1^T / d

All readers of the stream have to be such norms, and all its writers maps of parameters, whose means can go
once and for all.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import graphopt
from tests.helpers import Net, assert_equal, output_of, prepare, reasons, tensor

aten = torch.ops.aten
TOKENS = (3, 5, 8)
IMAGE = (3, 4, 6, 6)


def kinds(fast: graphopt.OptimizedModule) -> tuple[int, int]:
    """How many layer norms and how many RMS norms are computed."""
    nodes = fast.graph_module.graph.find_nodes
    return (
        len(nodes(op="call_function", target=aten.layer_norm.default)),
        len(nodes(op="call_function", target=aten.rms_norm.default)),
    )


def check(
    model: nn.Module, left: tuple[int, int], *inputs: torch.Tensor, mode: str = "deploy"
) -> graphopt.OptimizedModule:
    prepare(model)
    inputs = inputs or (tensor(*TOKENS),)
    fast = graphopt.optimize(model, inputs, mode=mode)
    assert kinds(fast) == left, reasons(fast)
    assert_equal(output_of(fast, inputs), output_of(model, inputs))
    return fast


class Block(nn.Module):
    """A pre-norm block; `scale` is its layer scale."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8, eps=1e-3)
        self.mix, self.up, self.down = nn.Linear(5, 5), nn.Linear(8, 16), nn.Linear(16, 8)
        self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8)) if scale else 1.0

    def forward(self, x):
        x = x + self.scale * self.out(self.mix(self.value(self.norm1(x)).mT).mT)
        return x + self.scale * self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """`embed` writes the stream, two blocks, a norm, a head."""

    def __init__(self, embed: nn.Module, scale: bool = False) -> None:
        super().__init__()
        self.embed, self.position = embed, nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(Block(scale), Block(scale))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


@pytest.mark.parametrize("scale", [False, True])
def test_every_norm_of_a_pre_norm_transformer(scale):
    fast = check(Transformer(nn.Linear(8, 8, bias=False), scale), (0, 5))
    assert fast.report.after.flops < fast.report.before.flops


def test_tune_mode_keeps_the_norms():
    check(Transformer(nn.Linear(8, 8)), (5, 0), mode="tune")


def test_an_embedding_table():
    check(Transformer(nn.Embedding(11, 8)), (0, 5), torch.randint(11, (3, 5)))


def test_a_tied_table_is_not_stored_twice():
    model = Transformer(nn.Embedding(11, 8))
    model.head = nn.Linear(8, 11)
    model.head.weight = model.embed.weight
    fast = check(model, (5, 0), torch.randint(11, (3, 5)))
    assert "embed.weight is read by head too, and would be stored twice" in reasons(fast)
    untied = graphopt.optimize(model, (torch.randint(11, (3, 5)),), passes="untie,deploy")
    assert kinds(untied) == (0, 5)


class Patches(nn.Module):
    """Patches of an image behind a class token: [N, 1 + 4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = nn.Conv2d(4, 8, 3, stride=3), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        return torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_patches_and_a_class_token_in_any_batch(batch):
    model = prepare(Transformer(Patches()))
    fast = graphopt.optimize(model, (tensor(*IMAGE),))
    assert kinds(fast) == (0, 5)
    x = tensor(batch, *IMAGE[1:])
    assert_equal(fast(x), model(x))


def test_norms_of_channels_that_lie_on_axis_1():
    """As (N, C, H, W) models write layer norms."""

    def body(net, x):
        y = net.conv(x)
        y = y + net.more(x)
        return net.head(net.norm(nn.functional.pad(y, (1, 1)).roll(1, 2).permute(0, 2, 3, 1)))

    maps = {"conv": nn.Conv2d(4, 8, 3, padding=1), "more": nn.Conv2d(4, 8, 1)}
    check(Net(body, **maps, norm=nn.LayerNorm(8), head=nn.Linear(8, 2)), (0, 1), tensor(*IMAGE))


def test_a_norm_of_a_pooled_stream():
    body = lambda net, x: net.head(net.norm(net.embed(x)[:, 1:].mean(1)))  # noqa: E731
    check(Net(body, embed=nn.Linear(8, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 2)), (0, 1))


def test_a_norm_that_keeps_its_shift_stays_and_reads_the_centred_stream():
    def body(net, x):
        y = net.embed(x)
        return net.head(net.norm(y)) + net.free(y).cos().sum(-1, True)

    check(stream(body, free=nn.LayerNorm(8)), (1, 1))


def stream(body, **modules) -> nn.Module:
    return Net(body, **{"embed": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 2),
                        **modules})  # fmt: skip


REFUSED = {
    "the stream itself is returned": (
        stream(lambda net, x: (lambda y: (y, net.head(net.norm(y))))(net.embed(x))),
        "what the model returns sees the mean of Linear (embed)",
    ),
    "a head reads it without a norm": (
        stream(lambda net, x: (lambda y: net.head(y) + net.head(net.norm(y)))(net.embed(x))),
        "Linear (head) sees the mean of Linear (embed)",
    ),
    "an RMS norm reads it": (
        stream(lambda net, x: (lambda y: net.head(net.rms(y) + net.norm(y)))(net.embed(x)),
               rms=nn.RMSNorm(8)),
        "RMSNorm (rms) sees the mean of Linear (embed)",
    ),
    "post-norm: the skip carries gain and shift": (
        stream(lambda net, x: (lambda y: net.head(net.norm2(y + net.mid(y))))(net.norm(net.embed(x))),
               norm2=nn.LayerNorm(8), mid=nn.Linear(8, 8)),
        "LayerNorm (norm) has a mean of its own",
    ),
    "the input of the model writes it": (
        stream(lambda net, x: net.head(net.norm(x + net.embed(x)))),
        "the input args_0 has a mean of its own",
    ),
    "an activation writes it": (
        stream(lambda net, x: net.head(net.norm(net.embed(x).sigmoid()))),
        "Sigmoid has a mean of its own",
    ),
    "groups": (
        stream(lambda net, x: net.head(net.norm(net.conv(x.mT).mT)), conv=nn.Conv1d(8, 8, 1, groups=2)),
        "Conv (conv) has groups, over which the mean goes",
    ),
    "features of several tokens are joined": (
        stream(lambda net, x: net.wide(net.norm(torch.cat([net.embed(x), net.embed(x.flip(1))], 2))),
               norm=nn.LayerNorm(16), wide=nn.Linear(16, 2)),
        "joins the features of several values",
    ),
    "every token is scaled by another vector": (
        stream(lambda net, x: net.head(net.norm(net.embed(x) * x))),
        "scales every feature by another factor",
    ),
    "a shift that no map has taken in": (
        stream(lambda net, x: net.head(net.norm(net.embed(x)).cos())),
        "LayerNorm (norm) keeps its shift, and an RMS norm that shifts is two ops",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_keeps_its_layer_norms(name):
    model, reason = REFUSED[name]
    passes = "canonicalize,[absorb-scales],center-norms"
    fast = graphopt.optimize(prepare(model), (tensor(*TOKENS),), passes=passes)
    assert kinds(fast)[0] == sum(isinstance(one, nn.LayerNorm) for one in model.modules())
    assert reason in reasons(fast)
    assert_equal(output_of(fast, [tensor(*TOKENS)]), output_of(model, [tensor(*TOKENS)]))


def test_elements_that_are_dropped_in_training_break_the_mean():
    model = stream(
        lambda net, x: net.head(net.norm(nn.functional.dropout(net.embed(x), 0.5, training=True)))
    )
    fast = graphopt.optimize(prepare(model), (tensor(*TOKENS),), validate=False)
    assert kinds(fast) == (1, 0) and "drops features at random" in reasons(fast)


WAYS = {
    "permute": lambda net, x: x.permute(1, 0, 2),
    "reshape": lambda net, x: x.reshape(-1, 1, x.shape[-1]),
    "select": lambda net, x: x[:, :1] + x[:, 1:2],
    "roll": lambda net, x: x.roll(2, 1),
    "stack": lambda net, x: torch.stack([x, 2 * x]).sum(0),
    "factor": lambda net, x: x * net.gates[0],
    "quotient": lambda net, x: x / net.gates[1],
    "pad": lambda net, x: nn.functional.pad(x, (0, 0, 1, 2)),
    "drop": lambda net, x: nn.functional.dropout(x, 0.3, training=False),
    "branch": lambda net, x: x + net.extra(torch.ones(6, dtype=x.dtype)),
    "read": lambda net, x: x - net.extra(net.norm(x)[..., :6].cos()),
}


@given(st.lists(st.sampled_from(sorted(WAYS)), max_size=5), st.booleans(), st.booleans())
def test_whatever_passes_the_mean_on(ways, shift, shared):
    """Any sequence of them between writers and readers; nothing validates the sites here."""

    def body(net, x):
        y = net.embed(x)
        for way in ways:
            y = WAYS[way](net, y)
        return net.head(net.norm(y)) + (net.head(net.norm(y * 2)) if shared else 0)

    model = stream(
        body, embed=nn.Linear(8, 8, bias=shift), extra=nn.Linear(6, 8), gates=nn.Parameter(torch.randn(2))
    )  # fmt: skip
    x = tensor(*TOKENS)
    fast = graphopt.optimize(prepare(model), (x,), passes="tune,center-norms", validate=False)
    assert kinds(fast)[1] > 0, reasons(fast)
    assert_equal(output_of(fast, [x]), output_of(model, [x]))
