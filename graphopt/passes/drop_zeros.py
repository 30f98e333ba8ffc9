"""Terms that are zero whatever the input is go away, and factors that are one.

    y + (0 x + b)  =  y + b,        y + 0 * f(x)  =  y,        y + f(0 x)  =  y  where f(0) = 0

A branch whose last map, gate or scale is zero in this very model: an adapter that was switched off, a
block that was inserted as the identity (LLaMA-Pro, arXiv 2401.02415), layers pruned to zero. The values
are those at hand, so this is for Deploy mode. Holds for finite inputs: 0 * inf is nan.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same_shape
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Algebraic, Exact
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Evaluator
from graphopt.ir.storage import states_of
from graphopt.ir.value import Value
from graphopt.passes.base import Pass


@dataclasses.dataclass(frozen=True)
class DropZeros(Pass):
    """Branches whose last map or scale is zero are dropped from sums, scales of one from products."""

    name = "drop-zeros"

    def run(self, session: Session) -> None:
        graph, zeros = session.graph, _Zeros(session.graph)
        for node in graph.calls:
            builder = Builder(graph, node)
            op = None if node._erased else builder.view(node)
            if isinstance(op, ops.Mul) and not op.out.is_constant:
                self._without_ones(session, op, zeros)
            if not isinstance(op, (ops.Add, ops.Sub)) or op.out.is_constant:
                continue
            sides = [(op.right, op.left)] + [(op.left, op.right)] * isinstance(op, ops.Add)
            for zero, rest in sides:
                if not isinstance(rest, Value) or rest.dtype != op.out.dtype:
                    continue
                if not same_shape(rest.shape, op.out.shape):
                    continue
                found, bias = zeros.is_zero(zero)
                if not found:
                    continue
                new = rest
                if bias is not None:
                    new = builder.emit(op.replace(left=rest, right=bias), like=op)
                if session.replace("drop-zeros", Algebraic(), node, new.node, builder.made):
                    session.erase_dead([node])
                    break
                builder.rollback()

    def _without_ones(self, session: Session, op: ops.Mul, zeros: _Zeros) -> None:
        for rest, factor in ((op.left, op.right), (op.right, op.left)):
            if not isinstance(rest, Value) or not zeros.is_one(factor):
                continue
            if rest.dtype == op.out.dtype and same_shape(rest.shape, op.out.shape):
                if session.replace("drop-zeros", Exact(), op.out.node, rest.node):
                    session.erase_dead([op.out.node])
                return


def _is_real(value: Value) -> bool:
    return value.dtype.is_floating_point and not value.is_constant


def _of_zero(node: fx.Node) -> float:
    """What an op of one operand makes of zero."""
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda one: torch.zeros(1, dtype=one.meta["val"].dtype)
    )
    return float(node.target(*args, **kwargs))  # type: ignore[operator]


class _Zeros:
    """Which values are zero for every input; a state is looked at once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._evaluator = Evaluator(graph)
        self._known: dict[Any, bool] = {}

    def is_zero(self, value: Any) -> tuple[bool, Value | None]:
        """Whether a value is zero but for a bias, and the bias laid out to be added in its place."""
        op = value.op if isinstance(value, Value) else None
        if isinstance(op, (ops.Dropout, ops.Copy)) and not getattr(op, "train", False):
            return self.is_zero(op.input)
        if isinstance(op, (ops.Linear, ops.Conv)) and self._vanishes(op.weight):
            bias = op.bias
            if bias is None or self._vanishes(bias):
                return True, None
            return True, bias.reshape(-1, *(1,) * op.rank) if isinstance(op, ops.Conv) else bias
        if isinstance(op, ops.Mul):
            sides = op.left, op.right
            return any(map(self._vanishes, sides)) or (None in map(self._zero_bias, sides)), None
        if isinstance(op, ops.Unary) and _is_real(op.input) and _of_zero(value.node) == 0:
            return self._zero_bias(op.input) is None, None
        return False, None

    def _zero_bias(self, value: Any) -> Any:
        """None for what is zero with no bias."""
        found, bias = self.is_zero(value)
        return bias if found else False

    def is_one(self, value: Any) -> bool:
        """Whether a parameter, or an expression of parameters, is one everywhere."""
        if (
            not isinstance(value, Value)
            or not value.is_constant
            or not value.dtype.is_floating_point
        ):
            return False
        return bool((torch.as_tensor(self._evaluator.evaluate(value.node)) == 1).all())

    def _vanishes(self, operand: Any) -> bool:
        if not isinstance(operand, Value):
            return bool(operand == 0)
        if not operand.is_constant or not operand.dtype.is_floating_point:
            return False
        node = operand.node
        if node not in self._known:
            # An expression of parameters none of which is zero is taken not to be.
            self._known[node] = (
                not bool(self.graph.states[str(node.target)].tensor.any())
                if node.op == "get_attr"
                else any(self._vanishes(operand.builder.value(one)) for one in states_of(node))
                and not bool(torch.as_tensor(self._evaluator.evaluate(node)).any())
            )
        return self._known[node]
