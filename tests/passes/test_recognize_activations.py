"""The specification of `recognize-activations`: formulas of GELU, SiLU, Mish and Hardswish are one op.

However their factors and terms are ordered and grouped, with any number in front; not where a number is
another one, where x is not the same value everywhere, or where a part is read elsewhere.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import graphopt
from tests.helpers import (
    Net,
    assert_equal,
    calls,
    gradient_error,
    gradients,
    prepare,
    reasons,
    tensor,
)

ONLY = "canonicalize,recognize-activations,canonicalize"
C, K = math.sqrt(2 / math.pi), 0.044715

GELU_TANH = {
    "GPT-2": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + K * torch.pow(x, 3.0)))),
    "multiplied out": lambda x: 0.5 * x + x * 0.5 * torch.tanh(C * x + C * K * x * x * x),
    "bracketed": lambda x: x * 0.5 * (1 + torch.tanh(x * C * (1 + K * x * x))),
    "squares": lambda x: (torch.tanh((x.square() * K + 1) * x / (1 / C)) + 1) * (x / 2),
    "a sigmoid": lambda x: x * torch.sigmoid(2 * C * (x + K * x**3)),
}
GELU = {
    "BERT": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "half the sum": lambda x: x * ((torch.erf(x * math.sqrt(0.5)) + 1) / 2),
    "multiplied out": lambda x: torch.erf(x / 2**0.5) * x / 2 + x / 2,
    "negative": lambda x: -x * (-0.5 - 0.5 * torch.erf(x / 2**0.5)),
}
SILU = {
    "sigmoid": lambda x: x * torch.sigmoid(x),
    "the other way around": lambda x: torch.sigmoid(x) * x,
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(x / 2)),
}
HARDSWISH = {
    "MobileNetV3": lambda x: x * F.relu6(x + 3) / 6,
    "a sixth first": lambda x: x * (F.hardtanh(3 + x, 0.0, 6.0) * (1 / 6)),
    "hardsigmoid": lambda x: F.hardsigmoid(x) * x,
    "limits 0 and 1": lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1),
}
MISH = {"softplus": lambda x: x * torch.tanh(F.softplus(x))}
KINDS = {
    "gelu tanh": GELU_TANH,
    "gelu": GELU,
    "silu": SILU,
    "hardswish": HARDSWISH,
    "mish": MISH,
}
CASES = [(kind, name) for kind, ways in KINDS.items() for name in ways]
# Both tails, the kinks of hardswish, zeros of both signs.
POINTS = torch.tensor([-40, -6, -3, -1e-9, -0.0, 0.0, 1e-9, 0.7, 3, 6, 40], dtype=torch.float64)


def named(fast):
    """The ops, with the approximation of a gelu."""
    assert fast.graph_module is not None
    nodes = [one for one in fast.graph_module.graph.nodes if one.op == "call_function"]
    tanh = [one.kwargs.get("approximate") == "tanh" for one in nodes]
    return [f"{name} tanh" if t else name for name, t in zip(calls(fast), tanh, strict=True)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_formula_is_one_op(kind, name):
    model, x = prepare(Net(lambda net, x: KINDS[kind][name](x))), POINTS.reshape(1, -1)
    fast = graphopt.optimize(model, (x,))
    assert named(fast) == [kind], reasons(fast)
    assert not fast.report.rolled_back
    assert_equal(fast(x), model(x))


@pytest.mark.parametrize("number", [2.0, -3.0])
def test_a_number_in_front_stays(number):
    model, x = (
        prepare(Net(lambda net, x: number * GELU["BERT"](x) + SILU["sigmoid"](x) / 7)),
        POINTS,
    )
    fast = graphopt.optimize(model, (x,), passes=ONLY)
    assert sorted(named(fast)) == ["add", "gelu", "mul", "mul", "silu"], reasons(fast)
    assert_equal(fast(x), model(x))


def test_it_is_part_of_both_presets_and_trains():
    model = prepare(
        Net(
            lambda net, x: net.b(GELU_TANH["GPT-2"](net.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2)
        )
    )
    x = tensor(3, 4)
    for passes in ("tune", "deploy"):
        fast = graphopt.optimize(model, (x,), passes=passes)
        assert named(fast) == ["linear", "gelu tanh", "linear"]
        assert_equal(fast(x), model(x))
    tuned = graphopt.optimize(model, (x,), passes="tune")
    assert gradient_error(gradients(tuned, [x]), gradients(model, [x])) < 1e-10


def test_any_batch_and_in_place():
    def body(net, x):
        y = net.a(x)
        z = torch.sigmoid(y)
        return y.mul_(z) + 1

    model = prepare(Net(body, a=nn.Linear(4, 4)))
    fast = graphopt.optimize(model, (tensor(3, 4),))
    assert named(fast) == ["linear", "silu", "add"]
    for batch in (1, 3, 7):
        assert_equal(fast(tensor(batch, 4)), model(tensor(batch, 4)))


def test_the_op_is_nearer_to_the_truth_in_half_precision():
    net = Net(lambda net, x: GELU_TANH["GPT-2"](x))
    x = tensor(64, 64, dtype=torch.bfloat16)
    fast = graphopt.optimize(net, (x,), passes=ONLY)
    assert named(fast) == ["gelu tanh"]
    truth = net(x.double())
    assert (fast(x) - truth).norm() < 0.8 * (net(x) - truth).norm()


# -- what is something else -----------------------------------------------------------------------

OTHERS = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "another cubic": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.0447 * x**3))),
    "another slope": lambda x: x * 0.5 * (1 + torch.erf(x / 1.41)),
    "a square": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + K * x**2))),
    "minus": lambda x: 0.5 * x * (1 - torch.tanh(C * (x + K * x**3))),
    "without the one": lambda x: 0.5 * x * torch.erf(x / 2**0.5),
    "one and a bit": lambda x: 0.5 * x * (1.0001 + torch.erf(x / 2**0.5)),
    "another value": lambda x: x * torch.sigmoid(x.sin()),
    "a shifted value": lambda x: (x + 1) * torch.sigmoid(x),
    "two gates": lambda x: x * torch.sigmoid(x) ** 2,
    "the gate beneath": lambda x: x / torch.sigmoid(x),
    "relu5": lambda x: x * torch.clamp(x + 3, 0, 5) / 6,
    "relu6 of x + 2": lambda x: x * F.relu6(x + 2) / 6,
    "from -1 to 6": lambda x: x * torch.clamp(x + 3, -1, 6) / 6,
    "clamped above alone": lambda x: x * torch.clamp(x + 3, max=6) / 6,
    "softplus of 2 x": lambda x: x * torch.tanh(F.softplus(x, beta=2)),
    "softplus cut early": lambda x: x * torch.tanh(F.softplus(x, threshold=2)),
    "broadcast": lambda x: x * torch.sigmoid(x[:1]),
    "detached": lambda x: x.detach() * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else_stays(name):
    x = torch.stack([POINTS, POINTS.flip(0) + 0.1])
    model = prepare(Net(lambda net, x: OTHERS[name](x)))
    fast = graphopt.optimize(model, (x,), passes=ONLY, validate=False)
    assert not {"gelu", "silu", "mish", "hardswish"} & set(calls(fast)), named(fast)
    assert_equal(fast(x), model(x))


def test_numbers_in_fewer_digits_are_another_function():
    """Bloom's; the reason says so, and nothing had to be rolled back."""
    model = prepare(
        Net(lambda net, x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + K * x * x))))
    )
    fast = graphopt.optimize(model, (POINTS,), passes=ONLY)
    assert "its numbers are those of gelu in fewer digits" in reasons(fast)
    assert "gelu" not in calls(fast) and not fast.report.rolled_back


def test_a_gate_that_is_read_elsewhere_stays():
    def body(net, x):
        gate = torch.sigmoid(x)
        return x * gate + gate.sin()

    model = prepare(Net(body))
    fast = graphopt.optimize(model, (POINTS,), passes=ONLY)
    assert "silu" not in calls(fast)
    assert "what silu is written with is read elsewhere too" in reasons(fast)


def test_a_half_that_is_read_elsewhere_does_not_matter():
    def body(net, x):
        half = 0.5 * x
        return half * (1 + torch.erf(x / 2**0.5)) + half.sin()

    model = prepare(Net(body))
    fast = graphopt.optimize(model, (POINTS,), passes=ONLY)
    assert sorted(calls(fast)) == ["add", "gelu", "mul", "sin"]
    assert_equal(fast(POINTS), model(POINTS))


# -- every spelling -------------------------------------------------------------------------------


@st.composite
def ordered(draw, operator, parts):
    """A sum or a product of `parts`, functions of x and t, in any order and grouping."""
    parts = list(parts)
    while len(parts) > 1:
        left = parts.pop(draw(st.integers(0, len(parts) - 1)))
        right = parts.pop(draw(st.integers(0, len(parts) - 1)))
        parts.append(lambda *given, a=left, b=right: operator(a(*given), b(*given)))
    return parts[0]


def number(value):
    return lambda *given: value


def x_(x, *rest):
    return x


def t_(x, t):
    return t


def times(a, b):
    return a * b


def plus(a, b):
    return a + b


@st.composite
def spelled(draw, inner, outer):
    """x -> c x (1 + t(s (x + k x^3))): polynomials as sums of products or as products of sums."""
    scale, cubic = inner
    if cubic:
        if draw(st.booleans()):
            power = draw(st.sampled_from([[x_, x_, x_], [lambda x, *_: x**3],
                                          [lambda x, *_: x.square(), x_]]))  # fmt: skip
            terms = [x_, draw(ordered(times, [number(cubic), *power]))]
            argument = draw(ordered(times, [number(scale), draw(ordered(plus, terms))]))
        else:
            square = draw(ordered(times, [x_, number(cubic), x_]))
            one = draw(ordered(plus, [square, number(1.0)]))
            argument = draw(ordered(times, [one, x_, number(scale)]))
    else:
        argument = draw(ordered(times, [x_, number(scale)])) if scale != 1 else x_
    constant, has_one = outer
    if has_one and draw(st.booleans()):
        terms = [draw(ordered(times, [x_, number(constant), *more])) for more in ([], [t_])]
        return argument, draw(ordered(plus, terms))
    gate = draw(ordered(plus, [t_, number(1)])) if has_one else t_
    return argument, draw(ordered(times, [gate, x_, number(constant)]))


FORMS = {
    "gelu tanh": ((C, K), (0.5, True), torch.tanh),
    "gelu tanh by sigmoid": ((2 * C, K), (1.5, False), torch.sigmoid),
    "gelu": ((2**-0.5, 0), (0.5, True), torch.erf),
    "silu": ((1, 0), (-2.0, False), torch.sigmoid),
    "silu by tanh": ((0.5, 0), (0.5, True), torch.tanh),
    "mish": ((1, 0), (3.0, False), lambda u: torch.tanh(F.softplus(u))),
    "hardswish": ((1, 0), (0.25, False), lambda u: F.relu6(u + 3)),
}


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMS)), st.booleans())
def test_any_order_and_grouping(data, form, wrong):
    """Without the check of sites: the rewrite itself is right, also where a number is another one."""
    inner, outer, gate = FORMS[form]
    if wrong:
        inner = (inner[0] * (1 + 1e-9), inner[1])
    argument, result = data.draw(spelled(inner, outer))
    model = prepare(Net(lambda net, x: result(x, gate(argument(x)))))
    fast = graphopt.optimize(model, (POINTS,), passes=ONLY, validate=False)
    assert (form.split(" by")[0] in named(fast)) != wrong, (form, named(fast))
    assert_equal(fast(POINTS), model(POINTS))
