"""The specification of `absorb-scales`: numbers, per-channel scales and shifts, and biases of attention
end up in the weights around them.

    c (W x + b)                     =  (c W) x + c b
    W (s x + t) + b                 =  (W s) x + (b + W t)
    softmax(q (k + 1 b^T)^T) v      =  softmax(q k^T) v
    softmax(a) (v + 1 b^T)          =  softmax(a) v + 1 b^T

A row of a table is a model, and the ops that are left of it in both modes. Where these laws end is
in `test_not_exact`.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from tests.helpers import Lambda, Net, assert_equal, output_of, prepare, reasons, tensor
from tests.passes.test_merge_maps import CONV, any_merge_pays, conv, norm, seq  # noqa: F401
from tests.passes.test_not_exact import IMAGE, TOKENS, acting, heads, optimized, parameter

CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def leaves(model: nn.Module, left: str, *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    """These ops are left, in both modes. Returns the Deploy form."""
    prepare(model)
    for mode in ("tune", "deploy"):
        fast = optimized(model, mode, *shapes)
        assert acting(fast) == left.split(), reasons(fast)
    return fast


def images(body: Any, **modules: Any) -> nn.Module:
    """`body(net, *inputs)` over convolutions `a` and `b`, unless others are given."""
    return Net(body, **{"a": conv(groups=2), "b": conv(padding=0), **modules})


def tokens(body: Any, **modules: Any) -> nn.Module:
    """`body(net, *inputs)` over linear maps `a`, `b` and `c`."""
    return Net(body, **{"a": nn.Linear(8, 4), "b": nn.Linear(8, 4, bias=False),
                        "c": nn.Linear(8, 8), **modules})  # fmt: skip


# -- one map ----------------------------------------------------------------------------------------

LINEAR = {  # all of these are one linear map
    "behind": lambda net, x: net.a(x) * 0.7,
    "in front": lambda net, x: net.a(0.7 * x),
    "divided": lambda net, x: net.a(x / 3) / 7,
    "shifted behind": lambda net, x: net.a(x) - 3,
    "shifted in front": lambda net, x: net.a(3 + x),
    "without a bias": lambda net, x: net.b((x - 3) / 7) + 0.3,
    "scaled and shifted, again and again": lambda net, x: ((net.a(x * 3 - 1) + 2) / 7 - 1) * -0.3,
    "zero": lambda net, x: net.a(x) * 0,
    "by keyword": lambda net, x: torch.mul(other=0.7, input=F.linear(
        bias=net.a.bias, input=torch.div(other=3, input=x), weight=net.a.weight)),
    "with a factor of its own": lambda net, x: torch.add(torch.sub(net.a(x), 3, alpha=2), 1, alpha=3),
    "in place": lambda net, x: net.a(x).mul_(0.7).add_(1),
    "per feature": lambda net, x: net.a((x - net.p) / net.p.exp()) * net.q + net.q,
    "a product with a parameter": lambda net, x: x @ net.c.weight * 0.7 + 0.3,
    "mean of two maps": lambda net, x: (net.a(x) + net.b(x)) / 2,
    "weighted difference": lambda net, x: 0.7 * net.a(x) + 0.3 * net.b(x * 3),
    "mean with the input": lambda net, x: (net.c(x) + x) / 2,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_one_linear_map(name):
    leaves(tokens(LINEAR[name], p=parameter(8), q=parameter(4)), "linear", TOKENS)


@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (2, 2), (3, 1)])
def test_convolutions_of_every_rank(rank, groups):
    """A convolution takes both sides; a transposed one a scale in front, and all behind."""
    image = (2, 4, *(7, 6, 5)[:rank])
    made = CONV[rank](4, 6, 3, groups=groups)
    leaves(Net(lambda net, x: net.a(x * 3 - 1) / 7 + 2, a=made), f"conv{rank}d", image)
    made = CONV_TRANSPOSE[rank](4, 6, 3, stride=2, padding=1, groups=groups)
    body = Net(lambda net, x: net.a(x * 3) / 7 + 2, a=made)
    leaves(body, f"conv_transpose{rank}d", image)


@pytest.mark.parametrize("options", [
    {"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
], ids=["patches", "dilated", "circular"])  # fmt: skip
def test_a_mean_and_a_deviation_enter_the_first_convolution(options):
    std = torch.tensor([0.2, 0.3, 0.4, 0.5]).reshape(4, 1, 1)
    body = Net(lambda net, x: net.a((x - net.mean) / net.std), a=nn.Conv2d(4, 6, **options),
               mean=parameter(4, 1, 1), std=nn.Parameter(std.double()))  # fmt: skip
    leaves(body, "pad conv2d" if "padding" in options else "conv2d", IMAGE)


def test_a_number_that_is_a_tensor():
    optimized(
        prepare(tokens(lambda net, x: net.a(x) * torch.tensor(0.7).to(x.dtype))), "deploy", TOKENS
    )


def test_pixels_as_integers():
    """The cast stays between the pixels and the map that takes in what follows."""
    net = prepare(Net(lambda net, x: net.a((x.double() / 255 - 0.5) / 0.2), a=conv(padding=0)))
    pixels = (tensor(*IMAGE).abs() * 80).to(torch.uint8)
    fast = graphopt.optimize(net, (pixels,))
    assert acting(fast) == ["to", "conv2d"]
    assert_equal(output_of(fast, (pixels,)), output_of(net, (pixels,)))


# -- through what stands between --------------------------------------------------------------------

BEHIND = {  # body(conv(x)) * 0.7 + 0.3: the ops without the last two
    "upsample_nearest2d": lambda y: F.interpolate(y, scale_factor=2),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "mean": lambda y: y.mean((2, 3)),
    "adaptive_avg_pool2d": lambda y: F.adaptive_avg_pool2d(y, 3),
    "avg_pool2d": lambda y: F.avg_pool2d(y, 2),
    "pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "reshape": lambda y: y.reshape(2, 2, 2, -1),
    "slice": lambda y: y[:, 1:3],
    "rsub": lambda y: 1 - y,
    "": lambda y: F.dropout(y.clone(), 0.5, training=False),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_number_and_a_shift_pass_towards_the_convolution(name):
    body = images(lambda net, x: BEHIND[name](net.a(x)) * 0.7 + 0.3)
    fast = optimized(prepare(body), "deploy", IMAGE)
    assert len(acting(fast)) == 1 + bool(name) and not {"mul", "add"} & {*acting(fast)}


@pytest.mark.parametrize(("body", "left"), [
    (lambda net, x: net.b(F.avg_pool2d(F.max_pool2d(x * 0.7, 2), 2, 1)), "max_pool2d avg_pool2d conv2d"),
    (lambda net, x: net.b(F.avg_pool2d(x * 0.7 + 0.3, 2)), "avg_pool2d conv2d"),
    (lambda net, x: net.d((x * 0.7 + 0.3).mean((2, 3))), "mean linear"),
    (lambda net, x: net.d((x * 0.7 + 0.3).permute(0, 2, 3, 1)), "permute linear"),
    (lambda net, x: net.d((x * net.p + net.p).flatten(2).transpose(1, 2)), "reshape permute linear"),
], ids=["pools", "pool", "mean", "channels last", "patches"])  # fmt: skip
def test_and_towards_what_reads_it(body, left):
    net = prepare(images(body, d=nn.Linear(4, 3), p=parameter(4, 1, 1)))
    fast = optimized(net, "deploy", IMAGE)
    assert acting(fast) == left.split()


SEVERAL = {
    "sum": (lambda net, x, y: (net.a(x) + net.b(y)) / 3 + 1, "linear linear add"),
    "difference": (lambda net, x, y: 1 - (net.a(x) - net.b(y)) / 3, "linear linear sub rsub"),
    "sum with a parameter": (lambda net, x, y: (net.a(x) + net.p) * 0.7, "linear add"),
    "cat": (lambda net, x, y: torch.cat((net.a(x) * 3, net.b(y)), -1) * 0.7, "linear linear cat"),
    "factors": (lambda net, x, y: net.a(x) * net.b(y).sigmoid() * 0.7, "linear sigmoid linear mul"),
    "the other factor": (
        lambda net, x, y: net.b(y).sigmoid() * net.a(x) * 0.7, "linear sigmoid linear mul"),
    "product": (
        lambda net, x, y: net.a(x) @ net.b(y).transpose(1, 2) * 0.7,
        "linear transpose linear matmul"),
    "product of an input": (
        lambda net, x, y: x[..., :4] @ net.b(y).transpose(1, 2) * 0.7,
        "slice linear permute matmul"),
    "DyT": (lambda net, x, y: net.a(torch.tanh(x * net.s) * net.s + net.s), "mul tanh linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_what_has_several_operands(name):
    body, left = SEVERAL[name]
    leaves(tokens(body, p=parameter(5, 4), s=parameter(8)), left, TOKENS, TOKENS)


# -- several readers, several calls -----------------------------------------------------------------


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_every_reader_takes_in_what_all_read(act):
    """As in networks without norms: `act(x) * gamma` in front of a block and of its shortcut."""
    body = images(
        lambda net, x: (net.a(y := getattr(F, act)(x) * 1.7), net.b(y)), b=conv(1, stride=2)
    )
    leaves(body, f"{act} conv2d conv2d", IMAGE)
    body = images(lambda net, x: net.a(y := getattr(F, act)(net.b(x)) * 1.7) + y.mean((2, 3), True))
    assert "mul" in acting(optimized(prepare(body), "deploy", IMAGE)) or act == "relu"


def test_every_call_of_a_shared_map_has_its_own_scale():
    body = tokens(lambda net, x, y: net.a(x * 3) + net.a(y / 3) * 0.7 + net.a(y.tanh()).relu())
    leaves(body, "linear linear add tanh linear relu add", TOKENS, TOKENS)


def test_a_shared_weight_stays_as_it_is_for_its_other_uses():
    body = tokens(
        lambda net, x: net.c(x) * 0.7 + F.linear(x.tanh(), net.c.weight) * net.c.weight.sum()
    )
    fast = leaves(body, "linear tanh linear add", TOKENS)
    assert len([one for one in fast.parameters() if one.shape == (8, 8)]) == 2


@pytest.mark.parametrize(("body", "left"), [
    (lambda net, x: (y := net.a(x)) * y * 0.7, "linear mul mul"),
    (lambda net, x: (y := net.a(x)) @ y.transpose(1, 2) * 0.7, "linear transpose matmul mul"),
], ids=["square", "Gram"])  # fmt: skip
def test_a_map_is_not_computed_twice_for_a_number(body, left):
    leaves(tokens(body), left, TOKENS)


# -- attention ----------------------------------------------------------------------------------------


def attention(score: Any, mix: Any = None) -> nn.Module:
    """`o(softmax(score(q, k)) @ v)` of three inputs, or `o(mix(q, k, v))`."""

    def body(net: Any, *inputs: Tensor) -> Tensor:
        q, k, v = map(heads, (net.q(inputs[0]), net.k(inputs[1]), net.v(inputs[2])))
        mixed = mix(q, k, v) if mix else score(q, k).softmax(-1) @ v
        return net.o(mixed.transpose(1, 2).flatten(2))

    return Net(body, **{name: nn.Linear(8, 8) for name in "qkvo"})


@pytest.mark.parametrize("score", [
    lambda q, k: q @ k.transpose(-1, -2) * 4**-0.5 * 0.7,
    lambda q, k: q @ k.transpose(-1, -2) / 4**0.5 / 3,
    lambda q, k: (q * 0.7) @ (k.transpose(-1, -2) * 0.3),
    lambda q, k: torch.matmul(other=k.mT, input=q).div(3),
], ids=["times", "divided", "both", "by keyword"])  # fmt: skip
def test_the_scale_of_explicit_attention_is_in_the_weights(score):
    fast = optimized(prepare(attention(score)), "deploy", *(TOKENS,) * 3)
    assert not {"mul", "div"} & {*acting(fast)}
    assert acting(fast).count("scaled_dot_product_attention") == 1


@pytest.mark.parametrize(("mix", "biased"), [
    (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "q o"),
    (lambda q, k, v: F.scaled_dot_product_attention(q * 0.7, k / 3 + 1, v * 3 - 1) * 0.7, "q o"),
    (lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True), "q o"),
], ids=["plain", "scaled all over", "by keyword"])  # fmt: skip
def test_fused_attention_keeps_no_bias_of_keys_and_values(mix, biased):
    fast = optimized(prepare(attention(None, mix)), "deploy", *(TOKENS,) * 3)
    assert not {"mul", "div", "add", "sub"} & {*acting(fast)}
    assert [name for name in "qkvo" if f"{name}.bias" in fast.state_dict()] == biased.split()


def test_a_value_bias_makes_the_bias_of_a_map_without_one():
    net = attention(None, F.scaled_dot_product_attention)
    net.o = nn.Linear(8, 8, bias=False)
    bias = optimized(prepare(net), "deploy", *(TOKENS,) * 3).state_dict()["o.bias"]
    assert_equal(bias, net.o.weight @ net.v.bias)


# -- dtypes -------------------------------------------------------------------------------------------


def narrow(number: float, size: float, dtype: torch.dtype, weight: float = 1.0) -> None:
    """The error against float64 is about that of the source, in its dtype."""
    net = images(lambda net, x: net.b(net.a(x * number).relu()), a=conv(bias=False, padding=0))
    nn.init.uniform_(net.a.weight, -weight, weight)
    net, x = net.to(dtype).eval(), (tensor(*IMAGE) * size).to(dtype)
    truth = output_of(net.double(), (x.double(),))
    net.to(dtype)
    own = (output_of(net, (x,)).double() - truth).abs().max()
    for mode in ("tune", "deploy"):
        fast = graphopt.optimize(net, (x,), mode=mode)
        assert all("does not fit" in one.reason for one in fast.report.rolled_back)
        assert {one.dtype for one in fast.parameters()} == {dtype}
        found = output_of(fast, (x,))
        assert found.dtype == dtype
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (found.double() - truth).abs().max() <= 2 * own + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype):
    narrow(1 / 255, 100, dtype)


@pytest.mark.parametrize(("number", "size", "weight"), [(1e-6, 1e4, 0.1), (3e4, 1e-5, 3.0)],
                         ids=["underflow", "overflow"])  # fmt: skip
def test_a_weight_that_its_dtype_cannot_hold_is_not_made(number, size, weight):
    narrow(number, size, torch.float16, weight)


# -- any chain ----------------------------------------------------------------------------------------

NUMBERS = [2.0, 0.7, -0.3, 1, 0, -3, 1 / 255]
STEPS = {
    **{f"* {c:.2g}": Lambda(lambda x, c=c: x * c) for c in NUMBERS},
    **{f"{c:.2g} - x": Lambda(lambda x, c=c: c - x) for c in NUMBERS[:3]},
    **{f"x / {c:.2g}": Lambda(lambda x, c=c: x / c) for c in (3.0, -0.7)},
    **{f"+ {c:.2g}": Lambda(lambda x, c=c: torch.add(x, c, alpha=2)) for c in NUMBERS[:3]},
    "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "relu6": nn.ReLU6(), "gelu": nn.GELU(),
    "max": nn.MaxPool2d(3, 1, 1), "mean": nn.AvgPool2d(3, 1, 1), "pad": nn.ZeroPad2d(1),
    "mean of pixels": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "roll": Lambda(lambda x: torch.cat((x[:, 1:], x[:, :1]), 1)),
    "twice": Lambda(lambda x: x + x * 0.7), "square": Lambda(lambda x: x * x * 0.3),
    "abs": Lambda(torch.abs),
}  # fmt: skip
MAPS = {
    "conv": lambda: conv(padding=0), "padded": conv, "1x1": lambda: conv(1),
    "grouped": lambda: conv(groups=2, bias=False), "norm": norm,
}  # fmt: skip


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
@hypothesis.given(st.data())
def test_any_chain_of_scales_and_maps_stays_right(data):
    steps = st.lists(st.sampled_from(sorted(STEPS)), max_size=3)
    parts = []
    for name in data.draw(st.lists(st.sampled_from(sorted(MAPS)), min_size=1, max_size=3)):
        parts += [*(STEPS[one] for one in data.draw(steps)), MAPS[name]()]
    parts += [STEPS[one] for one in data.draw(steps)]
    optimized(prepare(seq(*parts)), data.draw(st.sampled_from(["tune", "deploy"])), IMAGE)
