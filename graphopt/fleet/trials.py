"""One configuration of a sweep, and what comes of it, in whatever process it runs.

    source model  ->  optimize(passes, backend, precision)  ->  metric or error, latency beside the source's

Latency is the median of rounds in which the source and the result take turns, so `relative`, the median of
the ratios, means the same on a busy machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

Result = dict[str, Any]


class TrialError(Exception):
    """A trial that has no result; the message says why."""


class OutOfTime(BaseException):
    """Something takes too long; no handler of ordinary errors is to keep it going."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried. `passes` is None for the source as it is. `folder` is where callables are looked for
    first; `seconds` is how long to measure, `limit` the seconds that all may take."""

    model: str
    source: str
    pipeline: str
    passes: str | None
    backend: str = "eager"
    precision: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust: bool = False
    metric: str | None = None
    data: str | None = None
    threads: int = 1
    seconds: float = 2.0
    folder: str = ""
    limit: float | None = None

    @property
    def key(self) -> str:
        """The hash of all that the result depends on: names of pipelines and models are not in it."""
        told = {
            "source": self.source, "passes": self.passes, "backend": self.backend,
            "precision": self.precision, "metric": self.metric, "data": self.data,
            "threads": self.threads, "versions": versions(),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        chosen = [f"{name}={value}" for name, value in self.options.items()]
        chosen += [] if self.passes is None else [self.backend, *filter(None, [self.precision])]
        return " ".join([self.model, self.pipeline, *chosen])


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("graphopt", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def failed(trial: Trial, reason: str) -> Result:
    """The result of a trial that has none."""
    return {
        "key": trial.key, "trial": dataclasses.asdict(trial), "status": "failed",
        "reason": " ".join(reason.split())[:600],
    }  # fmt: skip


def run_trial(trial: Trial) -> Result:
    """Run a trial here; whatever goes wrong with it is its result. The result is plain data."""
    for place in (trial.folder, os.getcwd()):
        if place and place not in sys.path:
            sys.path.insert(0, place)
    start = time.perf_counter()
    try:
        with at_most(trial.limit):
            found = _run(trial)
    except (Exception, OutOfTime) as error:
        ours = isinstance(error, (TrialError, OutOfTime))
        why = str(error) if ours else f"{type(error).__name__}: {error}"
        return failed(trial, why)
    return {
        "key": trial.key, "trial": dataclasses.asdict(trial), "status": "ok", "reason": "",
        "took": time.perf_counter() - start, "node": platform.node(), **found,
    }  # fmt: skip


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """End the block after some time, where the system has alarms: as soon as Python is next reached.

    Raises:
        OutOfTime: if it took longer.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def over(*_: Any) -> None:
        raise OutOfTime(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(trial: Trial) -> Result:
    import torch

    from graphopt.ir.inputs import declared_inputs
    from graphopt.sources import import_object, load_source

    torch.set_num_threads(trial.threads)
    model, args, kwargs = load_source(trial.source, trust=trial.trust)
    if not args and not kwargs:
        args, kwargs = declared_inputs(model)  # type: ignore[assignment]
    if not args and not kwargs:
        raise TrialError(
            f"{trial.source} declares no example inputs; let the callable return (model, inputs)"
        )
    fast = model
    found: Result = {"applied": 0, "rolled_back": 0, "refused": 0}
    if trial.passes is not None:
        fast, found = _optimized(trial, model, args, kwargs)
    found["parameters"] = sum(one.numel() for one in fast.parameters())
    if trial.metric is None:
        found["value"] = _error(model, fast, args, kwargs)
    else:
        found["value"] = float(
            import_object(trial.metric, "expected package.module:callable")(fast)
        )
    if not math.isfinite(found["value"]):
        raise TrialError(f"{trial.metric or 'the error'} is {found['value']}")
    calls = {"source": model} if fast is model else {"source": model, "result": fast}
    with torch.no_grad():
        times = rounds(
            {name: partial(one, *args or (), **kwargs or {}) for name, one in calls.items()},
            trial.seconds,
        )  # fmt: skip
    theirs, mine = times["source"], times["result" if "result" in times else "source"]
    return found | {
        "latency": statistics.median(mine),
        "source_latency": statistics.median(theirs),
        "relative": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
        "rounds": len(mine),
    }


def _optimized(trial: Trial, model: Any, args: Any, kwargs: Any) -> tuple[Any, Result]:
    """
    Raises:
        TrialError: if the result is not what the trial is called: another backend, no op in its precision,
            a broken contract.
    """
    from graphopt.builds.building import measured_on
    from graphopt.optimize import PRECISIONS, optimize, pipeline_of
    from graphopt.pipeline import Pipeline
    from graphopt.sources import import_object

    data: tuple[Any, ...] = ()
    if trial.data is not None:
        data = tuple(import_object(trial.data, "expected package.module:callable")())
    fast = optimize(
        model, args, kwargs, passes=measured_on(pipeline_of("deploy", trial.passes), data),
        backend=trial.backend, precision=trial.precision, data=data if trial.precision else (),
    )  # fmt: skip
    report = fast.report
    if report.check is not None and report.check.reason:
        raise TrialError(report.check.reason)
    if trial.backend not in ("auto", report.backend):
        why = "; ".join(report.backend_notes)
        raise TrialError(f"backend {trial.backend} was not used: {why}")
    if trial.precision is not None:
        stages = {one.run.name for one in Pipeline(PRECISIONS[trial.precision]).stages}
        if not any(one.stage in stages for one in report.applied):
            raise TrialError(f"nothing is computed in {trial.precision}")
    return fast, {
        "applied": len(report.applied), "rolled_back": len(report.rolled_back),
        "refused": len(report.refused), "backend": report.backend,
    }  # fmt: skip


def _error(model: Any, fast: Any, args: Any, kwargs: Any) -> float:
    """Of the outputs in the own dtype of the result, against the source in float64: relative, in the
    2-norm."""
    from graphopt.verify.compare import verify

    return verify(model, fast, args, kwargs, locate=False).error


def rounds(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of callables that take turns, one figure a round, for some seconds."""
    from graphopt.backends.measure import measure

    found: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while (left := seconds - (time.perf_counter() - start)) > 0:
        for name, timing in measure(calls, left, race=False).items():
            found[name] += timing.rounds
    return found
