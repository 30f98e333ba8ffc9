"""What a graph computes in float64 on given inputs, and how far from it other runs of it may be.

A run is right if the relative error of each output is at most FACTOR times that of the graph run op by op in
its own dtypes, plus FLOOR roundings. Where comparisons or cancellation make the outputs jump, one such run
tells little: the limit is then FACTOR times the worst of some runs in which every value is off by a few
roundings (Monte Carlo arithmetic: Parker, Pierce, Eggert, 2000). Integers and booleans count the share of
entries that differ, so they have to be equal unless rounding decides them in these runs too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphopt.ir.distance import relative_error
from graphopt.ir.graph import Graph, is_random
from graphopt.ir.interpret import Interpreter
from graphopt.ir.source import first_line

FACTOR = 16.0
FLOOR = 64.0  # roundings of the coarsest output dtype
RUNS = 8  # a tie goes the same way in all of them once in 128 times
ROUNDINGS = 2.0  # standard deviation by which values are off in such a run


class Truth:
    """The outputs of `graph` on `inputs` in float64, computed once, when they are asked for.

    A graph that draws random numbers, or has no float64 run, is compared with its run in its own dtypes;
    `reason` then says why.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.graph, self.inputs = graph, list(inputs)
        self.reason = "it draws random numbers" if self.random else ""

    @property
    def random(self) -> bool:
        return any(map(is_random, self.graph.calls))

    @cached_property
    def outputs(self) -> tuple[Any, ...]:
        if not self.random:
            try:
                return self._run(Interpreter(self.graph, lifted=True, writes=False))
            except Exception as failure:
                self.reason = first_line(failure)
        return self._run(Interpreter(self.graph, writes=False))

    @cached_property
    def _own(self) -> tuple[Any, ...]:
        """Of a run op by op in the graph's own dtypes."""
        return self._run(Interpreter(self.graph, writes=False))

    @property
    def own_error(self) -> float:
        return relative_error(self._own, self.outputs)

    @cached_property
    def _perturbed(self) -> list[tuple[Any, ...]]:
        """Of runs in which every value is off by a few roundings."""
        return [self._run(_Perturbed(self.graph, seed)) for seed in range(RUNS)]

    def judge(self, found: Sequence[Any]) -> tuple[float, float]:
        """The error of other outputs, and how large it may be: of the output that is nearest to its limit, or
        beyond it."""
        if len(found) != len(self.outputs):
            return math.inf, 0.0
        judged = [self._judge(index, one) for index, one in enumerate(found)]
        return max(judged, key=_share, default=(0.0, 0.0))

    def _judge(self, index: int, found: Any) -> tuple[float, float]:
        def error(one: Any) -> float:
            return relative_error([one], [self.outputs[index]])

        own = self._own[index]
        floating = isinstance(own, torch.Tensor) and (own.is_floating_point() or own.is_complex())
        floor = FLOOR * torch.finfo(own.dtype).eps if floating else 0.0
        away, limit = error(found), FACTOR * error(own) + floor
        if not away <= limit:
            limit = max(limit, FACTOR * max(error(one[index]) for one in self._perturbed))
        return away, limit

    @torch.no_grad()
    def _run(self, interpreter: Interpreter) -> tuple[Any, ...]:
        copies = [one.clone() if isinstance(one, torch.Tensor) else one for one in self.inputs]
        if isinstance(interpreter, _Perturbed):
            copies = [interpreter.off(one) for one in copies]
        return interpreter.run(copies)


def _share(judged: tuple[float, float]) -> float:
    """Of its limit, of an error."""
    error, limit = judged
    if not error <= limit:
        return math.inf
    return error / limit if 0 < limit < math.inf else 0.0


class _Perturbed(Interpreter):
    """Every floating value of a run is off by a few roundings, but whole numbers."""

    def __init__(self, graph: Graph, seed: int) -> None:
        super().__init__(graph, writes=False)
        self.generator = torch.Generator().manual_seed(seed)

    def off(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.off, value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        drawn = torch.randn(value.shape, generator=self.generator).to(value.device)
        factor = 1 + ROUNDINGS * torch.finfo(value.dtype).eps * drawn.double()
        found = (value.detach().double() * factor).to(value.dtype)
        return torch.where(value == value.round(), value, found)

    def state(self, name: str, rows: slice | None = None) -> torch.Tensor:
        found: torch.Tensor = self.off(super().state(name, rows))
        return found

    def call(self, node: fx.Node, env: Any) -> Any:
        return self.off(super().call(node, env))
