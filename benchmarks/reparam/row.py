"""A row of the table: what became of one model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks.reparam.models import Forms
from graphopt.ir.distance import relative_error

# The published form with its ops reduced to what they compute, and none on parameters alone.
AS_PUBLISHED = "canonicalize,materialize,canonicalize"


@dataclasses.dataclass
class Latency:
    """Median milliseconds per call, and medians of the ratios of calls made in turn."""

    ours: float
    training: float
    deploy: float
    to_training: float
    to_deploy: float


@dataclasses.dataclass
class Row:
    """Calls in the graph of the training form, of ours and of the published deploy form; rewrites of
    ours that failed their check; its error in float64; latencies by threads and batch size."""

    model: str
    before: int
    after: int
    published: int
    rolled_back: int
    error: float
    latency: dict[str, Latency] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        latency = {key: Latency(**one) for key, one in data["latency"].items()}
        return cls(**{**data, "latency": latency})

    @property
    def ops(self) -> tuple[int, int, int]:
        return self.before, self.after, self.published

    @property
    def right(self) -> bool:
        """Whether ours is as small and as exact as it should be."""
        return self.after <= self.published and self.error <= 1e-10 and not self.rolled_back


def count(model: nn.Module, x: torch.Tensor, passes: str) -> int:
    report = graphopt.optimize(model, (x,), passes=passes, validate=False).report
    assert report.after is not None
    return report.after.nodes


def measure(name: str, forms: Forms) -> Row:
    """The row of a model, without latencies."""
    x = forms.images(2)
    report = graphopt.optimize(forms.training, (x,)).report
    assert report.after is not None
    double = copy.deepcopy(forms.training).double()
    exact = graphopt.optimize(double, (x.double(),))
    with torch.no_grad():
        error = relative_error(exact(x.double()), double(x.double()))
    return Row(
        name, count(forms.training, x, "canonicalize"), report.after.nodes,
        count(forms.deploy, x, AS_PUBLISHED), len(report.rolled_back), error,
    )  # fmt: skip
