"""Blocks with branches, from the definitions in their papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(channels: int, kernel: int | tuple[int, int], **options: int) -> nn.Sequential:
    """A convolution that keeps the size, then a batch norm."""
    taps = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(size // 2 for size in taps)
    conv = nn.Conv2d(channels, channels, taps, padding=padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Branches(nn.Module):
    """The sum of its branches, through a ReLU."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return F.relu(total)


def ac_block(channels: int) -> nn.Module:
    """ACNet (arXiv 1908.03930): a square kernel and its skeleton."""
    return Branches(*(conv_norm(channels, kernel) for kernel in ((3, 3), (1, 3), (3, 1))))


class PaddedNorm(nn.Module):
    """DBB (arXiv 2103.13425), section 3.2: a norm, then padding by what it makes of zero, which is
    a norm of the padded map."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.pad(x, (self.padding,) * 4))


def diverse_branch_block(channels: int, groups: int = 1) -> nn.Module:
    """DBB: kxk; 1x1; 1x1 then kxk; 1x1 then average; each with its norms."""

    def first() -> list[nn.Module]:
        conv = nn.Conv2d(channels, channels, 1, bias=False, groups=groups)
        return [conv, PaddedNorm(channels, 1)]

    return Branches(
        conv_norm(channels, 3, groups=groups), conv_norm(channels, 1, groups=groups),
        nn.Sequential(*first(), nn.Conv2d(channels, channels, 3, bias=False, groups=groups),
                      nn.BatchNorm2d(channels)),
        nn.Sequential(*first(), nn.AvgPool2d(3, 1), nn.BatchNorm2d(channels)),
    )  # fmt: skip


def rep_lk_block(channels: int) -> nn.Module:
    """RepLKNet (arXiv 2203.06717): a large depthwise kernel and a small one."""
    return Branches(*(conv_norm(channels, kernel, groups=channels) for kernel in (13, 5)))


class OnlineConv(nn.Module):
    """In the style of OREPA (arXiv 2204.00826): branches of weights with linear scaling, one
    convolution at run time, one norm behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(channels, channels, 3, 3) / 30)
        self.point = nn.Parameter(torch.randn(channels, channels, 1, 1) / 10)
        self.first = nn.Parameter(torch.randn(channels, channels, 1, 1) / 10)
        self.second = nn.Parameter(torch.randn(channels, channels, 3, 3) / 30)
        self.scales = nn.Parameter(torch.randn(4, channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        average = F.pad(self.point / 9, (1, 1, 1, 1), mode="replicate")
        chained = torch.einsum("omhw,mi->oihw", self.second, self.first[:, :, 0, 0])
        point = F.pad(self.point, (1, 1, 1, 1))
        terms = (self.square, point, average, chained)
        weight = sum(scale.reshape(-1, 1, 1, 1) * term
                     for scale, term in zip(self.scales, terms, strict=True))  # fmt: skip
        return F.relu(self.norm(F.conv2d(x, weight, padding=1)))


def stacked(block: object, channels: int = 32) -> nn.Module:
    """Four blocks behind a stem, with a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1), *(block(channels) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


BLOCKS = {
    "ACNet": ac_block,
    "DBB": diverse_branch_block,
    "RepLK": rep_lk_block,
    "OREPA": OnlineConv,
}
# What is left of a stack in the published deploy form: stem, (conv, relu) x 4, pool, flatten, linear.
DEPLOYED = 1 + 2 * 4 + 3
