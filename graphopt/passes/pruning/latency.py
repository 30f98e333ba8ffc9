"""Seconds: every op is measured at some ratios, and whole graphs side by side."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.ir.channels.meters import Axes, Floats, Meter, arithmetic, is_tensor
from graphopt.ir.channels.remove import remove
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.ir.ops.base import hint
from graphopt.passes.pruning.ranking import Ranked

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.75, 0.9)  # at which ops are measured
SECONDS = 8.0  # that it takes to measure all ops, about, and two comparisons of whole models


def latency(ranked: Ranked, inputs: Sequence[Any]) -> Meter:
    """Seconds: every op, measured at some ratios, is on a curve over its FLOPs, or over the elements
    of its result where it has none."""
    groups, axes, parts = ranked.groups, Axes(ranked.groups), {}
    for node in groups.graph.calls:
        if is_tensor(node):
            node.meta["part"] = node.name
            size = float(np.prod([hint(one) for one in node.meta["val"].shape]))
            powers = Counter(axes.of(groups.trace.labels[node]).values())
            parts[node.name] = arithmetic(groups, axes, node) or (size, powers)
    meter = Meter(axes, list(parts.values()))
    gone = [ranked.gone(ranked.at(ratio)) for ratio in RATIOS]
    seconds = _measured([remove(groups, one) for one in gone], list(parts), inputs)
    lost = np.concatenate([ranked.lost(one) for one in gone])
    work = meter.parts(axes.logs(lost, range(len(axes.layers))))
    order = np.argsort(work, 0, kind="stable")
    rising = np.maximum.accumulate(np.take_along_axis(seconds, order, 0))
    meter.curves = list(zip(np.take_along_axis(work, order, 0).T, rising.T, strict=True))
    return meter


def _measured(graphs: Sequence[Graph], parts: list[str], inputs: Sequence[Any]) -> Floats:
    """Seconds of every part in every graph: medians over runs in turns. Medians do not add up: they
    are scaled to the median of the whole run."""
    runs = [_Timed(graph) for graph in graphs]
    start = time.perf_counter()
    found: list[list[list[float]]] = [[] for _ in runs]
    while len(found[0]) < 3 or (len(found[0]) < 30 and time.perf_counter() - start < SECONDS):
        for run, rows in zip(runs, found, strict=True):
            run.seconds = dict.fromkeys(parts, 0.0)
            with torch.no_grad():
                run.run(inputs)
            rows.append(list(run.seconds.values()))
    times = np.array(found)  # graphs x runs x parts
    medians = np.median(times, 1)
    scaled: Floats = medians * (np.median(times.sum(2), 1) / medians.sum(1))[:, None]
    return scaled


class _Timed(Interpreter):
    """Runs a graph, and remembers how long every part took."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, writes=False)
        self.seconds: dict[str, float] = {}

    def call(self, node: fx.Node, env: Any) -> Any:
        start = time.perf_counter()
        value = super().call(node, env)
        _synchronize(self.graph)
        if (part := node.meta.get("part")) is not None:
            self.seconds[part] += time.perf_counter() - start
        return value


def runner(graph: Graph, inputs: Sequence[Any]) -> Callable[[], None]:
    """Runs a graph as generated code; what it writes to buffers is written to copies."""
    states = {
        name: state.tensor.detach() if state.kind == "parameter" else state.tensor.clone()
        for name, state in graph.states.items()
    }
    module = fx.GraphModule(states, graph.clone().fx)

    def run() -> None:
        with torch.no_grad():
            module(*inputs)
            _synchronize(graph)

    return run


def _synchronize(graph: Graph) -> None:
    if graph.device != "cpu":
        torch.accelerator.synchronize()


def compared(source: Callable[[], None], other: Callable[[], None]) -> float:
    """The median of the time of `other` over that of `source`, one measured right after the other."""
    found: list[float] = []
    source()
    other()
    start = time.perf_counter()
    while len(found) < 7 or (len(found) < 100 and time.perf_counter() - start < SECONDS / 2):
        times = []
        for run in (source, other):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        found.append(times[1] / times[0])
    return statistics.median(found)
