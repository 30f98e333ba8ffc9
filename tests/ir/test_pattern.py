"""The specification of `rewrite_from`: two plain functions, a pattern and a replacement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import Exact, rewrite_from
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.interpret import Interpreter
from graphopt.ir.rewrite import Rewrite, RewriteError
from graphopt.testing import check, prove
from graphopt.torchvision_ops import declare_missing_ops

declare_missing_ops()
torchvision = pytest.importorskip("torchvision")

X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)


class Model(nn.Module):
    """A function with two square matrices, a vector and a tied name of the first matrix at hand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.eye(4) + 0.1)
        self.v = nn.Parameter(torch.ones(4, 4) - 0.3)
        self.b = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        self.tied = self.w

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def run(rewrite: Rewrite, function: Callable[..., Any], *inputs: Tensor) -> Session:
    """`function(model, *inputs)` rewritten, and checked to compute the same."""
    model, inputs = Model(function), inputs or (X,)
    graph = capture(model, inputs).graph
    session = Session(graph)
    session.run([rewrite])
    with torch.no_grad():
        truth = model(*inputs)
        truth = truth if isinstance(truth, tuple) else (truth,)
        for found, one in zip(Interpreter(graph).run(inputs), truth, strict=True):
            torch.testing.assert_close(found, one)
    assert session.rolled_back == []
    return session


def count(rewrite: Rewrite, function: Callable[..., Any], *inputs: Tensor) -> int:
    return len(run(rewrite, function, *inputs).applied)


def reasons(rewrite: Rewrite, function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    session = run(rewrite, function, *inputs)
    assert session.applied == []
    return [one.reason for one in session.remaining_refusals()]


# -- the pair of the manual -------------------------------------------------------------------


def add_to_linear(x, w, b):
    """linear(x) + b = linear(x) with bias b."""
    return F.linear(x, w) + b


def linear_with_bias(x, w, b):
    return F.linear(x, w, b)


VECTOR = {"no vector is added": lambda b: b.ndim == 1}
BIAS = rewrite_from(add_to_linear, linear_with_bias, require=VECTOR)


def test_it_is_an_ordinary_rewrite():
    assert isinstance(BIAS, Rewrite)
    assert (BIAS.name, str(BIAS.contract)) == ("add-to-linear", "Algebraic")
    assert BIAS.summary == "linear(x) + b = linear(x) with bias b."


def test_unnamed_functions_are_called_by_their_ops():
    made = rewrite_from(lambda x, y: F.relu(x) + y, lambda x, y: y + torch.relu(x) * 1.0)
    assert made.name == "add-relu-to-add-mul-relu"
    assert made.summary == "add(relu(x), y) = add(y, mul(relu(x), 1.0))"
    assert rewrite_from(lambda x: x.neg().neg(), lambda x: x).name == "drop-neg-neg"
    assert rewrite_from(lambda x: x.neg().neg(), lambda x: x, name="twice").name == "twice"


# -- what matches -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w) + m.b,
        lambda m, x: m.b + F.linear(x, m.w),
        lambda m, x: torch.add(F.linear(weight=m.w, input=x), other=m.b),
        lambda m, x: F.linear(x, m.w, None).add(m.b),
        lambda m, x: F.linear(x, m.w, bias=None).add_(m.b),
    ],
)
def test_any_spelling_and_order_matches(function: Callable[..., Any]):
    assert count(BIAS, function) == 1


def test_what_is_there_and_not_in_the_pattern_does_not_match():
    assert reasons(BIAS, lambda m, x: F.linear(x, m.w, m.b) + m.b) == []
    assert reasons(BIAS, lambda m, x: F.linear(x, m.w) - m.b) == []


def distributed(x, y, z):
    return x * y + x * z


FACTOR = rewrite_from(distributed, lambda x, y, z: x * (y + z))


@pytest.mark.parametrize("swaps", range(8))
def test_orders_are_tried_at_every_level(swaps: int):
    def mul(a: Any, b: Any, swap: int) -> Any:
        return b * a if swap else a * b

    def function(m: Any, x: Tensor) -> Tensor:
        left, right = mul(x, m.w[:3], swaps & 1), mul(x, m.v[:3], swaps & 2)
        return right + left if swaps & 4 else left + right

    assert count(FACTOR, function) == 1


def test_a_condition_chooses_between_the_orders():
    shift = rewrite_from(
        lambda x, b: x + b,
        lambda x, b: x - (-b),
        require={"b is no state": lambda b: b.is_constant},
    )
    assert count(shift, lambda m, x: torch.sin(m.b + x)) == 1


def test_one_parameter_is_one_value():
    square = rewrite_from(lambda x: x * x, lambda x: x**2)
    assert count(square, lambda m, x: torch.sin(x) * 2.0) == 0
    assert count(square, lambda m, x: x * x) == 1
    assert count(square, lambda m, x: x * (x + 1)) == 0


def test_tied_weights_are_one_value():
    twice = rewrite_from(lambda x, w: F.linear(F.linear(x, w), w), lambda x, w: F.linear(x, w @ w))
    assert count(twice, lambda m, x: F.linear(F.linear(x, m.w), m.tied)) == 1
    assert count(twice, lambda m, x: F.linear(F.linear(x, m.w), m.v)) == 0


# -- numbers ----------------------------------------------------------------------------------


def scale_twice(x, c: float, d: float):
    return (x * c) * d


def test_numbers_stand_for_literals_and_can_be_calculated_with():
    made = rewrite_from(scale_twice, lambda x, c, d: x * (2 * c * d / 2))
    session = run(made, lambda m, x: 0.25 * (x * 3))
    assert [node.args[1] for node in session.graph.calls] == [0.75]
    assert count(made, lambda m, x: (x * 0.25) * m.b) == 0


def test_a_number_twice_is_one_number():
    def even(x, c: float):
        return (x + c) * c

    made = rewrite_from(even, lambda x, c: x * c + c**2)
    assert count(made, lambda m, x: (x + 3.0) * 3.0) == 1
    assert count(made, lambda m, x: (x + 3.0) * 2.0) == 0


def test_an_int_is_no_float():
    def shift(x, n: int):
        return torch.relu(x + n)

    made = rewrite_from(shift, lambda x, n: (n + x).clamp(min=0))
    assert count(made, lambda m, x: torch.relu(x + 2)) == 1
    assert count(made, lambda m, x: torch.relu(x + 0.5)) == 0


def test_literals_of_the_pattern_are_compared():
    made = rewrite_from(lambda x: F.relu(x * 2.0), lambda x: F.relu(x) * 2.0)
    assert count(made, lambda m, x: F.relu(x * 2)) == 1
    assert count(made, lambda m, x: F.relu(x * 3.0)) == 0


def test_torch_may_check_a_number():
    def normalized(x, mean, var, eps: float):
        return F.relu(F.batch_norm(x, mean, var, eps=eps))

    made = rewrite_from(
        normalized, lambda x, mean, var, eps: F.batch_norm(x, mean, var, eps=eps).clamp(min=0)
    )

    def function(m: Any, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, torch.zeros(4), torch.ones(4), momentum=0.01))

    assert count(made, function, X[0]) == 1


def test_conditions_speak_about_numbers():
    def scaled(x, c: float):
        return F.relu(x * c)

    made = rewrite_from(
        scaled, lambda x, c: F.relu(x) * c, require={"the factor is not positive": lambda c: c > 0}
    )
    assert prove(made).proved
    assert count(made, lambda m, x: F.relu(0.5 * x)) == 1
    assert reasons(made, lambda m, x: F.relu(x * -0.5)) == ["the factor is not positive"]


# -- axes and sizes ---------------------------------------------------------------------------


def layer_norm(x, w, b, eps: float):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def spelled_out(x, w, b, eps):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * w + b


NORM = rewrite_from(
    layer_norm, spelled_out,
    inputs=(torch.randn(2, 3, 4), torch.randn(4), torch.randn(4), 0.1),
)  # fmt: skip


def test_sizes_are_those_of_the_inputs():
    assert count(NORM, lambda m, x: F.layer_norm(x, (4,), m.b, m.b)) == 1
    assert count(NORM, lambda m, x: F.layer_norm(x, (3, 4), m.w[:3], m.v[:3])) == 0


def test_axes_mean_the_same_at_the_rank_of_the_examples_alone():
    assert reasons(NORM, lambda m, x: F.layer_norm(x, (4,), m.b, m.b), X[0]) == [
        "x does not have 3 axes, as its example has"
    ]
    total = rewrite_from(lambda x: F.softmax(x, -1).sum(-1), lambda x: x.sum(-1) * 0.0 + 1.0)
    assert count(total, lambda m, x: F.softmax(x, -1).sum(-1) + 1, X[0]) == 1
    assert count(total, lambda m, x: F.softmax(x, -1).sum(1) + 1) == 0


def test_reshapes_follow_from_the_sizes_of_the_inputs():
    made = rewrite_from(
        lambda x: F.relu(x.reshape(x.shape[0], -1)), lambda x: F.relu(x).flatten(1), inputs=(X,)
    )
    assert count(made, lambda m, x: F.relu(x.view(2, 12))) == 1
    assert count(made, lambda m, x: F.relu(x.flatten(1)), X[:, :, :2]) == 1
    assert count(made, lambda m, x: F.relu(x.view(6, 4))) == 0


def test_broadcasting_is_not_mistaken_for_equal_sizes():
    made = rewrite_from(
        lambda x, y: (x + y).sum(0), lambda x, y: (x + y).mean(0) * (x + y).shape[0]
    )
    assert count(made, lambda m, x: (m.w + m.v).sum(0)) == 1
    assert reasons(made, lambda m, x: (x + m.w).sum(0), X[0, :1]) == [
        "x.shape[0] is not y.shape[0]"
    ]


def test_an_example_of_size_one_stands_for_any_size():
    made = rewrite_from(
        lambda a, b: torch.cat([a * 2.0, b * 2.0], 1), lambda a, b: torch.cat([a, b], 1) * 2.0,
        inputs=(torch.randn(1, 2), torch.randn(1, 1)),
    )  # fmt: skip
    assert count(made, lambda m, x: torch.cat([m.w * 2.0, x * 2.0], 1), torch.randn(4, 3)) == 1


# -- other users ------------------------------------------------------------------------------


def test_inner_values_that_are_used_elsewhere_too_are_left_alone():
    def function(m: Any, x: Tensor) -> Any:
        inner = F.linear(x, m.w)
        return inner + m.b, torch.sin(inner)

    (reason,) = reasons(BIAS, function)
    assert reason == "Linear is used elsewhere too"


def test_inner_values_that_the_replacement_keeps_may_have_other_users():
    once = rewrite_from(lambda x: F.relu(F.relu(x)), lambda x: torch.relu(x), contract=Exact())

    def function(m: Any, x: Tensor) -> Any:
        inner = F.relu(x + 1)
        return F.relu(inner) * 2, torch.sin(inner)

    session = run(once, function)
    assert [one.contract for one in session.applied] == ["Exact"]
    assert sum("relu" in node.name for node in session.graph.calls) == 1


def test_an_inner_value_that_the_pattern_reads_twice():
    def square_of_relu(x):
        positive = F.relu(x)
        return positive * positive

    made = rewrite_from(square_of_relu, lambda x: F.relu(x) ** 2)
    assert count(made, lambda m, x: square_of_relu(x) + 1) == 1
    assert count(made, lambda m, x: F.relu(x) * F.relu(m.w[:3])) == 0


# -- where the replacement does not fit -------------------------------------------------------


def test_it_declines_where_the_result_has_another_shape():
    made = rewrite_from(lambda x, y: x * 0.0 + y, lambda x, y: y)
    assert reasons(made, lambda m, x: torch.sin(x * 0.0 + m.b)) == [
        "the replacement has another shape or dtype"
    ]


def test_it_declines_where_the_replacement_cannot_be_written():
    made = rewrite_from(lambda x, y: F.relu(x + y), lambda x, y: torch.mm(x, y))
    (reason,) = reasons(made, lambda m, x: F.relu(x + m.w[:3]))
    assert reason.startswith("matmul(x, y) does not fit here: ")


def test_it_declines_where_it_needs_a_dynamic_size():
    made = rewrite_from(lambda x: F.relu(x) * 0.0, lambda x: torch.zeros_like(x))
    (reason,) = reasons(made, lambda m, x: torch.sin(F.relu(x) * 0.0), X[0])
    assert reason.endswith("needs a size that is dynamic here")
    assert count(made, lambda m, x: x + F.relu(m.w) * 0.0, X[0, :1]) == 1


# -- definition -------------------------------------------------------------------------------


def plus(x, c: float):
    return x + c


def plus_double(x, c: float):
    return x + 2 * c


def with_default(x, c=1.0):
    return x + c


def with_flag(x, flag: bool):
    return x + flag


def leaky(x, c):
    return x * math.sqrt(c)


def branches(x, c):
    return x * (c if c > 0 else 0.0)


ERRORS = [
    ((plus, lambda x, d: x), "replacement takes d, which plus does not; expected some of x, c"),
    ((lambda x: x.clamp(min=0), torch.relu), r"relu is built in .*: lambda x: relu\(x\)"),
    ((with_default, plus), "with_default has a default for c; expected none"),
    ((with_flag, plus), "with_flag has a parameter flag: .*expected a tensor"),
    ((lambda x, y: x + 1, lambda x: x), "pattern reads its parameter y nowhere"),
    ((plus_double, plus), r"plus_double reads its parameter c only within \(2 \* c\)"),
    ((lambda x: x, lambda x: x * 1), "pattern returns x as it is; expected an op on it"),
    ((lambda x: (x, x), lambda x: x), "pattern returns a tuple; expected one tensor"),
    ((lambda x: -x, lambda x: torch.relu(-x)), r"replacement computes relu\(neg\(x\)\), in which"),
    ((plus, leaky), "leaky computes with its numbers in a way that cannot be followed"),
    ((plus, branches), "branches compares c with 0: .*say conditions with require="),
    (
        (lambda x: torch.special.i0(x), lambda x: x),
        "pattern uses aten.special_i0.default, for which",
    ),
    ((lambda x: F.dropout(x), lambda x: x), "pattern uses aten.dropout.default, which is random"),
    ((lambda x: x + torch.tensor([1.0]), lambda x: x), "pattern has a tensor of its own"),
    ((lambda x: x.reshape(4, 4) + x, lambda x: x), r"axis 0 of x has the size 4 .*x.shape\[0\] or"),
    ((lambda x, i: F.embedding(i, x), lambda x, i: x[i]), r"expected example .* inputs=\(x, i\)"),
]


@pytest.mark.parametrize(("pair", "message"), ERRORS, ids=range(len(ERRORS)))
def test_what_cannot_be_a_rewrite_is_refused_where_it_is_defined(pair: Any, message: str):
    with pytest.raises(RewriteError, match=message):
        rewrite_from(*pair)


def test_examples_are_checked():
    with pytest.raises(RewriteError, match="plus takes x, c; found 1 inputs"):
        rewrite_from(plus, plus_double, inputs=(X,))
    with pytest.raises(RewriteError, match="the example of c is of type Tensor; expected float"):
        rewrite_from(plus, plus_double, inputs=(X, X))
    with pytest.raises(RewriteError, match="pattern does not run on the example inputs: Runtime"):
        rewrite_from(lambda x, y: x @ y, lambda x, y: x, inputs=(X, X))


def test_conditions_are_checked():
    with pytest.raises(RewriteError, match="the condition 'small' takes d, which plus does not"):
        rewrite_from(plus, lambda x, c: x - (-c), require={"small": lambda d: d < 1})


# -- proofs -----------------------------------------------------------------------------------


def scale(x, c: float):
    return x * c


@pytest.mark.parametrize(
    "rewrite",
    [
        BIAS,
        NORM,
        rewrite_from(lambda x: F.relu(F.relu(x)), lambda x: F.relu(x)),
        rewrite_from(scale_twice, lambda x, c, d: x * (c * d)),
        rewrite_from(lambda x: x.sum(-1) / x.shape[-1], lambda x: x.mean(-1), inputs=(X,)),
    ],
    ids=str,
)
def test_true_pairs_are_proved(rewrite: Rewrite):
    proof = prove(rewrite)
    assert proof.proved, str(proof)


@pytest.mark.parametrize(
    ("rewrite", "residual"),
    [
        (rewrite_from(lambda x: F.relu(x), lambda x: x), "relu(x[i, j]) - x[i, j]"),
        (rewrite_from(scale, lambda x: x), "(c - 1) x[i, j]"),
        (rewrite_from(scale_twice, lambda x, c, d: x * (c + d)), "(c*c2 - c - c2) x2[i, j]"),
        (
            rewrite_from(add_to_linear, lambda x, w, b: F.linear(x, w)),
            "sum_{I#0} W[j, I#0] x2[i, I#0]",
        ),
    ],
    ids=["relu", "scale", "scale twice", "bias forgotten"],
)
def test_false_pairs_are_refuted(rewrite: Rewrite, residual: str):
    proof = prove(rewrite)
    assert not proof.proved
    assert residual in proof.residual


def test_true_pairs_pass_the_check_and_false_ones_do_not():
    assert check(BIAS, max_examples=10) > 0
    with pytest.raises(AssertionError, match="class Model"):
        check(rewrite_from(lambda x: F.relu(x), lambda x: x), max_examples=10)


# -- in a real model --------------------------------------------------------------------------


def test_joining_before_the_activation_in_squeezenet():
    image = torch.randn(1, 2, 3, 3)
    join = rewrite_from(
        lambda a, b: torch.cat([F.relu(a), F.relu(b)], 1),
        lambda a, b: F.relu(torch.cat([a, b], 1)),
        name="join-first", contract=Exact(), inputs=(image, image),
    )  # fmt: skip
    model = torchvision.models.squeezenet1_1().eval()
    fast = graphopt.optimize(model, (torch.randn(2, 3, 32, 32),), passes=[join])
    assert [one.rewrite for one in fast.report.applied] == ["join-first"] * 8
    assert (fast.report.refused, fast.report.rolled_back) == ([], [])
    assert fast.report.check.ok
