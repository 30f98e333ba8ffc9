"""The story of one module: its ops, what happened to them and why not more, and where they are now."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir import ops
from tests.helpers import Net, randomize_norms

IMAGE = torch.randn(2, 4, 12, 12)


def block(**modules: nn.Module) -> nn.Module:
    """Modules one after the other, under their names."""
    return Net(
        lambda net, x: nn.Sequential(*(getattr(net, name) for name in modules))(x), **modules
    )


def conv(size: int | tuple[int, int] = 3, width: int = 4) -> nn.Module:
    return nn.Conv2d(width, width, size, bias=False)


def report_of(model: nn.Module, x: torch.Tensor = IMAGE, **options) -> graphopt.Report:
    return graphopt.optimize(randomize_norms(model.eval()), (x,), **options).report


def happened(story: graphopt.Story) -> list[tuple[str, str]]:
    return [(one.rewrite, one.where) for one in story.applied]


def ops_of(listed) -> list[tuple[str, str]]:
    """(op, module) of listed ops."""
    return [(one.text.partition(" = ")[2].partition("(")[0], one.where) for one in listed]


# -- folded ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded() -> graphopt.Report:
    inner = block(conv=conv(), norm=nn.BatchNorm2d(4), act=nn.ReLU())
    return report_of(block(stem=inner, head=conv(1)))


def test_a_convolution_hears_of_the_norm_that_it_took_in(folded):
    story = folded.explain("stem.conv")
    assert ops_of(story.before) == [("Conv", "stem.conv")]
    assert happened(story) == [("fold-batch-norm", "stem.norm"), ("materialize", "stem.norm")]
    (after,) = story.after
    assert "f32[s" in after.text and "@stem.conv.bias" in after.text
    assert not story.refused and not story.rolled_back and not story.absorbed_by


def test_a_norm_that_is_gone_names_what_absorbed_it(folded):
    story = folded.explain("stem.norm")
    assert ops_of(story.before) == [("BatchNorm", "stem.norm")]
    assert story.after == []
    assert ops_of(story.absorbed_by) == [("Conv", "stem.conv")]


def test_a_module_that_nothing_happened_to(folded):
    story = folded.explain("head")
    assert ops_of(story.before) == ops_of(story.after) == [("Conv", "head")]
    assert not story.applied and not story.absorbed_by


def test_a_path_stands_for_all_that_is_inside_it(folded):
    story = folded.explain("stem")
    assert [where for _, where in ops_of(story.before)] == ["stem.conv", "stem.norm", "stem.act"]
    assert ops_of(story.after) == [("Conv", "stem.conv"), ("Relu", "stem.act")]
    assert story.absorbed_by == []  # what absorbed its norm is inside it


def test_names_of_siblings_are_not_prefixes():
    layers = [nn.ReLU() if i % 2 else conv(1) for i in range(11)]
    report = report_of(nn.Sequential(*layers))
    assert ops_of(report.explain("1").before) == [("Relu", "1")]


def test_the_text(folded):
    lines = str(folded.explain("stem.norm")).splitlines()
    assert lines[0] == "stem.norm"
    assert lines[1] == "  before"
    assert lines[2].startswith("    batch_norm: f32[")
    assert lines[3] == "  applied"
    assert lines[4].startswith("    0: fold-batch-norm replaced batch_norm (stem.norm): error ")
    assert lines[-4:-2] == ["  after", "    nothing"]
    assert lines[-2] == "  absorbed by"
    assert lines[-1].endswith("# stem.conv")


def test_applications_come_in_order_with_pass_and_error(folded):
    story = folded.explain("stem")
    assert [one.index for one in story.applied] == sorted(one.index for one in story.applied)
    for one in story.applied:
        assert one.stage and one.node and one.error <= one.bound


def test_ops_have_the_names_of_the_graph_module():
    model = block(a=conv(), norm=nn.BatchNorm2d(4), act=nn.ReLU(), b=conv(), last=nn.BatchNorm2d(4))
    fast = graphopt.optimize(randomize_norms(model.eval()), (IMAGE,))
    names = [one.name for one in fast.graph_module.graph.nodes if one.op == "call_function"]
    assert [one.text.partition(":")[0] for one in fast.report.ops_after] == names


# -- further than one application -----------------------------------------------------------------


def test_the_story_goes_on_in_what_absorbed_it():
    first, second = nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 3)
    report = report_of(block(first=first, second=second, drop=nn.Dropout(), norm=nn.BatchNorm2d(4)))
    for path in ("second", "norm", "drop"):
        story = report.explain(path)
        assert story.after == []
        assert ops_of(story.absorbed_by) == [("Conv", "first")]
        assert ("fold-batch-norm", "norm") in happened(story)
    assert ("merge-convolutions", "second") in happened(report.explain("first"))
    assert happened(report.explain("drop"))[0] == ("drop-dropout", "drop")


def test_branches_are_absorbed_by_the_convolution_that_they_became():
    branches = {"big": nn.Conv2d(4, 4, 3, padding=1), "small": conv(1), "skip": nn.BatchNorm2d(4)}
    model = Net(lambda net, x: net.big(x) + net.small(x) + net.skip(x), **branches)
    report = report_of(model)
    assert ops_of(report.ops_after) == [("Conv", "big")]
    for path in ("small", "skip"):
        assert ops_of(report.explain(path).absorbed_by) == [("Conv", "big")]
    assert [one for one, _ in happened(report.explain("big"))].count("merge-branches") == 2


def test_tune_mode_keeps_the_parameters_of_a_norm_as_ops():
    story = report_of(block(conv=conv(), norm=nn.BatchNorm2d(4)), mode="tune").explain("norm")
    assert {"Rsqrt", "Mul"} <= {op for op, _ in ops_of(story.after)}
    assert ops_of(story.absorbed_by) == [("Conv", "conv")]


class Dense(nn.Module):
    """A norm behind a concatenation, a pooling, a padding and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        self.norm, self.pad, self.pool = nn.BatchNorm2d(8), nn.ZeroPad2d(1), nn.AvgPool2d(2)
        self.last, self.drop, self.fc = nn.Conv2d(8, 4, 3), nn.Dropout(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        x = self.last(self.pad(self.pool(x))).mean((2, 3)) * 1
        return self.fc(self.drop(x))


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_no_module_is_lost(mode):
    """Every module that computed something lives on in some op."""
    report = report_of(Dense(), mode=mode)
    before = {one.where for one in report.ops_before}
    assert len(before) == 9
    assert before <= {path for one in report.ops_after for path in one.origins}


# -- what did not happen --------------------------------------------------------------------------


def test_refusals_come_with_their_reason_to_all_whom_they_concern():
    report = report_of(block(act=nn.ReLU(), norm=nn.BatchNorm2d(4), last=nn.ReLU()))
    for path in ("norm", "act"):
        (refusal,) = report.explain(path).refused
        assert (refusal.rewrite, refusal.where) == ("fold-batch-norm", "norm")
        assert "Relu (act)" in refusal.reason
        assert f"    fold-batch-norm at norm: {refusal.reason}" in str(report.explain(path))
    assert report.explain("last").refused == []


def test_estimated_costs_are_reasons():
    model = block(wide=conv((1, 7), 64), tall=conv((7, 1), 64))
    report = report_of(model, torch.randn(2, 64, 16, 16))
    for path in ("wide", "tall"):
        (refusal,) = report.explain(path).refused
        assert "it would take" in refusal.reason and "estimated for" in refusal.reason


@graphopt.rewrite
def forget_norm(norm: ops.BatchNorm, rw):
    """Wrong: a convolution absorbs a norm as it is."""
    return rw.emit_like(rw.producer(norm.input, ops.Conv))


@graphopt.rewrite
def stumble(norm: ops.BatchNorm, rw):
    raise RuntimeError(str(rw.producer(norm.input, ops.Conv).stride))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(forget_norm, "differs by more than rounding"), (stumble, "raised a RuntimeError: (1, 1)")],
    ids=str,
)
def test_what_was_rolled_back(wrong, reason):
    report = report_of(block(conv=conv(), norm=nn.BatchNorm2d(4)), passes=[wrong])
    for path in ("conv", "norm"):
        story = report.explain(path)
        (record,) = story.rolled_back
        assert (record.rewrite, record.where, record.index) == (wrong.name, "norm", -1)
        assert f"  rolled back\n    {wrong.name} at norm: {reason}" in str(story)
        assert ops_of(story.before) == ops_of(story.after)


# -- modules --------------------------------------------------------------------------------------


def test_a_module_with_two_names_has_one_story():
    model = block(first=conv(1), norm=nn.BatchNorm2d(4))
    model.again = model.first
    report = report_of(model)
    one, other = report.explain("first"), report.explain("again")
    assert one.before and one.applied
    assert (one.before, one.applied, one.after) == (other.before, other.applied, other.after)


def test_a_module_without_ops():
    story = report_of(block(conv=conv(), identity=nn.Identity())).explain("identity")
    assert str(story).split() == ["identity", "before", "nothing", "after", "nothing"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stem.cnv", "no module 'stem.cnv'; nearest: stem.conv"),
        ("stem.conv.weight", "nearest: stem.conv"),
        ("zzz", "no module 'zzz'; it has stem, head"),
        ("stem.observer_of_quantized_inputs", "'; stem has stem.conv, stem.norm, stem.act"),
    ],
)
def test_an_unknown_path_names_those_that_are_near(folded, path, words):
    with pytest.raises(graphopt.UnknownModule) as caught:
        folded.explain(path)
    assert words in str(caught.value)


class Branchy(nn.Module):
    """Two blocks around a branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(conv=conv(), norm=nn.BatchNorm2d(4))
        self.loose = nn.Linear(10, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.loose(x) if x.mean() > 0 else x


def test_regions_and_what_is_outside_of_them():
    report = report_of(Branchy())
    assert report.capture.method == "regional"
    inside = report.explain("stem.norm")
    assert ops_of(inside.absorbed_by) == [("Conv", "stem.conv")]
    assert happened(report.explain("stem.conv"))[0] == ("fold-batch-norm", "stem.norm")
    assert inside.left_out == {}
    outside = report.explain("loose")
    assert outside.before == [] and "data-dependent" in outside.left_out[""]
    assert "left out\n    the whole: " in str(outside)


def test_stories_are_saved_with_the_model(tmp_path):
    fast = graphopt.optimize(block(conv=conv(), norm=nn.BatchNorm2d(4)).eval(), (IMAGE,))
    fast.save(tmp_path / "model")
    again = graphopt.load(tmp_path / "model")
    for path in ("conv", "norm"):
        assert str(again.report.explain(path)) == str(fast.report.explain(path))
    data = json.loads(json.dumps(fast.report.explain("norm").to_dict(), allow_nan=False))
    assert data["module"] == "norm" and data["absorbed_by"][0]["where"] == "conv"
