"""Residual, dense and multi-branch models, after ResNet, MobileNet, DenseNet, RepVGG, ShuffleNet and
HRNet."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.families import (
    Concat,
    Residual,
    activations,
    batch_norms,
    classifiers,
    units,
)
from graphopt.testing.strategies.network import Draw, Network, measure, normal, seeds, settle

KINDS = (
    "basic", "bottleneck", "preactivated", "inverted", "dense", "branches", "shuffle",
    "multi-scale", "squeeze",
)  # fmt: skip
PREACTIVATED = "norm activation map"


class SqueezeExcite(nn.Module):
    """Channels weighted by what all pixels say: `x * gate(mlp(mean(x)))`."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 2, 1)
        self.expand = nn.Conv2d(2, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(torch.relu(self.reduce(squeezed))))


class Branches(nn.Module):
    """The sum of branches over one input, then an activation: RepVGG, ACNet, MobileOne."""

    def __init__(self, branches: list[nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = sum(branch(x) for branch in self.branches)  # type: ignore[assignment]
        return self.activation(total)


class ShuffleUnit(nn.Module):
    """Half of the channels passes by, half goes through `branch`; then they are shuffled."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.branch(right)], dim=1)
        n, channels, height, width = y.shape
        y = y.view(n, 2, channels // 2, height, width).transpose(1, 2)
        return y.reshape(n, channels, height, width)


class MultiScale(nn.Module):
    """Two resolutions that hear each other: `high + up(low)`, `low + down(high)`."""

    def __init__(self, high: nn.Module, low: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.high, self.low, self.up, self.down = high, low, up, down

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x), self.low(x)
        fine = torch.relu(high + self.up(low))
        coarse = torch.relu(low + self.down(high))
        return fine + nn.functional.interpolate(coarse, size=fine.shape[2:], mode="nearest")


@st.composite
def residual(draw: Draw) -> Network:
    """Stem, one to three blocks of `KINDS`, classifier (or the feature map)."""
    width = 4
    seed = draw(seeds())
    x = normal((draw(st.integers(2, 3)), 3, 8, draw(st.sampled_from([8, 6]))), seed)
    layers: list[nn.Module] = [draw(units(2, 3, width))]
    for _ in range(draw(st.integers(1, 3))):
        layers.append(_block(draw, draw(st.sampled_from(KINDS)), width))
        width = measure(nn.Sequential(*layers), tuple(x.shape))[1]
    if draw(st.integers(0, 3)):
        layers.append(draw(classifiers(2, width)))
    module = nn.Sequential(*layers).double()
    settle(module, seed)
    return Network(module, (x,))


def _block(draw: Draw, kind: str, width: int) -> nn.Module:
    if kind == "dense":
        growth = draw(st.integers(1, 3)) * 2
        order = draw(st.sampled_from([PREACTIVATED, "map norm activation"]))
        return Concat(nn.Identity(), draw(units(2, width, growth, order=order)))
    if kind == "branches":
        return _branches(draw, width)
    if kind == "shuffle":
        half = width // 2
        return ShuffleUnit(nn.Sequential(
            draw(units(2, half, half, kernel=1)),
            draw(units(2, half, half, groups=half, order="map norm")),
            draw(units(2, half, half, kernel=1)),
        ))  # fmt: skip
    if kind == "multi-scale":
        pool = nn.AvgPool2d(2) if draw(st.booleans()) else nn.MaxPool2d(3, 2, 1)
        mode = draw(st.sampled_from(["nearest", "bilinear"]))
        upsample = nn.Upsample(scale_factor=2, mode=mode)
        return MultiScale(
            draw(units(2, width, width)),
            nn.Sequential(pool, draw(units(2, width, width))),
            nn.Sequential(draw(units(2, width, width, kernel=1, order="map norm")), upsample),
            draw(units(2, width, width, stride=2, order="map norm")),
        )
    return _sum(draw, kind, width)


def _sum(draw: Draw, kind: str, width: int) -> nn.Module:
    """A block with a shortcut around it."""
    out = width if draw(st.booleans()) else width + 2
    inner = width * draw(st.integers(1, 2))
    preactivated = kind == "preactivated"
    last = PREACTIVATED if preactivated else "map norm"
    layers: list[nn.Module]
    if kind == "bottleneck":
        layers = [
            draw(units(2, width, inner, kernel=1)),
            draw(units(2, inner, inner, groups=draw(st.sampled_from([1, 2])))),
            draw(units(2, inner, out, kernel=1, order=last)),
        ]
    elif kind in ("inverted", "squeeze"):
        layers = [
            draw(units(2, width, inner, kernel=1)),
            draw(units(2, inner, inner, groups=inner)),
        ]
        if kind == "squeeze":
            gate = draw(st.sampled_from([nn.Sigmoid, nn.Hardsigmoid]))()
            layers.append(SqueezeExcite(inner, gate))
        layers.append(draw(units(2, inner, out, kernel=1, order=last)))
    else:
        first = PREACTIVATED if preactivated else "map norm activation"
        layers = [
            draw(units(2, width, inner, order=first)),
            draw(units(2, inner, out, order=last)),
        ]
    shortcut: nn.Module = nn.Identity()
    if out != width:
        shortcut = draw(units(2, width, out, kernel=1, order="map norm"))
    plain = preactivated or kind == "inverted"
    activation = nn.Identity() if plain else draw(activations())
    scale = draw(st.sampled_from([1.0, 0.5]))
    return Residual(nn.Sequential(*layers), shortcut, activation, draw(st.booleans()), scale)


def _branches(draw: Draw, width: int) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, width]))
    made: list[nn.Module] = [draw(units(2, width, width, groups=groups, order="map norm"))]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["1x1", "norm", "3x3", "asymmetric", "pool", "identity"]))
        if kind in ("1x1", "3x3"):
            size = int(kind[0])
            made.append(draw(units(2, width, width, kernel=size, groups=groups, order="map norm")))
        elif kind == "asymmetric":
            conv = nn.Conv2d(width, width, (1, 3), padding=(0, 1), bias=False)
            made.append(nn.Sequential(conv, draw(batch_norms(2, width))))
        elif kind == "pool":
            pointwise = draw(units(2, width, width, kernel=1, order="map norm"))
            made.append(nn.Sequential(pointwise, nn.AvgPool2d(3, 1, 1)))
        else:
            made.append(draw(batch_norms(2, width)) if kind == "norm" else nn.Identity())
    return Branches(made, draw(activations()))
