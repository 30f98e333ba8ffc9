"""Convolutional models without residual connections, in one, two and three dimensions."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.testing.strategies.families import activations, batch_norms, classifiers, units
from graphopt.testing.strategies.layers import CONV_TRANSPOSE
from graphopt.testing.strategies.network import Draw, Network, Shape, normal, seeds, settle

SIZES = {1: (16,), 2: (8, 8), 3: (4, 8, 4)}  # every side halves twice
UPSAMPLING = {1: "linear", 2: "bilinear", 3: "trilinear"}
ORDERS = ("map norm activation", "map activation norm", "norm activation map", "map norm")


class UNet(nn.Module):
    """Down, through the middle, up again, side by side with what was before."""

    def __init__(self, down: nn.Module, middle: nn.Module, up: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.down, self.middle, self.up, self.out = down, middle, up, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.up(self.middle(self.down(x))), x], dim=1))


class Siamese(nn.Module):
    """One tower for two inputs, compared in `how`."""

    def __init__(self, tower: nn.Module, how: str) -> None:
        super().__init__()
        self.tower = tower
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.tower(x), self.tower(y)
        if self.how == "difference":
            return (a - b).abs()
        if self.how == "cat":
            return torch.cat([a, b], dim=-1)
        return torch.cosine_similarity(a, b, dim=-1)


@st.composite
def convolutional(draw: Draw) -> Network:
    """A plain, separable, encoder-decoder, U-shaped or siamese network, or several outputs."""
    rank = draw(st.sampled_from([2, 1, 3]))
    shape = (draw(st.integers(2, 3)), draw(st.integers(1, 3)), *SIZES[rank])
    kind = draw(st.sampled_from(
        ["plain", "separable", "encoder and decoder", "u", "siamese"]
    ))  # fmt: skip
    seed = draw(seeds())
    inputs = [normal(shape, seed)]
    if kind == "encoder and decoder":
        module: nn.Module = nn.Sequential(*_decoder(draw, shape))
    elif kind == "u":
        module = _u(draw, rank, shape[1], 4, draw(st.integers(1, 2)))
    else:
        module = _tower(draw, shape, kind == "separable")
    if kind == "siamese":
        module = Siamese(module, draw(st.sampled_from(["difference", "cat", "cosine"])))
        inputs.append(normal(shape, seed + 1))
    settle(module.double(), seed)
    return Network(module, tuple(inputs))


def _tower(draw: Draw, shape: Shape, separable: bool) -> nn.Module:
    rank, channels = len(shape) - 2, shape[1]
    layers: list[nn.Module] = []
    order = draw(st.sampled_from(ORDERS))
    for stage in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([4, 6]))
        stride = draw(st.integers(1, 2)) if stage < 2 else 1
        if separable:
            layers += [
                draw(units(rank, channels, channels, groups=channels, stride=stride, order=order)),
                draw(units(rank, channels, out, kernel=1, order=order)),
            ]
        else:
            layers.append(draw(units(rank, channels, out, stride=stride, order=order)))
            if stride == 1 and stage == 0 and draw(st.booleans()):
                layers.append(getattr(nn, f"MaxPool{rank}d")(2))
        channels = out
    return nn.Sequential(*layers, draw(classifiers(rank, channels)))


def _decoder(draw: Draw, shape: Shape) -> list[nn.Module]:
    rank, channels = len(shape) - 2, shape[1]
    return [
        draw(units(rank, channels, 4, stride=2)),
        *(draw(units(rank, 4, 4)) for _ in range(draw(st.integers(0, 1)))),
        *_up(draw, rank, 4, 3),
        draw(batch_norms(rank, 3)),
        draw(activations()),
        draw(units(rank, 3, channels, order="map")),
    ]


def _up(draw: Draw, rank: int, channels: int, out: int) -> list[nn.Module]:
    """Layers that double every side."""
    kind = draw(st.sampled_from(["transposed", "nearest", "linear", "shuffle"]))
    if kind == "transposed":
        kernel, padding = draw(st.sampled_from([(2, 0), (4, 1)]))
        return [CONV_TRANSPOSE[rank](channels, out, kernel, 2, padding)]
    if kind == "shuffle" and rank == 2:
        return [draw(units(2, channels, 4 * out, order="map")), nn.PixelShuffle(2)]
    mode = UPSAMPLING[rank] if kind == "linear" else "nearest"
    return [nn.Upsample(scale_factor=2, mode=mode), draw(units(rank, channels, out, order="map"))]


def _u(draw: Draw, rank: int, channels: int, width: int, depth: int) -> nn.Module:
    pool = getattr(nn, f"{draw(st.sampled_from(['Max', 'Avg']))}Pool{rank}d")(2)
    down = nn.Sequential(pool, draw(units(rank, channels, width)))
    middle = _u(draw, rank, width, width, depth - 1) if depth > 1 else draw(units(rank, 4, width))
    up = nn.Sequential(*_up(draw, rank, width, width))
    return UNet(down, middle, up, draw(units(rank, width + channels, width)))
