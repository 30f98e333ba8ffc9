"""The specification of `roll-steps`: an unrolled loop over time becomes one scan, or is refused with the
operation that hinders it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.ir.interpret import Interpreter
from graphopt.ir.recurrence.operator import SCAN
from graphopt.pipeline import Pipeline
from graphopt.verify import SiteValidator
from tests.helpers import assert_equal, prepare, tensor
from tests.ir.test_recurrence import left, lif, over_time, rolled, scans

PASSES = (
    "canonicalize,fold-thresholds,canonicalize,roll-steps,canonicalize,materialize,canonicalize"
)


def spike(v: Tensor, threshold: Any = 1.0) -> Tensor:
    return (v >= threshold).to(v.dtype)


def integrate(x: Tensor, v: Tensor, w: Tensor) -> Any:
    v = v + x
    s = spike(v)
    return s, v - s


def leaky_hard(x: Tensor, v: Tensor, w: Tensor) -> Any:
    v = v + (x - v) * torch.sigmoid(w)  # a decay of every channel, as learned
    s = spike(v).detach()
    return s, torch.where(s > 0, torch.full_like(v, 0.25), v)


def synaptic(x: Tensor, i: Tensor, v: Tensor, w: Tensor) -> Any:
    i = i * 0.5 + x
    v = v * w + i
    s = spike(v)
    return s, i, v * (1 - s)


def adaptive(x: Tensor, v: Tensor, a: Tensor, w: Tensor) -> Any:
    v = v * 0.9 + x
    s = spike(v - a)
    return s, v - s * 0.5, a * 0.75 + s * w


def tenth_neuron(x: Tensor, v: Tensor, r: Tensor, w: Tensor) -> Any:
    """Nobody's: a quadratic charge, a refractory trace, a smooth threshold."""
    drive = torch.tanh(x) - 0.5 * r
    v = v + 0.25 * (v * v - v) + drive
    over = torch.clamp(v - w.abs(), min=-1.0)
    s = torch.where(over > 0, 1.0, 0.0).to(v.dtype)
    r = 0.5 * r + s
    v = torch.minimum(v, 2.0 - r)
    v = v * (1 - s) - 0.125 * s
    return s, v, r


NEURONS: dict[Callable[..., Any], int] = {
    integrate: 1, leaky_hard: 1, synaptic: 2, adaptive: 2, tenth_neuron: 2,
}  # fmt: skip


@pytest.mark.parametrize("start", ["zeros", "given", "number"])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda one: one.__name__)
def test_every_neuron_is_one_scan(neuron: Callable[..., Any], start: str):
    x, w = 2 * tensor(6, 4, 3), tensor(3, seed=5)
    first = [tensor(4, 3, seed=7 + i) for i in range(NEURONS[neuron])]

    def run(x: Tensor, w: Tensor, *given: Tensor) -> Any:
        number = 0.0 if start == "zeros" else -0.3
        begin = given if start == "given" else [torch.full_like(x[0], number) for _ in given]
        spikes, states = over_time(neuron, x, begin, w)
        return torch.stack(spikes), states[-1]

    graph, _ = rolled(run, x, w, *first)
    (scan,) = scans(graph)
    assert scan.steps == 6
    assert len(scan.states) >= NEURONS[neuron] - 1


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_time_along_any_axis_and_of_any_length(steps: int, axis: int):
    def run(x: Tensor) -> Any:
        inputs = x.unbind(axis)
        spikes, (v,) = over_time(lif, inputs, [torch.zeros_like(inputs[0])])  # type: ignore[arg-type]
        return torch.stack(spikes, axis), v

    shape = [4, 3]
    shape.insert(axis, steps)
    graph, session = rolled(run, 3 * tensor(*shape))
    assert len(scans(graph)) == (steps > 2)
    if steps == 2:  # zeros are folded into the first, the second hands nothing on
        assert any("two steps" in one.reason for one in session.remaining_refusals())
    if steps > 2:
        assert scans(graph)[0].steps == steps
        assert left(graph) == []


def test_outputs_read_at_single_steps_and_backwards():
    def run(x: Tensor) -> Any:
        spikes, _ = over_time(lif, x, [torch.zeros_like(x[0])])
        return torch.stack(spikes[::-1], 1), torch.cat(spikes), spikes[1] @ spikes[3].mT, spikes[2]

    graph, _ = rolled(run, 3 * tensor(5, 4, 4))
    assert len(scans(graph)) == 1
    assert not [node for node in left(graph) if not node.startswith("clone")]


def narrow(inside: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A neuron of float64 whose spikes are float32, as libraries have them; it returns them so."""

    def run(x: Tensor) -> Any:
        def step(x: Tensor, v: Tensor) -> Any:
            reset = inside((v > 1.0).float())
            v = 0.9 * v * (1 - reset) + x
            return (v > 1.0).to(torch.float32), v

        spikes, (v,) = over_time(step, x, [torch.zeros_like(x[0])])  # type: ignore[arg-type]
        return torch.stack(spikes), spikes[2], v

    return run


@pytest.mark.parametrize("inside", [lambda s: s, lambda s: -(-s * 3 - s) * 2, lambda s: 5 - s])
def test_spikes_of_float32_in_a_net_of_float64(inside: Callable[[Tensor], Tensor]):
    x = 2 * tensor(6, 4, 3)
    graph, _ = rolled(narrow(inside), x)
    assert len(scans(graph)) == 1
    truth, found = narrow(inside)(x), Interpreter(graph).run([x])
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert found[0].dtype == torch.float32 and 0 < found[0].mean() < 1


@pytest.mark.parametrize("inside", [
    lambda s: s * 0.3, lambda s: s / 3, lambda s: s.sigmoid(), lambda s: torch.add(s, s, alpha=0.7),
    lambda s: s * 1e9, lambda s: s.double().mul(0.3).float(),
])  # fmt: skip
def test_what_float32_would_round_is_refused_in_a_net_of_float64(inside: Any):
    graph, session = rolled(narrow(inside), 2 * tensor(6, 4, 3))
    assert scans(graph) == []
    reasons = [one.reason for one in session.remaining_refusals()]
    assert any("computes in torch.float32 what is float64" in one for one in reasons)


def test_a_first_step_of_its_own_stays_outside():
    def run(x: Tensor) -> Any:
        v = torch.exp(x[0])
        first = (v >= 2.0).to(x.dtype)
        spikes, _ = over_time(lif, x[1:], [v * first])
        return torch.stack([first, *spikes])

    graph, _ = rolled(run, 3 * tensor(6, 4))
    assert [one.steps for one in scans(graph)] == [5]


@pytest.mark.parametrize("reset", [True, False])
def test_a_first_step_that_hands_on_another_state_stays_outside(reset: bool):
    def run(x: Tensor) -> Any:
        first = spike(x[0])
        v, spikes = x[0] * (1 - first) - 0.125 if reset else x[0], [first]
        for one in x[1:]:
            v = v + one
            spikes.append(spike(v))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes)

    graph, _ = rolled(run, 2 * tensor(6, 4))
    assert [one.steps for one in scans(graph)] == [5]


def test_the_sign_of_a_zero_is_no_difference():
    def run(x: Tensor) -> Any:
        spikes, (v,) = over_time(lambda x, v: integrate(x, v, x), x, [torch.zeros_like(x[0])])
        return torch.stack(spikes), v

    graph, _ = rolled(run, torch.full((3, 4), -0.0, dtype=torch.float64))
    assert len(scans(graph)) == 1


# -- refused -----------------------------------------------------------------------------------------


def recurrent(x: Tensor, w: Tensor) -> Any:
    v = s = torch.zeros_like(x[0])
    spikes = []
    for one in x:
        s, v = lif(one + s @ w, v)
        spikes.append(s)
    return torch.stack(spikes)


def uneven(x: Tensor, w: Tensor) -> Any:
    v, spikes = torch.zeros_like(x[0]), []
    for t, one in enumerate(x):
        s, v = lif(one.pow(1.5 + t), v)
        spikes.append(s)
    return torch.stack(spikes)


def longer(x: Tensor, w: Tensor) -> Any:
    a = b = torch.zeros_like(x[0])
    made = []
    for one in x:
        a, b = torch.tanh(one * a + b), a
        made.append(a)
    return torch.stack(made)


def summed(x: Tensor, w: Tensor) -> Any:
    v, spikes = torch.zeros_like(x[0]), []
    for one in x:
        s, v = lif(one, v - v.mean(-1, keepdim=True))
        spikes.append(s)
    return torch.stack(spikes)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (recurrent, "aten.mm.default) between steps is not pointwise"),
        (summed, "aten.mean.dim) between steps is not pointwise"),
        (uneven, "steps 1 and 2 differ: "),
        (longer, "of more than one step before"),
    ],
)
def test_what_is_no_loop_of_one_step_is_refused_with_the_operation(function: Any, reason: str):
    graph, session = rolled(function, tensor(6, 4, 4), tensor(4, 4, seed=2))
    assert scans(graph) == []
    reasons = [one.reason for one in session.remaining_refusals() if one.rewrite == "roll-steps"]
    assert any(reason in one for one in reasons), reasons


def test_random_values_do_not_move():
    def run(x: Tensor, w: Tensor) -> Any:
        v, spikes = torch.zeros_like(x[0]), []
        for one in x:
            s, v = lif(torch.bernoulli(one.sigmoid()) + one, v)
            spikes.append(s @ w)
        return torch.stack(spikes)

    graph, session = rolled(run, tensor(4, 3, 3), tensor(3, 3, seed=2))
    assert scans(graph) == []
    assert any("random" in one.reason for one in session.remaining_refusals())


# -- whole models ------------------------------------------------------------------------------------


class Spiking(nn.Module):
    """Two layers step by step; the norm of the second is between membrane and threshold (MPBN)."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.decay, self.steps = nn.Parameter(torch.rand(8)), steps

    def forward(self, x: Tensor) -> Any:
        u = v = torch.zeros(())
        spikes = []
        for t in range(self.steps):
            s, u = leaky_hard(self.a(x[:, t]), u.expand(x.shape[0], 8).to(x.dtype), self.decay)
            v = 0.25 * v + self.b(s)
            o = (self.norm(v) > 0.1).to(x.dtype)
            v = v * (1 - o)
            spikes.append(o)
        return torch.stack(spikes, 1), v


def spiking(steps: int = 4) -> nn.Module:
    model = prepare(Spiking(steps))
    with torch.no_grad():
        model.norm.weight[2] = -model.norm.weight[2].abs() - 0.1
    return model


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = spiking(), 3 * tensor(5, 4, 4)
    return model, graphopt.optimize(model, (x,), passes=PASSES), x


def loops(fast: Any) -> int:
    return sum(node.target is SCAN for node in fast.graph_module.graph.nodes)


def test_a_model_with_a_dynamic_batch(whole: Any):
    model, fast, _ = whole
    assert fast.report.rolled_back == []
    assert loops(fast) == 2
    for rows in (1, 2, 7):
        given = 3 * tensor(rows, 4, 4, seed=rows)
        assert_equal(fast(given), model(given))
    assert sum(one.rewrite == "roll-steps" for one in fast.report.applied) == 2


def test_saved_and_loaded(whole: Any, tmp_path: Path):
    _, fast, x = whole
    fast.save(tmp_path / "model")
    again = graphopt.load(tmp_path / "model")
    assert loops(again) == 2
    assert_equal(again(x), fast(x), limit=0)


def test_exported_programs_know_no_scan(whole: Any):
    _, fast, x = whole
    program = torch.export.export(fast.graph_module, (x,)).run_decompositions()
    assert not any("graphopt" in str(node.target) for node in program.graph.nodes)
    assert_equal(program.module()(x), fast(x))


def test_moved_to_another_dtype(whole: Any):
    _, fast, x = whole
    single = copy.deepcopy(fast).float()
    assert single(x.float())[0].dtype == torch.float32


class Layer(nn.Module):
    """Neurons alone, three steps, batch first."""

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[:, 0]), []
        for t in range(3):
            s, v = lif(x[:, t], v)
            spikes.append(s)
        return torch.stack(spikes, 1)


@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_backends_agree(backend: str):
    model, x = Layer(), 3 * tensor(5, 3, 4, dtype=torch.float32)
    with torch.no_grad():
        fast = graphopt.optimize(model, (x,), passes=PASSES, backend=backend)
        assert fast.report.backend == backend, fast.report.backend_notes
        assert loops(fast) == 1
        assert_equal(fast(x), model(x), limit=0)
        if backend == "triton":
            assert [one.kind for one in fast.kernels].count("scan") == 1


class Peeled(nn.Module):
    """A first step that is none of the others."""

    def forward(self, x: Tensor) -> Any:
        v = torch.exp(x[:, 0])
        spikes = [(v >= 2.0).to(x.dtype)]
        v = v * spikes[0]
        for t in range(1, 5):
            s, v = lif(x[:, t], v)
            spikes.append(s)
        return torch.stack(spikes, 1), v


def test_a_first_step_of_its_own_in_kernels():
    model, x = Peeled(), 3 * tensor(4, 5, 3, dtype=torch.float32)
    with torch.no_grad():
        for passes in (PASSES, "canonicalize"):
            fast = graphopt.optimize(model, (x,), passes=passes, backend="triton")
            assert fast.report.backend == "triton", fast.report.backend_notes
            assert "scan" in [one.kind for one in fast.kernels]
            assert_equal(fast(x), model(x), limit=1e-6)


def test_the_documentation_prints_what_is_printed():
    page = (Path(__file__).parent.parent.parent / "docs" / "spiking.md").read_text()
    before, after = re.findall(r"^```text\n(graph\(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    x = torch.randn(2, 3, 4)
    graph = capture(Layer(), (x,), {}, None).graph
    session = Session(graph, SiteValidator(graph, [x]))

    def text() -> str:
        return re.sub(r"\bs\d+\b", "s0", str(graph))

    Pipeline("canonicalize").run(session)
    assert text() == before
    Pipeline("roll-steps,canonicalize").run(session)
    assert text() == after


def test_the_printout_shows_the_step():
    graph, _ = rolled(
        lambda x: torch.stack(over_time(lif, x, [torch.zeros_like(x[0])])[0]), tensor(4, 3)
    )
    text = str(graph)
    assert "Scan(steps=4, states=(full_like,), xs=(arg0_1,), others=())" in text.replace(
        "_default", ""
    )
    assert " = v0 + (x0 - v0) / 2" in text
    assert "aten.mul.Tensor" not in text


# -- neurons of libraries ------------------------------------------------------------------------------

LIBRARY = f"open-operators,drop-gradients,{PASSES}"


def library_neuron(make: Callable[[], nn.Module], mode: str) -> nn.Module:
    from spikingjelly.activation_based import functional

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.neuron = nn.Linear(4, 3), make()

        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self)
            if mode == "m":
                return self.neuron(self.lin(x))
            return torch.stack([self.neuron(self.lin(one)) for one in x])

    return Layer().eval()


@pytest.mark.parametrize(
    ("name", "options", "mode"),
    [
        ("LIFNode", {"decay_input": True}, "m"), ("LIFNode", {"decay_input": False, "v_reset": None}, "s"),
        ("IFNode", {"v_reset": None}, "m"), ("ParametricLIFNode", {}, "s"),
        ("QIFNode", {}, "m"), ("EIFNode", {}, "s"),
    ],
)  # fmt: skip
def test_spikingjelly(name: str, options: Any, mode: str):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = library_neuron(lambda: getattr(neuron, name)(step_mode=mode, **options), mode)
    x = 3 * tensor(4, 5, 4, dtype=torch.float32)
    fast = graphopt.optimize(model, (x,), passes=LIBRARY)
    assert fast.report.rolled_back == []
    assert loops(fast) == 1
    assert_equal(fast(x), model(x), limit=0)


@pytest.mark.parametrize("name", ["Leaky", "Synaptic"])
def test_snntorch(name: str):
    snn = pytest.importorskip("snntorch")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)
            self.neuron = (
                snn.Leaky(beta=0.9) if name == "Leaky" else snn.Synaptic(alpha=0.8, beta=0.9)
            )

        def forward(self, x: Tensor) -> Any:
            states = [torch.zeros(x.shape[1], 3)] * (1 + (name == "Synaptic"))
            spikes = []
            for one in x:
                s, *states = self.neuron(self.lin(one), *states)
                spikes.append(s)
            return torch.stack(spikes), states[-1]

    model, x = Layer().eval(), 3 * tensor(4, 5, 4, dtype=torch.float32)
    fast = graphopt.optimize(model, (x,), passes=LIBRARY)
    assert fast.report.rolled_back == []
    assert loops(fast) == 1
    assert_equal(fast(x), model(x), limit=0)


def test_the_preset_order_batches_the_layers():
    model, x = spiking(), 3 * tensor(5, 4, 4)
    passes = PASSES.replace("roll-steps", "batch-siblings,roll-steps")
    fast = graphopt.optimize(model, (x,), passes=passes)
    assert loops(fast) == 2
    linear = [n for n in fast.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(linear) == 2
    assert_equal(fast(x), model(x))
