"""Blocks that are one convolution in disguise, from the definitions in their papers.

None has its activation: a block is the affine map that its paper merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(channels: int, height: int, width: int, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, then a batch norm."""
    taps, padding = (height, width), (height // 2, width // 2)
    conv = nn.Conv2d(channels, channels, taps, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Branches(nn.Module):
    """The sum of its branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def ac_block(channels: int) -> nn.Module:
    """ACNet (arXiv 1908.03930): a square kernel and its skeleton."""
    return Branches(*(conv_norm(channels, *taps) for taps in ((3, 3), (1, 3), (3, 1))))


class PaddedNorm(nn.Module):
    """DBB (arXiv 2103.13425), section 3.2: a norm, then padding by what it makes of zero, which is
    a norm of the padded map."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: Tensor) -> Tensor:
        padded: Tensor = self.norm(F.pad(x, (self.padding,) * 4))
        return padded


def diverse_branch_block(channels: int) -> nn.Module:
    """DBB: kxk; 1x1; 1x1 then kxk; 1x1 then average; each with its norms."""

    def first() -> list[nn.Module]:
        return [nn.Conv2d(channels, channels, 1, bias=False), PaddedNorm(channels, 1)]

    return Branches(
        conv_norm(channels, 3, 3), conv_norm(channels, 1, 1),
        nn.Sequential(*first(), nn.Conv2d(channels, channels, 3, bias=False),
                      nn.BatchNorm2d(channels)),
        nn.Sequential(*first(), nn.AvgPool2d(3, 1), nn.BatchNorm2d(channels)),
    )  # fmt: skip


def rep_lk_block(channels: int) -> nn.Module:
    """RepLKNet (arXiv 2203.06717): a large depthwise kernel and a small one."""
    return Branches(*(conv_norm(channels, size, size, groups=channels) for size in (13, 5)))


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
        normed: Tensor = self.norm(F.conv2d(x, weight, padding=1))
        return normed


@dataclasses.dataclass(frozen=True)
class Block:
    """`make(channels)` is a block, and a convolution with a kernel of side `kernel` what its paper
    deploys."""

    make: Callable[[int], nn.Module]
    kernel: int = 3
    depthwise: bool = False


BLOCKS = {
    "ACNet": Block(ac_block),
    "DBB": Block(diverse_branch_block),
    "RepLK": Block(rep_lk_block, 13, depthwise=True),
    "OREPA": Block(OnlineConv),
}


def stack(block: Block, channels: int = 32) -> nn.Sequential:
    """Four blocks with activations behind a stem, with a classifier."""
    body = [layer for _ in range(4) for layer in (block.make(channels), nn.ReLU())]
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1), *body,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


def deploy_stack(net: nn.Module, block: Block) -> nn.Module:
    """The stack with a convolution in place of each block."""
    assert isinstance(net, nn.Sequential) and isinstance(net[0], nn.Conv2d)
    channels = net[0].out_channels
    for place in range(1, 9, 2):
        net[place] = as_convolution(net[place], channels, block)
    return net


@torch.no_grad()
def as_convolution(module: nn.Module, channels: int, block: Block) -> nn.Conv2d:
    """The convolution that computes what `module` does, read off its answers to an empty image and to
    one pixel in the middle of each channel."""
    size, like = block.kernel, next(module.parameters())
    images = like.new_zeros(1 + channels, channels, size, size)
    images[1:, :, size // 2, size // 2] = torch.eye(channels)
    empty, *answers = module(images)
    weight = torch.stack([answer - empty for answer in answers], 1).flip(2, 3)
    if block.depthwise:
        weight = weight[range(channels), range(channels)].unsqueeze(1)
    groups = channels if block.depthwise else 1
    conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=groups).to(like)
    conv.weight.copy_(weight)
    assert conv.bias is not None
    conv.bias.copy_(empty[:, size // 2, size // 2])
    return conv
