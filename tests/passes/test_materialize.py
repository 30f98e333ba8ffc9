"""The specification of `materialize`: what depends on parameters alone is computed once and stored.

In float64, rounded once to the stored dtype; except where the model itself rounds on the way, which
is then part of what it means and is done bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import graphopt
from tests.helpers import (
    assert_equal,
    calls,
    norms_left,
    output_of,
    prepare,
    randomize_norms,
    relative_error,
    snapshot,
    tensor,
)

NARROW = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    """A function of an input and two weights, one bias, one buffer."""

    def __init__(self, function: Callable[..., object], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Parameter(tensor(6, 4, seed=2).to(dtype))
        self.b = nn.Parameter(tensor(6, 4, seed=3).to(dtype))
        self.bias = nn.Parameter(tensor(6, seed=4).to(dtype))
        self.register_buffer("steps", tensor(6, 1, seed=5).abs().to(dtype) + 0.05)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def materialized(
    model: nn.Module, x: Tensor, passes: str = "canonicalize,materialize"
) -> graphopt.OptimizedModule:
    unchanged = snapshot(model.eval())
    fast = graphopt.optimize(model, (x,), passes=passes)
    assert fast.report.rolled_back == []
    unchanged()
    return fast


# -- one rounding -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_folded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """Bit for bit what float64 arithmetic on the stored parameters rounds to."""
    model = randomize_norms(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(dtype).eval())
    conv, norm = model
    fast = materialized(model, tensor(2, 4, 6, 6).to(dtype), "deploy")
    assert norms_left(fast) == 0

    def wide(name: str) -> Tensor:
        return getattr(norm, name).detach().double()

    scale = wide("weight") / torch.sqrt(wide("running_var") + norm.eps)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = (conv.bias.detach().double() - wide("running_mean")) * scale + wide("bias")
    found = fast.state_dict()
    assert found["0.weight"].dtype == found["0.bias"].dtype == dtype
    assert torch.equal(found["0.weight"], weight.to(dtype))
    assert torch.equal(found["0.bias"], bias.to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_long_formulas_are_rounded_once(dtype: torch.dtype) -> None:
    """Ten operations that would round ten times in the model's dtype."""

    def weight(a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
        w = a * b + a / steps - b
        w = w / w.norm(dim=1, keepdim=True)
        return (torch.exp(w) @ a.mT @ b).tanh() * 3

    model = Model(lambda m, x: F.linear(x, weight(m.a, m.b, m.steps), m.bias), dtype)
    fast = materialized(model, tensor(3, 4).to(dtype))
    assert calls(fast) == ["linear"]
    exact = weight(*(one.detach().double() for one in (model.a, model.b, model.steps)))
    (found,) = (one for one in fast.parameters() if one.ndim == 2)
    assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_two_stages_still_round_once(dtype: torch.dtype) -> None:
    """Materializing, folding and materializing again does not round the first result."""
    model = nn.Sequential(weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)).to(dtype)
    randomize_norms(model.eval())
    x = tensor(2, 4, 6, 6).to(dtype)
    fast = materialized(model, x, "materialize,fold-batch-norm,materialize")
    assert calls(fast) == ["conv2d"]
    wide = model.double()
    scale = wide[1].weight / torch.sqrt(wide[1].running_var + wide[1].eps)
    exact = wide[0].weight * scale[:, None, None, None]
    assert torch.equal(fast.state_dict()["0.weight"], exact.to(dtype))


def test_integers_stay_integers() -> None:
    model = Model(lambda m, x: x[:, torch.arange(4).flip(0) * 3 % 4] * m.a[0])
    x = tensor(3, 4, dtype=torch.float32)
    fast = materialized(model, x)
    assert torch.equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_complex_formulas() -> None:
    """A kernel given by its spectrum."""

    def weight(m: Model) -> Tensor:
        return torch.fft.irfft(torch.view_as_complex(m.a.reshape(6, 2, 2)), n=4)

    model, x = Model(lambda m, x: F.linear(x, weight(m))), tensor(3, 4, dtype=torch.float32)
    fast = materialized(model, x)
    assert calls(fast) == ["linear"]
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)), 1e-6)


# -- where the model rounds ---------------------------------------------------------------------


class FakeQuantized(nn.Module):
    """A parametrization: the weight on a grid."""

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.abs().amax() / 7
        return (weight / step).round().clamp(-8, 7) * step


ROUNDED: dict[str, Callable[[Model], Tensor]] = {
    "bfloat16 and back": lambda m: m.a.bfloat16().float(),
    "half and back": lambda m: m.a.to(torch.float16).to(torch.float32),
    "bfloat16, computed with, and back": lambda m: (m.a.bfloat16() * m.b.bfloat16()).float(),
    "rounded to a grid": lambda m: (m.a / 0.1).round() * 0.1,
    "rounded after a computation": lambda m: (m.a * m.b / m.steps).round() * m.steps,
    "rounded before a computation": lambda m: (m.a / m.steps).round() * m.steps + m.b * 0.3,
    "floored": lambda m: torch.floor(m.a * 16 + 0.5) / 16,
    "straight through": lambda m: m.a + ((m.a / m.steps).round() * m.steps - m.a).detach(),
    "through integers": lambda m: (m.a / m.steps).to(torch.int8).float() * m.steps,
    "signs": lambda m: m.a.sign() * m.a.abs().mean(1, keepdim=True),
    "compared": lambda m: torch.where(m.a * m.b > m.steps * m.bias[:, None], m.a, m.b),
    "fake quantized": lambda m: torch.fake_quantize_per_tensor_affine(m.a * m.b, 0.1, 0, -128, 127),
    "fake quantized per channel": lambda m: torch.fake_quantize_per_channel_affine(
        m.a, m.steps[:, 0] / 10, torch.zeros(6, dtype=torch.int32), 0, -8, 7
    ),
}


@pytest.mark.parametrize("how", ROUNDED)
def test_roundings_of_the_model_are_kept(how: str) -> None:
    """Quantized weights are the weights: one step off on the grid is another model."""
    function = ROUNDED[how]
    model = Model(lambda m, x: F.linear(x, function(m), m.bias))
    fast = materialized(model, tensor(3, 4, dtype=torch.float32))
    assert calls(fast) == ["linear"]
    (found,) = (one for one in fast.state_dict().values() if one.ndim == 2)
    assert torch.equal(found, function(model).detach())
    x = tensor(3, 4, seed=9, dtype=torch.float32)
    assert torch.equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_ties_of_a_grid_are_not_moved() -> None:
    """Weights halfway between grid points: another order of roundings would flip them."""
    model = Model(lambda m, x: F.linear(x, (m.a / 0.1).round() * 0.1))
    with torch.no_grad():
        model.a.copy_(torch.arange(24).reshape(6, 4) * 0.05)
    x = torch.eye(4)
    assert torch.equal(output_of(materialized(model, x), (x,)), output_of(model, (x,)))


def test_fake_quantized_parametrization() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for linear in (model[0], model[2]):
        parametrize.register_parametrization(linear, "weight", FakeQuantized())
    x = tensor(5, 4, dtype=torch.float32)
    fast = materialized(model, x, "deploy")
    assert calls(fast) == ["linear", "relu", "linear"]
    assert torch.equal(output_of(fast, (x,)), output_of(model, (x,)))


def test_folding_into_a_quantized_weight_keeps_its_grid() -> None:
    """The grid is the model's, the scale is ours: s * quantized(W), rounded once."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    parametrize.register_parametrization(model[0], "weight", FakeQuantized())
    randomize_norms(model.eval())
    x = tensor(2, 4, 6, 6, dtype=torch.float32)
    fast = materialized(model, x, "deploy")
    assert calls(fast) == ["conv2d"]
    assert relative_error(output_of(fast, (x,)), output_of(model, (x,))) <= 1e-6


def test_a_narrow_copy_of_a_weight_is_rounded_to_it() -> None:
    """Autocast by hand: the weight is cast, then only used."""
    model = Model(lambda m, x: F.linear(x.bfloat16(), m.a.bfloat16(), m.bias.bfloat16()))
    x = tensor(3, 4, dtype=torch.float32)
    fast = materialized(model, x)
    assert {one.dtype for one in fast.parameters()} == {torch.bfloat16}
    assert torch.equal(output_of(fast, (x,)), output_of(model, (x,)))


# -- parametrizations vanish --------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: weight_norm(nn.Conv2d(4, 6, 3)),
        lambda: weight_norm(nn.ConvTranspose2d(4, 6, 3), dim=1),
        lambda: spectral_norm(nn.Conv2d(4, 6, 3)),
        lambda: torch.nn.utils.weight_norm(nn.Conv2d(4, 6, 3)),
        lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)),
    ],
    ids=["weight_norm", "weight_norm transposed", "spectral_norm", "old weight_norm",
         "old spectral_norm"],
)  # fmt: skip
def test_parametrizations_vanish(make: Callable[[], nn.Module]) -> None:
    """What remains is the convolution with a plain weight under its own name."""
    x = tensor(2, 4, 7, 6)
    model = prepare(nn.Sequential(make(), nn.ReLU()))
    fast = materialized(model, x, "deploy")
    assert calls(fast) in (["conv2d", "relu"], ["conv_transpose2d", "relu"])
    assert sorted(fast.state_dict()) == ["0.bias", "0.weight"]
    assert all(isinstance(one, nn.Parameter) for one in fast.parameters())
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))


@pytest.mark.parametrize("map_", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_weights_vanish(map_: str) -> None:
    """A matrix exponential, a linear solve, a product of reflections."""
    model = prepare(nn.Sequential(orthogonal(nn.Linear(4, 4), orthogonal_map=map_)))
    x = tensor(3, 4)
    fast = materialized(model, x, "deploy")
    assert calls(fast) == ["linear"]
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)), 1e-11)


# -- what is stored, and what is not ------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self, share: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        if share:
            self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens)))


def test_tied_weights_are_not_duplicated() -> None:
    model, tokens = Tied().double(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    fast = materialized(model, tokens, "deploy")
    assert fast.embed.weight is fast.out.weight
    assert len(list(fast.parameters())) == 1
    assert sorted(fast.state_dict()) == sorted(model.state_dict())
    assert_equal(output_of(fast, (tokens,)), output_of(model, (tokens,)))


def test_weights_tied_through_a_view_are_not_duplicated() -> None:
    """The output layer reads the transposed weight: storing that would cost a second copy."""

    class Transposed(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.embed(tokens)) @ self.embed.weight.T

    model, tokens = Transposed(False).double(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    fast = materialized(model, tokens, "deploy")
    assert sum(one.numel() for one in fast.parameters()) == 40
    assert_equal(output_of(fast, (tokens,)), output_of(model, (tokens,)))


def test_tied_convolutions_with_one_norm_each() -> None:
    """Different folds of one weight are different weights; the tied name does not come along."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.b.weight = self.a.weight
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm_a(self.a(x)) + self.norm_b(self.b(x.sin())).relu()

    model, x = prepare(Twins()), tensor(2, 4, 6, 5)
    fast = materialized(model, x, "deploy")
    assert norms_left(fast) == 0
    assert sorted(fast.state_dict()) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert_equal(output_of(fast, (x,)), output_of(model, (x,)))
    tune = graphopt.optimize(model, (x,), mode="tune")
    assert tune.a.weight is tune.b.weight


def test_one_formula_with_many_readers_is_stored_once() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        w = torch.exp(m.a) * m.b
        return F.linear(x, w) + F.linear(torch.relu(x), w)

    fast = materialized(Model(function), tensor(3, 4, dtype=torch.float32))
    assert len(list(fast.parameters())) == 1


def test_what_is_unread_goes() -> None:
    """Statistics, sources of formulas, and layers that are never called."""

    class Partly(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    layers = weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.Linear(3, 3)
    fast = materialized(prepare(Partly(*layers)), tensor(2, 4, 6, 5), "deploy")
    assert sorted(fast.state_dict()) == ["0.bias", "0.weight"]


def test_small_formulas_with_large_results_are_not_stored() -> None:
    """A position table computed from nothing would outweigh the model."""

    def function(m: Model, x: Tensor) -> Tensor:
        table = torch.arange(4096.0)[:, None] * torch.arange(4096.0)
        return x @ m.a.T @ m.b @ table[:4] @ table[:, :2] * 1e-12

    fast = materialized(Model(function), tensor(3, 4, dtype=torch.float32))
    assert max((one.numel() for one in fast.state_dict().values()), default=0) <= 1 << 22


def test_written_buffers_are_not_constants() -> None:
    """A counter that the model advances is state, not a formula."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.weight = nn.Parameter(tensor(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return F.linear(x, self.weight * self.count)

    model, x = Counting().double(), tensor(3, 4)
    fast = graphopt.optimize(model.eval(), (x,))
    for _ in range(3):
        with torch.no_grad():
            assert_equal(fast(x), model(x))
    assert float(fast.count) == float(model.count) == 3


def test_random_weights_are_not_constants() -> None:
    model = Model(lambda m, x: F.linear(x, m.a + torch.randn_like(m.a)))
    x = tensor(3, 4, dtype=torch.float32)
    fast = graphopt.optimize(model.eval(), (x,))
    assert not torch.equal(output_of(fast, (x,)), output_of(fast, (x,)))


def test_stored_results_are_trainable_iff_their_sources_are() -> None:
    model = Model(lambda m, x: F.linear(x, torch.exp(m.a)) + torch.exp(m.b[:, 0]) * m.bias)
    model.a.requires_grad_(False)
    fast = materialized(model, tensor(3, 4, dtype=torch.float32))
    frozen = {one.ndim: one.requires_grad for one in fast.parameters()}
    assert frozen == {2: False, 1: True}


def test_a_model_without_formulas_is_left_alone() -> None:
    model, x = prepare(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())), tensor(2, 4, 6, 5)
    fast = materialized(model, x)
    assert fast.report.applied == []
    assert all(torch.equal(fast.state_dict()[k], v) for k, v in model.state_dict().items())
