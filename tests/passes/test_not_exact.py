"""What is not exact: models on which a fold, as it is first written down, is wrong.

A row says what must happen to its model instead, in Tune and in Deploy mode: which ops are left, and

- for what is refused, a reason that the report must contain;
- for what is put right (a map of the shift, a merged frame, a kernel with zeros between its taps),
  nothing but the ops.

Either way the outputs are those of the source model on two inputs, and nothing is rolled back: an
error that only validation notices is a wrong fold too. Among them are the defects of published
code (SLAB, IBN-Net, RepVGG, DBB). What training changes anyway (swapped norms, adaptation, low rank,
growth) has specifications of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from tests.helpers import (
    Net,
    optimized,
    prepare,
    reasons,
    tensor,
)
from tests.passes.test_merge_maps import any_merge_pays, conv, norm, seq, total  # noqa: F401

IMAGE = (2, 4, 9, 8)
TOKENS = (2, 5, 8)


class Case(NamedTuple):
    """A model, the ops that must be left of it (those that depend on an input, in order; "..." for
    any), a reason for it, and the linear maps that must keep a bias, if a row is about these."""

    build: Callable[[], nn.Module]
    left: str
    because: str = ""
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    biased: str | None = None


# -- models ---------------------------------------------------------------------------------------


def parameter(*shape: int, seed: int = 3) -> nn.Parameter:
    return nn.Parameter(tensor(*shape, seed=seed))


def net(body: Callable[..., Any], **modules: Any) -> nn.Module:
    """`body(net, *inputs)` over a convolution `a`, unless another one is given."""
    return Net(body, **{"a": conv(), **modules})


class Normalized(nn.Module):
    """(x - mean) / std inside the model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", tensor(4, 1, 1, seed=5))
        self.register_buffer("std", tensor(4, 1, 1, seed=6).abs() + 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)


class IBN(nn.Module):
    """Instance norm for the first half of the channels, batch norm for the rest."""

    def __init__(self, planes: int, half: int) -> None:
        super().__init__()
        self.half, self.conv = half, conv(out=planes)
        self.IN, self.BN = nn.InstanceNorm2d(half, affine=True), norm(planes - half)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.conv(x), self.half, 1)
        return torch.cat((self.IN(first.contiguous()), self.BN(second.contiguous())), 1)


class RepBN(nn.Module):
    """BN(x) + alpha x over tokens, behind a patch embedding with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.bn = conv(2, out=6, stride=2, padding=0), nn.BatchNorm1d(6)
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class PaddedWithItsShift(nn.Module):
    """DBB's BNAndPadLayer: the frame is what the norm makes of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        frame = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        frame = frame.reshape(1, -1, 1, 1)
        x = F.pad(bn(x), (1, 1, 1, 1))
        x[:, :, :1], x[:, :, -1:], x[..., :1], x[..., -1:] = (frame,) * 4
        return x


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """Rotated by an angle for each position, as rotary embeddings do."""
    angle = torch.arange(5, dtype=x.dtype, device=x.device)[:, None] * torch.tensor([1.0, 0.1])
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def attention(
    change: Callable[..., Any] = lambda *qkv: qkv, groups: int = 2, **options: Any
) -> Case:
    """o(attention(q(x), k(y), v(z))), which keeps the biases of q and o."""

    def body(net: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        q, k, v = change(*map(heads, (net.q(x), net.k(y), net.v(z))))
        given = {name: one(net) if callable(one) else one for name, one in options.items()}
        mixed = F.scaled_dot_product_attention(q, k, v, **given)
        return net.o(mixed.transpose(1, 2).flatten(2))

    def build() -> nn.Module:
        sizes = {"q": 8, "k": 4 * groups, "v": 4 * groups, "o": 8}
        linears = {name: nn.Linear(8, size) for name, size in sizes.items()}
        return Net(body, bias=parameter(2, 5, 5), **linears)

    return Case(build, "...", shapes=(TOKENS,) * 3, biased="q o")


def halves(body: Callable[..., Any], channels: int = 2) -> Callable[[], nn.Module]:
    """`body(y, net)` over the output y of a convolution and norms `bn` and `other`."""
    return lambda: net(lambda net, x: body(net.a(x), net), bn=norm(channels), other=norm(channels))


# -- the table --------------------------------------------------------------------------------------

PADS = "pads with zeros: the exact correction is a map"
APART = "used elsewhere"

BORDER = {  # W pad(x + t) is not W pad(x) + W t: the border sees less of t
    "norm, padded conv": Case(lambda: seq(norm(), conv()), "conv2d add"),
    "norm, strided dilated grouped conv": Case(
        lambda: seq(norm(), conv(groups=2, dilation=2, padding=(2, 3), stride=2)), "conv2d add"),
    "norm, frame of zeros, conv": Case(
        lambda: seq(norm(), nn.ZeroPad2d(1), conv(padding=0)), "conv2d add"),
    "bias parameter, padded conv": Case(
        lambda: net(lambda net, x: net.a(x + net.p), p=parameter(4, 1, 1)), "conv2d add"),
    "map of positions, padded conv": Case(
        lambda: net(lambda net, x: net.a(x + net.p), p=parameter(4, 9, 8)), "add conv2d"),
    "shift, padded conv": Case(lambda: net(lambda net, x: net.a(x + 0.7)), "conv2d add"),
    "x * 2 - 1, padded conv": Case(lambda: net(lambda net, x: net.a(x * 2 - 1)), "conv2d add"),
    "shift, pixels for padding": Case(
        lambda: net(lambda net, x: net.a(x + 0.7), a=conv(padding_mode="reflect")), "pad conv2d"),
    "mean and std, padded conv": Case(lambda: Normalized(conv(out=4)), "conv2d add"),
    "mean and std, padded conv that widens": Case(
        lambda: Normalized(conv(out=6)), "sub conv2d", PADS),
    "mean and std, patch embedding": Case(
        lambda: Normalized(conv(2, out=6, stride=2, padding=0)), "conv2d"),
    "std alone, padded conv": Case(
        lambda: net(lambda net, x: net.a(x / net.p.exp()), p=parameter(4, 1, 1)), "conv2d"),
    "x / 255, padded conv": Case(lambda: net(lambda net, x: net.a(x / 255)), "conv2d"),
    "shift, transposed conv": Case(
        lambda: net(lambda net, x: net.a(x + 0.7), a=nn.ConvTranspose2d(4, 1, 2, stride=2)),
        "conv_transpose2d add"),
    "biased 1x1, padded conv": Case(lambda: seq(conv(1), conv()), "conv2d add"),
    "biased 1x1, frame of zeros, conv": Case(
        lambda: seq(conv(1, groups=2), nn.ZeroPad2d(1), conv(padding=0, groups=2)), "conv2d add"),
    "kxk without biases, padded kxk": Case(
        lambda: seq(conv(bias=False), conv(bias=False)), "conv2d conv2d",
        "computes from more than one pixel"),
}  # fmt: skip

NORMS = {  # what a norm behind a map does not pass
    "(N, L, C), norm over L": Case(
        lambda: seq(nn.Linear(8, 6), nn.BatchNorm1d(5)), "linear batch_norm",
        "on axis 2, the norm's channels on axis 1", (TOKENS,)),
    "(N, L, C), norm over L = C": Case(
        lambda: seq(nn.Linear(8, 5), nn.BatchNorm1d(5)), "linear batch_norm",
        "on axis 2, the norm's channels on axis 1", (TOKENS,)),
    "mean that counts padded zeros": Case(
        lambda: seq(conv(), nn.AvgPool2d(3, 1, 1, count_include_pad=True), norm()),
        "conv2d avg_pool2d batch_norm", "counts padded zeros"),
    "mean that counts padded zeros, in front": Case(
        lambda: net(lambda net, x: net.a(F.avg_pool2d(x + 1, 3, 1, 1)), a=conv(padding=0)),
        "add avg_pool2d conv2d", "counts padded zeros"),
    "maximum, norm": Case(lambda: seq(conv(), nn.MaxPool2d(2), norm()),
                          "conv2d max_pool2d batch_norm", "a shift does not pass MaxPool"),
    "maximum, scale of any sign": Case(
        lambda: net(lambda net, x: F.max_pool2d(net.a(x), 2) * net.p, p=parameter(4, 1, 1)),
        "conv2d max_pool2d mul", "must be positive, whatever the parameters become"),
    "frame of zeros, norm": Case(lambda: seq(conv(), nn.ZeroPad2d(1), norm()),
                                 "conv2d pad batch_norm", "pads with a constant"),
    "relu, norm": Case(lambda: seq(conv(), nn.ReLU(), norm()),
                       "conv2d relu batch_norm", "a shift does not pass Relu"),
    "conv with other readers": Case(
        lambda: net(lambda net, x: net.bn(y := net.a(x)) + y.tanh(), bn=norm()),
        "conv2d batch_norm tanh add", APART),
    "no running statistics": Case(
        lambda: seq(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        "conv2d batch_norm", "keeps no running statistics"),
    "layer norm": Case(  # its own statistics stay, and it becomes no RMSNorm
        lambda: Net(lambda net, x: x + net.b(net.n(net.a(x)).relu()),
                    a=nn.Linear(8, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 8)),
        "linear layer_norm relu linear add", shapes=(TOKENS,)),
    "RepBN behind a patch embedding": Case(  # the published merge loses alpha * bias
        RepBN, "conv2d reshape transpose"),
}  # fmt: skip

CHANNELS = {  # a norm over some of the channels
    "IBN": Case(lambda: IBN(6, 4), "conv2d slice instance_norm slice cat"),
    "the other part is read twice": Case(
        halves(lambda y, net: net.bn(y[:, 2:]) + y[:, :2].tanh() * y[:, :2].sigmoid()),
        "conv2d slice slice tanh sigmoid mul add"),
    "each part has a norm": Case(
        halves(lambda y, net: net.bn(y[:, 2:]) * net.other(y[:, :2])), "conv2d slice slice mul"),
    "the part is read twice": Case(
        halves(lambda y, net: net.bn(y[:, 2:]) + y[:, 2:].tanh()),
        "conv2d slice batch_norm tanh add", APART),
    "overlapping parts": Case(
        halves(lambda y, net: net.bn(y[:, 1:]) + y[:, :3].tanh(), 3),
        "conv2d slice batch_norm slice tanh add", "Conv (a) is read by Slice too"),
    "overlapping parts, both with a norm": Case(
        halves(lambda y, net: net.bn(y[:, 1:]) * net.other(y[:, :3]), 3),
        "conv2d slice batch_norm slice batch_norm mul", "Conv (a) is read by Slice too"),
    "every other channel": Case(
        halves(lambda y, net: net.bn(y[:, ::2]) + y[:, 1::2].tanh()),
        "conv2d slice batch_norm slice tanh add", "Slice leaves channels out"),
    "the whole is read too": Case(
        halves(lambda y, net: net.bn(y[:, 2:]) + y.tanh()[:, :2]),
        "conv2d slice batch_norm tanh slice add", "Conv (a) is read by Tanh too"),
}  # fmt: skip

BRANCHES = {  # what published merges lose
    "dilation": Case(
        lambda: total(seq(conv(dilation=2, padding=2), norm()), seq(conv(1), norm()), norm()),
        "conv2d"),
    "kernels that are not square": Case(
        lambda: total(seq(conv((3, 5)), norm()), seq(conv((1, 5)), norm()), seq(conv(1), norm())),
        "conv2d"),
    "DBB with a kernel that is not square": Case(
        lambda: total(conv((3, 5), bias=False), seq(
            conv(1, bias=False), nn.ZeroPad2d((2, 2, 1, 1)), norm(), conv((3, 5), padding=0))),
        "conv2d"),
    "DBB's frame, written by assignments": Case(
        lambda: seq(conv(1, bias=False), PaddedWithItsShift(), conv(padding=0), norm()), "..."),
    "DBB with a bias in its 1x1": Case(
        lambda: net(lambda net, x: net.a(x) + net.c(net.b(x.relu())), b=conv(1), c=conv()),
        "conv2d relu conv2d add add"),
    "RepViT with a 5x5": Case(
        lambda: seq(total(seq(conv(5, groups=4), norm()), conv(1, groups=4), nn.Identity()), norm()),
        "conv2d"),
    "a large kernel without a small one": Case(
        lambda: seq(total(seq(conv(7, groups=4), norm())), nn.ReLU()), "conv2d relu"),
    "even and odd kernels": Case(
        lambda: total(conv(stride=2), conv(2, padding=0, stride=2)), "conv2d conv2d add",
        "not aligned", ((2, 4, 10, 8),)),
    "even and odd kernels that keep the size": Case(
        lambda: total(conv(), conv(4, padding="same")), "conv2d conv2d add",
        "pads its two sides differently"),
}  # fmt: skip

HOMOGENEOUS = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.1),
               "max_pool2d": lambda: nn.MaxPool2d(2)}  # fmt: skip
PRELU = {"prelu": nn.PReLU}
OTHERS = {"hardtanh": nn.ReLU6, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def each(
    acts: dict[str, Callable[[], nn.Module]], body: Callable[..., Tensor], left: str, why: str = "",
    first: str = "",
) -> Case:  # fmt: skip
    """`body(f, a, x)` for each activation f, with a convolution a of its own; f fills in `left`."""

    def build() -> nn.Module:
        fs = nn.ModuleList(make() for make in acts.values())
        convs = nn.ModuleList(conv(groups=2) for _ in acts)
        return Net(
            lambda net, x: [body(f, a, x) for f, a in zip(net.fs, net.convs, strict=True)],
            fs=fs, convs=convs,
        )  # fmt: skip

    return Case(build, " ".join([first, *(left.format(f=name) for name in acts)]), why)


POSITIVE = "must be positive, whatever the parameters become"
ACTIVATIONS = {  # f(c x) = c f(x) for c > 0, and for no other activations
    "positive number behind": each(
        HOMOGENEOUS, lambda f, a, x: f(a(x)) * 0.7, "conv2d {f}"),
    "positive number before": each(
        HOMOGENEOUS, lambda f, a, x: a(f(x * 0.7)), "{f} conv2d"),
    "positive number behind PReLU": each(
        PRELU, lambda f, a, x: f(a(x)) * 0.7, "conv2d {f}"),
    "positive number before PReLU": each(
        PRELU, lambda f, a, x: a(f(x * 0.7)), "{f} conv2d"),
    "negative number behind": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: f(a(x)) * -0.7, "conv2d {f} mul", POSITIVE),
    "negative number before": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: a(f(x * -0.7)), "{f} conv2d", POSITIVE, "mul"),
    "parameter behind": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: f(a(x)) * a.bias[:, None, None], "conv2d {f} mul",
        POSITIVE),
    "positive parameter behind": each(
        HOMOGENEOUS, lambda f, a, x: f(a(x)) * a.bias[:, None, None].exp(), "conv2d {f}"),
    "parameter before": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: a(f(x * a.bias[:, None, None])), "mul {f} conv2d",
        POSITIVE),
    "zero behind": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: f(a(x)) * 0.0, "conv2d {f} mul", POSITIVE),
    "shift behind": each(
        HOMOGENEOUS | PRELU, lambda f, a, x: f(a(x)) + 1, "conv2d {f} add", "a shift does not pass"),
    "number behind other activations": each(
        OTHERS, lambda f, a, x: f(a(x)) * 0.7, "conv2d {f} mul", "which a scale and shift cannot"),
    "number before other activations": each(
        OTHERS, lambda f, a, x: a(f(x * 0.7)), "{f} conv2d", "which a scale and shift cannot", "mul"),
    "number of a gate": Case(  # what is gated takes it, the gate must not
        lambda: Net(lambda net, x, y: F.silu(net.g(y)) * net.u(x) * 0.7,
                    g=nn.Linear(8, 6), u=nn.Linear(8, 6)),
        "linear silu linear mul", shapes=(TOKENS, TOKENS)),
}  # fmt: skip

ATTENTION = {  # softmax ignores what all scores of a query share; its weights add up to one
    "attention": attention(),
    "causal attention": attention(is_causal=True),
    "boolean mask": attention(  # the first query sees nothing, and its weights are zero
        attn_mask=lambda net: torch.ones(5, 5, dtype=torch.bool).tril(-1),
    )._replace(because="masks or drops", biased="q v o"),
    "added mask": attention(attn_mask=lambda net: net.bias)._replace(
        because="masks or drops", biased="q v o"),
    "keys and queries turned": attention(lambda q, k, v: (turned(q), turned(k), v))._replace(
        biased="q k o"),
    "keys of length one": attention(
        lambda q, k, v: (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
    )._replace(biased="q k o"),
    "values turned": attention(lambda q, k, v: (q, k, turned(v)))._replace(biased="q v o"),
    "positions for channels": attention(
        lambda q, k, v: (q, k.transpose(-1, -2).reshape(2, 2, 5, 4), v)
    )._replace(biased="q k o"),
    "shared values": attention(groups=1, enable_gqa=True)._replace(biased="q v o"),
}  # fmt: skip

CASES = {**BORDER, **NORMS, **CHANNELS, **BRANCHES, **ACTIVATIONS, **ATTENTION}


# -- what must happen -------------------------------------------------------------------------------


def acting(fast: graphopt.OptimizedModule) -> list[str]:
    """The ATen ops that depend on an input, but for reading sizes."""
    assert fast.graph_module is not None
    live: set[fx.Node] = set()
    for node in fast.graph_module.graph.nodes:
        if node.op == "placeholder" or live.intersection(node.all_input_nodes):
            live.add(node)
    names = [
        node.target._schema.name.removeprefix("aten::")
        for node in fast.graph_module.graph.nodes
        if node in live and node.op == "call_function" and hasattr(node.target, "_schema")
    ]
    return [name for name in names if name != "sym_size"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_or_put_right(case: Case) -> None:
    model = prepare(case.build())
    for mode in ("tune", "deploy"):
        fast = optimized(model, mode, *case.shapes)
        assert case.left == "..." or acting(fast) == case.left.split(), reasons(fast)
        assert case.because in reasons(fast)
    if case.biased is not None:
        biased = [name for name in ("q", "k", "v", "o") if f"{name}.bias" in fast.state_dict()]
        assert biased == case.biased.split()
