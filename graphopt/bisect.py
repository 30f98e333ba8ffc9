"""Bisection: which one application of a rewrite breaks a model.

Applications are numbered in the order of their commits, and `bisect_limit=n` applies the first n.
A model that is good at 0 and bad at all of them turns bad at one, which halving finds in
ceil(log2(n)) + 2 optimizations, those at 0 and at all of them included.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.ir.capture import Captured, capture
from graphopt.ir.contracts import Contract
from graphopt.ir.driver import Pair, Record, Verdict
from graphopt.ir.graph import Graph
from graphopt.ir.source import CaptureError
from graphopt.module import OptimizedModule
from graphopt.optimize import Options, Progress, optimize_as, pipeline_of
from graphopt.pipeline import Pipeline
from graphopt.report import Report
from graphopt.reproducer import Reproducer, Site, reproduce, take_site
from graphopt.verify import SiteValidator
from graphopt.verify.compare import verify
from graphopt.verify.side import Side, find_inputs

Predicate = Callable[[OptimizedModule], bool]


class BisectError(ValueError):
    """Nothing to bisect: the model is bad before any rewrite."""


@dataclasses.dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    `record` is the application that breaks the model, None if all `applications` are good;
    `before` and `after` are its site, as the printer writes graphs; `optimizations` is how many
    times the model was optimized.
    """

    record: Record | None
    applications: int
    optimizations: int
    before: str = ""
    after: str = ""
    reproducer: str = ""
    tensors: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the reproducer, and beside it the tensors that it reads, if any."""
        Reproducer(self.reproducer, dict(self.tensors)).save(Path(path))

    def __str__(self) -> str:
        if self.record is None:
            return (
                f"good: all {self.applications} applications together keep what the model computes"
            )
        one = self.record
        lines = [
            f"application {one.index} of {self.applications} breaks the model "
            f"(found in {self.optimizations} optimizations)",
            f"  rewrite    {one.rewrite} ({one.contract}), pass {one.stage}",
            f"  where      {one.where or one.node}",
        ]
        if not math.isnan(one.error):
            lines.append(f"  error      {one.error:.1e}, bound {one.bound:.1e} (float64, absolute)")
        for title, text in (("before", self.before), ("after", self.after)):
            lines += [f"  {title}", *(f"    {line}" for line in text.splitlines())]
        return "\n".join(lines)


def bisect(
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str = "deploy",
    passes: str | Pipeline | Iterable[Any] | None = None,
    predicate: Predicate | None = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Bisection:
    """Find the application that breaks `model`; nothing is rolled back on the way.

    Args:
        model, args, kwargs, mode, passes, dynamic_shapes, progress: as for `optimize`.
        predicate: whether an optimized module is good. By default, its graph must compute in
            float64 what the captured one does, before weights are rounded to their dtype, and
            `graphopt.verify` must find it equal to `model`.

    Raises:
        BisectError: if the model is bad with no rewrite applied.
        VerifyError: if the model has no inputs to compare it on.
    """
    pipeline = pipeline_of(mode, passes)
    options = Options(mode, pipeline, "eager", dynamic_shapes, progress, enforce=False)
    args, kwargs = find_inputs([Side("source", model)], args, kwargs)
    is_good = predicate or (lambda result: _computes_the_same(model, result, args, kwargs))
    search = Search(model, args, kwargs, options, is_good)
    everything = search.attempt(None)
    count = everything.count
    if everything.good:
        return Bisection(None, count, search.optimizations)
    if count == 0 or not search.attempt(0).good:
        raise BisectError(
            f"{type(model).__name__} is bad with no rewrite applied: the fault is not in the "
            f"pipeline {pipeline} but in the capture, or in what decides"
        )
    last_good, bad, found = 0, count, everything
    while bad - last_good > 1:
        middle = (last_good + bad) // 2
        one = search.attempt(middle)
        if one.good:
            last_good = middle
        else:
            bad, found = middle, one
    assert found.site is not None
    record = next(one for one in found.report.applied if one.index == bad - 1)
    title = f"{record.rewrite} at {record.where or record.node}"
    made = reproduce(
        found.site, title, f"application {record.index} of {count} on {type(model).__name__}",
        str(pipeline),
    )  # fmt: skip
    return Bisection(
        record, count, search.optimizations, found.site.before, found.site.after, made.text,
        made.tensors,
    )  # fmt: skip


def command(text: str, show: Callable[[str], None] | None = None) -> Predicate:
    """A shell command as a predicate: it is given the path of the saved model in place of `{}`, or as
    its last argument, and exits with 0 if the model is good. `show` gets what it prints.

    The predicate raises BisectError if the shell cannot run the command.
    """

    def is_good(result: OptimizedModule) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "optimized")
            result.save(path)
            place = shlex.quote(str(path))
            line = text.replace("{}", place) if "{}" in text else f"{text} {place}"
            done = subprocess.run(line, shell=True, text=True, capture_output=True)
        if show is not None and (said := done.stdout + done.stderr):
            show(said.rstrip())
        if done.returncode in (126, 127):  # found but not executable, not found
            raise BisectError(f"the predicate cannot be run: {done.stderr.strip()}")
        return done.returncode == 0

    return is_good


def _computes_the_same(
    model: nn.Module, result: OptimizedModule, args: Any, kwargs: Mapping[str, Any] | None
) -> bool:
    reports = [result.report, *result.report.regions.values()]
    if any(one.check is not None and not one.check.ok for one in reports):
        return False
    return verify(model, result, args, kwargs, locate=False).ok


# -- the search ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One optimization: how many rewrites it applied, whether the result is good, and the site of
    the last one."""

    good: bool
    count: int
    report: Report
    site: Site | None


@dataclasses.dataclass
class Search:
    """Optimizes a model again and again, with other limits."""

    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any] | None
    options: Options
    is_good: Predicate
    optimizations: int = 0
    captured: Captured | CaptureError | None = None

    def attempt(self, limit: int | None) -> Attempt:
        witness = Witness(limit)
        self.optimizations += 1
        self.options.say(f"optimization {self.optimizations}: {_limit_text(limit)}")
        options = dataclasses.replace(
            self.options, capture=self._capture(), validator=witness, bisect_limit=limit,
            progress=None,
        )  # fmt: skip
        result = optimize_as(self.model, self.args, self.kwargs, options)
        return Attempt(self.is_good(result), witness.count, result.report, witness.site)

    def _capture(self) -> Callable[..., Captured]:
        """A capture that remembers the model of all attempts, which is what it is called with first,
        and captures whatever comes after (regions) anew."""
        calls = itertools.count()

        def again(*call: Any) -> Captured:
            if next(calls) > 0:
                return capture(*call)
            if self.captured is None:
                try:
                    self.captured = capture(*call)
                except CaptureError as error:
                    self.captured = error
            if isinstance(self.captured, CaptureError):
                raise self.captured
            return dataclasses.replace(self.captured, graph=_independent(self.captured.graph))

        return again


def _independent(graph: Graph) -> Graph:
    """A copy of a graph with states of its own."""
    twin = graph.clone()
    for state in twin.states.values():
        tensor = state.tensor.detach().clone()
        is_parameter = isinstance(state.tensor, nn.Parameter)
        grad = state.tensor.requires_grad
        state.tensor = nn.Parameter(tensor, requires_grad=grad) if is_parameter else tensor
    return twin


def _limit_text(limit: int | None) -> str:
    return "all rewrites" if limit is None else f"the first {limit} rewrites"


class Witness:
    """Approves of every site and keeps the last one."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.count = 0
        self.site: Site | None = None

    def __call__(self, graph: Graph, inputs: Sequence[Any]) -> SiteWitness:
        return SiteWitness(graph, inputs, self)


class SiteWitness(SiteValidator):
    """The validator of one graph. Sites that cannot be the last are not evaluated."""

    def __init__(self, graph: Graph, inputs: Sequence[Any], witness: Witness) -> None:
        super().__init__(graph, inputs)
        self.witness = witness

    def check(self, pairs: Sequence[Pair], contract: Contract) -> Verdict:
        self.witness.count += 1
        if self.witness.limit not in (None, self.witness.count):
            return Verdict(True)
        verdicts = {pair: super(SiteWitness, self).check([pair], contract) for pair in pairs}
        worst = max(verdicts, key=lambda pair: verdicts[pair].badness)
        self.witness.site = take_site(self.graph, *worst, self._values.lifted)
        return dataclasses.replace(verdicts[worst], ok=True)
