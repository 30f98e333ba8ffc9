"""Pipelines: text that round-trips, options typed by dataclass fields, errors that help."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.rewrite import RewriteError, Rewriter
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.materialize import Materialize


@pytest.mark.parametrize(
    "text",
    ["canonicalize", "canonicalize,fold-batch-norm,materialize", "materialize{limit=1000}",
     "deploy", "tune,materialize", "canonicalize{},materialize{limit=1}"],
)  # fmt: skip
def test_text_round_trips(text: str):
    assert str(graphopt.Pipeline(text)) == text


def test_presets_are_named_pipelines():
    texts = [stage.text for stage in graphopt.Pipeline("tune,materialize")]
    together = "[collect-terms,fold-batch-norm,absorb-scales,merge-sequences,merge-branches]"
    assert texts == [
        "canonicalize", "recognize-norms", "recognize-activations", "recognize-attention",
        "fold-thresholds", together,
        "merge-regions", "absorb-scales", "multiply-out", "fold-thresholds", "canonicalize", "materialize",
    ]  # fmt: skip


def test_passes_in_brackets_share_a_worklist():
    """The norm of a sum folds once the sum is one convolution; each application names its pass."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x) + x)

    net, x = Net().eval(), torch.randn(2, 4, 6, 6)
    apart = graphopt.optimize(net, (x,), passes="fold-batch-norm,merge-branches").report
    assert [record.stage for record in apart.applied] == ["merge-branches"]
    text = "[fold-batch-norm,merge-branches]"
    together = graphopt.optimize(net, (x,), passes=text).report
    assert [record.stage for record in together.applied] == ["merge-branches", "fold-batch-norm"]
    assert together.pipeline == text == str(graphopt.Pipeline(text))


@pytest.mark.parametrize(("text", "message"), [
    ("[fold-batch-norm,materialize]", "materialize is not a set of rewrites"),
    ("[fold-batch-norm", "cannot read the pipeline"),
    ("[]", "empty pipeline"),
    ("[nothing]", "unknown pass"),
])  # fmt: skip
def test_what_may_not_stand_in_brackets(text, message):
    with pytest.raises((graphopt.PipelineError, graphopt.PassError), match=message):
        graphopt.Pipeline(text)


def test_options_reach_the_pass():
    (stage,) = graphopt.Pipeline("materialize{limit=7}")
    assert stage.run == Materialize(limit=7)


@graphopt.rewrite
def drop_relu(r: ops.Relu, rw: Rewriter):
    """Wrong on purpose: relu(x) = x."""
    return r.input


def test_objects_print_as_text_that_reads_back():
    pipeline = graphopt.Pipeline([Canonicalize, Materialize(limit=3)])
    assert str(pipeline) == "canonicalize,materialize{limit=3}"
    assert [s.run for s in graphopt.Pipeline(str(pipeline))] == [s.run for s in pipeline]
    assert str(graphopt.Pipeline([Canonicalize(), drop_relu])) == "canonicalize,drop-relu"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            "fold-batchnorm",
            graphopt.PassError,
            ["unknown pass 'fold-batchnorm'", "fold-batch-norm"],
        ),
        ("deplyo", graphopt.PassError, ["unknown pass 'deplyo'", "deploy"]),
        ("materialize{limt=3}", graphopt.PassError, ["no option 'limt'", "limit"]),
        ("materialize{limit=many}", graphopt.PassError, ["limit expects int", "'many'"]),
        ("canonicalize,,materialize", graphopt.PipelineError, ["',materialize'"]),
        ("canonicalize,", graphopt.PipelineError, ["ends with a comma"]),
        ("canonicalize{", graphopt.PipelineError, ["'canonicalize{'"]),
        ("", graphopt.PipelineError, ["empty pipeline"]),
    ],
)
def test_bad_text_is_explained(text: str, error: type[Exception], words: list[str]):
    with pytest.raises(error) as caught:
        graphopt.Pipeline(text)
    for word in words:
        assert word in str(caught.value)


# -- passes of one's own ------------------------------------------------------------------------


def test_a_rewrite_of_ones_own_fires_and_is_reported():
    @graphopt.rewrite(contract=graphopt.Exact())
    def drop_relu6_of_sigmoid(outer: ops.Clamp, rw: Rewriter):
        """relu6(sigmoid(x)) = sigmoid(x)."""
        rw.match((outer.min, outer.max) == (0, 6))
        return rw.producer(outer.input, ops.Sigmoid).out

    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU6())
    x = torch.randn(3, 4)
    fast = graphopt.optimize(model, (x,), passes=[drop_relu6_of_sigmoid])
    (record,) = fast.report.applied
    assert (record.rewrite, record.where, record.contract) == (
        "drop-relu6-of-sigmoid",
        "2",
        "Exact",
    )
    assert torch.equal(fast(x), model(x))


def test_a_wrong_rewrite_is_rolled_back_and_the_rest_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    fast = graphopt.optimize(model, (x,), passes=[drop_relu, "deploy"])
    (record,) = fast.report.rolled_back
    assert record.rewrite == "drop-relu"
    assert record.where == "2"
    assert record.error > record.bound
    assert "rounding" in record.reason
    assert fast.report.after.batch_norms == 0
    assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_an_exception_inside_a_rewrite_leaves_the_graph_as_it_was():
    @graphopt.rewrite
    def explode(r: ops.Relu, rw: Rewriter):
        rw.emit(ops.Neg(r.input))
        raise ZeroDivisionError("boom")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4)
    fast = graphopt.optimize(model, (x,), passes=[explode])
    untouched = graphopt.optimize(model, (x,), passes=[Canonicalize()])
    assert fast.graph_module.code == untouched.graph_module.code
    (record,) = fast.report.rolled_back
    assert "ZeroDivisionError: boom" in record.reason


def test_a_change_of_dtype_or_shape_is_rolled_back():
    @graphopt.rewrite
    def shrink(r: ops.Relu, rw: Rewriter):
        return rw.emit(ops.Slice(r.input, 1, 0, 2))

    fast = graphopt.optimize(nn.ReLU(), (torch.randn(3, 4),), passes=[shrink])
    assert "changes torch.float32" in fast.report.rolled_back[0].reason


def test_near_misses_are_reported_with_module_path_and_reason():
    @graphopt.rewrite
    def picky(r: ops.Relu, rw: Rewriter):
        rw.require(r.input.ndim == 4, f"expected 4 axes, found {r.input.ndim}")
        return r.input

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    (record,) = graphopt.optimize(model, (torch.randn(3, 4),), passes=[picky]).report.refused
    assert (record.where, record.reason) == ("1", "expected 4 axes, found 2")


def test_rewrites_that_undo_each_other_are_stopped():
    @graphopt.rewrite
    def double(n: ops.Relu, rw: Rewriter):
        return rw.emit(ops.Relu(rw.emit(ops.Neg(rw.emit(ops.Neg(n.input))))))

    with pytest.raises(RuntimeError, match="double fired"):
        graphopt.optimize(nn.ReLU(), (torch.randn(3),), passes=[double])


def test_a_rewrite_without_a_root_is_an_error_at_definition():
    with pytest.raises(RewriteError, match="annotate r with an op view"):

        @graphopt.rewrite
        def rootless(r: int, rw: Rewriter):
            return r


def test_a_pass_of_ones_own_has_typed_options():
    @dataclasses.dataclass(frozen=True)
    class CountRelus(graphopt.Pass):
        """Counts, changes nothing."""

        name = "count-relus"
        found: list[int] = dataclasses.field(default_factory=list)

        def run(self, session):
            self.found.append(len(session.graph.calls))

    one = CountRelus()
    graphopt.optimize(nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.randn(3),), passes=[one])
    assert one.found == [2]
