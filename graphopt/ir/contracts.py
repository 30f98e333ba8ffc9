"""What a rewrite promises. The pipeline checks the promise; see `graphopt.verify`."""

from __future__ import annotations

import dataclasses

METRIC = "relative error"  # in the 2-norm, the largest over outputs


@dataclasses.dataclass(frozen=True)
class Contract:
    """Base of the four promises."""

    def __str__(self) -> str:
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class Exact(Contract):
    """Bit-identical results."""


@dataclasses.dataclass(frozen=True)
class Algebraic(Contract):
    """Equal over the reals; floating-point results differ by rounding only."""


@dataclasses.dataclass(frozen=True)
class Masked(Contract):
    """Equal to the source model with the named channels masked."""


@dataclasses.dataclass(frozen=True)
class Calibrated(Contract):
    """Lossy, within `budget` of `metric` on the caller's data."""

    metric: str = METRIC
    budget: float = 0.0

    def __str__(self) -> str:
        return f"Calibrated({self.metric}, {self.budget:g})"
