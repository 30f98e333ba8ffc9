"""The checks of one model, and the verdict on it."""

from __future__ import annotations

import gc
import math
import time
import traceback
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import graphopt
from benchmarks.zoo.inputs import Inputs, MakeInputs, double, is_tensor, run
from benchmarks.zoo.norms import norms_run, read_norms
from benchmarks.zoo.row import Row
from benchmarks.zoo.zoos import build

FLOAT64_LIMIT = 1e-10
RATIO_LIMIT = 2.0


@torch.no_grad()
def check(row: Row, model: nn.Module, make: MakeInputs) -> None:
    """Fill in `row`; raises what building, optimizing or running the model raises."""
    example, fresh = make(1), make(3)
    row.inputs = ", ".join(
        "x".join(map(str, one.shape)) for one in pytree.tree_leaves(example) if is_tensor(one)
    )
    row.parameters = sum(one.numel() for one in model.parameters())
    row.norms_before = norms_run(model, example)
    found = run(model, example)
    try:
        found_batch = run(model, fresh)
        row.batch = "yes"
    except Exception as error:
        found_batch = []
        row.batch = f"source: {_first_line(error)}"

    model.double()  # and back below, which is exact; a copy would be the largest thing in memory
    truth = run(model, double(example))
    truth_batch = run(model, double(fresh)) if row.batch == "yes" else []
    if not all(bool(one.isfinite().all()) for one in truth if is_tensor(one)):
        raise ArithmeticError("the source model's outputs are not finite in float64")
    row.source_error = relative_error(found, truth)
    if row.batch == "yes":
        row.source_error_batch = relative_error(found_batch, truth_batch)

    args, kwargs = double(example)
    fast = graphopt.optimize(model, args, kwargs=kwargs)
    row.float64_error = relative_error(run(fast, double(example)), truth)
    row.float64_error_batch = _batch_error(row, fast, double(fresh), truth_batch)
    del fast
    gc.collect()

    model.float()
    args, kwargs = example
    start = time.perf_counter()
    fast = graphopt.optimize(model, args, kwargs=kwargs)
    row.seconds = time.perf_counter() - start
    row.error = relative_error(run(fast, example), truth)
    row.error_batch = _batch_error(row, fast, fresh, truth_batch)
    _read_report(row, fast)
    read_norms(row, fast, example)


def relative_error(found: list[Any], truth: list[Any]) -> float:
    """The largest relative 2-norm error over the leaves; inf where they do not compare."""
    if len(found) != len(truth):
        return math.inf
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if not (is_tensor(a) and is_tensor(b)):
            worst = max(worst, 0.0 if type(a) is type(b) and a == b else math.inf)
        elif a.shape != b.shape:
            worst = math.inf
        elif not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
        else:
            off, size = float((a.double() - b).norm()), float(b.norm())
            worst = max(worst, off / size if size else math.inf if off else 0.0)
            worst = math.inf if math.isnan(off) else worst
    return worst


def _batch_error(row: Row, fast: nn.Module, inputs: Inputs, truth: list[Any]) -> float:
    if row.batch != "yes":
        return math.nan
    try:
        found = run(fast, inputs)
    except Exception as error:  # refusing other batch sizes is allowed, answering wrongly is not
        row.batch = _first_line(error)
        return math.nan
    return relative_error(found, truth)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def _read_report(row: Row, fast: graphopt.OptimizedModule) -> None:
    report = fast.report
    reports = [report, *report.regions.values()]
    row.capture = report.capture.method
    row.notes = [note for one in reports for note in one.capture.notes]
    row.notes += [f"left eager {path or '(root)'}: {why}"
                  for path, why in report.capture.left_out.items()]  # fmt: skip
    row.applied, row.refused = len(report.applied), len(report.refused)
    row.rolled_back = [f"{one.rewrite} at {one.where}: {one.reason}" for one in report.rolled_back]
    row.nodes_before = sum(one.before.nodes for one in reports if one.before is not None)
    row.nodes_after = sum(one.after.nodes for one in reports if one.after is not None)
    row.capture_seconds = sum(one.capture.seconds for one in reports)
    row.passes_seconds = sum(seconds for one in reports for _, seconds in one.passes)


def judge(row: Row) -> None:
    """Set the verdict of a row whose checks all ran."""
    problems = [
        f"{name} {value:.1e}, more than {limit:g}"
        for name, value, limit in (
            ("float64 error", row.float64_error, FLOAT64_LIMIT),
            ("float64 error at batch 3", row.float64_error_batch, FLOAT64_LIMIT),
            ("float32 ratio", row.ratio, RATIO_LIMIT),
            ("float32 ratio at batch 3", row.ratio_batch, RATIO_LIMIT),
        )
        if value > limit
    ]
    row.verdict = "right"
    if row.norms_unexplained:
        row.verdict = "unexplained"
        row.reason = f"no reason for the batch norm at {', '.join(row.norms_unexplained)}"
    if problems:
        row.verdict, row.reason = "wrong", "; ".join(problems)


def run_one(zoo: str, name: str, size: int, debug: bool = False) -> Row:
    row = Row(name)
    try:
        check(row, *build(zoo, name, size))
        judge(row)
    except Exception as error:
        row.verdict, row.reason = "failed", _first_line(error)
        if debug:
            traceback.print_exc()
    finally:
        torch._dynamo.reset()
        gc.collect()
    return row
