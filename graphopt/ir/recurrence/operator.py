"""The operator `graphopt::scan`: one step, repeated over an axis of time.

    y_t, v_t = step(x_t, v_{t-1}, w),      t = 0 .. steps - 1
    scan(body, steps, v_{-1}, x, w)  ->  y_0 .. y_{steps-1} stacked, then v_{steps-1}

It is composite: a loop over the operators that the body names. Whatever traces it (export, autograd, the
compilers of backends) sees that loop unrolled, so that nothing but the graph of this package needs to know
the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from graphopt.ir.recurrence.body import parse

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "scan(str body, int steps, Tensor[] states, Tensor[] xs, Tensor[] others) -> Tensor[]"
)


_TYPES_ALONE: ContextVar[bool] = ContextVar("graphopt::scan types alone", default=False)


@contextmanager
def types_alone() -> Iterator[None]:
    """Within, a scan is run for the types of its results: one step says what they are."""
    token = _TYPES_ALONE.set(True)
    try:
        yield
    finally:
        _TYPES_ALONE.reset(token)


def scan(
    body: str, steps: int, states: Sequence[Tensor], xs: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of every step `[steps, ...]`, then the states after the last one.

    Args:
        body: a step (`graphopt.ir.recurrence.body`) from (x at t, states, others) to (outputs, states).
        steps: how often it is repeated, at least once.
        states: what it starts from.
        xs: read step by step, `[steps, ...]` each.
        others: the same in every step.

    Raises:
        ValueError: if the body does not take so many operands, or there is not an x for every step.
    """
    step = parse(body)
    if len(step.inputs) != len(xs) + len(states) + len(others):
        raise ValueError(
            f"the step takes {len(step.inputs)} operands, found {len(xs)} + {len(states)} + {len(others)}"
        )
    for x in xs:
        if x.shape[0] != steps:
            raise ValueError(f"expected {steps} steps along the first axis, found {list(x.shape)}")
    held, made = list(states), []
    count = len(step.results) - len(held)
    if _TYPES_ALONE.get():
        results = step.run([*(x.select(0, 0) for x in xs), *held, *others])
        stacks = [one.new_empty((steps, *one.shape)) for one in results[:count]]
        return [*stacks, *results[count:]]
    for t in range(steps):
        results = step.run([*(x.select(0, t) for x in xs), *held, *others])
        made.append(results[:count])
        held = results[count:]
    return [*(torch.stack(list(one)) for one in zip(*made, strict=True)), *held]


_LIBRARY.impl("scan", scan, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
SCAN = torch.ops.graphopt.scan.default
