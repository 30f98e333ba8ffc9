"""A vision transformer with Dual PatchNorm (arXiv 2302.01327), and its deploy form by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchNorms(nn.Module):
    """A layer norm before and one behind the embedding of patches."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.before = nn.LayerNorm(3 * patch**2)
        self.embed = nn.Linear(3 * patch**2, width)
        self.behind = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (size // self.patch for size in x.shape[2:])
        x = x.reshape(-1, 3, rows, self.patch, columns, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns, 3 * self.patch**2)
        return self.behind(self.embed(self.before(x)))  # type: ignore[no-any-return]


class PatchNormViT(nn.Module):
    """A small vision transformer with norms around its patch embedding."""

    def __init__(self, size: int = 64, patch: int = 8, width: int = 96, depth: int = 4) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.patches = PatchNorms(patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x) + self.position)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


@torch.no_grad()
def deploy_patch_norm_vit(net: nn.Module) -> nn.Module:
    """The weight and bias of the first norm folded into the embedding; the norm itself stays.

    Written as one strided convolution and a scalar per patch (Dual PatchNorm, arXiv 2302.01327), the variance
    of a patch alone takes more ops than the layer norm.
    """
    assert isinstance(net, PatchNormViT)
    patches = net.patches
    embed, before = patches.embed, patches.before
    embed.bias.add_(embed.weight @ before.bias)
    embed.weight.mul_(before.weight)
    patches.before = nn.LayerNorm(
        list(before.normalized_shape), before.eps, elementwise_affine=False
    )
    return net
