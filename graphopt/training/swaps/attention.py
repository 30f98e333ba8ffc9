"""Simplified linear attention (SLA; SLAB, arXiv 2405.11582): attention without softmax.

    q = relu(Q),  k = relu(K + position),  out = q (k^T v) / (q sum_n k_n + 1e-6) + DWC(v)

per head, DWC a depthwise 5x5 convolution of the values on the square of tokens, the same for all heads.
With m queries, n keys of d features and values of c features, both orders of the product are equal:

    q (k^T v)    2 d c (n + m) operations
    (q k^T) v    2 n m (d + c) operations
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class LinearAttention(nn.Module):
    """`forward(share, q, k, v)`: queries `[..., m, d]`, keys `[..., n, d]`, values `[..., n, c]`.

    Args:
        channels: c.
        position: what is added to the keys at first, zeros `[n, d]` or with axes in front, or None.
        convolution: whether DWC(v) is added.
        class_tokens: so many tokens at the front have no place on the square.
        transposed: whether keys come as `[..., d, n]`.
        order: "auto" takes the order of fewer operations; "linear" is the first, "quadratic" the second.
    """

    def __init__(
        self, channels: int, position: Tensor | None, convolution: bool, class_tokens: int = 0,
        transposed: bool = False, order: str = "auto", like: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.class_tokens, self.transposed, self.order = class_tokens, transposed, order
        self.position = None if position is None else nn.Parameter(position)
        self.convolution = None
        if convolution:
            self.convolution = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
            if like is not None:
                self.convolution.to(like)

    def forward(self, share: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        device = v.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._attend(q, k, v)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):  # sums over all tokens
            q, k, v = q.float(), k.float(), v.float()
        k = k.mT if self.transposed else k
        q, k = F.relu(q), F.relu(k if self.position is None else k + self.position)
        out = attend(q, k, v, self.order)
        if self.convolution is not None:
            out = out + self._convolved(v, self.convolution)
        return out.to(dtype)

    def _convolved(self, v: Tensor, convolution: nn.Conv2d) -> Tensor:
        tokens = v[..., self.class_tokens :, :].mT  # [..., c, n]
        side = math.isqrt(tokens.shape[-1])
        image = tokens.reshape(-1, tokens.shape[-2], side, side)
        y = F.conv2d(
            image, convolution.weight.to(v.dtype), None if convolution.bias is None
            else convolution.bias.to(v.dtype), padding=2, groups=image.shape[1],
        )  # fmt: skip
        y = y.reshape(tokens.shape).mT
        return F.pad(y, (0, 0, self.class_tokens, 0)) if self.class_tokens else y


def attend(q: Tensor, k: Tensor, v: Tensor, order: str = "auto") -> Tensor:
    """`q (k^T v) / (q sum_n k_n + 1e-6)` for q, k that are not negative. A row of zeros gives zeros."""
    if linear(q, k, v) if order == "auto" else order == "linear":
        return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + EPS)
    scores = q @ k.mT
    return (scores @ v) / (scores.sum(-1, keepdim=True) + EPS)


def linear(q: Any, k: Any, v: Any) -> bool:
    """Whether `q (k^T v)` takes fewer operations; for a dynamic number of tokens, yes."""
    m, n, d, c = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    if not all(isinstance(size, int) for size in (m, n, d, c)):
        return True
    return bool(d * c * (n + m) < n * m * (d + c))
