"""The specification of `fold-thresholds`: s x + t > theta = sgn(s) x > (theta - t) / |s|."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, prepare, randomize_norms, tensor
from tests.passes.test_not_exact import acting

PASSES = "canonicalize,fold-thresholds,materialize,canonicalize"
RELATIONS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}


def folded(model: nn.Module, *inputs: Tensor, passes: str = PASSES) -> Any:
    fast = graphopt.optimize(model, inputs, passes=passes)
    assert fast.report.rolled_back == []
    return fast


@pytest.mark.parametrize("relation", [sp.Gt, sp.Ge, sp.Lt, sp.Le])
@pytest.mark.parametrize(
    "s", [sp.Symbol("s", positive=True), sp.Symbol("s", negative=True), sp.S.Zero]
)
def test_the_formula_for_every_sign(relation: Any, s: Any) -> None:
    """With x at a distance d from where both sides are equal, so that only the sign of d matters."""
    t, theta, d = sp.symbols("t theta d", real=True)
    size = sp.S.One if s == 0 else sp.Abs(s)
    if s == 0:
        assert relation(0, (theta - t) / size) == relation(0, theta - t)
        assert sp.simplify(sp.Equivalent(relation(t - theta, 0), relation(0, theta - t))) == True  # noqa: E712
        return
    x = (theta - t) / s + d
    source = sp.expand(s * x + t - theta)  # relation 0
    result = sp.simplify(sp.sign(s) * x - (theta - t) / size)
    assert sp.simplify(source - s * d) == 0
    assert sp.simplify(result - sp.sign(s) * d) == 0
    # s d and sgn(s) d differ by the positive factor |s|.
    assert sp.simplify(source - sp.Abs(s) * result) == 0 and size.is_positive


def spiking(relation: str = "gt", steps: int = 4, reset: str = "hard", axis: int = 4) -> nn.Module:
    """An MPBN layer (arXiv 2308.08359): the norm is between the membrane potential and its spike."""
    compare = RELATIONS[relation]

    def body(net: Any, x: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(x[:, 0]), []
        for step in range(steps):
            u = 0.25 * u + x[:, step]
            o = compare(net.norm(u) / 1.5, 0.5).to(u.dtype)
            u = u * (1 - o) if reset == "hard" else u - 0.5 * o
            spikes.append(o)
        return torch.stack(spikes, 1)

    model = prepare(Net(body, norm=nn.BatchNorm2d(8) if axis == 4 else nn.BatchNorm1d(8)))
    with torch.no_grad():
        model.norm.weight[[1, 6]] = 0.0
        model.norm.weight[2] = -model.norm.weight[2].abs() - 0.1
        model.norm.bias[1], model.norm.bias[6] = 2.0, -2.0  # always and never
    return model


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_the_norm_of_a_membrane_potential(relation: str, reset: str) -> None:
    model, x = spiking(relation, reset=reset), 2 * tensor(64, 4, 8, 3, 3)
    fast = folded(model, x)
    found, truth = fast(x), model(x)
    assert torch.equal(found, truth) and 0.1 < truth.mean() < 0.9
    assert "batch_norm" not in acting(fast)
    always, never = (0, 6) if relation in ("gt", "ge") else (6, 1)
    assert truth[:, :, always if always else 1].min() == 1 and truth[:, :, never].max() == 0


def test_what_is_published_is_wrong_where_a_scale_is_negative() -> None:
    model, x = spiking(), 2 * tensor(64, 4, 8, 3, 3)
    norm = model.norm
    with torch.no_grad():
        published = (0.75 - norm.bias) * norm.running_var.sqrt() / norm.weight + norm.running_mean
    u = x[:, 0]
    found = (u > published.view(-1, 1, 1)).double()
    wrong = (found != model(x)[:, 0]).double().mean((0, 2, 3)) > 0
    assert wrong[norm.weight < 0].all() and not wrong[norm.weight > 0].any()


def test_what_is_left_without_negative_scales_is_the_comparison() -> None:
    """Factors of one and shifts of zero are no ops."""
    model, x = spiking(), 2 * tensor(16, 4, 8, 3, 3)
    with torch.no_grad():
        model.norm.weight.abs_().add_(0.1)
    fast = folded(model, x, passes=f"{PASSES},drop-zeros")
    assert acting(fast).count("mul") == acting(model_of(model, x)).count("mul")
    assert torch.equal(fast(x), model(x))


def model_of(model: nn.Module, x: Tensor) -> Any:
    return graphopt.optimize(model, (x,), passes="canonicalize")


@pytest.mark.parametrize("body", [
    lambda net, x: -2.0 * x + 1.0 > 0.25,
    lambda net, x: 0.3 >= net.scale * x,
    lambda net, x: (1.5 - x) / net.scale < 0.5,
    lambda net, x: net.shift - x / -4.0 <= net.threshold,
    lambda net, x: -x > net.scale,
    lambda net, x: net.map * x + net.map < 0.125,
])  # fmt: skip
def test_numbers_scales_and_maps_of_both_signs(body: Any) -> None:
    """Element-wise too: a scale for every channel and place."""
    shapes = {"scale": (5, 1, 1), "shift": (5, 1, 1), "threshold": (1,), "map": (5, 4, 4)}
    parameters = {
        name: nn.Parameter(tensor(*shape, seed=seed))
        for seed, (name, shape) in enumerate(shapes.items(), 2)
    }
    net = prepare(Net(lambda net, x: body(net, x).to(x.dtype), **parameters))
    x = tensor(6, 5, 4, 4)
    fast = folded(net, x)
    assert torch.equal(fast(x), net(x))
    assert set(acting(fast)) <= {"mul", "gt", "ge", "lt", "le", "to", "_to_copy"}
    assert fast.report.applied


def test_a_norm_that_is_read_elsewhere_too_stays() -> None:
    """Where the state is overwritten with the normalized value, no threshold does."""

    def body(net: Any, x: Tensor) -> Tensor:
        z = net.norm(x)
        return z * (z > 0.5).to(z.dtype)

    model, x = prepare(Net(body, norm=nn.BatchNorm1d(8))), tensor(5, 8)
    fast = folded(model, x)
    (record,) = [one for one in fast.report.refused if one.rewrite == "fold-threshold"]
    assert "read elsewhere too" in record.reason
    assert "batch_norm" in acting(fast)


def test_batch_statistics_stay() -> None:
    model = (
        Net(lambda net, x: (net.norm(x) > 0.5).to(x.dtype), norm=nn.BatchNorm1d(8)).double().train()
    )
    fast = folded(model, tensor(5, 8))
    (record,) = [one for one in fast.report.refused if one.rewrite == "fold-threshold"]
    assert "batch statistics" in record.reason


def test_a_threshold_of_the_run_stays_at_run_time() -> None:
    """One threshold for every sample and channel (INSTA-BNN, arXiv 2204.07439): the norm goes into it."""

    def body(net: Any, x: Tensor) -> Tensor:
        return (net.norm(x) >= x.mean((2, 3), keepdim=True)).to(x.dtype)

    model, x = prepare(Net(body, norm=nn.BatchNorm2d(8))), tensor(4, 8, 5, 5)
    fast = folded(model, x)
    assert torch.equal(fast(x), model(x)) and "batch_norm" not in acting(fast)
    other = prepare(
        Net(lambda net, x: (net.norm(x) >= x.roll(1, 0)).to(x.dtype), norm=nn.BatchNorm2d(8))
    )
    (record,) = [one for one in folded(other, x).report.refused if one.rewrite == "fold-threshold"]
    assert "same size" in record.reason


CHAIN: dict[str, Any] = {
    "scale": lambda net, y: net.scale * y,
    "shift": lambda net, y: y - net.shift,
    "number": lambda net, y: y * -0.5,
    "negate": lambda net, y: -y,
    "norm": lambda net, y: net.norm(y),
}


@given(
    st.sampled_from(sorted(RELATIONS)), st.booleans(), st.integers(1, 5), st.integers(0, 10**6),
    st.lists(st.sampled_from(sorted(CHAIN)), min_size=1, max_size=4),
)  # fmt: skip
def test_any_chain_of_scales_and_shifts(
    relation: str, left: bool, channels: int, seed: int, chain: list[str]
) -> None:
    """On integers and quarters, where ties are many, and unchecked by the validator."""
    torch.manual_seed(seed)

    def body(net: Any, x: Tensor) -> Tensor:
        y = x
        for kind in chain:
            y = CHAIN[kind](net, y)
        compare = RELATIONS[relation]
        return (compare(y, 0.25) if left else compare(0.25, y)).to(x.dtype)

    quarters = torch.randint(-4, 5, (2, channels, 1)).double() / 4
    norm = randomize_norms(nn.BatchNorm1d(channels).double().eval())
    model = Net(
        body, scale=nn.Parameter(quarters[0]), shift=nn.Parameter(quarters[1]), norm=norm
    ).eval()
    x = torch.randint(-8, 9, (5, channels, 7)).double() / 4
    fast = graphopt.optimize(model, (x,), passes=PASSES, validate=False)
    found, truth = fast(x), model(x)
    if "norm" not in chain:  # all is exact, ties too, but for the scales that are no powers of two
        exact = (quarters[0].abs().log2() % 1 == 0) | (quarters[0] == 0)
        assert torch.equal(found * exact, truth * exact)
    assert (found != truth).double().mean() < 0.02
