"""The specification of `stack-siblings`: maps of one input, side by side, are one map with all their
outputs.

    cat(W1 x + b1, W2 x + b2)  =  cat(W1, W2) x + cat(b1, b2)

A row of a table is a model and the ops that are left of it in Deploy mode. Unless a test is about
costs, launching ops is all they cost, a view a third of it (`any_merge_pays`).
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
from tests.helpers import Net, assert_equal, output_of, prepare, reasons, relative_error, tensor
from tests.passes.test_merge_maps import CONV, any_merge_pays, conv, norm  # noqa: F401
from tests.passes.test_not_exact import IMAGE, TOKENS, acting, heads, optimized, parameter


def leaves(model: nn.Module, left: str, *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    """These ops are left in Deploy mode."""
    fast = optimized(prepare(model), "deploy", *shapes)
    assert acting(fast) == left.split(), reasons(fast)
    return fast


def tokens(body: Any, **modules: Any) -> nn.Module:
    """`body(net, *inputs)` over linear maps `a`, `b` (without a bias), `c`, and `d` of 4 features."""
    return Net(body, **{"a": nn.Linear(8, 4), "b": nn.Linear(8, 6, bias=False),
                        "c": nn.Linear(8, 4), "d": nn.Linear(4, 8), **modules})  # fmt: skip


def images(body: Any, **modules: Any) -> nn.Module:
    """`body(net, *inputs)` over 1x1 convolutions `a`, `b` (without a bias) and `c`."""
    return Net(body, **{"a": conv(1, out=6), "b": conv(1, bias=False), "c": conv(1), **modules})


# -- read apart: slices -----------------------------------------------------------------------------


def attend(net: Any, x: Tensor) -> Tensor:
    q, k, v = map(heads, (net.q(x), net.k(x), net.v(x)))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


APART = {
    "gate and what it gates": (
        lambda net, x: net.d(F.silu(net.a(x)) * net.c(x)), "linear slice slice silu mul linear"),
    "one without a bias": (
        lambda net, x: (net.a(x).tanh(), net.b(x).relu()), "linear slice slice tanh relu"),
    "three": (lambda net, x: (net.a(x), net.b(x), net.c(x)), "linear slice slice slice"),
    "some of the readers": (
        lambda net, x: (net.a(x), x.tanh(), net.c(x)), "linear slice slice tanh"),
    "one that the other reads, in the end": (
        lambda net, x: net.a(x) * net.d(net.c(x).tanh())[..., :4],
        "linear slice slice tanh linear mul"),
    "groups of siblings": (
        lambda net, x: (net.a(x) * net.c(x.relu()), net.b(x), F.linear(x.relu(), net.d.weight.T)),
        "linear slice slice relu linear slice slice mul"),
    "a map of two inputs, which would be stored twice": (
        lambda net, x: (net.a(x) * net.c(x.relu()), net.b(x), net.b(x.relu())),
        "linear relu linear mul linear linear"),
    "one weight, two biases": (
        lambda net, x: F.linear(x, net.a.weight, net.a.bias).relu()
        * F.linear(x, net.a.weight, net.c.bias), "linear slice slice relu mul"),
    "a weight that is computed later": (
        lambda net, x: net.a(x).relu() * F.linear(x, net.c.weight.exp(), net.c.bias * 3),
        "linear slice slice relu mul"),
    "scales behind": (
        lambda net, x: (net.a(x) * 0.7).relu() * (net.c(x) * net.p + 1), "linear slice slice relu mul"),
    "the same twice": (lambda net, x: net.a(x).tanh() + net.a(x), "linear tanh add"),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_linear_maps_of_one_input(name):
    body, left = APART[name]
    leaves(tokens(body, p=parameter(4)), left, TOKENS)


def test_queries_keys_and_values():
    net = prepare(Net(attend, **{name: nn.Linear(8, 8) for name in "qkvo"}))
    fast = optimized(net, "deploy", TOKENS)
    assert [acting(fast).count(one) for one in ("linear", "slice")] == [2, 3]
    assert sorted(one.shape for one in fast.parameters() if one.ndim == 2) == [(8, 8), (24, 8)]


def test_a_sequence_of_one_token():
    leaves(tokens(lambda net, x: net.a(x) * net.c(x)), "linear slice slice mul", (8,))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_every_rank(rank):
    """Without a batch axis too: the channels are then the first axis."""
    options = {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1}
    pair = {"a": CONV[rank](4, 6, **options), "b": CONV[rank](4, 2, **options, bias=False)}
    net = Net(lambda net, x: (net.a(x), net.b(x)), **pair)
    leaves(net, f"conv{rank}d slice slice", (2, 4, *(7, 6, 8)[:rank]))
    leaves(net, f"conv{rank}d slice slice", (4, *(7, 6, 8)[:rank]))


def test_norms_behind_siblings_are_stacked_with_them():
    net = images(lambda net, x: net.m(net.a(x)).relu().mean((2, 3)) + net.n(net.c(x)).mean((2, 3)),
                 a=conv(1), m=norm(), n=norm())  # fmt: skip
    leaves(net, "conv2d slice slice relu mean mean add", IMAGE)


def test_a_weight_shared_by_two_stacks_is_stored_once():
    fast = leaves(tokens(lambda net, x, y: (net.a(x), net.c(x), net.a(y), net.c(y))),
                  "linear slice slice linear slice slice", TOKENS, TOKENS)  # fmt: skip
    assert sum(one.numel() for one in fast.parameters()) == 2 * (4 * 8 + 4)


def test_any_batch():
    net = prepare(tokens(lambda net, x: net.a(x) * net.c(x)))
    fast = graphopt.optimize(net, (tensor(*TOKENS),))
    assert acting(fast) == ["linear", "slice", "slice", "mul"]
    for batch in (1, 3):
        x = (tensor(batch, 5, 8),)
        assert_equal(output_of(fast, x), output_of(net, x))


# -- concatenated: nothing but the map --------------------------------------------------------------

CATS = {
    "two": (lambda net, x: torch.cat((net.a(x), net.c(x)), 1), "conv2d"),
    "three, one without a bias": (
        lambda net, x: torch.cat((net.a(x), net.b(x), net.c(x)), -3), "conv2d"),
    "with something in front": (
        lambda net, x: torch.cat((x, net.a(x), net.c(x)), 1), "conv2d cat"),
    "with something behind": (
        lambda net, x: torch.cat((net.a(x), net.c(x), F.max_pool2d(x, 3, 1, 1)), 1),
        "max_pool2d conv2d cat"),
    "nested": (
        lambda net, x: torch.cat((torch.cat((net.a(x), net.b(x)), 1).relu(), net.c(x.tanh())), 1),
        "conv2d relu tanh conv2d cat"),
    "with another geometry": (
        lambda net, x: torch.cat((net.a(x), net.b(x), net.e(x)), 1), "conv2d conv2d cat"),
    "with norms": (
        lambda net, x: torch.cat((net.m(net.b(x)), net.n(net.c(x))), 1).relu(), "conv2d relu"),
}  # fmt: skip


@pytest.mark.parametrize("name", CATS)
def test_concatenated_convolutions(name):
    body, left = CATS[name]
    leaves(images(body, e=conv(3), m=norm(), n=norm()), left, IMAGE)


@pytest.mark.parametrize(("body", "left"), [
    (lambda net, x: torch.cat((net.a(x), net.b(x), net.c(x)), -1), "linear"),
    (lambda net, x: torch.cat((net.a(x), net.c(x)), 1), "linear slice slice cat"),
    (lambda net, x: torch.cat((y := net.a(x), net.c(x)), -1).amax(-1) + y.amax(-1),
     "linear slice slice amax amax add"),
    (lambda net, x: torch.cat((y := net.a(x), y.relu(), net.c(x)), -1),
     "linear slice slice relu cat"),
], ids=["features", "tokens", "read elsewhere too", "read twice"])  # fmt: skip
def test_concatenated_linear_maps(body, left):
    leaves(tokens(body), left, TOKENS)


# -- not siblings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [
    {"a": conv(), "b": conv(stride=2)}, {"a": conv(), "b": conv(1)},
    {"a": conv(), "b": conv(padding=0)}, {"a": conv(), "b": conv((3, 1), padding=1)},
    {"a": conv(), "b": conv(dilation=2)}, {"a": conv(groups=2), "b": conv(groups=2)},
    {"a": conv(groups=2), "b": conv()}, {"a": conv(padding="same"), "b": conv(padding=2)},
    {"a": conv(), "b": conv(padding_mode="reflect")},
    {"a": nn.ConvTranspose2d(4, 4, 3), "b": nn.ConvTranspose2d(4, 4, 3)},
    {"a": nn.ConvTranspose2d(4, 4, 3, padding=1), "b": conv()},
], ids=["stride", "kernel", "padding", "shape of the kernel", "dilation", "groups",
        "groups of one", "padding by name", "pixels for padding", "transposed",
        "one transposed"])  # fmt: skip
def test_convolutions_that_differ_or_have_groups_stay_apart(others):
    net = prepare(Net(lambda net, x: (net.a(x), net.b(x)), **others))
    fast = optimized(net, "deploy", IMAGE)
    assert "slice" not in acting(fast)
    assert sum("conv" in one for one in acting(fast)) == 2


@pytest.mark.parametrize("body", [
    lambda net, x, y: (net.a(x), net.c(y)),
    lambda net, x, y: (net.a(x), net.c(x.float().double())),
    lambda net, x, y: (net.a(x), F.linear(x, net.e(y)[0])),
    lambda net, x, y: (net.a(x), F.linear(x, net.c.weight, net.a(x).mean((0, 1)))),
    lambda net, x, y: (net.a(x), F.linear(x, net.a(x).mean((0, 1)).repeat(2).reshape(1, 8))),
], ids=["other inputs", "rounded input", "a weight that is computed", "a bias of the other",
        "a weight of the other"])  # fmt: skip
def test_linear_maps_of_other_inputs_or_of_each_other_stay_apart(body):
    fast = optimized(prepare(tokens(body, e=nn.Linear(8, 8))), "deploy", TOKENS, TOKENS)
    assert acting(fast).count("linear") >= 2
    assert "stack-siblings" not in [one.rewrite for one in fast.report.applied]


# -- what it costs ----------------------------------------------------------------------------------


@pytest.mark.real_costs
def test_queries_keys_and_values_pay_at_real_costs():
    net = Net(attend, **{name: nn.Linear(64, 64) for name in "qkvo"})
    assert acting(optimized(prepare(net), "deploy", (1, 16, 64))).count("linear") == 2


@pytest.mark.real_costs
def test_slices_of_large_images_are_left_with_the_estimate():
    """What reads a slice of channels copies it."""
    net = prepare(images(lambda net, x: (net.a(x).relu(), net.b(x).tanh())))
    fast = graphopt.optimize(net, (tensor(4, 4, 64, 64),))
    assert acting(fast).count("conv2d") == 2
    assert "estimated for eager cpu" in reasons(fast)


@pytest.mark.real_costs
def test_concatenated_siblings_pay_at_any_size():
    net = prepare(images(lambda net, x: torch.cat((net.a(x), net.b(x), net.c(x)), 1)))
    assert acting(graphopt.optimize(net, (tensor(4, 4, 64, 64),))) == ["conv2d"]


# -- training and dtypes ----------------------------------------------------------------------------


def test_tune_mode_stacks_on_demand_and_then_trains_the_same_parameters():
    body = tokens(lambda net, x: (net.a(x).tanh() * net.c(x), torch.cat((net.b(x), net.e(x)), -1)),
                  e=nn.Linear(8, 3))  # fmt: skip
    net = prepare(body)
    assert "stack-siblings" not in optimized(net, "tune", TOKENS).report.pipeline
    fast = optimized(net, "tune", TOKENS, passes="tune,stack-siblings")
    assert acting(fast).count("linear") == 1
    assert [one for one, _ in fast.named_parameters()] == [one for one, _ in net.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype):
    net = tokens(lambda net, x: net.a(x).tanh() * net.c(x)).to(dtype).eval()
    x = tensor(*TOKENS).to(dtype)
    fast = graphopt.optimize(net, (x,))
    assert acting(fast) == ["linear", "slice", "slice", "tanh", "mul"]
    assert {one.dtype for one in fast.parameters()} == {dtype}
    assert relative_error(output_of(fast, (x,)), output_of(net, (x,))) <= 8 * torch.finfo(dtype).eps


# -- any net of siblings ----------------------------------------------------------------------------


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
@hypothesis.given(st.data())
def test_any_net_of_siblings_stays_right(data):
    """Maps that read the input or each other, some with norms, alike or not, concatenated or not."""
    kinds = st.sampled_from([{"kernel": 1}, {"kernel": 1, "bias": False}, {"kernel": 3},
                             {"kernel": 3, "groups": 2}, {"kernel": (3, 1)}])  # fmt: skip
    count = data.draw(st.integers(2, 6))
    maps = nn.ModuleList(conv(**data.draw(kinds)) for _ in range(count))
    norms = nn.ModuleList(
        norm() if data.draw(st.booleans()) else nn.Identity() for _ in range(count)
    )
    reads = [data.draw(st.sampled_from([0, 0, 0, *range(at + 1)])) for at in range(count)]
    calls = [data.draw(st.sampled_from([at, at, 0])) for at in range(count)]  # some share a map
    joined = data.draw(st.booleans())

    def body(net: Any, x: Tensor) -> Any:
        values = [x]
        for read, call, normed in zip(reads, calls, net.norms, strict=True):
            values.append(normed(net.maps[call](values[read])))
        return torch.cat(values[1:], 1) if joined else tuple(one.relu() for one in values[1:])

    model = prepare(Net(body, maps=maps, norms=norms))
    mode, passes = data.draw(st.sampled_from([("deploy", None), ("tune", "tune,stack-siblings")]))
    optimized(model, mode, IMAGE, **({"passes": passes} if passes else {}))
