"""verify(): any module against any other, and where they part."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir import ops
from graphopt.ir.rewrite import Rewriter
from graphopt.verify import SiteValidator
from tests.helpers import randomize_norms, snapshot


class Block(nn.Module):
    """Two branches, an activation that is called twice and in place, a structured result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(3, 6, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor):
        side = self.down(x)
        main = self.norm2(self.second(self.act(self.norm(self.first(x)))))
        features = self.act(main + side).mean((2, 3))
        return {"logits": self.head(features), "features": (features, 3)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Block().eval())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def changed(model: nn.Module, name: str, by: float = 0.1) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter(name)[1] += by
    return twin


def test_the_name_of_the_function_leaves_the_package_usable():
    assert callable(graphopt.verify)
    assert SiteValidator.__module__ == "graphopt.verify.site"


# -- equal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_an_optimized_model_is_equal_and_nothing_is_changed(model, x, mode):
    fast = graphopt.optimize(model, (x,), mode=mode)
    for a, b in ((model, fast), (fast, model)):
        unchanged = snapshot(a), snapshot(b)
        found = graphopt.verify(a, b, (x,))
        assert found.ok, str(found)
        assert found.source_error < 1e-6 and found.error < 1e-6
        assert found.divergence is None
        for one in unchanged:
            one()
    # Tune mode keeps the weights: no rounding excuses it.
    assert (found.float64_error < 1e-12) == (mode == "tune")
    assert (found.limit == 1e-10) == (mode == "tune")


@pytest.mark.parametrize(
    "other",
    [copy.deepcopy, torch.fx.symbolic_trace, lambda m: torch.compile(m, backend="eager"),
     lambda m: torch.export.export(m, (torch.randn(2, 3, 8, 8),)).module()],
    ids=["copy", "fx", "compile", "export"],
)  # fmt: skip
def test_modules_of_others(model, x, other):
    found = graphopt.verify(model, other(model), (x,))
    assert found.ok and found.float64_error < 1e-12, str(found)
    wrong = graphopt.verify(model, other(changed(model, "second.weight")), (x,))
    assert not wrong.ok
    assert "convolution" in wrong.divergence.source_value
    assert wrong.divergence.source_where == "second"
    assert wrong.divergence.where == "second"


def test_models_that_train_keep_their_statistics(model, x):
    model.train()
    unchanged = snapshot(model)
    assert graphopt.verify(model, copy.deepcopy(model), (x,)).ok
    unchanged()


def test_compiled_backends_are_checked_as_the_graph_they_run(model, x):
    pytest.importorskip("torch._inductor")
    fast = graphopt.optimize(model, (x,))
    fast.__dict__["_lower"] = lambda module: torch.compile(module, backend="eager")
    assert graphopt.verify(model, fast, (x,)).ok


def test_weights_rounded_once_are_equal_and_weights_changed_are_not(model, x):
    rounded, off = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for one in rounded.parameters():
            one.mul_(1 + 2.0**-24)
        for one in off.parameters():
            one.mul_(1 + 1e-4)
    assert graphopt.verify(model, rounded, (x,)).ok
    assert not graphopt.verify(model, off, (x,)).ok
    # In float64 there is no such rounding.
    wide = [one.double() for one in (model, changed(model, "head.weight", 1e-8))]
    assert not graphopt.verify(*wide, (x.double(),)).ok


def test_outputs_that_are_noise():
    class Cancels(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x / self.factor - x

    x = torch.rand(50, 50, dtype=torch.float64) + 1
    found = graphopt.verify(Cancels(3), Cancels(7), (x,))
    assert found.ok and found.float64_error > 1e-3


# -- different ----------------------------------------------------------------------------------


def test_the_worst_output_is_named_with_both_values(model, x):
    wrong = changed(model, "head.bias", 0.5)
    found = graphopt.verify(model, wrong, (x,))
    assert not found.ok
    assert "differ by" in found.check.reason
    worst = found.worst
    assert (worst.output, worst.index[1]) == ("output['logits']", 1)
    assert worst.optimized - worst.source == pytest.approx(0.5)
    for word in ("NOT EQUAL", "output['logits']", "head"):
        assert word in str(found)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["ok"] is False and data["divergence"]["where"] == "head"


@pytest.mark.parametrize("name", ["first.weight", "norm.weight", "second.weight", "norm2.bias",
                                  "down.weight", "head.weight"])  # fmt: skip
def test_the_first_diverging_value_of_two_eager_modules(model, x, name):
    part = graphopt.verify(model, changed(model, name), (x,)).divergence
    assert part.where == part.source_where == name.partition(".")[0]
    assert 0 < part.error < 10


@graphopt.rewrite
def wrong_once(norm: ops.BatchNorm, rw: Rewriter):
    """The fold, with a wrong shift at norm2."""
    conv = rw.producer(norm.input, ops.Conv)
    scale, shift = norm.scale_and_shift()
    if norm.out.where == "norm2":
        shift = shift * 1.01
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return rw.conv_like(conv, weight=conv.scale_out(scale), bias=bias)


@pytest.mark.parametrize("after", [[], ["deploy"]], ids=["tune", "deploy"])
def test_values_that_differ_and_agree_again_are_not_where_modules_part(model, x, after):
    """Every folded convolution differs from the source's; only one of them is wrong."""
    fast = graphopt.optimize(model, (x,), passes=[wrong_once, *after], validate=False)
    assert fast.report.after.batch_norms == 0
    part = graphopt.verify(model, fast, (x,)).divergence
    assert part.where == "second"
    assert (part.source_value, part.source_where) == ("native_batch_norm", "norm2")
    assert part.error < 0.05
    assert part.reads == ["relu_ (act)"]


def test_modules_inside_a_model_that_is_not_captured_whole(x):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = randomize_norms(Block().eval())

        def forward(self, x):
            return self.block(x)["logits"] * (2 if x.sum().item() > 0 else 3)

    model = Branches().eval()
    assert graphopt.verify(model, graphopt.optimize(model, (x,)), (x,)).ok
    fast = graphopt.optimize(model, (x,), passes=[wrong_once], validate=False)
    assert fast.graph_module is None
    assert graphopt.verify(model, fast, (x,)).divergence.where == "block.second"


# -- inputs -------------------------------------------------------------------------------------


def test_inputs_are_those_declared_or_captured(model, x):
    fast = graphopt.optimize(model, (x,))
    assert graphopt.verify(model, fast).ok  # captured
    model.example_input_array = x
    assert graphopt.verify(model, copy.deepcopy(model)).ok  # declared
    assert graphopt.verify(model, fast, {"x": x}).ok
    assert graphopt.verify(model, fast, None, {"x": x}).ok


def test_blank_inputs_hide_nothing(model, x):
    assert not graphopt.verify(model, changed(model, "down.weight"), (torch.zeros_like(x),)).ok


class One(nn.Module):
    def forward(self, x):
        return x + 1


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class Flat(nn.Module):
    def forward(self, x):
        return (x + 1).flatten()


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x


@pytest.mark.parametrize(
    ("a", "b", "inputs", "words"),
    [
        (One(), Two(), (torch.ones(3),), ["source One", "optimized Two", "'y'"]),
        (Two(), One(), (torch.ones(3), torch.ones(3)), ["source Two", "optimized One", "takes 2"]),
        (One(), Pair(), (torch.ones(3),), ["source One returns output;", "Pair", "output[0], output[1]"]),
        (One(), Flat(), (torch.ones(3, 2),), ["source One is a tensor of shape [3, 2]", "Flat", "[6]"]),
        (One(), One(), None, ["no example inputs", "source One or optimized One"]),
    ],
    ids=["signature", "signature again", "structure", "shape", "no inputs"],
)  # fmt: skip
def test_what_cannot_be_compared_is_an_error_that_names_both(a, b, inputs, words):
    with pytest.raises(graphopt.VerifyError) as caught:
        graphopt.verify(a, b, inputs)
    for word in words:
        assert word in str(caught.value)


def test_a_function_is_not_a_module():
    with pytest.raises(TypeError, match=r"optimized: expected an nn\.Module, found function"):
        graphopt.verify(One(), lambda x: x, (torch.ones(3),))


# -- float64 ------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt_tests::only_float32", mutates_args=())
def only_float32(x: torch.Tensor) -> torch.Tensor:
    if x.dtype is not torch.float32:
        raise RuntimeError("float32 only")
    return x * 2


class Custom(nn.Module):
    def forward(self, x):
        return torch.ops.graphopt_tests.only_float32(x) + 1


class Insists(nn.Module):
    """Also computes a part in float32 whatever comes in."""

    def __init__(self, catch: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.catch = catch

    def forward(self, x):
        assert x.dtype is torch.float32, "float32 please"
        if not self.catch:
            x = x * x.sum().item()
            x = x if (x > 0).any() else -x
        return self.head(x.float())


def test_an_op_without_float64_runs_in_float32_and_is_noted():
    found = graphopt.verify(Custom(), Custom(), (torch.randn(3),))
    assert found.ok
    assert "only_float32.default ran in float32: RuntimeError: float32 only" in found.notes[0]


def test_code_that_insists_on_a_dtype_runs_as_its_graph():
    model = Insists()
    found = graphopt.verify(model, copy.deepcopy(model), (torch.randn(3, 4),))
    assert found.ok and found.float64_error == 0
    assert "does not run in float64, its captured graph does" in found.notes[0]
    assert not graphopt.verify(model, changed(model, "head.weight"), (torch.randn(3, 4),)).ok


def test_what_does_not_run_in_float64_at_all_is_reported():
    model = Insists(catch=False)
    found = graphopt.verify(model, copy.deepcopy(model), (torch.randn(3, 4),))
    assert not found.ok
    assert math.isnan(found.float64_error)
    assert "source Insists does not run in float64: AssertionError: float32" in found.check.reason
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["float64_error"] is None


def test_casts_in_a_model_do_not_count():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.half().float() * 3

    class Plain(nn.Module):
        def forward(self, x):
            return x * 3

    found = graphopt.verify(Plain(), Narrow(), (torch.randn(5, 5),))
    assert found.ok and found.float64_error == 0
    assert found.error > 1e-5 > found.source_error
