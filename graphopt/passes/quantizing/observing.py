"""What a graph computes on the caller's data, as far as integers are chosen by it.

Two runs over all batches: the first sees the ranges of values, the second what rounding does to each map by
itself, given the float32 values of all others: the mean of its error, for every output channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.passes.precision.measured import Watching, copies
from graphopt.passes.quantizing.scales import Affine, fitted

SAMPLE = 1 << 17  # values of one tensor that its integers are fitted to, besides the extremes


@dataclasses.dataclass
class Noise:
    """What rounding does to one map: sums over batches."""

    channel: int  # the axis of output channels
    rows: int = 0
    first: Tensor | None = None  # of the error, for every channel
    second: Tensor | None = None  # of its square

    def add(self, found: Tensor, truth: Tensor) -> None:
        away = (found - truth).double().movedim(self.channel, -1)
        away = away.reshape(-1, away.shape[-1])
        self.rows += len(away)
        first, second = away.sum(0), away.square().sum(0)
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second

    def mean(self) -> Tensor:
        """The mean error m of every channel, as far as it is known: m max(0, 1 - (m's variance) / m^2).

        The positive part of James and Stein: a mean that few rows tell is not one to correct.
        """
        assert self.first is not None and self.second is not None
        mean = self.first / max(self.rows, 1)
        if self.rows < 2:
            return torch.zeros_like(mean)
        spread = (self.second / self.rows - mean.square()).clamp(min=0) / (self.rows - 1)
        return mean * (1 - spread / mean.square().clamp(min=1e-300)).clamp(min=0)


def ranges(
    graph: Graph, values: Collection[fx.Node], data: Sequence[Sequence[Any]]
) -> dict[fx.Node, Affine]:
    """The integers for each of `values`; those that are not finite are left out."""
    seen = _Ranges(graph, set(values), max(1, SAMPLE // max(1, len(data))))
    for inputs in data:
        seen.run(inputs)
    found = {}
    for node, ends in seen.ends.items():
        if bool(ends.isfinite().all()):
            low, high = ends.tolist()
            found[node] = fitted(torch.cat(seen.samples[node]), low, high)
    return found


class _Ranges(Watching):
    def __init__(self, graph: Graph, values: set[fx.Node], size: int) -> None:
        super().__init__(graph)
        self.values, self.size = values, size
        self.ends: dict[fx.Node, Tensor] = {}
        self.samples: dict[fx.Node, list[Tensor]] = {}

    def see(self, node: fx.Node, value: Tensor) -> None:
        if node not in self.values or not value.numel():
            return
        flat = value.detach().flatten()
        ends = torch.stack(flat.aminmax())
        before = self.ends.get(node, ends)
        self.ends[node] = torch.stack(torch.cat([ends, before]).aminmax())  # NaN, if one is
        # An odd step does not keep to one column of a matrix.
        step = max(1, -(-flat.numel() // self.size) | 1)
        self.samples.setdefault(node, []).extend((flat[::step].clone(), ends))


@torch.no_grad()
def noise(
    graph: Graph, maps: Mapping[fx.Node, tuple[fx.Node, Affine, fx.Node, Tensor, int]],
    data: Sequence[Sequence[Any]],
) -> dict[fx.Node, Noise]:  # fmt: skip
    """What rounding does to each of `maps`: its input and the integers for it, its weight and what is left
    of that, and the axis of its output channels."""
    seen = _Noise(graph, maps)
    for inputs in data:
        seen.run(copies(inputs))
    return seen.found


class _Noise(Interpreter):
    def __init__(
        self, graph: Graph, maps: Mapping[fx.Node, tuple[fx.Node, Affine, fx.Node, Tensor, int]]
    ) -> None:
        super().__init__(graph, writes=False)
        self.maps = maps
        self.found = {node: Noise(axis) for node, (*_, axis) in maps.items()}

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        if node in self.maps:
            source, by, weight, left, _ = self.maps[node]
            instead = {source: by.rounded(env[source]), weight: left}
            given = {one: instead.get(one, env[one]) for one in node.all_input_nodes}
            self.found[node].add(super().call(node, given), value)
        return value
