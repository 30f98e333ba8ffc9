"""What `graphopt bench` measures: the source as it is, and optimized on each backend.

All run on the same inputs in one process, interleaved as `graphopt.backends.measure` does it, so that a slow
minute slows everyone, and to the end of the time. Every backend is checked against the source in float64
first, as for backend "auto"; what fails or is wrong is not timed. Passes that are lossy by contract are
timed whatever their error.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from graphopt.backends import auto
from graphopt.backends.base import Backend, candidates
from graphopt.backends.choices import cpu
from graphopt.backends.measure import Timing, measure
from graphopt.ir.capture import capture
from graphopt.ir.source import clone_inputs, copy_module
from graphopt.optimize import optimize
from graphopt.pipeline import Pipeline
from graphopt.report.html import sections
from graphopt.report.plain import plain
from graphopt.verify.truth import Truth

SOURCE = "source"


def measured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, pipeline: Pipeline,
    backends: Sequence[Backend], seconds: float, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """
    Args:
        model: is not changed.
        backends: all that can run here, if none is named.
        seconds: for measuring; there is one round at least.

    Returns:
        Plain data: `table` has a row for the source and for each backend, with `ms` (median), its
        quartiles, `speed_up` over the source, `error` (relative, against float64), `build_seconds`, `rounds`
        and a `note`; beside it `threads`, `processor`, `torch`.

    Raises:
        CaptureError: if the model is not captured as one graph.
    """
    source = copy_module(model)
    say("capturing the source")
    leaves = pytree.tree_leaves(clone_inputs(args, kwargs))
    truth = Truth(capture(copy_module(model), args, kwargs).graph, leaves)
    fast = optimize(model, args, kwargs, mode=mode, passes=pipeline, progress=say)
    say("checking against float64")
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        task = auto.Task(source, args, kwargs, mode != "deploy", truth.judge, say)  # type: ignore[arg-type]
        error, _ = truth.judge(pytree.tree_leaves(task.caller(source)()))
        rows[SOURCE] = {"name": SOURCE, "error": error, "build_seconds": 0.0, "note": ""}
        calls = {SOURCE: task.caller(source)}
        assert fast.graph_module is not None  # the source was captured
        graph_task = dataclasses.replace(task, module=fast.graph_module)
        lossy = sorted({one.contract for one in fast.report.applied
                        if not one.contract.startswith(sections.LOSSLESS)})  # fmt: skip
        if (
            lossy
        ):  # within a budget of its own, or another function: the error is told, and not judged
            graph_task = dataclasses.replace(
                graph_task, judge=lambda found: (truth.judge(found)[0], math.inf)
            )
        for one in backends or candidates():
            choice = auto.build(graph_task, one)
            row = next(row for row in choice.rows if row.backend == one.name)
            good = choice.backend == one.name
            rows[one.name] = {
                "name": one.name, "error": row.error, "build_seconds": row.build,
                "note": "" if good else row.note,
            }  # fmt: skip
            if good:
                calls[one.name] = graph_task.caller(choice.run)
        say(f"measuring {', '.join(calls)}")
        timings = measure(calls, seconds, race=False)
    _enter(rows, timings)
    check = fast.report.check
    return plain({  # type: ignore[no-any-return]
        "model": type(model).__name__, "pipeline": str(pipeline), "threads": torch.get_num_threads(),
        "processor": cpu(), "torch": torch.__version__, "seconds": seconds,
        "reference": truth.reason or "float64",
        "optimized": bool(fast.report.applied), "lossy": lossy,
        "check": "" if check is None else check.reason, "table": list(rows.values()),
    })  # fmt: skip


def _enter(rows: dict[str, dict[str, Any]], timings: Mapping[str, Timing]) -> None:
    base = timings[SOURCE].rounds
    for name, row in rows.items():
        timing = timings.get(name)
        times = ("ms", "low_ms", "high_ms", "speed_up", "rounds")
        if timing is None:
            row |= dict.fromkeys(times)
            continue
        low, high = timing.quartiles
        # Rounds of the same number ran beside one another.
        ratios = [a / b for a, b in zip(base, timing.rounds, strict=False) if b]
        values = (1e3 * timing.median, 1e3 * low, 1e3 * high, statistics.median(ratios or [1.0]),
                  len(timing.rounds))  # fmt: skip
        row |= dict(zip(times, values, strict=True))


def lines(source: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{source}: {found['model']} on {found['processor']}, {found['threads']} thread(s), torch "
        f"{found['torch']}"
    )
    yield f"  pipeline {found['pipeline']}"
    yield (
        f"  {'':<12} {'ms':>9} {'quartiles':>19} {'speed-up':>9} {'error':>9} {'build s':>8} {'rounds':>7}"
    )
    for row in found["table"]:
        yield f"  {row['name']:<12} {_row(row)}"
    if found["check"]:
        yield f"  not optimized: {found['check']}"
    if found["lossy"]:
        yield f"  lossy: {', '.join(found['lossy'])}; errors are told, and not judged"
    if found["reference"] != "float64":
        yield f"  errors are against a run in its own dtypes: {found['reference']}"


def _row(row: Mapping[str, Any]) -> str:
    if row["ms"] is None:
        return row["note"] or "not measured"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    return (
        f"{row['ms']:>9.4g} {row['low_ms']:>9.4g}-{row['high_ms']:<9.4g} {row['speed_up']:>8.2f}x "
        f"{error:>9} {row['build_seconds'] or 0:>8.2f} {row['rounds']:>7}"
    )
