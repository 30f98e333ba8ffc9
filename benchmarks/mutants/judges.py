"""The judges of a mutant: proof, property test, and validation on a network."""

from __future__ import annotations

import signal
import time
import warnings
from typing import Any
from unittest import mock

import hypothesis
import torch

import graphopt
from benchmarks.mutants.changes import sample
from benchmarks.mutants.executed import Lines, executed, rewrites
from benchmarks.mutants.networks import networks
from graphopt.ir.distance import relative_error
from graphopt.ir.driver import DidNotConverge
from graphopt.ir.rewrite import Rewrite
from graphopt.testing import Counterexample, check, checking, prove

PROVE_SECONDS, CHECK_EXAMPLES, CHECK_PATHS, JUDGE_SECONDS = 5.0, 40, 1500, 60.0
JUDGES = ("proof", "property", "site", "together")


class Late(BaseException):
    """A judge took too long. Not an `Exception`: nothing on the way may take it for a failure."""


def _late(signum: int, frame: Any) -> None:
    raise Late


def by_proof(one: Rewrite) -> tuple[str, str]:
    if one.unproved:
        return "n/a", "declared unproved"
    found = prove(one, depth=2, seconds=PROVE_SECONDS)
    if found.pattern:
        return "caught", f"residual {found.residual} in {found.pattern}"
    never = found.residual.startswith("never matched")
    return "dead" if never else "survived", found.residual or f"proved to depth {found.depth}"


def by_property(one: Rewrite) -> tuple[str, str]:
    if one.unproved:
        return "n/a", "its pattern is not seen in index notation"
    plain = checking.settings

    def unshrunk(**options: Any) -> Any:
        return plain(**{**options, "phases": [hypothesis.Phase.generate]})

    try:
        with mock.patch.object(checking, "settings", unshrunk):
            count = check(one, max_examples=CHECK_EXAMPLES, paths=CHECK_PATHS)
    except (Counterexample, DidNotConverge, hypothesis.errors.Flaky) as found:
        return "caught", str(found)
    except AssertionError as found:
        return "dead", str(found)
    return "survived", f"applied {count} times"


def by_site(one: Rewrite) -> tuple[str, str]:
    torch.manual_seed(0)
    applied, wrong, x = 0, "", torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for model in networks(one.function.__name__):
        try:
            result = graphopt.optimize(model, (x,), passes=[one])
        except DidNotConverge as error:
            return "caught", f"{model.text}: the termination guard: {error}"
        report = result.report
        reason = report.check.reason if report.check and not report.check.ok else ""
        if report.rolled_back or reason:
            reason = reason or report.rolled_back[0].reason
            return "caught", f"rolled back in {model.text}: {reason}"
        applied += len(report.applied)
        with torch.no_grad():
            if "0.5, True" not in model.text and relative_error(result(x), model(x)) > 1e-9:
                wrong = f"{model.text} is wrong and was not rolled back"
    verdict = "MISSED" if wrong else "survived" if applied else "dead"
    return verdict, wrong or f"applied {applied} times"


def judged(
    name: str, seed: int, count: int, number: int, lines: Lines | None = None
) -> dict[str, Any]:
    """What the three judges say about mutant `number` of the rewrite called `name`, which runs
    `lines`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    home = rewrites()[name]
    mutant = sample(home, name, seed, count, lines or executed(name))[number]
    row: dict[str, Any] = {"rewrite": name, "function": mutant.law.name, "kind": mutant.kind,
                           "change": mutant.change, "argument": mutant.argument(name)}  # fmt: skip
    with mutant.active(name, home) as one:
        for judge, run in zip(JUDGES, (by_proof, by_property, by_site), strict=False):
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, JUDGE_SECONDS)
            try:
                row[judge], row[f"{judge} says"] = run(one)
            except Late:
                row[judge], row[f"{judge} says"] = "survived", "took too long"
            except Exception as error:
                row[judge], row[f"{judge} says"] = "CRASHED", f"{type(error).__name__}: {error}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            row[f"{judge} s"] = round(time.perf_counter() - start, 2)
    said = [row[judge] for judge in JUDGES[:3]]
    row["together"] = next((one for one in ("caught", "dead") if one in said), "survived")
    return row
