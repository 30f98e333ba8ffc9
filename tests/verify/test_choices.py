"""Ties: what rounding decides may differ, at a site and behind it in the model; nothing else may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.rewrite import Rewriter
from graphopt.report import Report
from graphopt.verify.choices import ties_of
from graphopt.verify.model import check_model
from tests.helpers import Net, tensor

X = torch.tensor([[1.0, 2.96], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)


def weighted(scale: float, threshold: float) -> Graph:
    """In float64 0.7 * 3 < 2.1, which is a tie. What follows makes much of it."""

    def body(net: Any, x: Tensor) -> Tensor:
        return ((scale * x >= threshold).to(x.dtype) * x.abs()).sum(1).exp()

    return capture(Net(body).eval(), (X,), {}).graph


def test_a_flip_excuses_its_own_row() -> None:
    check = check_model(weighted(0.7, 2.1), weighted(1.0, 3.0), [X], 1e-10)
    assert check.ok and check.ties == 1 and check.excused == 1
    assert check.float64_error > 1e-3  # which is said, and not enforced


def test_a_flip_excuses_no_other_row() -> None:
    """2.96 is on the other side of 2.95: no rounding explains that."""
    check = check_model(weighted(0.7, 2.1), weighted(1.0, 2.95), [X], 1e-10)
    assert "float64 outputs differ" in check.reason and check.ties == 1


def test_no_tie_no_excuse() -> None:
    rows = X[[0, 2]]
    check = check_model(weighted(0.7, 2.1), weighted(1.0, 2.95), [rows], 1e-10)
    assert not check.ok and check.ties == 0
    assert check_model(weighted(0.7, 2.1), weighted(1.0, 3.0), [rows], 1e-10).ties == 0


@pytest.mark.parametrize(("body", "count"), [
    (lambda net, x: (0.7 * x - 2.1).sign(), 1),
    (lambda net, x: (x - 3.0 * (1 / 3.0) * x).heaviside(torch.zeros(()).double()), 6),
    (lambda net, x: (0.7 * x - 2.1).relu() > 0, 1),
    # What is compared carries no rounding, or is limited to a number.
    (lambda net, x: x >= 3, 0),
    (lambda net, x: (x > 2).double() * x > 0, 0),
    (lambda net, x: (0.7 * x - 100).relu() > 0, 0),
    (lambda net, x: (0.7 * x + 100).clamp(0, 6) >= 6, 0),
])  # fmt: skip
def test_what_is_a_tie(body: Any, count: int) -> None:
    graph = capture(Net(lambda net, x: body(net, x) * 1.0).eval(), (X,), {}).graph
    assert ties_of(graph, [X]).count == count


def test_rows_are_those_of_the_batch_wherever_its_axis_is() -> None:
    def moved(net: Any, x: Tensor) -> Tensor:
        return (0.7 * x.t() >= 2.1).to(x.dtype).t() @ net.weight

    graph = capture(Net(moved, weight=nn.Parameter(tensor(2, 2))).eval(), (X,), {}).graph
    assert ties_of(graph, [X]).rows.tolist() == [False, True, False]

    def flattened(net: Any, x: Tensor) -> Tensor:
        return (0.7 * x.flatten() >= 2.1).to(x.dtype).reshape(-1, 2)

    graph = capture(Net(flattened).eval(), (X,), {}).graph
    found = ties_of(graph, [X])
    assert found.count == 1 and found.rows is None  # any row


class Signs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.sign(0.7 * x - 2.1) > 0, 2.0, -2.0).to(x.dtype) * 0.5


@pytest.mark.parametrize(("threshold", "passes"), [(3.0, True), (2.95, False)])
def test_what_is_computed_from_a_tie_may_differ_at_a_site(threshold: float, passes: bool) -> None:
    @graphopt.rewrite
    def divide(product: ops.Mul, rw: Rewriter) -> Any:
        cast = rw.producer(product.left, ops.Cast)
        where = rw.producer(cast.input, ops.Where)
        compare = rw.producer(where.condition, ops.Compare)
        sign = rw.producer(compare.left, ops.Sign)
        inner = rw.producer(rw.producer(sign.input, ops.Sub).left, ops.Mul)
        value = inner.left if isinstance(inner.right, float) else inner.right
        return rw.emit(ops.Sign(value - threshold))

    fast = graphopt.optimize(Signs().eval(), (X[[0, 1]],), passes=[divide])
    (record,) = fast.report.applied if passes else fast.report.rolled_back
    if passes:  # 0.7 * 3 < 2.1 in float64, so that 3 is -1 in the source and 0 in the result
        assert "1 of 4 comparisons are ties" in record.reason
        assert fast.report.check.ok and fast.report.check.ties == fast.report.check.excused == 1
    else:
        assert "more than rounding" in record.reason
    again = Report.from_dict(fast.report.to_dict())
    assert again.check.ties == fast.report.check.ties
