"""Adapters of the literature that no library here has, each written as its paper says: those that are
affine in what they read merge, from the traced graph alone; the others are refused with a reason.

Formulas: reference papers named at each. All start from one linear map or convolution with weight W.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.helpers import assert_equal, output_of, reasons
from tests.passes.test_not_exact import acting

WIDTH, RANK = 16, 3


class Adapter(nn.Module):
    """A linear map `base` with what a method adds; parameters by name, drawn at random."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.function = nn.Linear(WIDTH, WIDTH), forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))
        with torch.no_grad():
            vectors = torch.linalg.svd(self.base.weight)
        self.register_buffer("u", vectors.U[:, :RANK].clone())
        self.register_buffer("s", vectors.S[:RANK].clone())
        self.register_buffer("v", vectors.Vh[:RANK].clone())
        self.register_buffer("rows", torch.tensor([1, 4, 7, 9]))
        self.register_buffer("columns", torch.tensor([0, 2, 15]))
        self.register_buffer("on", (torch.arange(WIDTH) % 3 > 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def cayley(skew: Tensor) -> Tensor:
    skew = skew - skew.T
    eye = torch.eye(len(skew), dtype=skew.dtype)
    return torch.linalg.solve(eye + skew, eye - skew)


def low(a: Adapter, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, a.down), a.up)


LOW = {"down": (RANK, WIDTH), "up": (WIDTH, RANK)}


def hydra(a: Adapter, x: Tensor) -> Tensor:
    """Parallel and sequential branches (arXiv 2309.06922)."""
    y = a.base(x)
    return y + low(a, x) + F.linear(F.linear(y, a.after_down), a.after_up)


def nora(a: Adapter, x: Tensor) -> Tensor:
    """Nested: frozen outer singular vectors, a small pair inside (arXiv 2408.10280)."""
    return a.base(x) + F.linear(F.linear(F.linear(F.linear(x, a.v), a.inner_down), a.inner_up), a.u)


def bora(a: Adapter, x: Tensor) -> Tensor:
    """Magnitudes of rows and of columns (arXiv 2412.06441)."""
    weight = a.base.weight + a.up @ a.down
    weight = a.across * weight / weight.norm(dim=0)
    weight = a.along[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return F.linear(x, weight, a.base.bias)


def spectral_additive(a: Adapter, x: Tensor) -> Tensor:
    """The top singular vectors move (arXiv 2405.13952)."""
    rest = a.base.weight - a.u @ torch.diag(a.s) @ a.v
    return F.linear(x, rest + (a.u + a.du) @ torch.diag(a.s) @ (a.v + a.dv), a.base.bias)


def spectral_rotational(a: Adapter, x: Tensor) -> Tensor:
    """... or are rotated (arXiv 2405.13952)."""
    rest = a.base.weight - a.u @ torch.diag(a.s) @ a.v
    top = a.u @ cayley(a.left) @ torch.diag(a.s) @ cayley(a.right) @ a.v
    return F.linear(x, rest + top, a.base.bias)


def kind(a: Adapter, x: Tensor) -> Tensor:
    """Gated singular values, at a known class."""
    gated = a.s * torch.sigmoid(a.gates[2])
    return F.linear(F.linear(x, a.v) * gated, a.u) + a.base(x)


def structured(a: Adapter, x: Tensor) -> Tensor:
    """SPLoRA: low rank, then channels pruned away on both sides (here masked)."""
    weight = (a.base.weight + a.up @ a.down) * a.on[:, None] * a.on
    return F.linear(x, weight, a.base.bias)


def paca(a: Adapter, x: Tensor) -> Tensor:
    """Some columns are trained (arXiv 2503.01905)."""
    return a.base(x) + F.linear(x[..., a.columns], a.some)


def neuroada(a: Adapter, x: Tensor) -> Tensor:
    """A few bypasses per neuron: sparse rows (arXiv 2510.18940)."""
    index = (torch.arange(WIDTH)[:, None] * 5 + torch.tensor([0, 3])) % WIDTH
    return a.base(x) + (x[..., index] * a.bypass).sum(-1)


def losia(a: Adapter, x: Tensor) -> Tensor:
    """A submatrix is trained (arXiv 2507.04487)."""
    weight = a.base.weight.index_put((a.rows[:, None], a.columns), a.sub, accumulate=True)
    return F.linear(x, weight, a.base.bias)


def adapter_bias(a: Adapter, x: Tensor) -> Tensor:
    """A shift of every token along one vector, by an affine amount (arXiv 2205.00305)."""
    y = a.base(x)
    return y + (F.linear(y, a.amount[None]) + a.offset) * a.vector


def reft(a: Adapter, x: Tensor) -> Tensor:
    """Linear ReFT at all positions (arXiv 2404.03592)."""
    y = a.base(x)
    return y + F.linear(F.linear(y, a.project, a.shift) - F.linear(y, a.v), a.v.T)


def taps(a: Adapter, x: Tensor) -> Tensor:
    """A layer is replaced or not, by a trained indicator (arXiv 2203.16708)."""
    return F.linear(x, a.base.weight + (a.score > 0.1).to(x.dtype) * a.change, a.base.bias)


def selective(a: Adapter, x: Tensor) -> Tensor:
    """LoRA behind an indicator that is off."""
    return a.base(x) + (a.score > 10).to(x.dtype) * low(a, x)


def c_poly(a: Adapter, x: Tensor) -> Tensor:
    """A mixture of low ranks at a known task (arXiv 2312.03248)."""
    mix = torch.softmax(a.tasks[1], 0)
    return a.base(x) + torch.einsum("k,kor,kri,...i->...o", mix, a.ups, a.downs, x)


MERGED = {
    "Hydra": (hydra, {**LOW, "after_down": (RANK, WIDTH), "after_up": (WIDTH, RANK)}),
    "NoRA": (nora, {"inner_down": (2, RANK), "inner_up": (RANK, 2)}),
    "BoRA": (bora, {**LOW, "across": (WIDTH,), "along": (WIDTH,)}),
    "spectral additive": (spectral_additive, {"du": (WIDTH, RANK), "dv": (RANK, WIDTH)}),
    "spectral rotational": (spectral_rotational, {"left": (RANK, RANK), "right": (RANK, RANK)}),
    "KIND": (kind, {"gates": (4, RANK)}),
    "SPLoRA": (structured, LOW),
    "PaCA": (paca, {"some": (WIDTH, 3)}),
    "NeuroAda": (neuroada, {"bypass": (WIDTH, 2)}),
    "LoSiA": (losia, {"sub": (4, 3)}),
    "AdapterBias": (adapter_bias, {"amount": (WIDTH,), "offset": (1,), "vector": (WIDTH,)}),
    "linear ReFT": (reft, {"project": (RANK, WIDTH), "shift": (RANK,)}),
    "TAPS": (taps, {"score": (), "change": (WIDTH, WIDTH)}),
    "selective LoRA, off": (selective, {"score": (), **LOW}),
    "C-Poly": (c_poly, {"tasks": (3, 2), "ups": (2, WIDTH, RANK), "downs": (2, RANK, WIDTH)}),
}  # fmt: skip


def optimized(model: nn.Module, x: Tensor) -> graphopt.OptimizedModule:
    model = model.double().eval()
    fast = graphopt.optimize(model, (x,))
    assert fast.report.rolled_back == []
    assert fast.report.check.float64_error < 1e-12
    assert_equal(output_of(fast, (x.flip(0),)), output_of(model, (x.flip(0),)))
    return fast


@pytest.mark.parametrize("name", MERGED)
def test_affine_methods_leave_nothing_behind(name: str) -> None:
    function, shapes = MERGED[name]
    model = nn.Sequential(Adapter(function, **shapes), nn.Tanh())
    fast = optimized(model, torch.randn(3, 5, WIDTH).double())
    assert acting(fast) == ["linear", "tanh"], reasons(fast)


# -- convolutions -----------------------------------------------------------------------------------


class ConvAdapter(nn.Module):
    """A convolution with what a method adds."""

    def __init__(self, forward: Callable[..., Tensor], **options: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Conv2d(6, 8, 3, padding=1, **options)
        self.narrow = nn.Conv2d(6, RANK, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(RANK, 8, 1, bias=False)
        self.parts = nn.ModuleList([
            nn.Conv2d(6, RANK, 1, bias=False),
            nn.Conv2d(RANK, RANK, (3, 1), padding=(1, 0), groups=RANK, bias=False),
            nn.Conv2d(RANK, RANK, (1, 3), padding=(0, 1), groups=RANK, bias=False),
            nn.Conv2d(RANK, 8, 1, bias=False),
        ])  # fmt: skip
        self.magnitude = nn.Parameter(torch.rand(8, 1, 1, 1))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x).tanh()


def conv_lora(a: ConvAdapter, x: Tensor) -> Tensor:
    """k x k down, 1 x 1 up (arXiv 2106.09685, loralib)."""
    return a.base(x) + a.wide(a.narrow(x))


def cp_lora(a: ConvAdapter, x: Tensor) -> Tensor:
    """A CP tensor: 1x1, kx1, 1xk, 1x1."""
    y = x
    for part in a.parts:
        y = part(y)
    return a.base(x) + y


def conv_dora(a: ConvAdapter, x: Tensor) -> Tensor:
    """Magnitude and direction of every filter (arXiv 2402.09353)."""
    weight = a.base.weight + torch.einsum(
        "or,rikl->oikl", a.wide.weight[:, :, 0, 0], a.narrow.weight
    )
    weight = a.magnitude * weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return F.conv2d(x, weight, a.base.bias, padding=1)


@pytest.mark.parametrize("function", [conv_lora, cp_lora, conv_dora])
def test_adapters_of_convolutions_leave_one_convolution(function) -> None:
    fast = optimized(ConvAdapter(function), torch.randn(2, 6, 7, 8).double())
    assert acting(fast) == ["conv2d", "tanh"], reasons(fast)


def test_an_adapter_beside_a_grouped_convolution() -> None:
    # The sum of a grouped convolution and a full one is a full one: merged if that is faster.
    class Grouped(ConvAdapter):
        def __init__(self) -> None:
            super().__init__(conv_lora, groups=2)

    fast = optimized(Grouped(), torch.randn(2, 6, 7, 8).double())
    assert acting(fast).count("conv2d") in (1, 2)


# -- what a compiler can still do -------------------------------------------------------------------


def test_a_hypernetwork_at_a_known_task_runs_once() -> None:
    """Hyperformer (arXiv 2106.04489): a network makes the adapter from the task's embedding."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.tasks = nn.Linear(WIDTH, WIDTH), nn.Embedding(4, 8)
            self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2 * WIDTH * RANK))

        def forward(self, x: Tensor) -> Tensor:
            down, up = self.net(self.tasks(torch.tensor(2))).chunk(2)
            y = self.base(x) + F.linear(F.linear(x, down.view(RANK, -1)), up.view(-1, RANK))
            return y.tanh()

    torch.manual_seed(0)
    fast = optimized(Hyper(), torch.randn(3, 5, WIDTH).double())
    assert acting(fast) == ["linear", "tanh"]


def test_a_prefix_is_projected_once() -> None:
    """Prefix tuning (arXiv 2101.00190): keys and values that a network makes of trained embeddings."""

    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.prefix = nn.Embedding(5, WIDTH)
            self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 2 * WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            key, value = self.net(self.prefix(torch.arange(5))).expand(len(x), -1, -1).chunk(2, -1)
            keys = torch.cat([key, self.k(x)], 1)
            values = torch.cat([value, self.v(x)], 1)
            return F.scaled_dot_product_attention(self.q(x), keys, values)

    torch.manual_seed(0)
    fast = optimized(Prefix(), torch.randn(3, 5, WIDTH).double())
    assert "tanh" not in acting(fast) and "embedding" not in acting(fast)
    assert acting(fast).count("linear") == 1  # queries, keys and values of the tokens


@pytest.mark.parametrize("act", [F.relu, F.gelu, F.silu])
def test_a_bottleneck_beside_an_mlp_widens_it(act) -> None:
    """Parallel adapters (arXiv 2110.04366) with the activation of the MLP."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
            self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.down(act(self.up(x))) + self.b(act(self.a(x)))).tanh()

    torch.manual_seed(0)
    fast = optimized(Parallel(), torch.randn(3, 5, WIDTH).double())
    assert acting(fast) == ["linear", act.__name__, "linear", "tanh"]
    assert fast.graph_module is not None
    shapes = sorted(tuple(one.shape) for one in fast.parameters() if one.ndim == 2)
    assert shapes == [(WIDTH, 4 * WIDTH + 4), (4 * WIDTH + 4, WIDTH)]


# -- what depends on the input ----------------------------------------------------------------------


def routed(a: Adapter, x: Tensor) -> Tensor:
    """X-LoRA, S'MoRE: every token chooses."""
    gates = torch.softmax(F.linear(x, a.route), -1)
    return a.base(x) + torch.einsum("...k,kor,kri,...i->...o", gates, a.ups, a.downs, x)


def masked(a: Adapter, x: Tensor) -> Tensor:
    """aLoRA: from some position on."""
    on = (torch.arange(x.shape[1]) >= 3).to(x.dtype)[:, None]
    return a.base(x) + on * low(a, x)


def gated(a: Adapter, x: Tensor) -> Tensor:
    """UniPELT: a gate from the mean token."""
    return a.base(x) + torch.sigmoid(F.linear(x, a.gate[None])) * low(a, x)


def bottleneck(a: Adapter, x: Tensor) -> Tensor:
    return a.base(x) + F.linear(torch.relu(F.linear(x, a.down)), a.up)


def kernel(a: Adapter, x: Tensor) -> Tensor:
    """SNNK: features of the input times features of the weights."""
    return a.base(x) + F.linear(torch.cos(F.linear(x, a.down)), a.up)


MIXED = {"ups": (2, WIDTH, RANK), "downs": (2, RANK, WIDTH)}


@pytest.mark.parametrize(("function", "shapes", "why"), [
    (routed, {"route": (2, WIDTH), **MIXED}, "is not affine|multiplies what depends on its input"),
    (masked, LOW, "differs from token to token"),
    (gated, {"gate": (WIDTH,), **LOW}, "Sigmoid .*is not affine"),
    (bottleneck, LOW, "Relu .*is not affine"),
    (kernel, LOW, "Cos .*is not affine"),
])  # fmt: skip
def test_others_stay_and_say_why(function, shapes, why) -> None:

    model = nn.Sequential(Adapter(function, **shapes), nn.Tanh())
    fast = optimized(model, torch.randn(3, 5, WIDTH).double())
    assert len(acting(fast)) > 2
    assert re.search(why, reasons(fast)), reasons(fast)
