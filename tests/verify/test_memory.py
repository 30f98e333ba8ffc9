"""What a check has computed serves the checks after it, and never where it is no longer true."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Evaluator, Interpreter, Kept
from graphopt.verify import site as sites
from graphopt.verify.bounds import Memory, Site
from graphopt.verify.values import Values
from tests.helpers import Net, tensor


def graph_of(body: Any, **modules: Any) -> Graph:
    return capture(Net(body, **modules).eval(), (tensor(3, 4),), {}).graph


def chain() -> Graph:
    return graph_of(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(4, 5).double(),
                    b=nn.Linear(5, 2).double())  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op is run."""
    counted: Counter[str] = Counter()
    call = Interpreter.call

    def counting(self: Interpreter, node: fx.Node, env: Any) -> Any:
        counted[str(node.target)] += 1
        return call(self, node, env)

    monkeypatch.setattr(Interpreter, "call", counting)
    return counted


def through(graph: Graph, memory: Memory, cut: fx.Node) -> Site:
    """A site of all calls below `cut`."""
    values = Evaluator(graph, [tensor(3, 4)])
    known = {one: values.evaluate(one) for one in (cut, *graph.fx.nodes) if one.op == "get_attr"}
    site = Site(graph, known | {cut: values.evaluate(cut)}, memory)
    for node in graph.calls:
        if node > cut:
            site.add(node)
    return site


def test_products_are_computed_once_for_the_same_cut(runs: Counter[str]) -> None:
    graph, memory = chain(), Memory(1 << 20)
    first = through(graph, memory, graph.inputs[0])
    runs.clear()
    second = through(graph, memory, graph.inputs[0])
    assert not any("linear" in name for name in runs)
    for node in graph.calls:
        torch.testing.assert_close(second.values[node], first.values[node], rtol=0, atol=0)
        assert torch.equal(second.tolerance(node), first.tolerance(node))


def test_another_cut_has_other_bounds() -> None:
    """What is in the cut counts as exact there, and so nothing that depends on it is taken over."""
    graph, memory = chain(), Memory(1 << 20)
    above = through(graph, memory, graph.inputs[0])
    (relu,) = (one for one in graph.calls if "relu" in str(one.target))
    (result,) = graph.output.all_input_nodes
    below = through(graph, memory, relu)
    fresh = through(graph, Memory(0), relu)
    assert torch.equal(below.tolerance(result), fresh.tolerance(result))
    assert bool((below.tolerance(result) < above.tolerance(result)).all())


def test_a_node_whose_inputs_changed_is_computed_again() -> None:
    graph, memory = chain(), Memory(1 << 20)
    (result,) = graph.output.all_input_nodes
    before = through(graph, memory, graph.inputs[0]).values[result]
    (relu,) = (one for one in graph.calls if "relu" in str(one.target))
    result.replace_input_with(relu, relu.all_input_nodes[0])
    after = through(graph, memory, graph.inputs[0]).values[result]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, Evaluator(graph, [tensor(3, 4)]).evaluate(result))


def test_a_keyword_that_changed_is_seen() -> None:
    graph = graph_of(lambda net, x: torch.add(x @ net.w, x, alpha=2), w=nn.Parameter(tensor(4, 4)))
    memory = Memory(1 << 20)
    (result,) = graph.output.all_input_nodes
    before = memory.number(result, tuple(result.all_input_nodes))
    assert memory.number(result, tuple(result.all_input_nodes)) == before
    result.kwargs = {**result.kwargs, "alpha": 3}
    assert memory.number(result, tuple(result.all_input_nodes)) != before


def test_the_limit_holds(runs: Counter[str]) -> None:
    graph, memory = chain(), Memory(0)
    through(graph, memory, graph.inputs[0])
    runs.clear()
    through(graph, memory, graph.inputs[0])
    assert any("linear" in name for name in runs)


class Residual(nn.Module):
    """Blocks that read a residual stream through a norm and write into it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth))
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(depth)
        )
        self.first, self.last = nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, one in zip(self.norms, self.maps, strict=True):
            x = x + one(norm(x))
        return self.last(x)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_centring_a_stream_is_checked_in_linear_time(
    runs: Counter[str], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every norm depends on all maps before it: one by one, twice the depth is four times the work."""
    monkeypatch.setattr(sites, "Memory", lambda limit: Memory(min(limit, memory)))

    def products(depth: int) -> int:
        torch.manual_seed(0)
        runs.clear()
        model = Residual(depth).double().eval()
        fast = graphopt.optimize(model, (tensor(3, 4),))
        assert any(one.rewrite == "center-stream" for one in fast.report.applied)
        return sum(count for name, count in runs.items() if "linear" in name)

    assert products(16) < 2.5 * products(8)


@pytest.mark.parametrize("limit", [0, 1, 200, 1 << 20])
def test_values_are_the_same_however_little_is_kept(limit: int) -> None:
    graph = graph_of(lambda net, x: torch.cat([net.a(x), x.sin() + net.a(x).cos(), x * x]),
                     a=nn.Linear(4, 4).double())  # fmt: skip
    values = Evaluator(graph, [tensor(3, 4)], limit=limit)
    whole = Evaluator(graph, [tensor(3, 4)])
    for node in [*graph.calls, *reversed(graph.calls)]:
        assert torch.equal(values.evaluate(node), whole.evaluate(node))


def test_dear_values_are_kept_longest_and_then_those_read_last() -> None:
    graph = graph_of(lambda net, x: x.sin() + x.cos() + x.tan())
    sin, cos, _, tan, _ = graph.calls
    kept = Kept(2 * 8 * 12, dear=lambda node: node is sin)
    value = tensor(3, 4)
    for node in (sin, cos, tan):
        kept.put(node, value)
    assert sin in kept and cos not in kept and tan in kept
    kept.put(cos, value)
    assert sin in kept and cos in kept and tan not in kept
    kept.put(tan, tensor(30, 4))  # more than there is room for: it stays until the next one
    assert tan in kept and sin not in kept and cos not in kept
    kept.put(cos, value)
    assert cos in kept and tan not in kept


def test_sites_start_from_what_the_model_computes_and_from_exact_constants() -> None:
    """A third in float32 and a third in float64 are two numbers: a weight made of it is the latter."""
    graph = graph_of(lambda net, x: (x.float() / 3) * (net.w / 3), w=nn.Parameter(torch.ones(4)))
    values = Values(graph, [torch.ones(3, 4).double()], 1 << 20)
    ours, weight = (one for one in graph.calls if "div" in str(one.target))
    assert values.own(ours).dtype is torch.float32
    assert torch.equal(values.lifted(ours), torch.full((3, 4), 1 / 3).double())
    assert torch.equal(values.lifted(weight), torch.full((4,), 1 / 3, dtype=torch.float64))
    assert torch.equal(values.own(weight), torch.full((4,), 1 / 3))
