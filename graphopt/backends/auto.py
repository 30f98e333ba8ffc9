"""Building backends, checking what they compute, and choosing one by measuring.

    1. eager and, if it can run, prepacked are built and checked; the latter would do at once.
    2. The others are built in order while `tune_seconds` last; one that is expected to need more than what is
       left is not started, and the report says how much it would need.
    3. All that are right are measured, interleaved (`measure`), in the time that is left; one round at least.
    4. The simplest of those within 3% of the fastest is kept.

Every backend is checked against the truth that the caller has; one that is off, or fails, is out with a line
in the report. Eager is always left. What was measured is remembered (`choices`): the next time the winner
alone is built, and checked.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphopt.backends.base import Backend, Runnable
from graphopt.backends.choices import Choices, Entry, folder, key
from graphopt.backends.defects import refuse
from graphopt.backends.measure import FEWEST, Clock, Timing, measure
from graphopt.ir.source import clone_inputs, first_line, untouched

NOISE = 1.03  # times that differ by less count as equal
AT_ONCE = "prepacked"


class Tuning:
    """How long "auto" may look for a faster backend than the first, over all parts of a model, and where
    choices are kept."""

    def __init__(
        self, seconds: float = 60.0, cache: bool = True, clock: Clock = time.perf_counter
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"tune_seconds: expected a number of seconds >= 0, found {seconds!r}")
        self.seconds, self.cache, self.clock = float(seconds), cache, clock
        self.spent = 0.0

    def anew(self) -> Tuning:
        """The same with nothing spent."""
        return Tuning(self.seconds, self.cache, self.clock)

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def choices(self) -> Choices:
        return Choices(folder() if self.cache else None)


@dataclasses.dataclass
class Row:
    """What is known of one backend. Times are medians; `spread` is the interquartile range over the
    median; `error` is relative, against float64."""

    backend: str
    build: float | None = None
    seconds: float | None = None
    spread: float | None = None
    error: float | None = None
    speed_up: float | None = None
    chosen: bool = False
    note: str = ""

    def data(self) -> dict[str, Any]:
        """For the report."""
        return {
            "backend": self.backend,
            "build s": _rounded(self.build, 3),
            "ms": _rounded(self.seconds, 4, 1e3),
            "spread": _rounded(self.spread, 3),
            "error": self.error,
            "speed-up": _rounded(self.speed_up, 3),
            "chosen": self.chosen,
            "note": self.note,
        }


def _rounded(value: float | None, digits: int, unit: float = 1.0) -> float | None:
    return None if value is None else round(unit * value, digits)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that was kept, as a callable, and how that came about."""

    backend: str
    run: Runnable
    rows: list[Row]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Task:
    """A module to run fast on given inputs.

    `judge(outputs)`, of the leaves of a result, returns its error against the truth and how large that may
    be.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trainable: bool
    judge: Callable[[list[Any]], tuple[float, float]]
    say: Callable[[str], None] = lambda _: None

    def caller(self, run: Runnable) -> Callable[[], Any]:
        """`run` on inputs of its own; on a GPU it returns once that is done."""
        args, kwargs = clone_inputs(self.args, self.kwargs)
        if any(isinstance(one, Tensor) and one.is_cuda for one in pytree.tree_leaves(self.args)):

            def call() -> Any:
                found = run(*args, **kwargs)
                torch.cuda.synchronize()
                return found

            return call
        return lambda: run(*args, **kwargs)


class _Bench:
    """The candidates of one task, as far as they are built."""

    def __init__(self, task: Task, clock: Clock) -> None:
        self.task, self.clock = task, clock
        self.rows: dict[str, Row] = {}
        self.runs: dict[str, Runnable] = {}
        self.notes: list[str] = []
        start = clock()
        with untouched(task.module):
            self.plain = pytree.tree_leaves(task.caller(task.module)())
        self.call_seconds = clock() - start

    def eager(self) -> None:
        """The module itself: what is left when nothing else is."""
        error, _ = self.task.judge(self.plain)
        self.rows["eager"] = Row("eager", 0.0, error=error)
        self.runs["eager"] = self.task.module

    def build(self, backend: Backend) -> bool:
        """Build and check; whether it is good. What is wrong with it is in its row and in the notes."""
        task, name = self.task, backend.name
        task.say(f"compiling with {name}")
        row = self.rows[name] = Row(name)
        start = self.clock()
        try:
            refuse(name, task.module)
            run = backend.lower(task.module, task.trainable)
            with untouched(task.module):
                found = pytree.tree_leaves(task.caller(run)())
            row.build = self.clock() - start
            if reason := _different_kind(found, self.plain):
                return self._drop(row, f"not used: {reason}")
            row.error, limit = task.judge(found)
        except Exception as failure:
            return self._drop(row, f"failed: {first_line(failure)}")
        if not row.error <= limit:
            found_error = f"differ by {row.error:.1e} from float64 (limit {limit:.1e})"
            return self._drop(row, f"not used: its outputs {found_error}")
        self.runs[name] = run
        return True

    def _drop(self, row: Row, why: str) -> bool:
        row.note = why
        self.notes.append(f"{row.backend}: {why}")
        return False

    def keep(self, name: str) -> Choice:
        self.rows[name].chosen = True
        remarks = getattr(self.runs[name], "remarks", ())
        notes = [*self.notes, *(f"{name}: {one}" for one in remarks)]
        return Choice(name, self.runs[name], list(self.rows.values()), notes)


def _different_kind(found: list[Any], expected: list[Any]) -> str:
    """How outputs differ from the module's own in number, shape or dtype; empty if they do not."""
    if len(found) != len(expected):
        return f"it returns {len(found)} values, the module {len(expected)}"
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        kinds = [
            (str(one.dtype), list(one.shape)) if isinstance(one, Tensor) else type(one).__name__
            for one in (a, b)
        ]
        if kinds[0] != kinds[1]:
            return f"its output {number} is {kinds[0]}, the module's {kinds[1]}"
    return ""


def build(task: Task, backend: Backend) -> Choice:
    """The one backend that was asked for; eager, with a note, if it is not good."""
    bench = _Bench(task, time.perf_counter)
    if bench.build(backend):
        return bench.keep(backend.name)
    bench.notes.append("running eager")
    bench.runs["eager"] = task.module
    bench.rows["eager"] = Row("eager")
    return bench.keep("eager")


def choose(task: Task, backends: Sequence[Backend], tuning: Tuning) -> Choice:
    """The fastest of `backends` that is right; they are in order of simplicity, eager first."""
    bench = _Bench(task, tuning.clock)
    bench.eager()
    named = {one.name: one for one in backends if one.name != "eager"}
    at_once = "eager"
    if AT_ONCE in named and bench.build(named[AT_ONCE]):
        at_once = AT_ONCE
    if bench.runs[at_once] is task.module and at_once != "eager":  # it has nothing to offer here
        del bench.rows[at_once], bench.runs[at_once]
        at_once = "eager"
    others = [one for name, one in named.items() if name != AT_ONCE]
    if tuning.seconds == 0:
        return bench.keep(at_once)
    start = tuning.clock()
    spent = tuning.spent
    try:
        return _Search(task, bench, others, tuning, start - spent).run()
    finally:
        tuning.spent = spent + tuning.clock() - start


class _Search:
    """Building and measuring the rest; `start` is when the time of `tuning` began to run."""

    def __init__(
        self, task: Task, bench: _Bench, others: list[Backend], tuning: Tuning, start: float
    ) -> None:
        self.task, self.bench, self.others, self.tuning = task, bench, others, tuning
        self.start = start
        self.choices = tuning.choices()
        self.ops = sum(node.op == "call_function" for node in task.module.graph.nodes)
        self.key = ""

    def left(self) -> float:
        return self.tuning.seconds - (self.tuning.clock() - self.start)

    def needed(self, backend: Backend) -> float:
        """Seconds to build a backend, and to check and measure it beside what there is."""
        expected = backend.expected_build(self.ops) * self.choices.correction(backend.name)
        return expected + FEWEST * self.bench.call_seconds * (1 + len(self.bench.runs))

    def run(self) -> Choice:
        bench = self.bench
        leaves = pytree.tree_leaves((self.task.args, self.task.kwargs))
        names = [*bench.rows, *(one.name for one in self.others)]
        if self.choices.path is not None:
            self.key = key(self.task.module, leaves, self.task.trainable, names)
            if (known := self._known()) is not None:
                return known
        left_out = self._build_others()
        if len(bench.runs) > 1:
            self._measure()
        chosen = pick({name: one.seconds for name, one in bench.rows.items() if name in bench.runs})
        if self.key and len(bench.runs) > 1:
            self._remember(left_out)
        bench.notes += self.choices.notes
        return bench.keep(chosen)

    def _build_others(self) -> dict[str, float]:
        """Build what the time allows; of others, the seconds of tuning that would have allowed them."""
        left_out = {}
        for backend in self.others:
            needed, left = self.needed(backend), self.left()
            if needed > left:
                left_out[backend.name] = needed + self.tuning.seconds - left
                why = (
                    f"not tried: needs about {needed:.1f} s, {max(0.0, left):.1f} s are left of "
                    f"tune_seconds={self.tuning.seconds:g}"
                )
                self.bench.rows[backend.name] = Row(backend.name, note=why)
                self.bench.notes.append(f"{backend.name}: {why}")
            else:
                self.bench.build(backend)
        return left_out

    def _measure(self) -> None:
        bench, task = self.bench, self.task
        task.say(f"measuring {', '.join(bench.runs)}")
        calls = {name: task.caller(run) for name, run in bench.runs.items()}
        with untouched(task.module):
            timings = measure(calls, self.left(), self.tuning.clock)
        self._enter(timings)

    def _enter(self, timings: dict[str, Timing]) -> None:
        eager = timings["eager"].median
        for name, timing in timings.items():
            row = self.bench.rows[name]
            row.seconds, row.spread = timing.median, timing.spread
            row.speed_up = eager / timing.median if timing.median else None

    def _remember(self, left_out: dict[str, float]) -> None:
        rows = {name: self.bench.rows[name] for name in self.bench.runs}
        entry = Entry.now(
            {name: round(1e3 * (row.seconds or 0.0), 4) for name, row in rows.items()},
            {name: round(row.build or 0.0, 3) for name, row in rows.items()},
            {name: round(seconds, 1) for name, seconds in left_out.items()},
        )
        builds = {
            one.name: rows[one.name].build / one.expected_build(self.ops)  # type: ignore[operator]
            for one in self.others
            if one.name in rows and one.expected_build(self.ops) > 0
        }
        self.choices.remember(self.key, entry, builds)

    def _known(self) -> Choice | None:
        """What an earlier measurement chose, if it holds for the time that there is and is still right."""
        entry = self.choices.look_up(self.key)
        if entry is None:
            return None
        left = self.left()
        if any(seconds <= left for seconds in entry.left_out.values()):
            return None  # there is time now for what was left out
        bench = self.bench
        others = {one.name: one for one in self.others}
        fits = {
            name: 1e-3 * ms for name, ms in entry.milliseconds.items()
            if name in bench.runs or (name in others and entry.builds[name] <= left)
        }  # fmt: skip
        if not fits:
            return None
        chosen = pick(dict(fits))
        if chosen not in bench.runs and not bench.build(others[chosen]):
            bench.notes.append(
                f"the choice of {entry.date}, {chosen}, does not hold; measuring again"
            )
            self.others = [one for one in self.others if one.name != chosen]
            return None
        for name, seconds in fits.items():
            row = bench.rows.setdefault(name, Row(name))
            row.seconds = seconds
            if eager := fits.get("eager"):
                row.speed_up = eager / seconds if seconds else None
        bench.notes.append(
            f"{chosen}: chosen from the cache of {entry.date}, measured {1e3 * fits[chosen]:.3g} ms"
        )
        return bench.keep(chosen)


def pick(seconds: dict[str, float | None]) -> str:
    """The first name, so the simplest backend, within noise of the fastest; the first at all where nothing
    was measured."""
    known = {name: one for name, one in seconds.items() if one is not None}
    if not known:
        return next(iter(seconds))
    limit = NOISE * min(known.values())
    return next(name for name, one in known.items() if one <= limit)
