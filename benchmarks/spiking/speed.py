"""Time for a sample: the source as it is, compiled, and optimized, in turn; medians of all rounds.

Kernels are the functions that Inductor generates, calls those of the framework's in the generated code, both
for a step of the net.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.frozen import frozen

OUTER = re.compile(
    r"= (?:extern_kernels|torch\.ops\.(?:aten|mkldnn|mkl)\.|aten)[._]|^\s+extern_kernels\.",
    re.MULTILINE,
)
KERNEL = re.compile(r"^\s+(?:cpp_fused_\w*\(|triton_\w*\.run\()", re.MULTILINE)
WAYS = ("eager", "compiled", "frozen", "ours eager", "ours prepacked", "ours inductor")
FEW = tuple(one for one in WAYS if one != "frozen")


@dataclasses.dataclass
class Speed:
    """Milliseconds for a sample, by way; seconds until the first result."""

    net: str
    steps: int
    batch: int
    device: str = "cpu"
    threads: int = 1
    ms: dict[str, float] = dataclasses.field(default_factory=dict)
    ready: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: dict[str, float] = dataclasses.field(default_factory=dict)
    same: dict[str, float] = dataclasses.field(default_factory=dict)  # percent of the predictions
    optimizing: str = ""
    error: str = ""

    def ratio(self, slow: str = "compiled", fast: str = "ours inductor") -> float | None:
        if slow not in self.ms or fast not in self.ms:
            return None
        return self.ms[slow] / self.ms[fast]


def measure(
    net: str, model: nn.Module, x: Tensor, steps: int, seconds: float = 8.0,
    ways: tuple[str, ...] = WAYS, passes: str | None = None,
) -> Speed:  # fmt: skip
    """One row; `x` is the batch."""
    from torch._inductor.utils import run_and_get_code

    row = Speed(net, steps, len(x), x.device.type, torch.get_num_threads())
    run: dict[str, Callable[[Tensor], Any]] = {}
    expected: Tensor | None = None
    with torch.no_grad():
        for way in ways:
            start = time.perf_counter()
            try:
                one, codes = run_and_get_code(lambda way=way: _made(way, model, x, passes))
                found = one(x)
            except Exception as error:
                row.error += f"{way}: {type(error).__name__}: {str(error)[:120]} "
                continue
            row.ready[way] = time.perf_counter() - start
            if codes:
                body = codes[-1].partition("def call(")[2]
                row.kernels[way] = len(KERNEL.findall(body)) / steps
                row.calls[way] = len(OUTER.findall(body)) / steps
            expected = found if expected is None else expected
            row.same[way] = 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())
            if isinstance(one, graphopt.OptimizedModule):
                spent = sum(seconds for _, seconds in one.report.passes)
                row.optimizing = (
                    f"capture {one.report.capture.seconds:.1f}, passes {spent:.1f}, checks "
                    f"{one.report.validation_seconds:.1f}"
                )
            run[way] = one
        row.ms = in_turn(run, x, seconds)
    return row


def _made(way: str, model: nn.Module, x: Tensor, passes: str | None) -> Callable[[Tensor], Any]:
    """What runs, after its first call."""
    if way.startswith("ours"):
        backend = way.removeprefix("ours ")
        one: Any = graphopt.optimize(model, (x,), backend=backend, passes=passes)
    elif way == "eager":
        one = model
    else:
        one = (frozen if way == "frozen" else torch.compile)(copy.deepcopy(model))
    one(x)
    return one  # type: ignore[no-any-return]


def in_turn(run: dict[str, Callable[[Tensor], Any]], x: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds for a sample, the medians of rounds in which each runs once."""
    found: dict[str, list[float]] = {way: [] for way in run}
    start = time.perf_counter()
    while len(next(iter(found.values()))) < 7 or time.perf_counter() - start < seconds:
        for way, one in run.items():
            begin = time.perf_counter()
            one(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            found[way].append(1e3 * (time.perf_counter() - begin) / len(x))
    return {way: statistics.median(times) for way, times in found.items()}
