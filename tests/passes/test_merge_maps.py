"""The specification of `merge-branches` and `merge-sequences`: what becomes one convolution, what
stays and why.

    W2 (W1 x + b1) + b2          =  (W2 W1) x + (W2 b1 + b2)
    (W1 x + b1) + (W2 x + b2)    =  (W1 + W2) x + (b1 + b2)

`merges` and `stays` run a model through both modes, in float64. Merging that costs more than it saves
is another matter: unless a test is about that, launching an op is all it costs (`any_merge_pays`).
"""

from __future__ import annotations

import json
from collections import Counter

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.ir import cost
from tests.helpers import (
    EXACT,
    Net,
    assert_equal,
    calls,
    gradient_error,
    gradients,
    output_of,
    prepare,
    reasons,
    snapshot,
    tensor,
)

IMAGE = (2, 4, 9, 8)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def any_merge_pays(request, monkeypatch, tmp_path):
    """Costs as if all time went into launching ops, except in tests marked with the real ones."""
    if "real_costs" not in request.keywords:
        rates = dict.fromkeys(("dense", "pointwise", "grouped", "depthwise", "matmul"), 1e30)
        table = {"targets": {"eager cpu": {"launch": 1.0, "bandwidth": 1e30, "rates": rates}}}
        monkeypatch.setattr(cost, "TABLE", tmp_path / "table.json")
        cost.TABLE.write_text(json.dumps(table))
    cost.target.cache_clear()
    yield
    cost.target.cache_clear()


def optimized(model: nn.Module, mode: str, *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    """The optimized model, right on two batches, gradients too in Tune mode, nothing rolled back."""
    inputs = tuple(tensor(*shape, seed=i) for i, shape in enumerate(shapes or (IMAGE,)))
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, mode=mode)
    unchanged()
    assert fast.report.rolled_back == []
    for rows in (inputs, tuple(one.flip(0) * 2 for one in inputs)):
        assert_equal(output_of(fast, rows), output_of(model, rows))
    if mode == "tune":
        assert gradient_error(gradients(fast, inputs), gradients(model, inputs)) <= EXACT
    return fast


def merges(
    model: nn.Module, *shapes: tuple[int, ...], to: tuple[str, ...] = ("conv2d",)
) -> graphopt.OptimizedModule:
    """The Deploy form consists of the ops `to`."""
    prepare(model)
    optimized(model, "tune", *shapes)
    fast = optimized(model, "deploy", *shapes)
    assert tuple(calls(fast)) == to, f"{calls(fast)}: {reasons(fast)}"
    return fast


def stays(model: nn.Module, *shapes: tuple[int, ...], because: str = "", convs: int = 2) -> None:
    """As many convolutions are left, for a reason that contains `because`."""
    prepare(model)
    for mode in ("tune", "deploy"):
        fast = optimized(model, mode, *shapes)
        assert Counter(calls(fast))["conv2d"] == convs, calls(fast)
        assert because in reasons(fast), reasons(fast)


def conv(kernel=3, out: int = 4, into: int = 4, **options) -> nn.Conv2d:
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    options.setdefault("padding", tuple(size // 2 for size in kernel))
    return nn.Conv2d(into, out, kernel, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def total(*branches: nn.Module) -> nn.Module:
    """The sum of branches of one input."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    return Sum()


# -- branches that are added up -----------------------------------------------------------------

IDENTITY = nn.Identity
SUMS = {
    "RepVGG": lambda g: total(seq(conv(groups=g, bias=False), norm()),
                              seq(conv(1, groups=g, bias=False), norm()), norm()),
    "ACNet": lambda g: total(*(seq(conv(k, groups=g, bias=False), norm())
                               for k in ((3, 3), (1, 3), (3, 1)))),
    "no kernel holds the other": lambda g: total(conv((1, 5), groups=g), conv((3, 1), groups=g)),
    "RepLK": lambda g: total(seq(conv(7, groups=g), norm()), seq(conv(3, groups=g), norm())),
    "identity": lambda g: total(conv(groups=g), IDENTITY()),
    "identity first": lambda g: total(IDENTITY(), conv(groups=g)),
    "identity and 1x1": lambda g: total(IDENTITY(), conv(1, groups=g)),
    "dilated": lambda g: total(conv(groups=g, dilation=2, padding=2), conv(groups=g)),
    "dilated and 1x1": lambda g: total(conv(1, groups=g), conv(groups=g, dilation=2, padding=2)),
    "both dilated": lambda g: total(conv(5, groups=g, dilation=2, padding=4),
                                    conv(groups=g, dilation=2, padding=2)),
    "dilated by 2 and by 3": lambda g: total(conv(groups=g, dilation=2, padding=2),
                                             conv(groups=g, dilation=3, padding=3)),
    "dilated one way": lambda g: total(conv(groups=g, dilation=(1, 2), padding=(1, 2)),
                                       conv(groups=g)),
    "even": lambda g: total(conv(4, groups=g, padding=1), conv(2, groups=g, padding=0)),
    "even and dilated odd": lambda g: total(conv(2, groups=g, padding=1, dilation=2),
                                            conv(3, groups=g)),
    "strided": lambda g: total(conv(groups=g, stride=2), conv(1, groups=g, stride=2)),
    "strided two ways": lambda g: total(conv((3, 5), groups=g, stride=(2, 3)),
                                        conv((5, 1), groups=g, stride=(2, 3))),
    "more channels": lambda g: total(conv(groups=g, out=8), conv(1, groups=g, out=8)),
    "average pool": lambda g: total(conv(groups=g), nn.AvgPool2d(3, 1, 1)),
    "normed average pool": lambda g: total(conv(groups=g), seq(nn.AvgPool2d(3, 1, 1), norm())),
    "1x1 before kxk": lambda g: total(conv(5, groups=g),
                                      seq(conv(1, groups=g, bias=False), conv(groups=g))),
    "DBB": lambda g: total(
        seq(conv(groups=g, bias=False), norm()), seq(conv(1, groups=g, bias=False), norm()),
        seq(conv(1, groups=g, bias=False), nn.ZeroPad2d(1), norm(),
            conv(padding=0, groups=g, bias=False), norm()),
        seq(conv(1, groups=g, bias=False), nn.ZeroPad2d(1), norm(), nn.AvgPool2d(3, 1), norm())),
    "norm of the sum": lambda g: seq(total(conv(groups=g), conv(1, groups=g), IDENTITY()), norm()),
    "nested": lambda g: total(seq(total(conv(groups=g), IDENTITY()), norm()), norm(), conv(1)),
    "difference": lambda g: Net(lambda net, x: net.a(x) - net.b(net.c(x)),
                                a=conv(groups=g), b=norm(), c=conv(1, groups=g)),
    "difference from the identity": lambda g: Net(
        lambda net, x: x + net.s.reshape(4, 1, 1) * (net.a(x) - net.b(x)),
        a=conv(groups=g), b=norm(), s=nn.Parameter(tensor(4))),
    "difference from a plain norm": lambda g: Net(
        lambda net, x: net.a(x) - net.b(x), a=conv(groups=g), b=nn.BatchNorm2d(4, affine=False)),
}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("name", SUMS)
def test_affine_branches_are_one_convolution(name, groups):
    merges(SUMS[name](groups))


def test_a_dense_and_a_grouped_branch_are_a_dense_one():
    merges(total(conv(), conv(groups=2)))
    merges(total(conv(1, groups=4), conv()))


@pytest.mark.parametrize("rank", [1, 3])
def test_branches_of_every_rank(rank):
    branches = total(CONV[rank](4, 4, 3, padding=1), CONV[rank](4, 4, 1), IDENTITY())
    merges(branches, (2, 4, *(7, 6, 5)[:rank]), to=(f"conv{rank}d",))


def test_mobile_one():
    """Several equal kernels, a 1x1 and the identity, each with its norm; then squeeze-excite."""
    block = total(*(seq(conv(groups=4, bias=False), norm()) for _ in range(4)),
                  seq(conv(1, groups=4, bias=False), norm()), norm())  # fmt: skip
    net = Net(lambda net, x: F.relu(net.block(x)) * net.gate(x).sigmoid(), block=block,
              gate=seq(nn.AdaptiveAvgPool2d(1), conv(1)))  # fmt: skip
    merges(net, to=("conv2d", "relu", "adaptive_avg_pool2d", "conv2d", "sigmoid", "mul"))


def test_branches_that_are_not_neighbours_in_the_sum():
    """Only terms that meet in one addition merge: (conv + other) + conv keeps both."""
    net = Net(lambda net, x, y: (net.a(x) + y) + net.b(x), a=conv(), b=conv(1))
    stays(net, IMAGE, IMAGE)


def test_the_weights_of_two_calls_stay_tied_in_tune_mode():
    """The number moves into the second call's weight, which stays the first one's too."""
    merges(Net(lambda net, x: net.a(x) + net.a(x * 2), a=conv()))


@pytest.mark.parametrize(("model", "because"), [
    (total(conv((5, 3), padding=1, stride=(4, 1)), conv((5, 3), padding=(0, 1), stride=(4, 1))),
     "not aligned"),
    (total(conv(stride=2), conv(2, padding=0, stride=2)), "not aligned"),
    (total(conv(2, stride=8, padding=0), conv(2, stride=(8, 7), padding=0)), "different strides"),
    (total(conv(groups=2), conv(1, groups=4)), "differ in their groups"),
    (Net(lambda net, x: (a := net.a(x)) + net.b(x) + a.relu(), a=conv(), b=conv(1)),
     "used elsewhere"),
], ids=["middle", "even and odd", "stride", "groups", "used elsewhere"])  # fmt: skip
def test_branches_stay_apart_where_they_must(model, because):
    stays(model, (2, 4, 10, 8), because=because)


@pytest.mark.parametrize("model", [
    Net(lambda net, x: net.a(x) + net.b(x.relu()), a=conv(), b=conv(1)),
    Net(lambda net, x: net.a(x) + net.b(F.pad(x, (1, 1, 1, 1), "reflect")), a=conv(),
        b=conv(padding=0)),
    Net(lambda net, x: net.a(x) + net.b(x)[:, :, :1], a=conv(), b=conv(1)),
], ids=["another input", "another padding", "broadcast"])  # fmt: skip
def test_branches_of_different_inputs_stay_apart(model):
    stays(model)


@pytest.mark.parametrize(("first", "second"), [
    (conv(), nn.AvgPool2d(3, 1, 1)),
    (conv(padding=2), seq(conv(1, bias=False), nn.ZeroPad2d(1))),
], ids=["pool", "frame"])  # fmt: skip
def test_what_has_no_weight_to_negate_is_subtracted_as_it_is(first, second):
    net = prepare(Net(lambda net, x: net.a(x) - net.b(x), a=first, b=second))
    assert "sub" in calls(optimized(net, "deploy"))


def test_a_norm_in_training_mode_is_no_branch():
    model = total(conv(), norm())
    prepare(model)
    model.branches[1].train()
    fast = graphopt.optimize(model, (tensor(*IMAGE),))
    assert "batch_norm" in " ".join(calls(fast)) and "conv2d" in calls(fast)


# -- maps that follow each other ----------------------------------------------------------------

CHAINS = {
    "kxk, 1x1": seq(conv(), conv(1, out=6)),
    "strided, strided 1x1": seq(conv(stride=2, out=6), conv(1, into=6, stride=2)),
    "1x1, kxk": seq(conv(1, out=6), conv(into=6, padding=0)),
    "1x1 without bias, padded kxk": seq(conv(1, out=6, bias=False), conv(into=6)),
    "strided 1x1 without bias, padded kxk": seq(conv(1, bias=False, stride=2), conv()),
    "padded kxk, kxk": seq(conv(), conv(padding=0)),
    "strided kxk, kxk": seq(conv(stride=2), conv(2, padding=0)),
    "dilated, dilated": seq(conv(dilation=2), conv(2, dilation=2, padding=0)),
    "dilated, kxk": seq(conv(dilation=2, padding=2), conv(2, padding=0)),
    "grouped": seq(conv(groups=2), conv(1, groups=2, out=6)),
    "depthwise, pointwise": seq(conv(groups=4), conv(1, out=6)),
    "pointwise, depthwise": seq(conv(1, bias=False), conv(groups=4)),
    "three": seq(conv(1, out=6), conv(into=6, padding=0, bias=False), conv(1, out=3)),
    "frame of zeros, kxk": seq(nn.ZeroPad2d((2, 2, 1, 1)), conv()),
    "1x1, frame of zeros, kxk": seq(conv(1, bias=False), nn.ZeroPad2d(1), conv(padding=0)),
    "with norms": seq(conv(bias=False), norm(), conv(1, bias=False), norm()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_convolutions_that_follow_each_other_are_one(name):
    merges(CHAINS[name])


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_biased_1x1_before_a_padded_kxk_leaves_a_map_of_its_bias(groups, stride):
    """The border sees zeros where the others see the bias: one addition puts it right."""
    pair = seq(conv(1, groups=groups, stride=stride), conv(groups=groups))
    merges(pair, to=("conv2d", "add"))
    merges(seq(pair[0], nn.ZeroPad2d(1), conv(padding=0, groups=groups)), to=("conv2d", "add"))


def test_a_biased_1x1_before_a_padded_kxk_on_images_of_any_size():
    """What has no fixed size gets a channel of ones."""
    net = prepare(seq(conv(1), conv()))
    size = torch.export.Dim.AUTO
    fast = graphopt.optimize(net, (tensor(*IMAGE),), dynamic_shapes=({2: size, 3: size},))
    assert calls(fast) == ["pad", "conv2d"]
    for shape in (IMAGE, (2, 4, 5, 12)):
        assert_equal(output_of(fast, (tensor(*shape),)), output_of(net, (tensor(*shape),)))


def test_linear_maps_that_follow_each_other_are_one():
    merges(seq(nn.Linear(8, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 7)), (2, 3, 8),
           to=("linear",))  # fmt: skip


@pytest.mark.parametrize(("model", "because"), [
    (seq(conv(), conv()), "computes from more than one pixel"),
    (seq(conv(1, padding=1, bias=False), conv()), "computes from more than one pixel"),
    (seq(conv(), nn.ConvTranspose2d(4, 4, 1), conv(1)), ""),
    (seq(conv(), nn.ReLU(), conv(1)), ""),
    (seq(conv(groups=2, out=6, into=4), conv(1, groups=3, into=6, out=6)), "differ in their groups"),
    (Net(lambda net, x: net.b(a := net.a(x)) + a.relu(), a=conv(), b=conv(1)), "used elsewhere"),
    (seq(conv(1, bias=False), nn.ZeroPad2d((1, 0, 0, 1)), conv(padding=0)), ""),
    (seq(conv(1, bias=False), nn.ReflectionPad2d(1), conv(padding=0)), ""),
    (seq(conv(1, bias=False), nn.ConstantPad2d(1, 0.5), conv(padding=0)), ""),
    (seq(conv(1, bias=False), nn.ZeroPad2d(-1), conv(padding=0)), ""),
], ids=["kxk before padding", "padding twice", "transposed", "relu", "groups",
        "used elsewhere", "one-sided frame", "reflection", "frame of 0.5",
        "cropped"])  # fmt: skip
def test_convolutions_stay_apart_where_they_must(model, because):
    stays(model, because=because)


# -- what it costs ------------------------------------------------------------------------------


@pytest.mark.real_costs
@pytest.mark.parametrize("model", [
    total(conv((1, 7), 64, 64), conv((7, 1), 64, 64)),
    seq(conv(7, 64, 64, groups=64), conv(1, 64, 64)),
], ids=["1x7 and 7x1 as 7x7", "depthwise and pointwise as dense"])  # fmt: skip
def test_what_would_be_slower_is_left_with_the_estimate(model):
    prepare(model)
    fast = graphopt.optimize(model, (tensor(1, 64, 28, 28),))
    assert Counter(calls(fast))["conv2d"] == 2
    assert "estimated for eager cpu" in reasons(fast)


@pytest.mark.real_costs
def test_what_is_faster_merges_at_real_costs():
    prepare(model := SUMS["RepVGG"](1))
    assert calls(graphopt.optimize(model, (tensor(*IMAGE),))) == ["conv2d"]


# -- any net of branches ------------------------------------------------------------------------


@st.composite
def branch(draw, groups: int, reach: int) -> nn.Module:
    """An affine branch that keeps the size of an image, with windows of at most 2 reach + 1."""
    kind = draw(st.sampled_from(["conv", "conv", "norm", "identity", "pool", "deep", "sum"]))
    bias = draw(st.booleans())
    if kind == "identity":
        return nn.Identity()
    if kind == "norm":
        return nn.BatchNorm2d(4, affine=bias)
    if kind == "pool" and reach:
        return nn.AvgPool2d(2 * reach + 1, 1, reach)
    if kind == "deep":  # padding first, so that no border is inside the branch
        inner = nn.Conv2d(4, 4, 1, bias=False, groups=groups)
        return seq(inner, draw(convolution(groups, reach)))
    if kind == "sum":
        return seq(total(draw(convolution(groups, reach)), nn.Identity()), nn.BatchNorm2d(4))
    return draw(convolution(groups, reach))


@st.composite
def convolution(draw, groups: int, reach: int) -> nn.Module:
    taps = [draw(st.integers(0, reach)) for _ in range(2)]
    dilation = [draw(st.integers(1, max(1, reach // one))) if one else 1 for one in taps]
    made = nn.Conv2d(
        4, 4, [2 * one + 1 for one in taps], dilation=dilation, groups=groups,
        padding=[d * one for d, one in zip(dilation, taps, strict=True)], bias=draw(st.booleans()),
    )  # fmt: skip
    return seq(made, nn.BatchNorm2d(4)) if draw(st.booleans()) else made


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
@hypothesis.given(st.data())
def test_any_sum_of_affine_branches_is_one_convolution(data):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    first = data.draw(convolution(groups, 2))
    rest = [data.draw(branch(groups, 2)) for _ in range(data.draw(st.integers(1, 4)))]
    net = prepare(total(first, *rest), seed=data.draw(st.integers(0, 9)))
    fast = optimized(net, "deploy")
    assert calls(fast) == ["conv2d"], f"{calls(fast)}: {reasons(fast)}"


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
@hypothesis.given(st.data())
def test_any_net_of_branches_stays_right(data):
    """Blocks in a row, with activations and branches that are not affine among them."""
    blocks = []
    for _ in range(data.draw(st.integers(1, 3))):
        groups = data.draw(st.sampled_from([1, 2, 4]))
        branches = [data.draw(branch(groups, 2)) for _ in range(data.draw(st.integers(1, 3)))]
        extra = [nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Identity()]
        branches.append(data.draw(st.sampled_from(extra)))
        blocks += [total(*branches), data.draw(st.sampled_from(extra))]
    optimized(prepare(seq(*blocks)), data.draw(st.sampled_from(["tune", "deploy"])))


def test_the_table_of_costs_has_every_kind():
    real = cost.Path(cost.__file__).parent / "efficiency.json"
    for entry in json.loads(real.read_text())["targets"].values():
        assert set(entry["rates"]) == {
            "dense", "pointwise", "grouped", "depthwise", "matmul", "layer norm", "rms norm",
        }  # fmt: skip
        assert (
            torch.tensor([entry["launch"], entry["bandwidth"], *entry["rates"].values()]).min() > 0
        )
