"""Latencies of one model: ours, its training form and its published deploy form, by the same backend.

    python -m benchmarks.reparam.latency repvgg_a0 inductor

prints a line of JSON per condition. Run in a process of its own, which a time limit can end: compiled
code piles up in memory, and a compiler that hangs must not take the sweep with it.

torch.compile guards on the number of threads, and generates other C++ for it (serial loops for one
thread): the first calls after `set_num_threads` compile again, and warm up what is timed. Kernels
that were compiled before are found on disk.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import nn

import graphopt
from benchmarks.frozen import frozen
from benchmarks.reparam.models import forms
from benchmarks.reparam.row import Latency

BATCHES = (1, 8)
THREADS = (1, 2)
ROUNDS = 15  # at least, and on until SECONDS are spent
SECONDS = 2.0
Side = Callable[[torch.Tensor], Any]


def in_subprocess(name: str, backend: str, limit: float) -> dict[str, Latency]:
    """The latencies by condition, those measured within `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.reparam.latency", name, backend]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit, check=False)
        output = done.stdout
        if done.returncode:
            print(f"{name}: the latency process ended with {done.returncode}", flush=True)
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        print(f"{name}: out of time after {limit:.0f} s", flush=True)
    found = {}
    for line in output.decode().splitlines():
        if line.startswith("{"):
            data = json.loads(line)
            condition = data.pop("condition")
            found[condition] = Latency(**data)
    return found


def measure(name: str, backend: str) -> None:
    """Prints the latencies of a model, a line per condition."""
    both = forms(name)
    for batch in BATCHES:
        x = both.images(batch)
        torch._dynamo.reset()  # or the second batch size would be compiled as a dynamic one
        torch.set_num_threads(max(THREADS))
        sides: list[Side] = [
            optimized(both.training, x, backend),
            compiled(both.training, backend),
            compiled(both.deploy, backend),
        ]
        for threads in THREADS:
            torch.set_num_threads(threads)
            condition = f"{threads} {'thread' if threads == 1 else 'threads'}, batch {batch}"
            found = {"condition": condition}
            found |= dataclasses.asdict(latency(sides, x))
            print(json.dumps(found), flush=True)


@torch.no_grad()
def optimized(model: nn.Module, x: torch.Tensor, backend: str) -> Side:
    """Ours, without the validation that would take most of the time, and that `row.measure` has done."""
    fast = graphopt.optimize(model, (x,), backend=backend, validate=False)
    assert fast.report.check is not None
    if fast.report.backend != backend or not fast.report.check.ok:
        raise RuntimeError(f"not what was to be timed:\n{fast.report}")
    return fast


def compiled(model: nn.Module, backend: str) -> Side:
    if backend == "eager":
        return model
    return frozen(model)


@torch.no_grad()
def latency(sides: list[Side], x: torch.Tensor) -> Latency:
    """Of ours, the training and the deploy form, run in turns, each as often first as the others."""
    for side in sides:
        for _ in range(3):
            side(x)
    rounds: list[list[float]] = []
    until = time.perf_counter() + SECONDS
    while len(rounds) < ROUNDS or time.perf_counter() < until:
        times = [0.0] * len(sides)
        for step in range(len(sides)):
            turn = (len(rounds) + step) % len(sides)
            start = time.perf_counter()
            sides[turn](x)
            times[turn] = 1e3 * (time.perf_counter() - start)
        rounds.append(times)
    ours, training, deploy = zip(*rounds, strict=True)
    return Latency(
        statistics.median(ours), statistics.median(training), statistics.median(deploy),
        to_training=statistics.median(a / b for a, b in zip(ours, training, strict=True)),
        to_deploy=statistics.median(a / b for a, b in zip(ours, deploy, strict=True)),
    )  # fmt: skip


def main(name: str, backend: str) -> None:
    warnings.simplefilter("ignore")
    measure(name, backend)


if __name__ == "__main__":
    typer.run(main)
