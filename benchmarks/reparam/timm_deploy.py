"""Deploy forms of timm's models: its own, and by hand where it has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def by_timm(model: nn.Module) -> nn.Module:
    """timm's own deploy form, for the models that it changes."""
    from timm.utils.model import reparameterize_model

    deployed: nn.Module = reparameterize_model(model)
    return deployed


@torch.no_grad()
def standardized_once(model: nn.Module) -> nn.Module:
    """Plain convolutions with standardized weights; the scalar factors of the activations and residual
    branches stay where the published code has them."""
    from timm.layers.std_conv import ScaledStdConv2d

    for name, conv in list(model.named_modules()):
        if isinstance(conv, ScaledStdConv2d):
            model.set_submodule(name, _plain(conv))
    return model


def _plain(conv: Any) -> nn.Conv2d:
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups,
    )  # fmt: skip
    variance, mean = torch.var_mean(conv.weight, (1, 2, 3), correction=0, keepdim=True)
    standard = (conv.weight - mean) / torch.sqrt(variance + conv.eps)
    plain.weight = nn.Parameter(standard * conv.gain * conv.scale)
    plain.bias = conv.bias
    return plain


@torch.no_grad()
def fold_layer_scale(model: nn.Module) -> nn.Module:
    """The layer scale of every block of a ConvNeXt folded into the linear map in front of it."""
    from timm.models.convnext import ConvNeXtBlock

    blocks: list[Any] = [one for one in model.modules() if isinstance(one, ConvNeXtBlock)]
    for block in blocks:
        last = block.mlp.fc2
        last.weight.mul_(block.gamma.reshape(-1, *[1] * (last.weight.ndim - 1)))
        last.bias.mul_(block.gamma)
        block.gamma = None
    return model
