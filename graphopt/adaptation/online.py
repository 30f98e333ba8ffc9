"""Norms that take the place of batch norms and adapt on every call, in eval mode too.

Parameters and statistics of the source are operands; what is learned of the target are buffers. Nothing
of it has gradients but the statistics of the batch itself.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphopt.adaptation.statistics import (
    Statistics,
    mixed,
    of_batch,
    of_instances,
    per_channel,
    source_shares,
    wide,
)

TEMPERATURE = 0.07  # of UnMix-TNS's assignment
BATCH = 64  # the batch size for which UnMix-TNS's momentum is meant
SPREAD = 0.5  # the share of the source's variance that its components start apart with


class OnlineNorm(nn.Module):
    """Base: `(x - mean) / sqrt(var + eps) * weight + bias` with statistics of `adapted`.

    `OPTIONS` are the keyword arguments. `source` are the statistics of the source model, [C], from which
    the states start; `adapted` is given them anew on every call.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {}

    def __init__(self, eps: float, source: Statistics, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        for name, value in options.items():
            setattr(self, name, value)
        for name, value in self.start(source).items():
            self.register_buffer(name, value)

    def start(self, source: Statistics) -> dict[str, Tensor]:
        """The states before any data."""
        return {}

    def adapted(self, x: Tensor, source: Statistics) -> Statistics:
        """Mean and variance, [C] or [N, C], to normalize `x` with; updates the states."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        y = wide(x)
        centre, spread = self.adapted(y, (wide(mean), wide(var)))
        scale = (spread + self.eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        rest = (1,) * (x.ndim - 2)
        y = (y - centre.reshape(*centre.shape, *rest)) * scale.reshape(*scale.shape, *rest)
        return (y if bias is None else y + bias.reshape(-1, *rest)).to(x.dtype)


class Target(OnlineNorm):
    """Statistics of the target, `momentum` of each batch in them: AdaBN, or mixed with the source's."""

    unbiased: ClassVar[bool]
    momentum: float
    mean: Tensor
    var: Tensor

    def start(self, source: Statistics) -> dict[str, Tensor]:
        return {"mean": wide(source[0]).clone(), "var": wide(source[1]).clone()}

    def target(self, x: Tensor) -> Statistics:
        if per_channel(x) < 2:
            raise ValueError(
                f"expected at least 2 values per channel for a variance, found 1 ({list(x.shape)})"
            )
        found = of_batch(x, self.unbiased)
        if self.momentum != 1:
            found = mixed((self.mean, self.var), found, self.momentum)
        for state, value in zip((self.mean, self.var), found, strict=True):
            state.copy_(value.detach())
        return found


class AdaBN(Target):
    """Statistics of the target alone, variances biased (AdaBN; one batch: prediction-time norm)."""

    OPTIONS: ClassVar[dict[str, Any]] = {"momentum": 1.0}
    unbiased = False

    def adapted(self, x: Tensor, source: Statistics) -> Statistics:
        return self.target(x)


class AlphaBN(Target):
    """`(1 - alpha) * source + alpha * target`, the target's variance unbiased (alpha-BN)."""

    OPTIONS: ClassVar[dict[str, Any]] = {"alpha": 0.5, "momentum": 1.0}
    unbiased = True
    alpha: float

    def adapted(self, x: Tensor, source: Statistics) -> Statistics:
        return mixed(source, self.target(x), self.alpha)


class AdaMixBN(OnlineNorm):
    """`lambda * source + (1 - lambda) * target`, both of the batch at hand: there is no state.

    The published code writes the mixture into gain and shift at the first batch and uses them for all
    that follow; this is the form that it equals on that first batch.
    """

    def adapted(self, x: Tensor, source: Statistics) -> Statistics:
        target = of_batch(x, unbiased=True)
        shares = source_shares(of_instances(x, unbiased=True), source, target)
        return mixed(source, target, 1 - shares.mean())


class UnMixTNS(OnlineNorm):
    """A mixture of `components` statistics per norm, each drawn towards the instances that are like it
    (UnMix-TNS, arXiv 2401.08328); every instance is normalized with its own mixture.

    States are `means` and `variances`, [K, C]. Their mixture has the source's mean and, in expectation,
    the source's variance at the start. `momentum` is that of a batch of 64.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"components": 16, "momentum": 0.1, "seed": 0}
    components: int
    momentum: float
    seed: int
    means: Tensor
    variances: Tensor

    def start(self, source: Statistics) -> dict[str, Tensor]:
        mean, var = map(wide, source)
        count, apart = self.components, SPREAD if self.components > 1 else 0.0
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(count, len(mean), generator=generator, dtype=torch.float64).to(mean)
        step = math.sqrt(apart * count / (count - 1)) if count > 1 else 0.0
        return {
            "means": mean + step * var.sqrt() * drawn,
            "variances": ((1 - apart) * var).repeat(count, 1),
        }

    def adapted(self, x: Tensor, source: Statistics) -> Statistics:
        mean, var = (one.unsqueeze(1) for one in of_instances(x, unbiased=False))  # [N, 1, C]
        means, variances = self.means, self.variances
        alike = torch.cosine_similarity(mean.detach(), means, -1, 1e-12)
        shares = (alike / TEMPERATURE).softmax(-1).unsqueeze(-1)  # [N, K, 1]
        mixed_means = (1 - shares) * means + shares * mean
        mixed_vars = (1 - shares) * variances + shares * var
        centre = mixed_means.mean(1)
        spread = mixed_vars.mean(1) + mixed_means.square().mean(1) - centre.square()
        momentum = 1 - (1 - self.momentum) ** (torch.ones_like(alike[:, 0]).sum() / BATCH)
        for state, old, now in ((self.means, means, mean), (self.variances, variances, var)):
            state.copy_(old + momentum * (shares * (now.detach() - old)).mean(0))
        return centre, spread


NORMS: dict[str, type[OnlineNorm]] = {
    "adabn": AdaBN, "alpha-bn": AlphaBN, "adamixbn": AdaMixBN, "unmix-tns": UnMixTNS,
}  # fmt: skip
