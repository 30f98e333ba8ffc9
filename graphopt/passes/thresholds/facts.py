"""What a rewrite may know of parameters: what their expressions say, or in Deploy mode their values too."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.affine import keeps_sign
from graphopt.ir.graph import Graph
from graphopt.ir.integers import Integers
from graphopt.ir.interpret import Evaluator
from graphopt.ir.value import Value

_POSITIVE = (ops.Exp, ops.Sigmoid, ops.Softplus, ops.Rsqrt)
_SPREADING = (ops.Reshape, ops.Expand, ops.Cast, ops.Permute, ops.Copy, ops.Detach)


class Facts:
    """Signs and integers among the values of a graph. With `at_hand`, parameters keep their values."""

    def __init__(self, graph: Graph, at_hand: bool = False) -> None:
        self.at_hand = at_hand
        self.integers = Integers(graph, at_hand)
        self._evaluator = Evaluator(graph)

    def positive(self, one: Any) -> bool:
        """Whether a number or parameter is positive everywhere."""
        if not isinstance(one, Value):
            return one is None or (not isinstance(one, complex) and bool(one > 0))
        op = one.op
        if isinstance(op, _POSITIVE):
            return True
        if isinstance(op, (*_SPREADING, ops.Reciprocal)) and self.positive(op.input):
            return True
        if (
            isinstance(op, (ops.Mul, ops.Div))
            and self.positive(op.left)
            and self.positive(op.right)
        ):
            return True
        if isinstance(op, ops.Full):
            return bool(op.fill_value > 0)
        return self.at_hand and one.is_constant and bool((self._value(one) > 0).all())

    def not_negative(self, one: Any) -> bool:
        """Whether a number or parameter is positive or zero everywhere."""
        if not isinstance(one, Value):
            return one is None or bool(one >= 0)
        if keeps_sign(one) or self.positive(one):
            return True
        op = one.op
        if isinstance(op, (ops.Mean, ops.Sum, *_SPREADING)) and self.not_negative(op.input):
            return True
        return self.at_hand and one.is_constant and bool((self._value(one) >= 0).all())

    def _value(self, one: Value) -> torch.Tensor:
        return torch.as_tensor(self._evaluator.evaluate(one.node))
