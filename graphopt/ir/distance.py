"""How far outputs are from others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.interpret import lift


def relative_error(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """The largest relative 2-norm error over paired outputs; inf where shapes differ."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            worst = max(worst, 0.0 if a is b or a == b else math.inf)
            continue
        if a.shape != b.shape:
            return math.inf
        if not (b.is_floating_point() or b.is_complex()):
            worst = max(worst, float((a != b).double().mean()) if b.numel() else 0.0)
            continue
        a, b = lift(a), lift(b)
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, a - b)
        if not bool(difference.isfinite().all()):
            return math.inf
        scale = float(torch.where(b.isfinite(), b, 0.0).norm())
        norm = float(difference.norm())
        worst = max(worst, norm / scale if scale > 0 else (0.0 if norm == 0 else math.inf))
    return worst
