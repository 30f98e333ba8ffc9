"""Binary networks: a norm in front of a sign is a threshold, and one of integers is halfway between two.

XNOR-style networks (Rastegari et al., arXiv 1603.05279) have weights alpha_o sign(W_o) and activations of -1
and 1: what is left of them is convolutions with weights of -1 and 1, biases that are thresholds, and signs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from tests.helpers import Net, prepare, randomize_norms, relative_error, tensor
from tests.passes.test_not_exact import acting

TUNE = ("canonicalize,fold-thresholds,[collect-terms,fold-batch-norm,absorb-scales,merge-sequences,"
        "merge-branches],canonicalize")  # fmt: skip
DEPLOY = f"canonicalize,cancel-terms,settle-thresholds,{TUNE},drop-zeros,materialize,canonicalize"


def binary(x: Tensor) -> Tensor:
    """A sign with the gradient of x where |x| < 1."""
    limited = x.clamp(-1, 1)
    return limited + (torch.sign(x) - limited).detach()


class XnorConv(nn.Conv2d):
    """mean |W_o| sign(W_o) over the weights of each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.weight.abs().mean((1, 2, 3), keepdim=True)
        weight = binary(self.weight) * alpha.expand(self.weight.shape)
        return self._conv_forward(x, weight, self.bias)


class Vgg(nn.Module):
    """Two stages of two convolutions each on 8 x 8 images; the first convolution sees real numbers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.maps = nn.ModuleList([
            nn.Conv2d(1, width, 3, padding=1),
            XnorConv(width, width, 3, padding=1, bias=False),
            XnorConv(width, 2 * width, 3, padding=1),
            XnorConv(2 * width, 2 * width, 3, padding=1, bias=False),
        ])  # fmt: skip
        self.norms = nn.ModuleList([nn.BatchNorm2d(one.out_channels) for one in self.maps])
        self.slopes = nn.PReLU(2 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.maps, self.norms, strict=True)):
            x = conv(x)
            if index % 2:
                x = F.max_pool2d(x, 2)
            x = norm(x)
            x = binary(self.slopes(x) if index == 2 else x)
        return self.head(x.flatten(1))


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)


@pytest.fixture(scope="module")
def trained() -> Vgg:
    torch.manual_seed(0)
    model, (x, y) = Vgg(), digits()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        for rows in torch.randperm(1500).split(100):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def deployed(model: nn.Module, x: Tensor, passes: str = DEPLOY) -> Any:
    fast = graphopt.optimize(model, (x,), passes=passes)
    assert fast.report.rolled_back == []
    return fast


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_binary_vgg_on_digits(trained: Vgg, by_hand: bool) -> None:
    """Every prediction is the same, in float32, and nothing but maps, maxima and signs is left."""
    model, (x, y) = copy.deepcopy(trained), digits()
    if by_hand:
        with torch.no_grad():
            for norm in model.norms:
                norm.weight[::3] *= -1
                norm.weight[1], norm.weight[2] = 0.0, -0.0
    with torch.no_grad():
        truth = model(x)
    right = float((truth[1500:].argmax(1) == y[1500:]).double().mean())
    assert right > 0.8 or by_hand
    fast = deployed(model, x[:8])
    with torch.no_grad():
        found = fast(x)
    assert torch.equal(found.argmax(1), truth.argmax(1))
    assert float((found - truth).abs().max()) < 1e-4  # so no sign of any image differs
    maps = ["conv2d", "sign", "conv2d", "max_pool2d", "sign"]
    assert acting(fast)[:10] == [*maps, *maps] and len(acting(fast)) == 12  # no norm, no product
    state = {name: one.detach() for name, one in fast.state_dict().items()}
    weights = [one for name, one in state.items() if one.ndim == 4 and one.shape[1] > 1]
    assert len(weights) == 3
    for one in weights:
        assert set(one.unique().tolist()) <= {-1.0, 0.0, 1.0}
    # Thresholds of integers: halfway between two of them.
    halves = [one for name, one in state.items() if one.ndim == 1 and len(one) in (16, 32)]
    assert sum(bool((2 * one % 1 == 0).all()) for one in halves) == 3


def test_norms_that_were_folded_first_come_out_of_the_weights_again(trained: Vgg) -> None:
    """s alpha sign(W) is a scale of signs too."""
    x, _ = digits()
    fast = deployed(trained, x[:8], f"canonicalize,cancel-terms,fold-batch-norm,{DEPLOY}")
    weights = [one for one in fast.state_dict().values() if one.ndim == 4 and one.shape[1] > 1]
    assert len(weights) == 3 and all(set(one.unique().tolist()) <= {-1, 0, 1} for one in weights)
    with torch.no_grad():
        assert torch.equal(fast(x).argmax(1), trained(x).argmax(1))


def test_tune_mode_keeps_the_estimator() -> None:
    """Straight-through gradients are those of the source: nothing moves across them."""
    model = randomize_norms(Vgg(4).double().eval())
    x = tensor(3, 1, 8, 8)
    fast = graphopt.optimize(model, (x,), mode="tune", passes=TUNE)
    assert fast.report.rolled_back == []
    assert relative_error(fast(x), model(x)) < 1e-12
    model(x).sum().backward()
    fast(x).sum().backward()
    gradients = dict(fast.named_parameters())
    for name, one in model.named_parameters():
        assert relative_error(gradients[name].grad, one.grad) < 1e-9


# -- one layer ------------------------------------------------------------------------------------


def choice(relation: str, high: float) -> Any:
    compare = getattr(torch, relation)
    return lambda y: torch.where(
        compare(y, 0), high * torch.ones_like(y), -high * torch.ones_like(y)
    )


STEPS: dict[str, Any] = {
    "sign": torch.sign,
    **{f"{relation} {high}": choice(relation, high)
       for relation in ("gt", "ge", "lt", "le") for high in (1.0, -1.0)},
    "twice less one": lambda y: (y >= 0).to(y.dtype) * 2 - 1,
    "spike": lambda y: (y > 0.5).to(y.dtype),
    "later spike": lambda y: (0.5 <= y).to(y.dtype),
    "biased": lambda y: torch.sign(torch.sign(y) + 0.1),
}  # fmt: skip


class Layer(nn.Module):
    """Spikes or signs of x through an XNOR map, perhaps a maximum, a norm and a step."""

    def __init__(
        self, step: str, seed: int, spikes: bool, pool: bool, linear: bool, tied: bool, turned: bool
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn((5, 4) if linear else (5, 4, 3, 3), generator=generator)
        self.weight = nn.Parameter(drawn)
        self.bias = (
            nn.Parameter(torch.randn(5, generator=generator)) if seed % 2 and not tied else None
        )
        norm = nn.BatchNorm1d(5) if linear else nn.BatchNorm2d(5)
        self.norm = randomize_norms(norm, seed).eval()
        with torch.no_grad():
            self.norm.weight[1] = -0.0
            if tied:  # ties that are exact: no shift and no bias
                self.norm.running_mean.zero_()
                self.norm.bias.zero_()
        self.after = nn.Parameter(
            torch.randn((4, 5) if linear else (4, 5, 1, 1), generator=generator)
        )
        self.step, self.spikes, self.pool, self.linear = step, spikes, pool and not linear, linear
        self.sign = nn.Parameter(torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])) if turned else None

    def before(self, x: Tensor) -> Tensor:
        """What the step is a function of."""
        x = (x > 0).to(x.dtype) if self.spikes else torch.sign(x)
        rest = tuple(range(1, self.weight.ndim))
        weight = torch.sign(self.weight) * self.weight.abs().mean(rest, keepdim=True)
        if self.sign is not None:
            weight = weight * self.sign.reshape(-1, *(1,) * len(rest))
        if self.linear:
            return self.norm(F.linear(x, weight, self.bias))
        y = F.conv2d(x, weight, self.bias, padding=1)
        return self.norm(F.max_pool2d(y, 2) if self.pool else y)

    def forward(self, x: Tensor) -> Tensor:
        y = STEPS[self.step](self.before(x))
        return F.linear(y, self.after) if self.linear else F.conv2d(y, self.after)


@given(
    st.sampled_from(sorted(STEPS)), st.integers(0, 10**6),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_step_of_integers_is_exact_in_float32(
    step: str, seed: int, spikes: bool, pool: bool, linear: bool, tied: bool, turned: bool
) -> None:
    """Against the source in float64, but for what is there within rounding of a tie; exact ties too."""
    model = Layer(step, seed, spikes, pool, linear, tied, turned).eval()
    shape = (64, 4) if linear else (8, 4, 6, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    fast = graphopt.optimize(model, (x,), passes=DEPLOY, validate=False)
    exact = copy.deepcopy(model).double()
    truth, before = exact(x.double()).detach(), exact.before(x.double()).detach()
    at = 0.5 if "spike" in step else 0.0
    scale = model.norm.weight.reshape(-1, *(1,) * (before.ndim - 2))
    near = ((before - at).abs() < 1e-9) & (scale != 0) & ~(before == at)
    clear = ~near.any(1, keepdim=True)
    found = fast(x).detach().double()
    assert float(((found - truth) * clear).abs().max()) < 1e-5
    left = acting(fast)
    assert "batch_norm" not in left and left.count("mul") <= model.pool


def test_integers_that_are_parameters_are_known_in_deploy_mode_only() -> None:
    """Weights of -1, 0 and 1 may become others in training."""

    def body(net: Any, x: Tensor) -> Tensor:
        return (net.norm(net.linear((x > 0).to(x.dtype))) > 0.3).to(x.dtype)

    model = prepare(Net(body, linear=nn.Linear(6, 4, bias=False), norm=nn.BatchNorm1d(4))).float()
    with torch.no_grad():
        model.linear.weight.copy_(torch.sign(model.linear.weight))
    x = tensor(64, 6, dtype=torch.float32)

    def thresholds(passes: str) -> Tensor:
        fast = deployed(model, x, passes)
        assert torch.equal(fast(x), model(x))
        (found,) = [one for name, one in fast.state_dict().items() if "weight" not in name]
        return found.detach()

    assert bool((2 * thresholds(DEPLOY) % 1 == 0).all())
    kept = thresholds("canonicalize,fold-thresholds,materialize,canonicalize")
    assert not bool((2 * kept % 1 == 0).all())
