"""Many models, drawn by hypothesis, and the minimal ones of those that are wrong."""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import torch

from benchmarks.fuzz.checks import check
from benchmarks.fuzz.row import Row, Wrong
from graphopt.fleet.trials import OutOfTime, at_most
from graphopt.testing import strategies
from graphopt.testing.strategies import Network

MODES = ("deploy", "tune")
KINDS: dict[str, Callable[[], st.SearchStrategy[Network]]] = {
    "programs": strategies.programs,
    "networks": strategies.networks,
    "convolutional": strategies.convolutional,
    "residual": strategies.residual,
    "transformers": strategies.transformers,
    "spiking": strategies.spiking,
}
SHRINK_SECONDS = 60.0


class _Enough(BaseException):
    """Shrinking has had its time."""


@dataclasses.dataclass
class Failure:
    """The smallest model found for one way of being wrong, and how to find it again."""

    row: Row
    seed: int


_known: set[str] = set()  # reasons that this process has shrunk already


def signature(row: Row) -> str:
    """The reason without its numbers and names: the same for one way of being wrong."""
    return re.sub(r"[-+.\d]+(e[-+]?\d+)?|'.*?'", "#", row.reason)[:160]


def draw_models(
    kind: str, mode: str, seed: int, count: int, timeout: float, strict: bool = False
) -> tuple[list[Row], list[Failure]]:
    """`count` models of one kind. A wrong one ends a run of hypothesis, so there may be several.

    `strict` counts a site that was rolled back as wrong too, so that it is shrunk.
    """
    rows: list[Row] = []
    failures: list[Failure] = []
    for attempt in range(count):
        if len(rows) >= count:
            break
        failure = _run(kind, mode, seed + attempt, count - len(rows), timeout, strict, rows)
        if failure is not None:
            failures.append(failure)
    return rows, failures


def _run(
    kind: str, mode: str, seed: int, count: int, timeout: float, strict: bool, rows: list[Row]
) -> Failure | None:
    smallest: list[Row] = []
    deadline = [0.0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(count, 2), database=None, deadline=None, report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(KINDS[kind]())
    def one(network: Network) -> None:
        if smallest and time.perf_counter() > deadline[0]:
            raise _Enough
        with at_most(timeout):
            row = check(kind, network, mode)
        if strict and row.rolled_back and row.verdict == "right":
            row.verdict, row.reason = "wrong", f"rolled back: {row.rolled_back[0]}"
        if not smallest:
            rows.append(row)
        if row.verdict != "wrong" or (not smallest and signature(row) in _known):
            return
        if not smallest or signature(row) == signature(smallest[0]):
            if not smallest:
                deadline[0] = time.perf_counter() + SHRINK_SECONDS
            if not smallest or len(row.shown) <= len(smallest[0].shown):
                smallest[:] = [row]
            raise Wrong(signature(row))

    try:
        one()
    except (Wrong, _Enough):
        pass
    except hypothesis.errors.Flaky:
        smallest[0].reason += " (not every time)"
    except OutOfTime:
        rows.append(Row(kind, mode, "timeout", f"more than {timeout:.0f} s", seconds=timeout))
    if not smallest:
        return None
    _known.add(signature(smallest[0]))
    return Failure(smallest[0], seed)


def start_worker() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
