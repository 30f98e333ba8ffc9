"""Applications have numbers, a run can stop at any of them, and bisection finds the wrong one."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.bisect import command
from graphopt.ir import ops
from graphopt.ir.contracts import Algebraic
from graphopt.ir.driver import Session
from graphopt.ir.graph import State
from graphopt.ir.rewrite import Rewriter
from graphopt.report import Report
from graphopt.sources import load_source
from tests.helpers import randomize_norms


def stack(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()]
    return randomize_norms(nn.Sequential(*layers).eval())


def image(size: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, size, size)


def fold_wrong_at(where: str, factor: float = 1.01) -> graphopt.rewrite:
    """The fold of a batch norm into the convolution before it, wrong at one norm."""

    @graphopt.rewrite(name="fold-wrong-once")
    def fold(norm: ops.BatchNorm, rw: Rewriter):
        conv = rw.producer(norm.input, ops.Conv)
        scale, shift = norm.scale_and_shift()
        if norm.out.where == where:
            shift = shift * factor
        bias = shift if conv.bias is None else conv.bias * scale + shift
        return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)

    return fold


def names(fast: graphopt.OptimizedModule) -> list[tuple[int, str, str]]:
    return [(one.index, one.rewrite, one.where) for one in fast.report.applied]


def run_file(path: Path) -> subprocess.CompletedProcess[str]:
    """Run a reproducer far from here, in a process that has never heard of this test."""
    return subprocess.run(
        [sys.executable, str(path)], cwd="/", capture_output=True, text=True, check=False
    )


# -- the limit ----------------------------------------------------------------------------------


class Swap(graphopt.Pass):
    """Commits by hand: every relu becomes its negated negation."""

    name = "swap"

    def run(self, session: Session) -> None:
        for node in session.graph.calls:
            rw = Rewriter(session.graph, node)
            op = rw.view(node)
            if isinstance(op, ops.Relu):
                new = rw.emit(ops.Neg(-rw.emit(ops.Relu(op.input))))
                if session.replace("swap", Algebraic(), node, new.node, rw.made):
                    session.erase_dead([node])
                else:
                    rw.rollback()


PIPELINE = [Swap, "deploy"]


def test_every_application_has_an_index_and_the_limit_stops_at_it():
    model, x = stack(1), image()
    everything = names(graphopt.optimize(model, (x,), passes=PIPELINE))
    assert [index for index, _, _ in everything] == list(range(len(everything)))
    rewrites = [name for _, name, _ in everything]
    assert {"swap", "drop-double-negation", "fold-batch-norm", "materialize"} <= set(rewrites)
    for limit in (1, 3, len(everything) - 1, len(everything) + 1):
        fast = graphopt.optimize(model, (x,), passes=PIPELINE, bisect_limit=limit)
        assert names(fast) == everything[:limit]
        assert not fast.report.rolled_back and fast.report.check.ok
        assert torch.allclose(fast(x), model(x), atol=1e-5)
        assert fast.report.bisect_limit == limit


def test_a_limit_of_zero_leaves_the_graph_as_captured():
    model, x = stack(2), image()
    passes = [fold_wrong_at("1"), Swap, "materialize"]
    nothing = graphopt.optimize(model, (x,), passes=passes, bisect_limit=0)
    captured = graphopt.optimize(model, (x,), passes="fold-batch-norm", bisect_limit=0)
    assert nothing.graph_module.code == captured.graph_module.code
    read = [name for name in model.state_dict() if "num_batches_tracked" not in name]
    assert list(nothing.state_dict()) == read  # materialize drops what nothing reads


def test_records_keep_their_index_and_pass_in_the_report():
    fast = graphopt.optimize(stack(1), (image(),), passes=[fold_wrong_at("1"), "deploy"])
    (wrong,) = fast.report.rolled_back
    assert (wrong.index, wrong.stage) == (-1, "fold-wrong-once")
    again = Report.from_dict(json.loads(json.dumps(fast.report.to_dict(), allow_nan=False)))
    assert again.applied == fast.report.applied
    assert [one.index for one in again.applied] == list(range(len(again.applied)))
    assert {one.stage for one in again.applied} >= {"fold-batch-norm", "materialize"}


def test_numbers_run_on_over_the_regions_of_a_model():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = stack(1), stack(1)

        def forward(self, x):
            x = self.one(x)
            return self.two(x) if x.sum().item() > -1e9 else x

    model, x = Branches().eval(), image()
    everything = names(graphopt.optimize(model, (x,)))
    assert [index for index, _, _ in everything] == list(range(len(everything)))
    limit = len(everything) - 2
    assert names(graphopt.optimize(model, (x,), bisect_limit=limit)) == everything[:limit]
    found = graphopt.bisect(model, (x,), passes=[fold_wrong_at("1")])
    assert (found.record.index, found.record.where) == (0, "one.1")


def test_without_validation_wrong_rewrites_stay_and_are_measured():
    model, x = stack(1), image()
    fast = graphopt.optimize(model, (x,), passes=[fold_wrong_at("1")], validate=False)
    assert [one.rewrite for one in fast.report.applied] == ["fold-wrong-once"]
    assert not fast.report.check.ok
    assert "WRONG, but not validated" in str(fast.report)
    assert not torch.allclose(fast(x), model(x), atol=1e-5)


def test_a_negative_limit_is_an_error():
    with pytest.raises(ValueError, match="bisect_limit: expected a number of rewrites, found -1"):
        graphopt.optimize(stack(1), (image(),), bisect_limit=-1)


# -- bisection ----------------------------------------------------------------------------------


def test_one_wrong_fold_of_53_in_resnet50(tmp_path: Path):
    model, _, _ = load_source("torchvision:resnet50")
    x = torch.randn(1, 3, 32, 32)
    found = graphopt.bisect(model, (x,), passes=[fold_wrong_at("layer3.2.bn2", 1 + 1e-6)])
    assert found.applications == 53
    assert found.optimizations <= 8
    assert (found.record.rewrite, found.record.where) == ("fold-wrong-once", "layer3.2.bn2")
    assert found.record.error > 1e3 * found.record.bound
    assert "BatchNorm(" in found.before and "Mul(" in found.after
    assert not found.tensors and len(found.reproducer) < 8000
    found.save(tmp_path / "reproducer.py")
    result = run_file(tmp_path / "reproducer.py")
    assert result.returncode == 1, result.stderr
    assert "float64 error" in result.stdout


@pytest.mark.parametrize("layer", range(4))
def test_each_place_is_found_in_time(layer):
    where = str(4 * layer + 1)
    found = graphopt.bisect(stack(), (image(),), passes=[fold_wrong_at(where), "deploy"])
    assert found.record.where == where
    assert found.optimizations <= math.ceil(math.log2(found.applications)) + 2
    for words in (f"application {found.record.index} of", "fold-wrong-once", "before", "after"):
        assert words in str(found)


def test_a_good_pipeline_has_no_culprit():
    found = graphopt.bisect(stack(1), (image(),))
    assert (found.record, found.optimizations, found.reproducer) == (None, 1, "")
    assert "good" in str(found)


def test_bad_from_the_start_is_an_error():
    with pytest.raises(graphopt.BisectError, match="Sequential is bad with no rewrite applied"):
        graphopt.bisect(stack(1), (image(),), predicate=lambda fast: False)


def test_inputs_are_needed():
    with pytest.raises(graphopt.VerifyError, match="no example inputs"):
        graphopt.bisect(stack(1))


def test_a_predicate_of_ones_own():
    model, x = stack(), image()
    found = graphopt.bisect(
        model, (x,), predicate=lambda fast: all(one.where != "9" for one in fast.report.applied)
    )
    assert (found.record.rewrite, found.record.where) == ("fold-batch-norm", "9")
    assert "the fault shows in the whole model only" in found.reproducer


def test_a_command_gets_the_saved_model():
    model, x, said = stack(2), image(), []
    code = "import json, sys; d = json.load(open(sys.argv[1] + '/manifest.json')); print('seen'); "
    code += "sys.exit(any(one['where'] == '5' for one in d['report']['applied']))"
    for text in (f'{sys.executable} -c "{code}"', f'{sys.executable} -c "{code}" {{}} unused'):
        found = graphopt.bisect(model, (x,), predicate=command(text, said.append))
        assert found.record.where == "5"
    assert set(said) == {"seen"}
    with pytest.raises(graphopt.BisectError, match="the predicate cannot be run: "):
        graphopt.bisect(model, (x,), predicate=command("no-such-command-anywhere"))


# -- reproducers --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoreWrong(graphopt.Pass):
    """Stores `weight * scale` after a fold, one element off: a stored weight is one value, and no
    draw can stand for it."""

    name = "store-wrong"

    def run(self, session: Session) -> None:
        graph = session.graph
        for node in graph.calls:
            op = Rewriter(graph, node).view(node)
            if isinstance(op, ops.Conv):
                weight = graph.states[str(op.weight.node.target)].tensor
                wrong = nn.Parameter(weight.detach().clone())
                wrong.data.view(-1)[0] += 1
                read = graph.add_state("wrong", State(wrong, "parameter"))
                rw = Rewriter(graph, node)
                new = rw.emit_like(op, weight=rw.value(read))
                session.replace("store-wrong", Algebraic(), node, new.node, rw.made)
                session.erase_dead([node])
                return


@pytest.mark.parametrize(("channels", "beside"), [(2, False), (40, True)])
def test_stored_weights_are_kept(tmp_path: Path, channels: int, beside: bool):
    model = nn.Sequential(nn.Conv2d(channels, channels, 3), nn.ReLU())
    x = torch.randn(1, channels, 5, 5)
    found = graphopt.bisect(model, (x,), passes=[StoreWrong])
    assert found.record.rewrite == "store-wrong"
    file = tmp_path / "here.py"
    found.save(file)
    assert file.with_suffix(".safetensors").exists() == beside == bool(found.tensors)
    result = run_file(file)
    assert result.returncode == 1, result.stderr
    assert "float64 error" in result.stdout


def test_a_fault_that_draws_do_not_show_is_shown_on_the_values_themselves(tmp_path: Path):
    @graphopt.rewrite
    def drop_clamp(outer: ops.Clamp, rw: Rewriter):
        """clamp(x, -4, 4) = x, true of nearly all normal draws."""
        return outer.input

    x = torch.zeros(1, 4000)
    x[0, 17] = 5.0  # more than 300 deviations
    model = nn.Sequential(nn.Hardtanh(-4.0, 4.0), nn.Tanh())
    found = graphopt.bisect(model, (x,), passes=[drop_clamp])
    assert "stored(" in found.reproducer
    found.save(tmp_path / "here.py")
    result = run_file(tmp_path / "here.py")
    assert result.returncode == 1, result.stderr


class Many(nn.Module):
    """Ops whose arguments need care when they are written as Python."""

    def forward(self, x, index):
        parts = x.split(2, 1)
        y = torch.cat([parts[1], parts[0]], 1).to(torch.float64)
        y = y.masked_fill(y > 3, float("-inf")).clamp(min=-1e3)
        y = y.new_zeros(y.shape[0], 4, dtype=torch.float32) + y[:, index].to(x.dtype)
        return y.relu()


def test_arguments_of_every_kind_are_written_out(tmp_path: Path):
    @graphopt.rewrite
    def skip(outer: ops.Relu, rw: Rewriter):
        first = rw.value(rw.graph.inputs[0])
        rw.match(outer.input != first)
        return rw.emit(ops.Relu(first))

    x, index = torch.randn(3, 4), torch.tensor([3, 1, 0, 2])
    found = graphopt.bisect(Many(), (x, index), passes=[skip])
    file = tmp_path / "here.py"
    found.save(file)
    result = run_file(file)
    assert (result.returncode, "float64 error" in result.stdout) == (1, True), result.stderr
    assert "pick(generator" in found.reproducer
