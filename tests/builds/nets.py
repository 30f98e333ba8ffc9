"""Models and data that the configurations of these tests name."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers import randomize_norms


class Net(nn.Module):
    """Two inputs, a norm to fold, a dimension that both inputs have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image, scale):
        x = torch.relu(self.bn(self.conv(image)))
        return self.head(x.mean((2, 3))) * scale


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Net()).eval()


def other() -> nn.Module:
    """Other weights."""
    torch.manual_seed(1)
    return randomize_norms(Net(), seed=1).eval()


def both():
    return net(), (torch.randn(2, 3, 8, 8), torch.ones(2, 1))


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),)


def not_a_number():
    model, inputs = both()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    return model, inputs


class Branches(nn.Module):
    """Which ops run depends on values: no graph."""

    def forward(self, image, scale):
        if float(image.sum()) > 0:
            return image * 2
        return image - scale.sum()


def branches():
    return Branches(), (torch.randn(2, 3, 8, 8), torch.ones(2, 1))


def fails():
    raise RuntimeError("no weights here\nand more lines")


def data(count: int = 2):
    generator = torch.Generator().manual_seed(5)
    return [
        ({"image": torch.randn(4, 3, 8, 8, generator=generator), "scale": torch.ones(4, 1)}, None)
        for _ in range(count)
    ]


def bad_data():
    return [torch.zeros(3)]


class Keywords(nn.Module):
    """Inputs without names."""

    def forward(self, **more):
        return more["image"].sum((1, 2, 3))[:, None] * more["scale"]


def keywords():
    return Keywords()


class Large(Net):
    """32 KiB of weights, more than its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 1024, bias=False)

    def forward(self, image, scale):
        x = torch.relu(self.bn(self.conv(image)))
        return self.wide(x.mean((2, 3))) * scale


def large() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Large()).eval()
