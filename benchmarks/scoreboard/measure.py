"""One row in a process of its own: every side built, checked, and timed in turns.

    python -m benchmarks.scoreboard.measure "ResNet-18" 1 1    # batch 1, one thread

Prints lines of JSON: a side as soon as it is built, then the times of all. Compiled code piles up in memory,
and a compiler that hangs must not take the other rows with it.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
import typer
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from benchmarks.scoreboard import models, sides
from graphopt.backends.measure import settle
from graphopt.fleet.trials import OutOfTime, at_most
from graphopt.ir.distance import relative_error

ROUNDS = 5  # at least
SIZE = 1536  # of the matrices that tell the machine's peak


def peak_memory(reset: bool = False) -> float:
    """The largest resident size since the last reset, in MB; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_rate() -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2e-9 * SIZE**3 / min(times)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


@torch.no_grad()
def measure(
    row: str, batch: int, threads: int, only: list[str], limit: float, seconds: float
) -> None:
    torch.set_num_threads(threads)
    model, make = models.build(row)
    args, _ = make(batch)
    truth = pytree.tree_leaves(copy.deepcopy(model).double()(*map(_double, args)))
    with FlopCounterMode(display=False) as counter:
        model(*args)
    say(gflop=1e-9 * counter.get_total_flops(), peak=peak_rate())
    built: dict[str, sides.Run] = {}
    for name in only or sides.SIDES:
        before = peak_memory(reset=True)
        start = time.perf_counter()
        try:
            with at_most(limit):
                run = sides.SIDES[name](model, args)
                found = [one.clone() for one in pytree.tree_leaves(run(*args))]
        except (Exception, OutOfTime) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            say(side=name, failed=why)
            continue
        built[name] = run
        about: dict[str, Any] = {}
        if isinstance(run, graphopt.OptimizedModule):
            assert run.report.after is not None
            about = {"chosen": run.report.backend, "gflop": 1e-9 * run.report.after.flops,
                     "notes": run.report.backend_notes}  # fmt: skip
        say(side=name, error=relative_error(found, truth), build=time.perf_counter() - start,
            memory=peak_memory() - before, **about)  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in built}
    for run in built.values():
        run(*args)
    order = list(built)
    until = time.perf_counter() + seconds
    while len(times[order[0]]) < ROUNDS or time.perf_counter() < until:
        for name in order:
            settle(lambda name=name: built[name](*args))  # type: ignore[misc]
            start = time.perf_counter()
            built[name](*args)
            times[name].append(1e3 * (time.perf_counter() - start))
        order.append(order.pop(0))
    base = times[next(iter(built))]
    for name, one in times.items():
        say(side=name, ms=statistics.median(one), rounds=len(one),
            speedup=statistics.median(a / b for a, b in zip(base, one, strict=True)))  # fmt: skip


def _double(one: Any) -> Any:
    return one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one


def main(
    row: str, batch: int, threads: int, side: list[str] | None = None, limit: float = 400,
    seconds: float = 20,
) -> None:  # fmt: skip
    measure(row, batch, threads, side or [], limit, seconds)
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
