"""Scales and zero points: which real numbers the integers stand for.

    activations   x ~ (q - z) s,      q = clamp(round(x / s) + z, 0, 255),        one s, z a tensor
    weights       w ~ q s[channel],   q = clamp(round(w / s), -127, 127),         one s an output channel

The range of an activation holds zero, which is then an integer: zeros of padding and of ReLU stay zeros.
Ranges are those that were seen, or smaller ones where clipping costs less than it wins in resolution: the
candidate of the least mean square error is taken (Choukroun et al., 2019; Nagel et al., 2021, section 3.1).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

LEVELS = 255
BOUND = 127  # of a weight's code: symmetric, -128 is not used
SHARES = tuple(1 - 0.05 * step for step in range(15))  # of a range, tried in this order


@dataclasses.dataclass(frozen=True)
class Affine:
    """`(q - zero) scale` for q in 0 ... 255; the scale is a float32 number."""

    scale: float
    zero: int

    def codes(self, values: Tensor) -> Tensor:
        """In the dtype of `values`."""
        return (torch.round(values * (1.0 / self.scale)) + self.zero).clamp(0, LEVELS)

    def rounded(self, values: Tensor) -> Tensor:
        return (self.codes(values) - self.zero) * self.scale


def affine(low: float, high: float) -> Affine:
    """The integers for numbers from `low` to `high`, and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / LEVELS, dtype=torch.float32))
    if not scale > torch.finfo(torch.float32).tiny * LEVELS:
        return Affine(1.0, 0)  # nothing but zeros
    return Affine(scale, min(max(round(-low / scale), 0), LEVELS))


def fitted(values: Tensor, low: float, high: float) -> Affine:
    """The integers of the least mean square error on `values`, a sample of what lies in [low, high]."""
    whole = ends = (min(low, 0.0), max(high, 0.0))
    best = affine(*ends)
    least = _error(best, values)
    for side in (0, 1, 0):
        chosen = ends
        for share in SHARES[1:]:
            tried = (share * whole[0], ends[1]) if side == 0 else (ends[0], share * whole[1])
            if (error := _error(affine(*tried), values)) < least:
                best, least, chosen = affine(*tried), error, tried
        ends = chosen
    return best


def _error(tried: Affine, values: Tensor) -> float:
    return float((tried.rounded(values) - values).square().mean())


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of a float64 weight `[O, ...]` and the float32 scale `[O]` of the least square error of
    each output channel. Channels of zeros have the scale 1."""
    rows = weight.flatten(1)
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    best, least = _weight_scale(largest), rows.new_full((len(rows),), float("inf"))
    for share in SHARES:
        scale = _weight_scale(share * largest)
        error = (_weight_codes(rows, scale) * scale[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    codes = _weight_codes(rows, best).to(torch.int8).reshape(weight.shape)
    return codes.contiguous(), best.float()


def _weight_scale(largest: Tensor) -> Tensor:
    """Rounded to float32, as it is stored."""
    scale = (largest / BOUND).float().double()
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)


def _weight_codes(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.round(rows / scale[:, None]).clamp(-BOUND, BOUND)
