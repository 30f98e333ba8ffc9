"""A sample of what `benchmarks.fuzz` runs a thousand of, by the same checks; and proof that the
generators reach what they claim and that the checks can fail."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import graphopt
from benchmarks.fuzz import checks, draw
from benchmarks.fuzz.observe import copied
from benchmarks.fuzz.row import Row
from graphopt.testing import strategies
from graphopt.testing.strategies import residuals, spikes
from graphopt.testing.strategies.sketch import STATEMENTS
from tests.helpers import prepare, tensor

SAMPLE = {"programs": 9, "convolutional": 3, "residual": 3, "transformers": 3, "spiking": 3}


ROUND = 12  # draws of one run of hypothesis, which are variations of each other


def each(strategy: st.SearchStrategy[Any], count: int, test: Callable[[Any], None]) -> None:
    """Run `test` on `count` draws, the same every time."""
    profile = settings(
        max_examples=min(count, ROUND), database=None, deadline=None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for number in range(-(-count // ROUND)):

        def drawn(value: Any) -> None:
            test(value)

        seed(number)(profile(given(strategy)(drawn)))()


@pytest.mark.parametrize("kind", SAMPLE)
@pytest.mark.parametrize("mode", draw.MODES)
def test_the_optimized_model_is_the_source(kind: str, mode: str) -> None:
    def test(network: strategies.Network) -> None:
        row = checks.check(kind, network, mode)
        assert row.verdict == "right", row.reason

    each(draw.KINDS[kind](), SAMPLE[kind], test)


# -- the generators reach what they claim -------------------------------------------------------


class Names(TorchFunctionMode):
    """The names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(function.__name__)
        return function(*args, **(kwargs or {}))


BREADTH = """
__getitem__ __setitem__ _weight_norm adaptive_avg_pool2d add add_ amax avg_pool2d batch_norm
broadcast_tensors cat cdist chunk clamp clone conv1d conv2d conv3d conv_transpose2d copy_ cummax
cumsum detach div double dropout einsum embedding exp expand flatten flip gather gelu group_norm
gru gt instance_norm interpolate layer_norm le linear log log_softmax logsumexp masked_fill
masked_fill_ matmul maximum mean mul mul_ narrow neg pad permute pow prelu relu relu_
repeat_interleave reshape rms_norm roll rsqrt scaled_dot_product_attention scatter select sigmoid
silu softmax sort split sqrt squeeze stack sub sum tanh tile to topk transpose unbind unsqueeze
var view where zero_ zeros_like
""".split()


@pytest.fixture(scope="module")
def programs() -> list[strategies.Network]:
    """200 free-form programs."""
    made: list[strategies.Network] = []
    each(strategies.programs(), 200, made.append)
    return made


def test_programs_use_a_wide_range_of_ops(programs: list[strategies.Network]) -> None:
    names = Names()
    with torch.no_grad(), names:
        for one in programs:
            one.module(*copied(one.inputs), **copied(one.kwargs))
    assert not set(BREADTH) - names.seen
    assert len(names.seen) > 220
    code = "\n".join(str(one.module.code) for one in programs)
    for mark in ("no_grad", "out=", "*, ", "gain=", "return {", "self.p0", "_ = ", "self.b0"):
        assert mark in code, f"200 programs without {mark}"
    assert code.count("\n") / len(programs) > 8
    assert len(STATEMENTS) > 35


def test_programs_print_as_code_that_runs(programs: list[strategies.Network]) -> None:
    for network in programs[:20]:
        scope: dict[str, Any] = {"torch": torch, "F": nn.functional}
        exec(str(network.module.code), scope)
        assert repr(network).endswith(str(network.module.code))
        assert scope["forward"].__code__.co_code == type(network.module).forward.__code__.co_code


def test_programs_are_the_same_every_time() -> None:
    one: list[strategies.Network] = []
    two: list[strategies.Network] = []
    for made in (one, two):
        each(strategies.programs(), 20, made.append)
    assert list(map(repr, one)) == list(map(repr, two))
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(one, two, strict=True))


def features(network: strategies.Network) -> Counter[str]:
    """What the modules of a network are and say of themselves, by word."""
    return Counter(re.findall(r"[\w. =-]+", repr(network.module)))


def collect(kind: str, count: int, total: Counter[str]) -> None:
    each(draw.KINDS[kind](), count, lambda one: total.update(features(one)))


def test_the_families_reach_their_variants() -> None:
    found: dict[str, Counter[str]] = {}
    for kind in ("convolutional", "residual", "transformers", "spiking"):
        found[kind] = Counter()
        collect(kind, 60, found[kind])
    expected = {
        "convolutional": ["UNet", "Siamese", "ConvTranspose", "Conv1d", "Conv3d"],
        "residual": ["Residual", "SqueezeExcite", "Branches", "ShuffleUnit", "MultiScale", "Concat"],
        "transformers": [
            "LayerNorm", "RMSNorm", "WrittenRMSNorm", "BatchNorm1d", "sdpa", "written", "einsum",
            "MultiHead", "causal", "additive", "boolean", "swiglu", "pre", "post", "parallel",
            "Window", "Patches", "Embedding", "tied=True", "cls=True",
        ],
        "spiking": [
            *spikes.SPIKES, *spikes.RESETS, *spikes.STEPS, "ThresholdNorm", "StepNorms", "None",
            "repeated", "Conv2d", "Conv1d", "Linear",
        ],
    }  # fmt: skip
    for kind, words in expected.items():
        text = " ".join(found[kind])
        missing = [word for word in words if word not in text]
        assert not missing, f"60 draws of {kind}() without {missing}"
    assert len(residuals.KINDS) == 9


def test_graphs_draws_every_kind() -> None:
    seen: Counter[str] = Counter()
    each(strategies.graphs(), 60, lambda one: seen.update([type(one.module).__name__]))
    assert {"Program", "Sequential", "Transformer", "Spiking"} <= set(seen)


# -- the checks can fail ------------------------------------------------------------------------


class Slip(nn.Module):
    """A model that is wrong in one way."""

    def __init__(self, right: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = copy.deepcopy(right), how
        if how == "weights":
            with torch.no_grad():
                self.inner[0].weight.mul_(1 + 1e-7)  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        if self.how == "memory":
            return self.inner[0].bias  # type: ignore[index]
        if self.how == "input":
            x.add_(1)
        if self.how == "dtype":
            return y.float()
        if self.how == "structure":
            return (y,)
        if self.how == "batch":
            return y if len(y) == 3 else y + 1e-6
        if self.how == "gradient":
            return y + 1e-6 * (y - y.detach())
        return y

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.named_parameters(*args, **kwargs)


SLIPS = [
    "weights",
    "input",
    "dtype",
    "structure",
    "batch",
    "gradient",
    "source",
    "raises",
    "memory",
]


@pytest.mark.parametrize("slip", SLIPS)
def test_wrong_models_are_seen(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    optimize = graphopt.optimize

    def wrong(module: nn.Module, args: Any, kwargs: Any, **options: Any) -> Any:
        fast = optimize(module, args, kwargs, **options)
        if slip == "source":
            module.train()
        if slip == "raises":
            raise RuntimeError("half way")
        made = Slip(module, slip)
        made.report, made.graph_module = fast.report, fast.graph_module
        return made

    monkeypatch.setattr(graphopt, "optimize", wrong)
    row = checks.check("networks", strategies.Network(model, (tensor(3, 4),)), "tune")
    assert row.verdict == "wrong", row


def test_a_right_model_passes() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()))
    row = checks.check("networks", strategies.Network(model, (tensor(3, 4),)), "tune")
    assert (row.verdict, row.batch, row.gradients) == ("right", "right", "right"), row
    assert row.applied
    assert {"linear", "batch_norm", "tanh"} <= set(row.ops)


def test_a_failure_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a program that has what the failure needs and hardly more."""

    def check(kind: str, network: strategies.Network, mode: str) -> Row:
        row = Row(kind, mode, shown=repr(network))
        if "torch.cat" in repr(network):
            row.verdict, row.reason = "wrong", "cats are wrong"
        return row

    monkeypatch.setattr(draw, "check", check)
    rows, failures = draw.draw_models("programs", "deploy", 0, 30, 60.0)
    assert len(rows) >= 30
    assert [one.row.reason for one in failures] == ["cats are wrong"]
    assert failures[0].row.shown.count("\n") <= 8, failures[0].row.shown
