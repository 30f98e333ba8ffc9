"""Latencies of one model: ours, its training form and its published deploy form, by the same backend.

    python -m benchmarks.reparam.latency repvgg_a0 inductor

prints a line of JSON per condition. Run in a process of its own, which a time limit can end: compiled
code piles up in memory, and a compiler that hangs must not take the sweep with it.

torch.compile bakes the number of threads into the C++ it generates (`omp parallel num_threads(2)`)
and guards on it: the first call after `set_num_threads` compiles again. So every condition is warmed
up by itself, and nothing that was compiled for two threads is timed on one.
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
            found[data.pop("condition")] = Latency(**data)
    return found


def measure(name: str, backend: str) -> None:
    """Prints the latencies of a model, a line per condition."""
    both = forms(name)
    for batch in BATCHES:
        x = both.images(batch)
        torch._dynamo.reset()  # or the second batch size would be compiled as a dynamic one
        torch.set_num_threads(max(THREADS))
        with torch.no_grad():
            ours = graphopt.optimize(both.training, (x,), backend=backend)
        sides: list[Side] = [ours, compiled(both.training, backend), compiled(both.deploy, backend)]
        for threads in THREADS:
            torch.set_num_threads(threads)
            found = {"condition": f"{threads} threads, batch {batch}"}
            found |= dataclasses.asdict(latency(sides, x))
            print(json.dumps(found), flush=True)


def compiled(model: nn.Module, backend: str) -> Side:
    if backend == "eager":
        return model
    return torch.compile(model, options={"freezing": True})  # type: ignore[no-any-return]


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
    ours, training, deploy = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Latency(
        ours, training, deploy,
        to_training=statistics.median(ours / training for ours, training, _ in rounds),
        to_deploy=statistics.median(ours / deploy for ours, _, deploy in rounds),
    )  # fmt: skip


def main(name: str, backend: str = "inductor") -> None:
    warnings.simplefilter("ignore")
    measure(name, backend)


if __name__ == "__main__":
    typer.run(main)
