"""What the passes that round have in common: a budget, and the data that it is measured on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.contracts import Calibrated
from graphopt.ir.distance import relative_error
from graphopt.ir.driver import Record, Session, Verdict
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Call
from graphopt.ir.interpret import Interpreter
from graphopt.passes.base import Data, Pass, PassError
from graphopt.passes.precision.narrowing import WIDE, tensors_of
from graphopt.passes.pruning.evidence import EvidenceError, batches, example, misfit


@dataclasses.dataclass(frozen=True)
class Measured(Pass):
    """Base: the outputs stay within `budget` of the float64 ones on `data`, or else nothing is done."""

    budget: float = 0.0  # of the error of any output, relative in the 2-norm
    # What ranges and errors are measured on, (inputs, target); without it the example inputs
    data: Data = dataclasses.field(default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.budget >= 0:
            raise PassError(f"{self.name}: budget is {self.budget}, expected at least 0")

    @property
    def contract(self) -> Calibrated:
        return Calibrated(budget=self.budget)

    def within(self, seen: Callable[[Data], Data]) -> Pass:
        return dataclasses.replace(self, data=seen(self.data)) if self.data else self

    def inputs(self, session: Session) -> list[list[Any]]:
        """The leaves of every call of the data, else of the example inputs.

        Raises:
            PassError: if the model is not called like that.
        """
        graph = session.graph
        # A part that is called in another way too is eager then.
        data = [one for one in self.data if not (_is_part(one) and misfit(graph, one))]
        if not data:
            return [list(session.examples) or example(graph)]
        try:
            return [leaves for leaves, _ in batches(graph, data, self.name)]
        except EvidenceError as error:
            raise PassError(f"{self.name}: {error}") from error

    def said(self, session: Session, done: str, error: float, before: float) -> str:
        """What a record says of `done`."""
        drawn = session.drawn and not self.data
        on = ", on normal draws in place of blank example inputs" if drawn else ""
        return f"{done}; error {error:.1e}, in float32 {before:.1e}{on}"

    def refuse(
        self, session: Session, reason: str, node: fx.Node | None = None, error: float = math.nan
    ) -> None:
        node = session.graph.output if node is None else node
        bound = math.nan if math.isnan(error) else self.budget
        session.refused[self.name, node] = Record(
            self.name, session.graph.where(node), str(self.contract), reason, error, bound, node.name,
            stage=session.pass_name,
        )  # fmt: skip

    def commit(self, session: Session, result: Graph, said: str, error: float) -> bool:
        """Let the graph become `result`, whose error was measured. Returns whether it did."""
        verdict = Verdict(True, error, self.budget)
        if not session.become(self.name, self.contract, result, lambda _: verdict, said):
            return False
        session.applied[-1] = dataclasses.replace(
            session.applied[-1], error=error, bound=self.budget
        )
        return True


def _is_part(batch: Any) -> bool:
    return isinstance(batch, tuple) and isinstance(batch[0], Call)


class Watching(Interpreter):
    """Shows `see` every tensor that is put in or computed."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, writes=False)

    def see(self, node: fx.Node, value: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def run(self, inputs: Sequence[Any], seed: int | None = 0) -> tuple[Any, ...]:
        if seed is not None:
            inputs = copies(inputs)
            for node, value in zip(self.graph.inputs, inputs, strict=False):
                if isinstance(value, Tensor):
                    self.see(node, value)
        return super().run(inputs, seed)

    def call(self, node: fx.Node, env: Any) -> Any:
        value = super().call(node, env)
        if isinstance(value, Tensor):
            self.see(node, value)
        return value


def mixed(graph: Graph) -> str:
    """What a graph computes in beside float32; empty if nothing."""
    dtypes = {
        one.dtype for node in graph.nodes for one in tensors_of(node) if one.is_floating_point()
    }
    other = sorted(str(one).removeprefix("torch.") for one in dtypes - {WIDE})
    return f"the model computes in {', '.join(other)} too, expected float32 alone" if other else ""


def copies(inputs: Sequence[Any]) -> list[Any]:
    return [one.clone() if isinstance(one, Tensor) else one for one in inputs]


@torch.no_grad()
def outputs(graph: Graph, inputs: Sequence[Any], lifted: bool = False) -> list[Any]:
    return list(Interpreter(graph, lifted, writes=False).run(copies(inputs)))


def distance(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """The largest relative error over floating outputs, in the 2-norm; inf where it is not finite."""
    floats = [
        (a, b) for a, b in zip(found, truth, strict=True)
        if isinstance(b, Tensor) and b.is_floating_point()
    ]  # fmt: skip
    return relative_error([a for a, _ in floats], [b for _, b in floats])
