"""Channels that are the same whatever the input go into the bias of what reads them, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.passes.prune import Prune
from tests.helpers import Net, assert_equal, prepare, relative_error

PRUNE = "prune{importance=batch-norm-scale,threshold=0.0,reconstruct=constants}"
IMAGE = (3, 3, 9, 9)


def dead(norm: Any, *channels: int) -> nn.Module:
    """The norm with scales of both signs, but zero for these."""
    with torch.no_grad():
        scale = norm.weight
        scale.copy_(torch.where(scale < 0, scale - 0.2, scale + 0.2))
        scale[list(channels)] = 0.0
    return norm


def net(
    behind: Callable[[], nn.Module], act: Callable[[], nn.Module] = nn.ReLU, *away: int
) -> nn.Module:
    """Eight channels, two of which are act(beta) everywhere, or those given."""
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(), behind())).double()
    with torch.no_grad():
        model[1].bias.abs_().add_(0.1)  # type: ignore[union-attr, operator]
    dead(model[1], *(away or (1, 5)))
    return model.eval()


BEHIND = {
    "a convolution": lambda: nn.Conv2d(8, 5, 3),
    "dilated, no bias, a norm": lambda: nn.Sequential(
        nn.Conv2d(8, 5, 3, dilation=2, bias=False), nn.BatchNorm2d(5)
    ),
    "one pixel": lambda: nn.Conv2d(8, 5, 1),
    "pooled": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(8, 5, 2)
    ),
    "mean and linear": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 7, 5)),
    "two": lambda: Fork(),
}


class Fork(nn.Module):
    """Two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)[..., 1:-1, 1:-1] * self.b(x)
        return y


@pytest.mark.parametrize("act", [nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_norm_of_scale_zero_is_its_shift(behind: str, act: Callable[[], nn.Module]) -> None:
    model, x = net(BEHIND[behind], act), torch.randn(IMAGE).double()
    plain = graphopt.optimize(model, (x,), passes=PRUNE.replace("constants", "data-free"))
    fast = graphopt.optimize(model, (x,), passes=PRUNE)
    assert fast.state_dict()["0.weight"].shape[0] == 6
    assert_equal(fast(x), model(x), 1e-12)
    assert_equal(fast(3 * x[:1] - 5), model(3 * x[:1] - 5), 1e-12)  # on any input
    assert relative_error(plain(x), model(x)) > 1e-3


def test_whole_groups() -> None:
    """Channels of two groups are constant: these, and what they are read for, go."""
    behind = nn.Sequential(nn.Conv2d(8, 8, 3, 2, groups=4), nn.Conv2d(8, 5, 1))
    model, x = net(lambda: behind, nn.ReLU, 0, 1, 6, 7), torch.randn(IMAGE).double()
    with torch.no_grad():
        behind[0].weight[[0, 1, 6, 7]] = 0.0
    fast = graphopt.optimize(model, (x,), passes=PRUNE)
    assert fast.state_dict()["3.0.weight"].shape == (4, 2, 3, 3)
    assert_equal(fast(2 * x), model(2 * x), 1e-12)


def test_a_padded_border_sees_less_of_them() -> None:
    """No bias is right for it and for the rest: plain removal stays."""
    model, x = net(lambda: nn.Conv2d(8, 5, 3, padding=1)), torch.randn(IMAGE).double()
    fast = graphopt.optimize(model, (x,), passes=PRUNE)
    assert [one.rewrite for one in fast.report.applied] == ["prune"]
    assert torch.equal(fast.state_dict()["3.bias"], model.state_dict()["3.bias"])
    (record,) = fast.report.rolled_back
    assert record.rewrite == "reconstruct" and "not nearer" in record.reason


def test_a_unit_that_only_seems_dead_is_not_constant() -> None:
    """On these inputs its output is zero; on others it is not."""
    model = net(lambda: nn.Conv2d(8, 5, 1))
    with torch.no_grad():
        model[1].bias[2], model[1].weight[2] = -1e3, 0.1  # type: ignore[index, operator]
    x = torch.randn(IMAGE).double()
    score = torch.zeros(8)
    score[[2, 1]] = -1.0  # both go

    def wanted(evidence):  # type: ignore[no-untyped-def]
        return evidence.summed({"0.bias": score})

    chosen = Prune(importance=wanted, threshold=-0.5, reconstruct="constants")
    fast = graphopt.optimize(model, (x,), passes=[chosen])
    beta = model[1].bias[1].relu()  # type: ignore[index, operator]
    expected = model[3].bias + model[3].weight[:, 1, 0, 0] * beta
    assert_equal(fast.state_dict()["3.bias"], expected, 1e-12)


def test_what_reads_nothing_is_its_bias() -> None:
    """A row of zeros, and a scale of zero: constants without a norm."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale, self.down = (
                nn.Linear(4, 8),
                nn.Parameter(torch.randn(8)),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.sigmoid(self.up(x) * self.scale))
            return y

    model = Scaled().double().eval()
    with torch.no_grad():
        model.up.weight[3] = 0.0
        model.scale[5] = 0.0
    x = torch.randn(6, 4).double()

    def wanted(evidence):  # type: ignore[no-untyped-def]
        score = torch.ones(8)
        score[[3, 5]] = 0.0
        return evidence.summed({"scale": score})

    chosen = Prune(importance=wanted, threshold=0.0, reconstruct="constants")
    fast = graphopt.optimize(model, (x,), passes=[chosen])
    assert fast.state_dict()["scale"].shape == (6,)
    assert_equal(fast(-2 * x), model(-2 * x), 1e-12)


@given(st.sets(st.integers(0, 7), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 99))
def test_any_channels(away: set[int], kernel: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = prepare(
        Net(lambda m, x: m.c(torch.cat([m.n(m.a(x)), m.b(x)], 1).sigmoid()),
            a=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(12, 5, kernel))
    ).double().eval()  # fmt: skip
    dead(model.n, *away)
    x = torch.randn(2, 3, 5, 5).double()
    fast = graphopt.optimize(model, (x,), passes=PRUNE)
    assert fast.state_dict()["a.weight"].shape[0] == 8 - len(away)
    assert_equal(fast(2 - x), model(2 - x), 1e-11)
