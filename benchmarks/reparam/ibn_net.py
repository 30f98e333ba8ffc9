"""IBN-Net (arXiv 1807.09441), and its deploy form by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class HalfInstanceNorm(nn.Module):
    """An instance norm of the first half of the channels and a batch norm of the rest, written as in
    the published code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.instances = channels // 2
        self.first = nn.InstanceNorm2d(self.instances, affine=True)
        self.rest: nn.Module = nn.BatchNorm2d(channels - self.instances)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, self.instances, 1)
        return torch.cat((self.first(first.contiguous()), self.rest(rest.contiguous())), 1)


class Bottleneck(nn.Module):
    """A residual bottleneck of IBN-ResNet "a": both norms behind the first convolution."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = HalfInstanceNorm(width)
        self.conv2 = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.conv3 = nn.Sequential(
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.conv3(F.relu(self.conv2(out)))
        return F.relu(out + self.shortcut(x))


def ibn_net(width: int = 32) -> nn.Module:
    """Three bottlenecks behind a stem, with a classifier."""
    wide = 4 * width
    stem = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
    )
    return nn.Sequential(
        stem, nn.ReLU(), Bottleneck(width, width, wide), Bottleneck(wide, width, wide),
        Bottleneck(wide, width, wide), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10),
    )  # fmt: skip


def deploy_ibn_net(net: nn.Module) -> nn.Module:
    """Every batch norm folded, half of a convolution at a time where need be; the instance norms, the
    split and the concatenation stay."""
    for module in list(net.modules()):
        if isinstance(module, Bottleneck):
            _fold_half(module)
        elif isinstance(module, nn.Sequential) and len(module) == 2:
            conv, norm = module
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[0], module[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return net


@torch.no_grad()
def _fold_half(block: Bottleneck) -> None:
    conv, half, norm = block.conv1, block.norm1.instances, block.norm1.rest
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    # In front of an instance norm a constant has no effect, so its half needs no bias.
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    conv.weight[half:] *= scale.reshape(-1, 1, 1, 1)
    conv.bias = nn.Parameter(torch.cat((torch.zeros_like(shift), shift)))
    block.norm1.rest = nn.Identity()
