"""Spiking networks with parameters of their own at every time step: norms (BNTT), factors (TEBN), decays,
thresholds, numbers. They are read step by step by a scan, in which no norm is left."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.recurrence.operator import SCAN
from graphopt.pipeline import Pipeline
from graphopt.streaming import StreamingError, streaming
from graphopt.verify import SiteValidator
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
from tests.ir.test_recurrence import left, over_time, rolled, scans
from tests.passes.test_roll_steps import PASSES, loops

BATCHED = PASSES.replace("canonicalize,", "canonicalize,batch-siblings,canonicalize,", 1).replace(
    "fold-thresholds", "fold-thresholds,[fold-batch-norm,absorb-scales]"
)
NORMS = ("bntt", "tebn", "tebn of 3d", "tdbn")
VIEWS = {"sym_size", "transpose", "permute", "flatten", "unflatten", "reshape", "select", "stack",
         "full_like", "slice"}  # fmt: skip


class Fire(nn.Module):
    """Leaky integrate and fire; with `smooth`, spikes have the gradient of a sigmoid."""

    def __init__(self, reset: str, decay: float, smooth: bool = False) -> None:
        super().__init__()
        self.reset, self.decay, self.smooth = reset, decay, smooth

    def step(self, x: Tensor, v: Tensor | None, threshold: Any = 0.7) -> tuple[Tensor, Tensor]:
        v = x if v is None else self.decay * v + x
        s = (v > threshold).to(x.dtype)
        if self.smooth:
            soft = torch.sigmoid(2 * (v - threshold))
            s = s.detach() - soft.detach() + soft
        return s, v * (1 - s) if self.reset == "hard" else v - threshold * s

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = None, []
        for one in x:
            s, v = self.step(one, v)
            spikes.append(s)
        return torch.stack(spikes)


class Norm(nn.Module):
    """The norms of the papers: `forward` for one step, `all` for `[T, N, C, H, W]`."""

    def __init__(self, kind: str, steps: int, channels: int) -> None:
        super().__init__()
        self.kind = kind
        flat = nn.BatchNorm3d if kind == "tebn of 3d" else nn.BatchNorm2d
        self.norms = nn.ModuleList(flat(channels) for _ in range(steps if kind == "bntt" else 1))
        if kind.startswith("tebn"):
            self.factor = nn.Parameter(torch.linspace(1.5, -0.8, steps).view(-1, 1, 1, 1, 1))

    def forward(self, x: Tensor, t: int) -> Tensor:
        if self.kind == "bntt":
            return self.norms[t](x)
        if self.kind == "tebn of 3d":
            return self.norms[0](x.unsqueeze(2)).squeeze(2) * self.factor[t]
        y = self.norms[0](x)
        return y * self.factor[t] if self.kind == "tebn" else 0.7 * y

    def all(self, x: Tensor) -> Tensor:
        if self.kind == "bntt":
            return torch.stack([norm(one) for norm, one in zip(self.norms, x, strict=True)])
        if self.kind == "tebn of 3d":
            y = self.norms[0](x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
        else:
            y = self.norms[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y * self.factor if self.kind.startswith("tebn") else 0.7 * y


class Spiking(nn.Module):
    """Two layers of `[N, T, ...]`, the second with a shortcut if `residual`; all its spikes too."""

    def __init__(
        self, norm: str, form: str, steps: int = 4, reset: str = "hard", decay: float = 0.5,
        smooth: bool = False, residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.steps, self.residual = form, steps, residual
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.na, self.nb, self.nc = (Norm(norm, steps, 5) for _ in range(3))
        self.c, self.head = nn.Conv2d(2, 5, 1), nn.Linear(5, 3)
        self.fire = Fire(reset, decay, smooth)

    def forward(self, x: Tensor) -> Any:
        x = x.transpose(0, 1)
        s, r = self.loop(x) if self.form == "loop" else self.stacked(x)
        scores = self.head(r.flatten(0, 1).mean((2, 3))).unflatten(0, (self.steps, -1))
        return scores.transpose(0, 1), s, r

    def loop(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = v = None
        made = []
        for t in range(self.steps):
            s, u = self.fire.step(self.na(self.a(x[t]), t), u)
            y = self.nb(self.b(s), t)
            y = y + self.nc(self.c(x[t]), t) if self.residual else y
            r, v = self.fire.step(y, v)
            made.append((s, r))
        first, second = zip(*made, strict=True)
        return torch.stack(first), torch.stack(second)

    def stacked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def over(conv: nn.Module, x: Tensor) -> Tensor:
            return conv(x.flatten(0, 1)).unflatten(0, (self.steps, -1))

        s = self.fire(self.na.all(over(self.a, x)))
        y = self.nb.all(over(self.b, s))
        y = y + self.nc.all(over(self.c, x)) if self.residual else y
        return s, self.fire(y)


def frames(rows: int = 3, steps: int = 4, seed: int = 1) -> Tensor:
    return 2 * tensor(rows, steps, 2, 4, 4, seed=seed)


def assert_spikes(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    (scores, *spikes), (truth, *expected) = fast(x), model(x)
    assert_equal(scores, truth)
    for one, other in zip(spikes, expected, strict=True):
        assert torch.equal(one, other)
        assert 0 < one.mean() < 1


def assert_folded(fast: Any, more: Set[str] = frozenset()) -> None:
    """Two scans, no norm, and nothing pointwise outside of them but `more`."""
    assert fast.report.rolled_back == []
    assert fast.report.after.batch_norms == 0
    assert loops(fast) == 2
    found = {one for one in calls(fast) if not one.startswith("graphopt")}
    assert found - VIEWS == {"conv2d", "linear", "mean"} | more


@pytest.mark.parametrize("form", ["loop", "stacked"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_every_step_are_in_the_scan(norm: str, form: str):
    residual = (form == "stacked") == (norm in ("bntt", "tdbn"))
    reset = "soft" if residual else "hard"
    model, x = prepare(Spiking(norm, form, reset=reset, residual=residual)), frames()
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert_folded(fast, {"add"} if norm == "tdbn" and residual else set())
    for rows in (3, 1, 5):
        assert_spikes(fast, model, frames(rows, seed=rows))
    live = streaming(fast)
    scores = model(x)[0]
    for t in range(4):
        assert_equal(live(x[:, t])[0], scores[:, t])


@pytest.mark.parametrize("form", ["loop", "stacked"])
def test_deployed(form: str, tmp_path: Path):
    """By the preset; a scale and a shift of every step, stacked, take the place of four parameters of
    every norm."""
    model, x = prepare(Spiking("bntt", form)), frames()
    fast = graphopt.optimize(model, (x,), mode="deploy")
    assert_folded(fast)
    assert_spikes(fast, model, x)
    own = [one.shape for one in fast.state_dict().values() if one.shape[:1] == (4,)]
    assert own == [torch.Size([4, 1, 5, 1, 1])] * 4
    assert "fold-batch-norm" not in {one.rewrite for one in fast.report.refused}
    fast.save(tmp_path / "model")
    assert_spikes(graphopt.load(tmp_path / "model"), model, x)


@given(
    norm=st.sampled_from(NORMS), form=st.sampled_from(["loop", "stacked"]),
    steps=st.integers(3, 6), reset=st.sampled_from(["hard", "soft"]),
    decay=st.sampled_from([0.25, 0.9, 1.0]), residual=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_any_number_of_steps(
    norm: str, form: str, steps: int, reset: str, decay: float, residual: bool, seed: int
):
    model = prepare(Spiking(norm, form, steps, reset, decay, residual=residual), seed)
    x = frames(2, steps, seed)
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert fast.report.rolled_back == []
    assert fast.report.after.batch_norms == 0
    assert loops(fast) == 2
    for found, truth in zip(fast(x), model(x), strict=True):
        assert_equal(found, truth)


@pytest.mark.parametrize(
    ("norm", "form"), [("bntt", "loop"), ("bntt", "stacked"), ("tebn", "loop")]
)
def test_the_parameters_of_every_step_train(norm: str, form: str):
    model, x = prepare(Spiking(norm, form, reset="soft", smooth=True)), frames()
    fast = graphopt.optimize(
        model, (x,), mode="tune", passes="canonicalize,batch-siblings,canonicalize,roll-steps,canonicalize",
    )  # fmt: skip
    assert loops(fast) == 2
    truth = gradients(model, (x,))
    own = [name for name in truth if "norms" in name or "factor" in name]
    assert len(own) >= 3
    assert all(float(truth[name].abs().max()) > 0 for name in own if not name.startswith("nc"))
    assert gradient_error(gradients(fast, (x,)), truth) <= 1e-10


# -- other parameters of every step ------------------------------------------------------------------


class Steps(nn.Module):
    """A neuron with something of its own at every step."""

    def __init__(self, kind: str, steps: int = 4) -> None:
        super().__init__()
        self.kind, self.steps, self.fire = kind, steps, Fire("hard", 0.5)
        self.lin = nn.Linear(3, 5)
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(steps))
        self.own = nn.ParameterList(torch.rand(5) + 0.2 for _ in range(steps))
        if kind == "shapes":
            self.own[2] = torch.rand(1)

    def forward(self, x: Tensor) -> Any:
        v: Any = None
        spikes = []
        for t in range(self.steps):
            y = self.lin(x if self.kind == "direct" else x[:, t])
            y = self.norms[t](y) if self.kind in ("direct", "norm") else y
            if self.kind == "decay":
                v = y if v is None else v * self.own[t] + y
                s = (v > 0.5).to(v.dtype)
                v = v - s
            elif self.kind == "membrane":
                v = y if v is None else 0.5 * v + y
                s = (self.norms[t](v) > 0.5).to(v.dtype)
                v = v - s
            elif self.kind == "state":
                v = self.norms[t](y if v is None else 0.5 * v + y)
                s = (v > 0.2).to(v.dtype)
                v = v - s
            elif self.kind in ("threshold", "shapes"):
                s, v = self.fire.step(y, v, self.own[t])
            elif self.kind == "number":
                s, v = self.fire.step((1.0 + 0.5 * t) * y, v, 0.5 + 0.1 * t)
            else:
                s, v = self.fire.step(y, v)
            spikes.append(s)
        return torch.stack(spikes, 1), v


@pytest.mark.parametrize(
    "kind", ["norm", "direct", "decay", "membrane", "state", "threshold", "number"]
)
def test_whatever_a_step_has_of_its_own(kind: str):
    model, x = prepare(Steps(kind)), 3 * tensor(4, 4, 3)
    x = x[:, 0] if kind == "direct" else x
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert fast.report.rolled_back == []
    assert fast.report.after.batch_norms == 0
    assert loops(fast) == 1
    (found, last), (truth, state) = fast(x), model(x)
    assert torch.equal(found, truth)
    assert_equal(last, state)
    assert 0 < found.mean() < 1
    live = streaming(fast, axis=None if kind == "direct" else "auto")
    for t in range(4):
        found, last = live(x if kind == "direct" else x[:, t])
        assert torch.equal(found, truth[:, t])
    assert_equal(last, state)


def test_the_last_norm_of_a_loop_stays_as_those_before():
    """Nothing reads the state after it, and alone it would be a threshold."""
    model = prepare(Net(lambda net, x: net.inner(x)[0], inner=Steps("state")))
    x = 3 * tensor(4, 4, 3)
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    steps = [one.args[1] for one in fast.graph_module.graph.nodes if one.target is SCAN]
    assert steps == [4]
    assert not {"gt", "stack"} & set(calls(fast))
    assert torch.equal(fast(x), model(x))


def test_a_norm_in_front_of_a_comparison_is_a_threshold_of_every_step():
    model, x = prepare(_Stateless()), tensor(4, 6, 3)
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert fast.report.after.batch_norms == 0
    assert torch.equal(fast(x), model(x))
    assert calls(fast).count("gt") == 1
    assert "add" not in calls(fast)


class _Stateless(nn.Module):
    """Norms of every step in front of a comparison, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        made = [(norm(one) > 0.5).to(x.dtype) for norm, one in zip(self.norms, x, strict=True)]
        return torch.stack(made)


def test_norms_of_every_step_in_front_of_a_pool():
    """What stands between them and the neurons is one op; they are a product and a sum before it."""

    class Pooled(Spiking):
        def loop(self, x: Tensor) -> tuple[Tensor, Tensor]:
            v, made = None, []
            for t in range(self.steps):
                y = nn.functional.avg_pool2d(self.na(self.a(x[t]), t), 2)
                s, v = self.fire.step(y, v)
                made.append(s)
            return torch.stack(made), torch.stack(made)

    model, x = prepare(Pooled("bntt", "loop")), frames()
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert fast.report.after.batch_norms == 0
    assert [calls(fast).count(one) for one in ("mul", "add", "avg_pool2d")] == [1, 1, 1]
    assert_spikes(fast, model, x)


def test_in_kernels():
    model, x = prepare(Spiking("bntt", "stacked")).float(), frames().float()
    with torch.no_grad():
        fast = graphopt.optimize(model, (x,), passes=BATCHED, backend="triton")
        assert fast.report.backend == "triton", fast.report.backend_notes
        assert [one.kind for one in fast.kernels].count("scan") == 2
        for one, other in zip(fast(x), model(x), strict=True):
            assert_equal(one, other, limit=1e-4)


# -- numbers, in a traced function -------------------------------------------------------------------


def test_numbers_of_every_step():
    def run(x: Tensor) -> Any:
        v, spikes = torch.zeros_like(x[0]), []
        for t, one in enumerate(x):
            v = v * (0.5 + 0.05 * t) + one / (1.0 + t)
            s = (v >= 0.3 + 0.1 * t).to(x.dtype)
            v = v - s * (0.25 + t)
            spikes.append(s)
        return torch.stack(spikes)

    graph, _ = rolled(run, 2 * tensor(6, 4, 3))
    (scan,) = scans(graph)
    assert (scan.steps, len(scan.xs), left(graph)) == (6, 5, [])


def test_a_number_that_all_steps_share_stays_one():
    def run(x: Tensor) -> Any:
        return torch.stack(over_time(lambda one, v: Fire("hard", 0.5).step(one, v), x, [None])[0])

    graph, _ = rolled(run, 2 * tensor(6, 4, 3))
    assert len(scans(graph)[0].xs) == 1


class Leaky(nn.Module):
    """A convolution, a norm of every step, a neuron: the example of the documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = None, []
        for t in range(3):
            y = self.norms[t](self.conv(x[:, t]))
            v = y if v is None else v * 0.5 + y
            spikes.append((v > 1).to(x.dtype))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes, 1)


def test_the_documentation_prints_what_is_printed():
    page = (Path(__file__).parent.parent.parent / "docs" / "spiking.md").read_text()
    (expected,) = re.findall(r"^```text\n(scan: .*?)\n```", page, re.DOTALL | re.MULTILINE)
    x = tensor(2, 3, 2, 5, 5)
    graph = capture(prepare(Leaky()), (x,), {}, None).graph
    passes = "canonicalize,batch-siblings,canonicalize,roll-steps,canonicalize,materialize"
    Pipeline(passes).run(Session(graph, SiteValidator(graph, [x])))
    text = textwrap.dedent(re.sub(r"\bs\d+\b", "s0", str(graph)).partition("\n")[2])
    assert expected in text


# -- refused -----------------------------------------------------------------------------------------


def test_parameters_of_different_shapes_are_refused():
    model, x = prepare(Steps("shapes")), 3 * tensor(4, 4, 3)
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert loops(fast) == 0
    assert "steps 1 and 2 differ" in reasons(fast)
    assert "[1], expected float64 [5]" in reasons(fast)
    assert_equal(fast(x), model(x))


def test_two_steps_that_start_from_zero_stay_unrolled():
    model, x = prepare(Spiking("bntt", "loop", 2)), frames(3, 2)
    fast = graphopt.optimize(model, (x,), passes=BATCHED)
    assert loops(fast) == 0
    assert "two steps, the first of which starts from numbers" in reasons(fast)
    assert_spikes(fast, model, x)


def test_more_steps_than_there_are_parameters_for():
    model, x = prepare(Spiking("bntt", "loop")), frames()
    live = streaming(graphopt.optimize(model, (x,), passes=BATCHED))
    scores = model(x)[0]
    assert (live.limit, live.time) == (4, 0)
    for t in range(4):
        live(x[:, t])
    with pytest.raises(StreamingError, match=r"at most 4 steps, .* found step 5; call reset\(\)"):
        live(x[:, 0])
    live.reset()
    assert_equal(live(x[:, 0])[0], scores[:, 0])
    with torch.no_grad():
        live.reset()
        live(x[:, 0])
        assert_equal(copy.deepcopy(live)(x[:, 1])[0], scores[:, 1])


def test_steps_that_are_alike_go_on_for_ever():
    model, x = prepare(Spiking("tdbn", "loop")), frames()
    live = streaming(graphopt.optimize(model, (x,), passes=BATCHED))
    assert live.limit is None
    for t in range(9):
        live(x[:, t % 4])
