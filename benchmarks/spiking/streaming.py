"""One step at a time, with the potentials kept: equal to all steps at once, and what a step costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import graphopt
from benchmarks.digits import Digits
from benchmarks.spiking import zoo
from benchmarks.spiking.train import encode
from graphopt.streaming import streaming

NETS = ("MPBN VGG, rate", "MPBN VGG by steps, soft reset", "SpikingJelly LIF", "snnTorch Leaky")


def planned(data: Digits, passes: str | None) -> Iterator[tuple[str, Any]]:
    """A row for every net."""
    for name in NETS:
        yield name, lambda name=name: measure(name, data, passes)


@torch.no_grad()
def measure(name: str, data: Digits, passes: str | None, steps: int = 8) -> dict[str, Any]:
    """Milliseconds of a step of one sample, and the largest difference of the mean of all steps from
    what the net, optimized as a whole, makes of them."""
    model = zoo.NETS[name].make(steps=steps).eval()
    x = encode(data.test_x[:4], "rate", steps, torch.Generator().manual_seed(0))
    fast = graphopt.optimize(model, (x,), passes=passes)
    row: dict[str, Any] = {"steps": steps, "difference": None, "step ms": None, "whole ms": None}
    try:
        live: Any = streaming(fast)
        mean = torch.stack([live(x[:, step]) for step in range(steps)]).mean(0)
        row["difference"] = float((mean - fast(x)).abs().max())
        live.reset()
        row["step ms"] = round(_median(lambda: live(x[:1, 0])), 3)
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {str(error)[:160]}"
        return row
    row["whole ms"] = round(_median(lambda: fast(x[:1])), 3)
    row["note"] = ""
    return row


def _median(run: Any) -> float:
    """Milliseconds."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
