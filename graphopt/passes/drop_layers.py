"""Whole layers removed: depth instead of width.

    v = u + f(u)  ->  v = u     for the blocks of residual streams that matter least

What a block is, and which may go, is found by `graphopt.ir.blocks`. Which go is decided by how little
the stream turns across them (`similarity`: The Unreasonable Ineffectiveness of the Deeper Layers, arXiv
2403.17887) or by how little the outputs change without them (`ablation`: SLEB, arXiv 2402.09025). The
contract is `Masked`: the result is checked in float64 against the source in which v is replaced by u, or,
under a `max_error`, `Calibrated` beside.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from torch import fx

from graphopt.ir.blocks import Block, Step, Stream, find_streams
from graphopt.ir.contracts import Calibrated, Contract, Masked
from graphopt.ir.driver import Record, Session, Validator, Verdict
from graphopt.ir.graph import Graph
from graphopt.passes.base import Pass, PassError
from graphopt.passes.pruning.depth import (
    Measures,
    feature_axis,
    without,
)
from graphopt.passes.pruning.evidence import EvidenceError, Loss
from graphopt.passes.pruning.ranking import protected

RATIO = 0.25  # where nothing else is said
UNITS = ("block", "step")
IMPORTANCE = ("similarity", "ablation", "random")


class Bypasses(Protocol):
    """A validator that knows what a model computes where values take the place of others."""

    def check_bypassed(
        self, source: Graph, instead: Mapping[fx.Node, fx.Node], result: Graph
    ) -> Verdict: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A block that may go: its stream, its place there, and its depth from the end of the model, 0 for
    the last candidate and 1 for the first."""

    block: Block
    stream: Stream
    place: int
    depth: float


Run = tuple[Candidate, ...]  # what goes at once
Scores = Callable[[Run, Sequence[Run]], list[float]]  # of more that may go, by what has gone


@dataclasses.dataclass(frozen=True)
class DropLayers(Pass):
    """The least important layers of residual streams are removed, as many as asked for."""

    name = "drop-layers"
    ratio: float | None = None  # of the blocks that may go; 0.25, or all that `max_error` allows
    count: int | None = None  # instead of a ratio
    unit: str = "block"  # what repeats along a stream; or step: attention and MLP on their own
    importance: str = "similarity"  # one of `IMPORTANCE`
    # Whether what goes is one run of consecutive blocks, and not one block at a time, each measured with
    # those before it gone; None: where that is the method's own way, for similarity.
    contiguous: bool | None = None
    position: float = 0.0  # p: late blocks go rather than early ones, scores + p depth |scores|
    max_error: float | None = None  # of the outputs on the data, relative; or increase of the loss
    protect: str | Sequence[str] = ""  # patterns of parameters whose blocks stay, "head.*;h.0.*"
    seed: int = 0
    # Batches (inputs, target), and loss(output, target), a scalar; targets are for the loss alone:
    data: Sequence[tuple[Any, Any]] = dataclasses.field(default=(), repr=False)
    loss: Loss | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise PassError(f"drop-layers: ratio is {self.ratio}, expected 0 <= ratio <= 1")
        if self.count is not None and self.count < 1:
            raise PassError(f"drop-layers: count is {self.count}, expected at least 1")
        if self.ratio is not None and self.count is not None:
            raise PassError("drop-layers: ratio and count are given, expected one of them")
        for what, known in (("unit", UNITS), ("importance", IMPORTANCE)):
            found = getattr(self, what)
            if found not in known:
                raise PassError(
                    f"drop-layers: {what} is {found!r}, expected one of {', '.join(known)}"
                )
        if not self.position >= 0:
            raise PassError(f"drop-layers: position is {self.position}, expected at least 0")
        if self.max_error is not None and not self.max_error >= 0:
            raise PassError(f"drop-layers: max_error is {self.max_error}, expected at least 0")
        if not isinstance(self.protect, str):  # as it is written in a pipeline
            object.__setattr__(self, "protect", ";".join(self.protect))

    def run(self, session: Session) -> None:
        try:
            self._run(session)
        except EvidenceError as error:
            raise PassError(f"drop-layers: {error}") from error

    def _run(self, session: Session) -> None:
        source = session.graph
        measures = Measures(source, self.data, self.loss)
        if self.importance != "random" or self.max_error is not None:
            next(measures.batches(self.importance if self.max_error is None else "max_error"))
        candidates = self._candidates(session)
        number = self._number(len(candidates))
        if not candidates:
            self._refuse(session, source.output, "there is no block that may go")
        elif not number:
            asked = RATIO if self.ratio is None else self.ratio
            reason = f"ratio={asked} of {len(candidates)} blocks is less than one"
            self._refuse(session, source.output, reason)
        if not number:
            return
        gone, error = self._chosen(candidates, number, measures)
        if not gone:
            self._refuse(
                session, source.output, f"the first block exceeds max_error={self.max_error}"
            )
            return
        result = without(source, _steps(gone)).graph
        contract: Contract = (
            Masked() if self.max_error is None else Calibrated(measures.metric, self.max_error)
        )
        instead = {step.end: step.start for step in _steps(gone)}

        def check(by: Validator) -> Verdict:
            verdict = cast(Bypasses, by).check_bypassed(source, instead, result)
            if self.max_error is None or not verdict.ok:
                return verdict
            return Verdict(True, error, self.max_error)

        session.become("drop-layers", contract, result, check, f"left out: {names(source, gone)}")

    def _refuse(self, session: Session, node: fx.Node, reason: str) -> None:
        contract = "Masked" if self.max_error is None else "Calibrated"
        session.refused["drop-layers", node] = Record(
            "drop-layers", session.graph.where(node), contract, reason, node=node.name
        )

    # -- which may go -----------------------------------------------------------------------------

    def _candidates(self, session: Session) -> list[Candidate]:
        """The blocks that may go, in graph order; of the steps that may not, reasons are recorded."""
        source, found = session.graph, []
        kept = protected(source, str(self.protect), "drop-layers")
        for stream in find_streams(source):
            for step in stream.steps:
                if step.reason:
                    self._refuse(session, step.sum, step.reason)
            for place, block in enumerate(stream.blocks(1 if self.unit == "step" else None)):
                if not block.reason and not kept & block.parameters:
                    found.append(Candidate(block, stream, place, 0.0))
        found.sort(key=lambda one: one.block.steps[0].sum)
        last = max(len(found) - 1, 1)
        return [
            dataclasses.replace(one, depth=1 - number / last) for number, one in enumerate(found)
        ]

    def _number(self, able: int) -> int:
        if self.count is not None:
            if self.count > able and able and self.max_error is None:
                raise PassError(
                    f"drop-layers: count is {self.count}, expected at most {able}: no more may go"
                )
            return min(self.count, able)
        if self.ratio is None and self.max_error is not None:
            return able
        return int((RATIO if self.ratio is None else self.ratio) * able + 1e-9)

    # -- which go ---------------------------------------------------------------------------------

    def _chosen(
        self, candidates: Sequence[Candidate], number: int, measures: Measures
    ) -> tuple[Run, float]:
        """What goes, and its error if there is a limit to it."""
        scores = self._scores(candidates, measures)
        whole = self.contiguous if self.contiguous is not None else self.importance == "similarity"
        if whole:
            return self._in_one(candidates, number, measures, scores)
        return self._one_by_one(candidates, number, measures, scores)

    def _in_one(
        self, candidates: Sequence[Candidate], number: int, measures: Measures, scores: Scores
    ) -> tuple[Run, float]:
        """The best run of so many, or, under a limit, of the most that keep to it."""
        for size in [number] if self.max_error is None else range(number, 0, -1):
            if runs := list(_runs(candidates, size)):
                best = self._best(runs, scores((), runs))
                error = self._error(measures, best)
                if error <= self._limit:
                    return best, error
        if self.max_error is None:
            raise PassError(
                f"drop-layers: no stream has {number} consecutive blocks that may go; "
                "contiguous=false takes them one by one"
            )
        return (), 0.0

    def _one_by_one(
        self, candidates: Sequence[Candidate], number: int, measures: Measures, scores: Scores
    ) -> tuple[Run, float]:
        gone: Run = ()
        error = 0.0
        while len(gone) < number:
            shorter = without(measures.source, _steps(gone))
            runs = [(one,) for one in candidates if one not in gone and shorter.has(one.block)]
            if not runs:
                break
            more = gone + self._best(runs, scores(gone, runs))
            found = self._error(measures, more)
            if found > self._limit:
                break
            gone, error = more, found
        return gone, error

    @property
    def _limit(self) -> float:
        return math.inf if self.max_error is None else self.max_error

    def _error(self, measures: Measures, gone: Run) -> float:
        if self.max_error is None:
            return 0.0
        return measures.error(without(measures.source, _steps(gone)).graph)

    def _best(self, runs: Sequence[Run], scores: Sequence[float]) -> Run:
        """The run with the lowest score, where late ones count less and are first among equals."""

        def key(number: int) -> tuple[float, float]:
            depth = self.position * float(np.mean([one.depth for one in runs[number]]))
            return scores[number] + depth * abs(scores[number]), depth

        return runs[min(range(len(runs)), key=key)]

    def _scores(self, candidates: Sequence[Candidate], measures: Measures) -> Scores:
        source = measures.source
        if self.importance == "random":
            drawn = np.random.default_rng(self.seed).random(len(candidates)).tolist()
            by = dict(zip(candidates, drawn, strict=True))
            return lambda gone, runs: [float(np.mean([by[one] for one in run])) for run in runs]
        if self.importance == "ablation":
            return lambda gone, runs: [
                measures.error(without(source, _steps(gone + run)).graph) for run in runs
            ]
        axes = {one: feature_axis(source, one.block) for one in candidates}

        def similarity(gone: Run, runs: Sequence[Run]) -> list[float]:
            now = without(source, _steps(gone))
            pairs = [(now.value(run[0].block.start), now.value(run[-1].block.end)) for run in runs]
            return measures.distances(now.graph, pairs, [axes[run[0]] for run in runs])

        return similarity


def _runs(candidates: Sequence[Candidate], size: int) -> Iterable[Run]:
    """So many consecutive blocks of one stream."""
    for stream in dict.fromkeys(one.stream for one in candidates):
        members = [one for one in candidates if one.stream is stream]
        for first in range(len(members) - size + 1):
            run = tuple(members[first : first + size])
            if run[-1].place - run[0].place == size - 1:
                yield run


def _steps(gone: Run) -> list[Step]:
    return [step for one in gone for step in one.block.steps]


def names(graph: Graph, gone: Run) -> str:
    """Where blocks are in the source model: what the places of their sums have in common."""
    found = []
    for one in sorted(gone, key=lambda one: one.block.steps[0].sum):
        places = [graph.where(step.sum).split(".") for step in one.block.steps]
        common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*places, strict=False))
        where = ".".join(parts[0] for parts in common)
        sums = "+".join(step.sum.name for step in one.block.steps)
        found.append(f"{where} ({sums})" if where else sums)
    return ", ".join(found)
