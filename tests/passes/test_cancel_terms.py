"""The specification of `cancel-terms`: x + (y - x) = y, whatever of it is detached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, assert_equal, prepare, tensor
from tests.passes.test_not_exact import acting

ESTIMATORS: dict[str, Any] = {
    "sum": lambda x: x + (torch.sign(x) - x).detach(),
    "difference": lambda x: x - (x - torch.sign(x)).detach(),
    "apart": lambda x: torch.sign(x).detach() - x.detach() + x,
    "limited": lambda x: (torch.sign(x) - x.clamp(-1, 1)).detach() + x.clamp(-1, 1),
    "soft": lambda x: torch.sign(x).detach() - x.sigmoid().detach() + x.sigmoid(),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_straight_through_estimators_become_what_they_estimate(estimator: str) -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        return ESTIMATORS[estimator](net.linear(x)) @ ESTIMATORS[estimator](net.weight)

    net = prepare(Net(body, linear=nn.Linear(4, 5), weight=nn.Parameter(tensor(5, 3))))
    x = tensor(7, 4)
    fast = graphopt.optimize(net, (x,), passes="canonicalize,cancel-terms,materialize,canonicalize")
    assert fast.report.rolled_back == []
    assert_equal(fast(x), net(x))
    assert acting(fast) == ["linear", "sign", "matmul"]
    (weight,) = [one for one in fast.state_dict().values() if tuple(one.shape) == (5, 3)]
    assert set(weight.unique().tolist()) == {-1.0, 1.0}  # not just nearly


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.booleans(), st.booleans()), min_size=2, max_size=5),
    st.lists(st.booleans(), min_size=4, max_size=4),
)  # fmt: skip
def test_any_sum(terms: list[tuple[str, bool, bool]], nested: list[bool]) -> None:
    """Of three values of two shapes, nested to the left or right, unchecked by the validator."""

    def body(net: Any, x: Tensor) -> Tensor:
        values = {"x": x, "y": x.tanh(), "z": x.mean(1, keepdim=True)}
        total = 2 * x
        for (name, plus, detached), right in zip(terms, nested, strict=False):
            value = values[name].detach() if detached else values[name]
            if right:
                total = value + total if plus else -(value - total)
            else:
                total = total + value if plus else total - value
        return total

    net, x = Net(body).eval(), tensor(3, 4)
    fast = graphopt.optimize(net, (x,), passes="canonicalize,cancel-terms", validate=False)
    assert_equal(fast(x), net(x))
    assert fast.report.check.ok


def test_nothing_is_left_of_a_sum_that_is_zero() -> None:
    """That would have to be a tensor of zeros: it is left alone."""
    net, x = Net(lambda net, x: x - x.detach()).eval(), tensor(3, 4)
    fast = graphopt.optimize(net, (x,), passes="canonicalize,cancel-terms")
    assert torch.equal(fast(x), torch.zeros(3, 4).double()) and fast.report.rolled_back == []
