"""The check of one site decides meaning: rounding passes, every bug fails, whatever the scales.

The variants are those of which hand-chosen tolerances pass some bug or fail the right fold.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.capture import capture
from graphopt.ir.contracts import Algebraic
from graphopt.ir.driver import Session
from graphopt.ir.ops import times
from graphopt.ir.rewrite import Rewriter
from graphopt.verify.site import SiteValidator, cut, together
from tests.helpers import Net, tensor


def fold(norm: ops.BatchNorm, rw: Rewriter, *, eps: float | None = None, center: bool = True,
         skip: int | None = None):  # fmt: skip
    """The textbook fold, with one detail of it changed."""
    conv = rw.producer(norm.input, ops.Conv)
    scale = norm.weight * (norm.running_var + (norm.eps if eps is None else eps)).rsqrt()
    if skip is not None:
        mask = torch.arange(conv.out_channels) != skip
        keep = rw.emit(ops.Reshape(scale, (1, -1))).narrow(1, 0, skip)
        one = rw.emit(ops.Full((1, 1), 1.0, scale.dtype, scale.meta.device))
        rest = scale.reshape(1, -1).narrow(1, skip + 1, int(mask.sum()) - skip)
        scale = rw.emit(ops.Cat((keep, one, rest), 1)).reshape(-1)
    shift = norm.bias - norm.running_mean * scale if center else norm.bias - norm.running_mean
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)


VARIANTS: dict[str, dict] = {
    "right": {},
    "eps 1e-5 became 1e-3": {"eps": 1e-3},
    "eps dropped": {"eps": 0.0},
    "mean not scaled": {"center": False},
    "one channel unscaled": {"skip": 3},
}


def pair(channels: int, mean: float, var: float) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_(mean)
    norm.running_var.uniform_(0.5 * var, 2 * var)
    return nn.Sequential(conv, norm).eval()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (20.0, 0.01), (0.0, 100.0)])
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_right_fold_passes(name, mean, var, channels, dtype):
    if dtype is torch.bfloat16 and name == "right":

        @graphopt.rewrite(name=name, root=ops.BatchNorm)
        def variant(norm, rw):
            scale, shift = norm.scale_and_shift()
            conv = rw.producer(norm.input, ops.Conv)
            bias = (times(conv.bias, scale) + shift.to(conv.bias.dtype)).to(conv.bias.dtype)
            return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)
    else:

        @graphopt.rewrite(name=name, root=ops.BatchNorm)
        def variant(norm, rw):
            return fold(norm, rw, **VARIANTS[name])

    model = pair(channels, mean, var).to(dtype)
    x = torch.randn(2, channels, 8, 8, dtype=dtype)
    report = graphopt.optimize(model, (x,), passes=[variant]).report
    (record,) = report.applied + report.rolled_back
    assert (record in report.applied) == (name == "right"), record
    # Right folds lie far below the bound and bugs far above it.
    if name == "right":
        assert record.error < 0.1 * record.bound
    else:
        assert record.error > 1e3 * record.bound


def check(function: Callable[[ops.Op, Rewriter], object], model: nn.Module, x: torch.Tensor, **how):
    report = graphopt.optimize(model, (x,), passes=[graphopt.rewrite(**how)(function)]).report
    return report.applied, report.rolled_back


def test_exact_means_bit_for_bit():
    def plus_zero(op, rw):
        return op.left

    class PlusZero(nn.Module):
        def forward(self, x):
            return -(x + 0)

    x = torch.tensor([-0.0, 1.0])
    how = {"root": ops.Add, "name": "plus-zero"}
    assert check(plus_zero, PlusZero(), x, contract=graphopt.Exact(), **how)[1]
    assert check(plus_zero, PlusZero(), x, contract=graphopt.Algebraic(), **how)[0]


def test_exact_sees_casts_in_the_models_own_dtype():
    def drop_cast(op, rw):
        return rw.producer(op.input, ops.Cast).input

    class Rounds(nn.Module):
        def forward(self, x):
            return -x.bfloat16().float()

    x = torch.tensor([1.0, 1.0 + 2**-12])
    how = {"root": ops.Cast, "name": "drop-cast", "contract": graphopt.Exact()}
    assert check(drop_cast, Rounds(), x, **how)[1]


def test_an_op_without_a_bound_must_agree_bitwise():
    def shifted(op, rw):
        return rw.emit(ops.LogSoftmax(op.input + 0.1, op.dim))

    x = torch.randn(4, 5)
    (record,) = check(shifted, nn.LogSoftmax(-1), x, root=ops.LogSoftmax, name="shifted")[1]
    assert "no rounding bound is known for aten.log_softmax" in record.reason


def test_the_cut_is_where_both_computations_meet():
    def function(x):
        a = x * 2
        b = a + 1
        return b.relu(), a.neg()

    graph = torch.fx.symbolic_trace(function).graph
    x, a, b, relu, neg, _ = graph.nodes
    for node in graph.nodes:
        node.op = "call_function" if node.op == "call_method" else node.op
    assert cut(relu, neg) == ([a], [b, relu, neg]) or cut(relu, neg) == ([a], [b, neg, relu])
    assert cut(relu, b) == ([b], [relu])
    assert cut(b, x) == ([x], [a, b])


def test_values_that_underflow_are_compared_absolutely():
    model = pair(8, 0.0, 1.0).double()
    for shift in (model[0].bias, model[1].bias, model[1].running_mean):
        shift.data.zero_()
    x = 1e-318 * torch.randn(2, 8, 6, 6, dtype=torch.float64)
    report = graphopt.optimize(model, (x,)).report
    assert report.after.batch_norms == 0 and not report.rolled_back


class Compared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (0.7 * x >= 2.1).to(x.dtype) - x  # in float64, 0.7 * 3 < 2.1


@pytest.mark.parametrize(("threshold", "passes"), [(3.0, True), (2.95, False)])
def test_comparisons_may_differ_where_rounding_decides_a_tie(threshold, passes):
    @graphopt.rewrite
    def divide(compare: ops.Compare, rw: Rewriter):
        product = rw.producer(compare.left, ops.Mul)
        value = product.left if isinstance(product.right, float) else product.right
        return rw.emit(ops.Compare(value, threshold, compare.relation))

    x = torch.tensor([1.0, 2.96, 3.0, 4.0], dtype=torch.float64)
    graph = capture(Compared(), (x,), {}).graph
    session = Session(graph, SiteValidator(graph, [x]))
    session.run([divide])
    (record,) = session.applied if passes else session.rolled_back
    assert ("1 of 4" if passes else "2 of 4") in record.reason


def several(*wrong: int) -> tuple[SiteValidator, list[tuple[fx.Node, fx.Node]]]:
    """`sin(x)`, and its double and treble, with sums in their place; those of `wrong` are not right."""
    graph = capture(
        Net(lambda net, x: (x.sin() * 2, x.sin() * 3, x.sin())), (tensor(3, 4),), {}
    ).graph
    builder = Builder(graph, graph.output)
    double, treble, once = map(builder.value, graph.output.all_input_nodes)
    sine, other = builder.value(double.node.args[0]), builder.value(treble.node.args[0])
    new = [sine + sine, other + other + other, sine + 0.0]
    pairs = [(one.node, (by + 0.5 if number in wrong else by).node)
             for number, (one, by) in enumerate(zip((double, treble, once), new, strict=True))]  # fmt: skip
    return SiteValidator(graph, [tensor(3, 4)]), pairs


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (2,), (0, 2)])
def test_values_that_go_together_are_all_compared(wrong: tuple[int, ...]):
    validator, pairs = several(*wrong)
    assert validator.check(pairs, Algebraic()).ok == (not wrong)
    assert validator.check(pairs[::-1], Algebraic()).ok == (not wrong)


def parts(*pairs: tuple[fx.Node, fx.Node]) -> list[list[tuple[fx.Node, fx.Node]]]:
    return [list(one) for one, _ in together(pairs)]


def test_values_that_go_together_are_one_site_unless_one_is_the_cut_of_another():
    _, ((double, two), (treble, three), _) = several()
    assert parts((double, two), (treble, three)) == [[(double, two), (treble, three)]]
    graph = capture(Net(lambda net, x: x.sin().cos()), (tensor(3, 4),), {}).graph
    builder = Builder(graph, graph.output)
    (cosine,) = map(builder.value, graph.output.all_input_nodes)
    (sine,) = map(builder.value, cosine.node.all_input_nodes)
    first, second = (sine.node, (sine + 0.0).node), (cosine.node, builder.emit(ops.Cos(sine)).node)
    assert parts(second) == [[second]]
    below = (sine.node, builder.emit(ops.Sin(builder.value(graph.inputs[0]))).node)
    assert parts(below, second) == [[below], [second]]
    assert parts(first, second) == [[first, second]]
