"""What becomes known of one model, in memory and in JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

UNIT_ROUNDOFF = 2.0**-24  # no source is credited with a smaller float32 error than this


@dataclasses.dataclass
class Row:
    """What is known of one model. `verdict`: right, wrong, unexplained or failed.

    Errors are relative in the 2-norm, the largest over the outputs; nan where not measured.
    `batch`: "yes", or why the optimized model does not take batch size 3 (or the source cannot).
    """

    name: str
    verdict: str = "failed"
    reason: str = ""
    inputs: str = ""
    parameters: int = 0
    capture: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    batch: str = ""
    float64_error: float = math.nan
    float64_error_batch: float = math.nan
    source_error: float = math.nan
    error: float = math.nan
    source_error_batch: float = math.nan
    error_batch: float = math.nan
    norms_before: int = 0
    norms_after: int = 0
    norms_unexplained: list[str] = dataclasses.field(default_factory=list)
    norms_reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    applied: int = 0
    refused: int = 0
    rolled_back: list[str] = dataclasses.field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    capture_seconds: float = math.nan
    passes_seconds: float = math.nan
    validation_seconds: float = math.nan
    seconds: float = math.nan

    @property
    def ratio(self) -> float:
        return self.error / max(self.source_error, UNIT_ROUNDOFF)

    @property
    def ratio_batch(self) -> float:
        return self.error_batch / max(self.source_error_batch, UNIT_ROUNDOFF)


def plain(row: Row) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(row).items()
    }


def read(lines: Iterable[str]) -> dict[str, Row]:
    rows = {}
    for line in lines:
        data = json.loads(line)
        row = Row(**{key: math.nan if value is None else value for key, value in data.items()})
        rows[row.name] = row
    return rows
