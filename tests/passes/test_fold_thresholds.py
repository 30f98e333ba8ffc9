"""The specification of `fold-thresholds`: s x + t > theta = sgn(s) x > (theta - t) / |s|."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, assert_equal, prepare, randomize_norms, tensor
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


LAYOUTS: dict[str, tuple[int, Any]] = {
    "every element": (72, lambda norm, u: norm(u.flatten(1)).unflatten(1, u.shape[1:])),
    "view": (72, lambda norm, u: norm(u.view(-1, 72)).view(-1, 8, 3, 3)),
    "channels": (8, lambda norm, u: norm(u.flatten(2)).view_as(u)),
    "scaled": (72, lambda norm, u: (2 - 3 * norm(u.flatten(1))).reshape(u.shape) / 1.5),
    "an axis more": (8, lambda norm, u: norm(u.unsqueeze(4)).squeeze(4)),
    "rows of channels": (24, lambda norm, u: norm(u.reshape(-1, 24, 3)).reshape(u.shape)),
}  # fmt: skip


def laid_out(layout: str, relation: Any = operator.gt) -> nn.Module:
    """A neuron whose norm is taken in another shape of the potential."""
    size, normed = LAYOUTS[layout]
    kinds = {"an axis more": nn.BatchNorm3d}

    def body(net: Any, x: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(x[:, 0]), []
        for step in range(3):
            u = 0.25 * u + x[:, step]
            o = relation(normed(net.norm, u), 0.4).to(u.dtype)
            u = u * (1 - o)
            spikes.append(o)
        return torch.stack(spikes, 1)

    model = prepare(Net(body, norm=kinds.get(layout, nn.BatchNorm1d)(size)))
    with torch.no_grad():
        model.norm.weight[::5] = 0.0
        model.norm.weight[1::3] *= -1
    return model


@pytest.mark.parametrize("relation", ["gt", "le"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_in_another_shape(layout: str, relation: str) -> None:
    """As a norm with a scale for every element has to be written; signs of both kinds and zeros."""
    model, x = laid_out(layout, RELATIONS[relation]), 2 * tensor(64, 3, 8, 3, 3)
    fast = folded(model, x[:5])
    assert "batch_norm" not in acting(fast)
    truth = model(x)
    assert torch.equal(fast(x), truth) and 0.1 < truth.mean() < 0.9


def test_a_norm_in_another_shape_that_is_read_there_stays() -> None:
    def body(net: Any, x: Tensor) -> Any:
        y = net.norm(x.flatten(1))
        return y.view(-1, 4, 3) > 0.4, y.sum(1)

    model, x = prepare(Net(body, norm=nn.BatchNorm1d(12))), tensor(6, 4, 3)
    fast = folded(model, x)
    assert acting(fast).count("batch_norm") == 1
    (refused,) = [one for one in fast.report.refused if one.rewrite == "fold-threshold"]
    assert "read elsewhere too, so it has to be computed" in refused.reason


def test_a_norm_across_rows_stays() -> None:
    """Of the three rows of a group, each has a scale of its own."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.norm(x.view(-1, 3, 4)).view(-1, 4) > 0.4

    model, x = prepare(Net(body, norm=nn.BatchNorm1d(3))), tensor(6, 4)
    fast = graphopt.optimize(model, (x,), passes=PASSES)
    assert torch.equal(fast(x), model(x)) and "batch_norm" in acting(fast)


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

    model, x = prepare(Net(body, norm=nn.BatchNorm2d(8))), tensor(4, 8, 64, 64)
    fast = folded(model, x)
    (record,) = [one for one in fast.report.refused if one.rewrite == "fold-threshold"]
    assert "it would take" in record.reason  # to multiply by signs is no faster than the norm
    with torch.no_grad():
        model.norm.weight.abs_().add_(0.1)
    fast = folded(model, x, passes=f"canonicalize,settle-thresholds,{PASSES}")
    assert torch.equal(fast(x), model(x))
    assert [one for one in acting(fast) if one not in ("mean", "to")] == ["sub", "mul", "ge"]
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


# -- signs ----------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {
    "sign": torch.sign,
    "sgn": torch.sgn,
    "where": lambda y: torch.where(y >= 0, 1.0, -1.0).to(y.dtype),
    "where of tensors": lambda y: torch.where(y > 0, torch.ones_like(y), -torch.ones_like(y)),
    "twice less one": lambda y: (y >= 0).to(y.dtype) * 2 - 1,
    "one less twice": lambda y: 1 - 2 * (y < 0).to(y.dtype),
    "sign of sign": lambda y: torch.sign(torch.sign(y) + 0.1),
    "below": lambda y: torch.where(y < 0, 1.0, -1.0).to(y.dtype),
    "heaviside": lambda y: torch.heaviside(y, torch.ones((), dtype=y.dtype)),
    "strict heaviside": lambda y: torch.heaviside(y, torch.zeros((), dtype=y.dtype)),
    "limited": lambda y: y.clamp(-1, 1).sign(),
    "hardtanh": lambda y: F.hardtanh(y).sign(),
    "tanh": lambda y: y.tanh().sign(),
    "leaky": lambda y: F.leaky_relu(y, 0.25).sign(),
    "spike": lambda y: (y - 0.25 >= 0).to(y.dtype),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_norm_goes_into_the_map_in_front_of_a_sign(step: str) -> None:
    """sign(s (W x + b) + t) = sign((sgn(s) W) x + (sgn(s) b + t / |s|)), in every spelling of a sign."""
    conv = nn.Conv2d(3, 6, 3, padding=1)
    model = prepare(
        Net(lambda net, x: STEPS[step](net.norm(net.conv(x))), conv=conv, norm=nn.BatchNorm2d(6))
    )
    x = tensor(4, 3, 6, 6)
    fast = folded(model, x)
    assert torch.equal(fast(x), model(x))
    left = acting(fast)
    assert left[0] == "conv2d" and left[1] in ("sign", *RELATIONS)
    assert set(left[2:]) <= {"where", "to"} and len(left) == len(set(left))


def test_the_three_values_of_a_sign_stay_three() -> None:
    """sign(0) = 0, also where the scale is zero."""
    model = Net(lambda net, x: torch.sign(net.norm(net.linear(x))), linear=nn.Linear(2, 4, bias=False),
                norm=nn.BatchNorm1d(4)).double().eval()  # fmt: skip
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([2.0, -0.5, 0.0, 0.0]))
        model.norm.bias.copy_(torch.tensor([0.0, 0.0, -0.0, -3.0]))
        model.linear.weight.copy_(torch.tensor([[1.0, -1.0]]).expand(4, 2))
    x = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    fast = folded(model, x)
    truth = torch.tensor([[0, 0, 0, -1], [1, -1, 0, -1], [-1, 1, 0, -1]]).double()
    assert torch.equal(model(x), truth) and torch.equal(fast(x), truth)
    assert acting(fast) == ["linear", "sign"]


def test_signs_pass_a_maximum_into_what_reads_the_sign() -> None:
    """sign(s max(y) + t) = sgn(s) sign(max(y + t / s)), and sgn(s) goes into the next weights."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.after(torch.sign(net.norm(F.max_pool2d(net.conv(x), 2))))

    model = prepare(Net(body, conv=nn.Conv2d(3, 6, 3), after=nn.Conv2d(6, 4, 3, padding=1),
                        norm=nn.BatchNorm2d(6)))  # fmt: skip
    with torch.no_grad():
        model.norm.weight[1] = -0.0
    x = tensor(4, 3, 8, 8)
    fast = folded(model, x, passes=f"canonicalize,fold-thresholds,absorb-scales,{PASSES}")
    assert_equal(fast(x), model(x))
    assert acting(fast) == ["conv2d", "max_pool2d", "sign", "conv2d"]
    # The result as it is: nothing takes the signs in.
    alone = Net(lambda net, x: torch.sign(net.norm(F.max_pool2d(net.conv(x), 2))),
                conv=model.conv, norm=model.norm).eval()  # fmt: skip
    fast = folded(alone, x)
    assert "batch_norm" in acting(fast) and torch.equal(fast(x), alone(x))
    (record,) = [one for one in fast.report.refused if one.rewrite == "fold-sign"]
    assert "neither what computes it nor what reads the result" in record.reason


def test_thresholds_of_the_run_in_front_of_a_sign() -> None:
    """sign(BN(x) - TH(x)) with TH(x) smaller than x (INSTA-BNN) is sign(x - (TH(x) - t) / s)."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        third = (y**2).mean((2, 3), keepdim=True) * net.rate
        return net.after(torch.sign(net.norm(y) - third))

    model = prepare(Net(body, conv=nn.Conv2d(3, 6, 3), after=nn.Conv2d(6, 4, 1),
                        norm=nn.BatchNorm2d(6), rate=nn.Parameter(tensor(6, 1, 1))))  # fmt: skip
    x = tensor(4, 3, 64, 64)
    fast = folded(model, x, passes=f"canonicalize,fold-thresholds,absorb-scales,{PASSES}")
    assert_equal(fast(x), model(x))
    # One op of the size of x less; the rest is done on thresholds [N, C, 1, 1].
    assert acting(fast)[-4:] == ["where", "sub", "sign", "conv2d"]
    assert "batch_norm" not in acting(fast) and acting(fast).count("conv2d") == 2
    small = folded(model, x[..., :8, :8], passes=PASSES)
    (record,) = [one for one in small.report.refused if one.rewrite == "fold-sign"]
    assert "it would take" in record.reason
    whole = prepare(
        Net(lambda net, x: torch.sign(net.norm(x) - x.roll(1, 0)), norm=nn.BatchNorm2d(3))
    )
    assert "batch_norm" in acting(folded(whole, x))


# -- increasing functions ---------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "left"), [
    (lambda net, y: y.sigmoid() > 0.5, "gt"),
    (lambda net, y: y.sigmoid() <= 0.2, "le"),
    (lambda net, y: 2 * y.tanh() < 0.6, "lt"),
    (lambda net, y: -y.tanh() < 0.6, "gt"),
    (lambda net, y: y.exp() >= 2, "ge"),
    (lambda net, y: y.relu() > 0, "gt"),
    (lambda net, y: y.clamp(0, 1) >= 0.5, "ge"),
    (lambda net, y: F.leaky_relu(y, 0.1) > -0.05, "gt"),
    (lambda net, y: net.norm(F.leaky_relu(y, 0.1)) > 0.3, "mul gt"),
    (lambda net, y: net.norm(F.leaky_relu(y, 0.1)) < 0.3, "mul lt"),
    (lambda net, y: net.norm(y.clamp(-1, 1)) - net.norm.bias > -net.norm.bias, None),
    (lambda net, y: F.elu(y) > 0, "gt"),
    # The edges: what is limited compares otherwise than what is not.
    (lambda net, y: y.relu() >= 0, None),
    (lambda net, y: y.clamp(0, 1) > 1, None),
    (lambda net, y: y.clamp(0, 1) <= 1, None),
    (lambda net, y: y.tanh() < 1, None),
    (lambda net, y: F.leaky_relu(y, -0.1) > -0.05, None),
    (lambda net, y: F.elu(y, -1.0) > 0, None),
    (lambda net, y: y.abs() > 0.5, None),
])  # fmt: skip
def test_increasing_functions_in_front_of_a_comparison_drop_out(
    body: Any, left: str | None
) -> None:
    model = prepare(Net(lambda net, y: body(net, y).to(y.dtype), norm=nn.BatchNorm1d(5)))
    y = torch.cat([tensor(200, 5), torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5]).double().expand(5, 5)])
    fast = folded(model, y)
    assert torch.equal(fast(y), model(y))
    if left is not None:
        assert acting(fast)[:-1] == left.split()
    elif "norm" not in body.__code__.co_names:
        assert len(acting(fast)) == 3


@pytest.mark.parametrize("slopes", [(0.1, 0.5, 2.0), (0.1, 0.0, 2.0), (0.1, -0.5, 2.0), (0.3,)])
def test_slopes_that_are_parameters_must_be_positive(slopes: tuple[float, ...]) -> None:
    """Tune mode knows no values: training may change them. Deploy mode takes those at hand."""

    def body(net: Any, x: Tensor) -> Tensor:
        return torch.sign(net.slope(net.norm(net.linear(x))) + 0.25)

    model = prepare(
        Net(body, linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), slope=nn.PReLU(len(slopes)))
    )
    with torch.no_grad():
        model.slope.weight.copy_(torch.tensor(slopes))
    x = tensor(64, 4)

    def why(fast: Any) -> str:
        return " ".join(one.reason for one in fast.report.refused if one.rewrite == "fold-sign")

    trained = folded(model, x)
    assert torch.equal(trained(x), model(x)) and "prelu" in acting(trained)
    settled = folded(model, x, passes=f"canonicalize,fold-thresholds,settle-thresholds,{PASSES}")
    assert torch.equal(settled(x), model(x))
    assert (acting(settled) == ["linear", "sign"]) == (min(slopes) > 0)
    plain = Net(lambda net, x: torch.sign(net.slope(x)), slope=model.slope).eval()
    y = tensor(9, 3)
    assert "whatever training makes of them" in why(folded(plain, y))
    settled = folded(plain, y, passes="canonicalize,settle-thresholds")
    assert (acting(settled) == ["sign"]) == (min(slopes) > 0)
    assert ("not known to be positive everywhere" in why(settled)) == (min(slopes) <= 0)


# -- no product is left --------------------------------------------------------------------------------


def test_the_signs_of_scales_go_into_the_map_that_computes_what_is_compared() -> None:
    model = prepare(Net(lambda net, x: (net.norm(net.conv(x)) > 0.5).to(x.dtype),
                        conv=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6)))  # fmt: skip
    x = tensor(4, 3, 6, 6)
    fast = folded(model, x)
    assert torch.equal(fast(x), model(x)) and acting(fast)[:2] == ["conv2d", "gt"]


def test_a_state_keeps_its_sign() -> None:
    """What is compared is carried on to the next step, so that no map may change its sign."""
    model, x = spiking(), 2 * tensor(8, 4, 8, 3, 3)
    before, after = (
        acting(model_of(model, x)),
        acting(folded(model, x, passes=f"{PASSES},drop-zeros")),
    )
    assert before.count("batch_norm") == before.count("div") == 4
    assert after.count("mul") == before.count("mul") + 4 and not {"batch_norm", "div"} & set(after)


@given(
    st.sampled_from(sorted(STEPS)), st.integers(1, 4), st.integers(0, 10**6), st.booleans(),
    st.lists(st.sampled_from([*sorted(CHAIN), "leaky", "limit", "odd"]), max_size=4),
)  # fmt: skip
def test_any_step_behind_any_chain(
    step: str, channels: int, seed: int, mapped: bool, chain: list[str]
) -> None:
    """Numbers of both signs and zeros, ties, -0.0, infinities and nan, unchecked by the validator."""
    torch.manual_seed(seed)
    functions = {
        **CHAIN, "leaky": lambda net, y: F.leaky_relu(y, 0.5),
        "limit": lambda net, y: y.clamp(-1.5, 2), "odd": lambda net, y: F.hardtanh(y),
    }  # fmt: skip

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.linear(x.transpose(1, 2)).transpose(1, 2) if mapped else x
        for kind in chain:
            y = functions[kind](net, y)
        return STEPS[step](y)

    quarters = torch.randint(-4, 5, (2, channels, 1)).double() / 4
    norm = randomize_norms(nn.BatchNorm1d(channels).double().eval())
    linear = nn.Linear(channels, channels, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-2, 3, linear.weight.shape))
    model = Net(
        body,
        scale=nn.Parameter(quarters[0]),
        shift=nn.Parameter(quarters[1]),
        norm=norm,
        linear=linear,
    ).eval()
    x = torch.randint(-8, 9, (5, channels, 7)).double() / 4
    x[0, :, 0] = -0.0
    if not mapped:
        x[0, :, 1:4] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    fast = graphopt.optimize(model, (x,), passes=PASSES, validate=False)
    found, truth = fast(x), model(x)
    if "norm" not in chain:
        exact = (quarters[0].abs().log2() % 1 == 0) | (quarters[0] == 0)
        assert torch.equal(found * exact, truth * exact)
    assert (found != truth).double().mean() < 0.02
