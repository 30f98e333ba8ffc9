"""The specification of the backend `prepacked`: oneDNN's fused operators, the same results.

Convolutions and linear maps run on reordered weights, with the sum and the activation behind them in one
call; everything else, and every call with gradients, is the framework's.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.autograd import forward_ad

import graphopt
from graphopt.backends.frozen import Frozen
from graphopt.backends.prepacked import Packed, Prepacked, missing
from tests.helpers import Net, relative_error

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
IMAGE = (2, 4, 9, 9)
LIMIT = 1e-5


def optimized(model: nn.Module, *inputs: torch.Tensor) -> graphopt.OptimizedModule:
    fast = graphopt.optimize(model.eval(), inputs, backend="prepacked")
    with torch.no_grad():
        assert relative_error(fast(*inputs), model(*inputs)) < LIMIT
    return fast


def run_by(fast: graphopt.OptimizedModule) -> list[str]:
    """The calls of the packed program."""
    nodes = fast._run.packed.graph.nodes
    return [
        str(node.target).removeprefix("mkldnn.") for node in nodes if node.op == "call_function"
    ]


ACTIVATIONS = {
    "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "silu": F.silu, "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2), "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_part_of_the_call(name):
    conv = Net(lambda net, x: ACTIVATIONS[name](net.c(x)), c=nn.Conv2d(4, 6, 3))
    fast = optimized(conv, torch.randn(IMAGE))
    assert run_by(fast) == ["aten.contiguous.default", "_convolution_pointwise.default",
                            "aten.contiguous.default"]  # fmt: skip
    linear = Net(lambda net, x: ACTIVATIONS[name](net.l(x)), l=nn.Linear(9, 5))
    assert run_by(optimized(linear, torch.randn(IMAGE))) == ["_linear_pointwise.default"]


PRODUCTS = {
    "addmm": lambda net, x: torch.addmm(net.b, x.view(-1, 9), net.w).view(2, 4, 9, 5),
    "mm": lambda net, x: torch.mm(x.view(-1, 9), net.w).view(2, 4, 9, 5),
    "matmul": lambda net, x: x @ net.w,
}


@pytest.mark.parametrize("activation", [None, "gelu by tanh", "relu", "clamp"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrices_from_input_to_output_are_packed(name, activation):
    """As GPT-2 spells its linear maps; a view between a map and its activation is no obstacle."""
    behind = ACTIVATIONS.get(activation, lambda x: x)
    model = Net(lambda net, x: behind(PRODUCTS[name](net, x)), w=nn.Parameter(torch.randn(9, 5)),
                b=nn.Parameter(torch.randn(5)))  # fmt: skip
    x = torch.randn(IMAGE)
    fast = graphopt.optimize(model.eval(), (x,), passes="canonicalize", backend="prepacked")
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < LIMIT
    found = [one for one in run_by(fast) if "view" not in one and "reshape" not in one]
    assert found == ["_linear_pointwise.default"]


STAYS = {
    "twice the bias": lambda net, x: torch.addmm(net.b, x[0, 0], net.w, beta=2),
    "half the product": lambda net, x: torch.addmm(net.b, x[0, 0], net.w, alpha=0.5),
    "a bias per row": lambda net, x: torch.addmm(x[0, 0, :, :5], x[0, 0], net.w),
    "a stack of matrices": lambda net, x: x @ net.w.expand(4, 9, 5),
    "a vector": lambda net, x: x @ net.b.repeat(2)[:9],
    "on the left": lambda net, x: net.w.mT @ x,
}


@pytest.mark.parametrize("name", STAYS)
def test_other_products_stay(name):
    model = Net(STAYS[name], w=nn.Parameter(torch.randn(9, 5)), b=nn.Parameter(torch.randn(5)))
    x = torch.randn(IMAGE)
    fast = graphopt.optimize(model.eval(), (x,), passes="canonicalize", backend="prepacked")
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < LIMIT
    assert "_linear_pointwise.default" not in run_by(fast)


def test_a_map_that_is_read_before_its_activation_keeps_both():
    def body(net, x):
        y = (x @ net.w).view(2, -1, 5)
        return F.relu(y), y.sin()

    model, x = Net(body, w=nn.Parameter(torch.randn(9, 5))).eval(), torch.randn(IMAGE)
    fast = graphopt.optimize(model, (x,), passes="canonicalize", backend="prepacked")
    with torch.no_grad():
        for found, truth in zip(fast(x), model(x), strict=True):
            assert relative_error(found, truth) < LIMIT
    assert {"_linear_pointwise.default", "aten.relu.default"} <= set(run_by(fast))


@pytest.mark.parametrize("options", [
    {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}, {"groups": 4, "bias": False},
    {"padding": "same"}, {"padding": "valid", "stride": (1, 2)}, {"padding": (0, 2)},
])  # fmt: skip
def test_geometry(options):
    optimized(nn.Conv2d(4, 8, 3, **options), torch.randn(IMAGE))


def residual(net, x):
    y = net.a(x)
    return F.relu(net.b(F.relu(y)) + y) + net.c(x)


def test_sums_and_what_may_be_overwritten():
    """x + conv(...) is written over x where nothing else reads it."""
    maps = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "abc"}
    model = Net(residual, **maps).eval()
    fast = graphopt.optimize(
        model, (torch.randn(IMAGE),), passes="canonicalize", backend="prepacked"
    )
    with torch.no_grad():
        assert relative_error(fast(torch.ones(IMAGE)), model(torch.ones(IMAGE))) < LIMIT
    names = run_by(fast)
    assert "aten.add.Tensor" not in names and "_convolution_pointwise_.binary" in names
    x = torch.randn(IMAGE)
    kept = x.clone()
    with torch.no_grad():
        fast(x)
    assert torch.equal(x, kept)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from("cralmv")), max_size=9),
       st.integers(0, 9))  # fmt: skip
def test_any_sums_of_convolutions(steps, returned):
    """Nothing is overwritten that is read later: random graphs of convolutions, sums, views."""

    def body(net, x):
        values = [x]
        for left, right, kind in steps:
            a, b = values[left % len(values)], values[right % len(values)]
            values.append({
                "c": lambda a=a: net.c(a), "r": lambda a=a: F.relu(a), "a": lambda a=a, b=b: a + b,
                "l": lambda a=a, b=b: F.relu(net.d(a) + b), "m": lambda a=a, b=b: net.c(a) + net.d(b),
                "v": lambda a=a: a.flatten(2).unflatten(2, (5, 5)),
            }[kind]())  # fmt: skip
        return values[-1] + values[returned % len(values)], values[returned % len(values)]

    maps = {name: nn.Conv2d(3, 3, 3, padding=1) for name in "cd"}
    model, x = Net(body, **maps).eval(), torch.randn(2, 3, 5, 5)
    module = graphopt.optimize(model, (x,), passes="canonicalize").graph_module
    packed = Prepacked(module)
    with torch.no_grad():
        for given_x in (x, torch.randn(3, 3, 5, 5)):
            for found, truth in zip(packed(given_x), model(given_x), strict=True):
                assert relative_error(found, truth) < LIMIT
                assert found.is_contiguous()


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_other_batches(batch):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 3))
    fast = optimized(model, torch.randn(IMAGE))
    x = torch.randn(batch, *IMAGE[1:])
    with torch.no_grad():
        assert fast(x).shape == (batch, 3)
        assert batch == 0 or relative_error(fast(x), model(x)) < LIMIT


@pytest.mark.parametrize("kind", ["flat", "volume", "line"])
def test_outputs_lie_in_memory_as_those_of_the_graph(kind):
    rank = {"flat": 2, "volume": 3, "line": 1}[kind]
    conv = getattr(nn, f"Conv{rank}d")(3, 4, 3)
    model = nn.Sequential(conv, nn.Flatten(2)) if kind == "flat" else nn.Sequential(conv)
    x = torch.randn(2, 3, *(6 for _ in range(rank)))
    with torch.no_grad():
        found, expected = optimized(model, x)(x), model(x)
    assert found.stride() == expected.stride() and found.view(-1).shape == expected.view(-1).shape


def test_gradients_and_changed_weights():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU())
    fast = optimized(model, torch.randn(IMAGE))
    x = torch.randn(IMAGE, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    (found,) = torch.autograd.grad(fast(x).sum(), x)
    assert relative_error(found, expected) < LIMIT
    twice = {name: 2 * value for name, value in fast.state_dict().items()}
    for assign in (False, True):
        fast.load_state_dict(copy.deepcopy(twice), assign=assign)
        with torch.no_grad():
            assert relative_error(fast(x), 2 * model(x)) < LIMIT


@pytest.mark.parametrize("kind", ["autocast", "vmap", "jvp"])
def test_calls_that_are_more_than_a_call_run_the_graph(kind):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    fast = optimized(model, x)

    @torch.no_grad()
    def found(module):
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)
        if kind == "vmap":
            return torch.vmap(lambda row: module(row[None])[0])(x)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones(3, 8)))).tangent

    assert found(fast).dtype == found(model).dtype
    assert torch.allclose(found(fast), found(model), atol=1e-6)


def test_a_weight_that_is_written_while_a_program_is_built():
    module = graphopt.optimize(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)).graph_module
    builds = []

    def slow(module, leaves):
        program = Packed(module, leaves)
        builds.append(program)
        if len(builds) == 1:
            module.weight.detach().add_(1.0)
        return program

    run, x = Frozen(module, slow), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.allclose(run(x), module(x)) and len(builds) == 2


def test_a_program_that_cannot_be_built_is_the_graph(caplog):
    """But for the first one: that a backend cannot run a graph is known when it is chosen."""
    module = graphopt.optimize(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)).graph_module

    class Small(Packed):
        def __init__(self, module, leaves):
            if len(leaves[0]) > 2:
                raise RuntimeError("too many rows")
            super().__init__(module, leaves)

        def fits(self, leaves):
            return len(leaves[0]) <= 2

    with torch.no_grad(), pytest.raises(RuntimeError, match="too many rows"):
        Frozen(module, Small)(torch.randn(3, 4))
    run = Frozen(module, Small)
    with torch.no_grad():
        for rows in (2, 3, 3, 5, 1):
            x = torch.randn(rows, 4)
            assert torch.allclose(run(x), module(x))
        module.weight.add_(1.0)
        assert torch.allclose(run(x), module(x))
    assert caplog.text.count("too many rows") == 2


def test_threads_that_call_first_leave_the_random_state():
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(10)]
    x = torch.randn(2, 16)
    fast = optimized(nn.Sequential(*layers).eval(), x)
    for _ in range(5):
        twin, before = copy.deepcopy(fast), torch.get_rng_state()
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(torch.no_grad()(twin), [x] * 3))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(one, found[0]) for one in found)


def test_states_that_the_model_writes_are_written_once():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return self.conv(x) + self.calls

    model = Counting().eval()
    fast = graphopt.optimize(copy.deepcopy(model), (torch.randn(IMAGE),), backend="prepacked")
    x = torch.randn(IMAGE)
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(fast(x), model(x)) < LIMIT
            assert torch.equal(fast.calls, model.calls)
            program = fast._run.packed
        fast(x)
    assert fast._run.packed is program  # and nothing is packed anew


def test_what_onednn_does_not_do_stays():
    model = Net(
        lambda net, x: net.t(net.c(x)).cumsum(1),
        c=nn.Conv2d(4, 3, 3),
        t=nn.ConvTranspose2d(3, 2, 3),
    )
    names = run_by(optimized(model, torch.randn(IMAGE)))
    assert "aten.cumsum.default" in names and any("conv_transpose2d" in name for name in names)
    double = Net(lambda net, x: net.c(x), c=nn.Conv2d(4, 3, 3)).double()
    assert run_by(optimized(double, torch.randn(IMAGE).double())) == ["aten.conv2d.default"]


def test_bfloat16():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 49, 3))
    model = model.eval().to(torch.bfloat16)
    x = torch.randn(IMAGE).to(torch.bfloat16)
    fast = graphopt.optimize(model, (x,), backend="prepacked")
    with torch.no_grad():
        assert relative_error(fast(x).float(), model(x).float()) < 0.05
    assert run_by(fast)[-1] == "_linear_pointwise.default"


def test_the_report_says_what_is_packed():
    fast = optimized(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), torch.randn(IMAGE))
    assert "1 convolutions and linear maps on packed weights" in " ".join(fast.report.backend_notes)
