"""A loop over time."""

from __future__ import annotations

from typing import Any

from graphopt.ir.ops.base import TABLE, Op, numel, op
from graphopt.ir.ops.norm import BatchNorm
from graphopt.ir.ops.pointwise import Binary, Unary
from graphopt.ir.recurrence import operator as operator  # enters the operator
from graphopt.ir.recurrence.body import Step, formulas, parse
from graphopt.ir.value import Value


@op("graphopt::scan.default")
class Scan(Op):
    """`steps` times the step `body`, from `states` on: a list of every output `[steps, ...]`, then of the
    last states. Each step reads its place of `xs` `[steps, ...]`, and all of `others`."""

    body: str
    steps: int
    states: tuple[Value, ...]
    xs: tuple[Value, ...]
    others: tuple[Value, ...]

    @property
    def step(self) -> Step:
        return parse(self.body)

    def formulas(self) -> list[str]:
        """The step for reading: what it takes from each group of operands, then its lines."""
        step = self.step
        names, groups = list(step.inputs), []
        for title, count in (
            ("xs", len(self.xs)),
            ("states", len(self.states)),
            ("others", len(self.others)),
        ):
            if count:
                groups.append(f"{title} {', '.join(names[:count])}")
            del names[:count]
        return [f"step of {'; '.join(groups)}", *formulas(step)]

    @property
    def flops(self) -> float:
        """Of the arithmetic, as outside of a scan."""
        sizes = [numel(one) for one in (*self.states, *self.others)]
        sizes += [numel(one) // self.steps for one in self.xs]
        lines = sum(_is(one.target, Binary, Unary) for one in self.step.lines)
        return float(self.steps * lines * max(sizes, default=0))

    @property
    def batch_norms(self) -> int:
        """Those in a step."""
        return sum(_is(one.target, BatchNorm) for one in self.step.lines)

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.call(operator.SCAN)


def _is(target: Any, *kinds: type[Op]) -> bool:
    return any(issubclass(one, kinds) for one in TABLE.get(target, ()))
