"""The whole model: the rewritten graph against the captured one, in float64 and in its dtype."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.ir.distance import relative_error
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter
from graphopt.verify.choices import Ties, ties_of

# Outputs that cancel to nothing are noise in the source too: how much, its own response to a
# last-bit change of the inputs tells. This many times as much is allowed.
NOISE = 100


@dataclasses.dataclass(frozen=True)
class ModelCheck:
    """Errors are relative in the 2-norm, the largest over the outputs.

    `float64_error`: rewritten against source, both in float64: meaning.
    `source_error`, `error`: source and rewritten in the model's own dtype against the source in
    float64: numerics. `ties`: comparisons of the source that rounding decides; `excused`: the rows of
    the batch whose outputs differ by more than `limit` behind such a tie. Both are counted only where
    outputs differ by more.
    """

    float64_error: float = math.nan
    source_error: float = math.nan
    error: float = math.nan
    limit: float = 1e-10
    reason: str = ""
    ties: float = 0
    excused: float = 0

    @property
    def ok(self) -> bool:
        return not self.reason


@torch.no_grad()
def check_model(
    source: Graph, result: Graph, inputs: Sequence[Any], limit: float,
    exact: Callable[[], Sequence[Any]] | None = None,
) -> ModelCheck:  # fmt: skip
    """Run both graphs on `inputs`, lifted and as they are; `exact()` gives the lifted source's outputs, if
    the caller has use for them too."""

    def run(graph: Graph, lifted: bool) -> tuple[Any, ...]:
        copies = [one.clone() if isinstance(one, torch.Tensor) else one for one in inputs]
        return Interpreter(graph, lifted=lifted, writes=False).run(copies)

    try:
        truth = run(source, True) if exact is None else exact()
        meaning = relative_error(run(result, True), truth)
        before = relative_error(run(source, False), truth)
        after = relative_error(run(result, False), truth)
        enforced, ties, excused = meaning, Ties(), 0
        if not meaning <= limit:
            ties, found = ties_of(source, inputs), run(result, True)
            noise = Interpreter(source, lifted=True, writes=False).run(
                [nudged(one) for one in inputs]
            )
            limit = max(limit, NOISE * relative_error(*ties.spared(noise, truth)))
            enforced = relative_error(*ties.spared(found, truth))
            excused = sum(not relative_error(*row) <= limit for row in ties.concerned(found, truth))
    except Exception as error:
        return ModelCheck(limit=limit, reason=f"raised {type(error).__name__}: {error}")
    reason = ""
    if not enforced <= limit:
        reason = f"float64 outputs differ by {enforced:.1e} (relative), more than {limit:.0e}"
    return ModelCheck(meaning, before, after, limit, reason, ties.count, excused)


def nudged(value: Any) -> Any:
    """A floating input with its last bit changed."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double() * (1 + 2.0**-52)
    return value
