"""The norms that take the place of layer norms and RMS norms.

Each normalizes along the axis of the norm that it replaces and starts from its gain and shift. What is fixed
after training is written as scales and shifts per channel, `x * scale + shift`, which the passes of
`deploy` move into the maps that read it. Sources: SLAB (arXiv 2405.11582), PowerNorm (2003.07845), DyT
(2503.10622), EvoNorm (2004.02967).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Old:
    """What is known of the norm that is replaced: `gain` and `shift` are vectors over the `channels`
    along `axis`, or None."""

    axis: int
    ndim: int
    channels: int
    eps: float
    gain: Tensor | None
    shift: Tensor | None
    like: Tensor  # without elements, of the dtype and on the device of the new states


class NewNorm(nn.Module):
    """Base: a gain and a shift per channel along an axis. `OPTIONS` are the keyword arguments."""

    OPTIONS: ClassVar[dict[str, Any]] = {}
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, old: Old, **options: Any) -> None:
        super().__init__()
        self.axis, self.ndim, self.channels, self.eps = old.axis, old.ndim, old.channels, old.eps
        gain = old.like.new_ones(old.channels) if old.gain is None else old.gain.to(old.like)
        shift = old.like.new_zeros(old.channels) if old.shift is None else old.shift.to(old.like)
        self.weight, self.bias = nn.Parameter(gain.clone()), nn.Parameter(shift.clone())
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, share: float, x: Tensor) -> Tensor:
        raise NotImplementedError

    def along(self, vector: Tensor) -> Tensor:
        """A vector over the channels in a shape that broadcasts with the input."""
        if self.axis == self.ndim - 1:
            return vector
        return vector.reshape(-1, *(1,) * (self.ndim - 1 - self.axis))

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (x * self.along(scale) + self.along(shift)).to(x.dtype)

    def moved(self, x: Tensor, axis: int, back: bool = False) -> Tensor:
        """The channels moved to `axis`, or from there back."""
        ends = (axis, self.axis) if back else (self.axis, axis)
        return x if axis % self.ndim == self.axis else x.movedim(*ends)


class BatchNorm(NewNorm):
    """Batch norm over all axes but that of the channels; running statistics in eval mode."""

    OPTIONS: ClassVar[dict[str, Any]] = {"momentum": 0.1}
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, old: Old, momentum: float) -> None:
        super().__init__(old, momentum=momentum)
        self.register_buffer("running_mean", old.like.new_zeros(old.channels))
        self.register_buffer("running_var", old.like.new_ones(old.channels))

    def normalized(self, x: Tensor) -> Tensor:
        """With the statistics of the batch, which move the running ones."""
        y = F.batch_norm(
            self.moved(x, 1), self.running_mean, self.running_var, self.weight, self.bias, True,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.moved(y, 1, back=True)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, share: float, x: Tensor) -> Tensor:
        return self.normalized(x) if self.training else self.affine(x, *self.scale_and_shift())


class RepBN(BatchNorm):
    """`BN(x) + alpha x` with a trained number alpha (SLAB, arXiv 2405.11582)."""

    OPTIONS: ClassVar[dict[str, Any]] = {**BatchNorm.OPTIONS, "alpha": 0.0}

    def __init__(self, old: Old, momentum: float, alpha: float) -> None:
        super().__init__(old, momentum)
        self.alpha = nn.Parameter(old.like.new_full((), alpha))

    def forward(self, share: float, x: Tensor) -> Tensor:
        if self.training:
            return self.normalized(x) + (self.alpha * x).to(x.dtype)
        scale, shift = self.scale_and_shift()
        return self.affine(x, scale + self.alpha, shift)


class DyT(NewNorm):
    """`tanh(alpha x) * weight + bias` with a trained number alpha (arXiv 2503.10622)."""

    OPTIONS: ClassVar[dict[str, Any]] = {"alpha": 0.5}

    def __init__(self, old: Old, alpha: float) -> None:
        super().__init__(old)
        self.alpha = nn.Parameter(old.like.new_full((), alpha))

    def forward(self, share: float, x: Tensor) -> Tensor:
        return self.affine(torch.tanh(self.alpha * x), self.weight, self.bias).to(x.dtype)


class RMSNorm(NewNorm):
    """`x / sqrt(mean(x^2) + eps) * weight + bias` along the channels."""

    def forward(self, share: float, x: Tensor) -> Tensor:
        return self.affine(self.rms(x), self.weight, self.bias)

    def rms(self, x: Tensor, groups: int = 1) -> Tensor:
        """`x / sqrt(mean(x^2) + eps)` over the channels of each group."""
        y = self.moved(x, -1)
        if groups == 1:
            y = F.rms_norm(y, (self.channels,), None, self.eps)
        else:
            parts = y.reshape(*y.shape[:-1], groups, -1)
            y = F.rms_norm(parts, (self.channels // groups,), None, self.eps).flatten(-2)
        return self.moved(y, -1, back=True)


class PowerNorm(RMSNorm):
    """`g(x) / sqrt(phi + eps) * weight + bias` (arXiv 2003.07845), where g is an RMS norm of groups of
    channels and phi the running mean of g^2 per channel.

    While the old norm has a share the batch's own mean of g^2 is used; from then on phi is, and the
    gradient is the paper's approximation, which projects on what the statistic would have removed.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"groups": 1, "momentum": 0.1}
    phi: Tensor
    projection: Tensor
    groups: int
    momentum: float

    def __init__(self, old: Old, groups: int, momentum: float) -> None:
        super().__init__(old, groups=groups, momentum=momentum)
        self.register_buffer("phi", old.like.new_ones(old.channels))
        self.register_buffer("projection", old.like.new_zeros(old.channels))

    def forward(self, share: float, x: Tensor) -> Tensor:
        y = self.rms(x, self.groups)
        if not self.training:
            return self.affine(y, self.weight * (self.phi + self.eps).rsqrt(), self.bias)
        others = tuple(axis for axis in range(self.ndim) if axis != self.axis)
        square = y.square().mean(others)
        used = square
        if share == 0:
            used = self.phi.clone()
            y = _Projected.apply(  # type: ignore[no-untyped-call]
                y, self.along(used + self.eps), self.projection, others, self.momentum
            )
        else:
            y = y * self.along((used + self.eps).rsqrt())
        with torch.no_grad():
            self.phi.lerp_(square.detach().to(self.phi), self.momentum)
        return self.affine(y, self.weight, self.bias)


class _Projected(torch.autograd.Function):
    """`z = x / sqrt(square)` for a running statistic; the gradient of x is
    `(g - p z) / sqrt(square)`, p the running mean of what is left of `(g - p z) z` per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, square: Tensor, projection: Tensor, others: Any, momentum: float
    ) -> Tensor:
        inverse = square.rsqrt()
        z = x * inverse
        ctx.save_for_backward(z, inverse)
        ctx.projection, ctx.others, ctx.momentum = projection, others, momentum
        return z.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        z, inverse = ctx.saved_tensors
        left = gradient - ctx.momentum * ctx.projection.reshape(inverse.shape) * z
        ctx.projection.add_((left * z).mean(ctx.others).to(ctx.projection))
        return left * inverse, None, None, None, None


class GroupNorm(NewNorm):
    """Group norm: statistics of every sample over the channels of a group and all positions."""

    OPTIONS: ClassVar[dict[str, Any]] = {"groups": None}
    groups: int

    def __init__(self, old: Old, groups: int | None) -> None:
        super().__init__(old, groups=groups or math.gcd(old.channels, 32))

    def forward(self, share: float, x: Tensor) -> Tensor:
        y = F.group_norm(self.moved(x, 1), self.groups, self.weight, self.bias, self.eps)
        return self.moved(y, 1, back=True)


class EvoNorm(GroupNorm):
    """EvoNorm-S0 (arXiv 2004.02967): `x sigmoid(v x) / std(x) * weight + bias`, the biased standard
    deviation as in `GroupNorm`; a norm and its activation."""

    def __init__(self, old: Old, groups: int | None) -> None:
        super().__init__(old, groups)
        self.v = nn.Parameter(torch.ones_like(self.weight))

    def forward(self, share: float, x: Tensor) -> Tensor:
        parts = self.moved(x, 1).reshape(x.shape[0], self.groups, -1)
        var = parts.var(-1, unbiased=False).repeat_interleave(self.channels // self.groups, 1)
        inverse = (var + self.eps).rsqrt()
        inverse = inverse.reshape(x.shape[0], self.channels, *(1,) * (self.ndim - 2))
        gated = x * torch.sigmoid(self.along(self.v) * x)
        return self.affine(gated * self.moved(inverse, 1, back=True), self.weight, self.bias).to(
            x.dtype
        )


NORMS: dict[str, type[NewNorm]] = {
    "prepbn": RepBN, "batchnorm": BatchNorm, "dyt": DyT, "rmsnorm": RMSNorm,
    "powernorm": PowerNorm, "groupnorm": GroupNorm, "evonorm": EvoNorm,
}  # fmt: skip
