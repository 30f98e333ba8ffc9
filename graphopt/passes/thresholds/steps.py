"""Functions of a sign that take numbers as values: what they are below a threshold, at it, and above.

    sign(sign(x) + 0.1)   =   -1 where x < 0, else 1
    2 [x >= 0] - 1        =    1 where x >= 0, else -1

The fourth value is that of a nan, of which a comparison is false, and the sign 0.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from graphopt.ir import ops
from graphopt.ir.rewrite import Rewriter
from graphopt.ir.value import Value

Values = tuple[float, float, float, float]
SIGN: Values = (-1.0, 0.0, 1.0, 0.0)
LONGEST = 8  # ops on the numbers of one step
SMALL = 4096  # elements of a literal that are looked at
_RELATIONS: dict[str, tuple[bool, bool, bool, bool]] = {
    "lt": (True, False, False, False), "le": (True, True, False, False),
    "gt": (False, False, True, False), "ge": (False, True, True, False),
    "eq": (False, True, False, False), "ne": (True, False, True, True),
}  # fmt: skip
_ARITHMETIC = {
    ops.Add: operator.add, ops.Sub: operator.sub, ops.Mul: operator.mul, ops.Div: operator.truediv,
}  # fmt: skip
_COMPARED = {name: getattr(operator, name) for name in _RELATIONS}


@dataclasses.dataclass(frozen=True)
class Step:
    """`values` of `left` against `right`: below it, at it, above it, and of nan."""

    left: Any
    right: Any
    values: Values

    def map(self, function: Any) -> Step:
        return dataclasses.replace(self, values=tuple(map(function, self.values)))

    @property
    def relation(self) -> str | None:
        """The comparison that this is, if its values are 0 and 1."""
        return next((name for name, one in _RELATIONS.items() if one == self.values), None)


def read(value: Any, left: int = LONGEST) -> Step | None:
    """A value as a step, if it is one."""
    op = value.op if isinstance(value, Value) and left else None
    if isinstance(op, ops.Compare):
        return Step(op.left, op.right, _RELATIONS[op.relation])
    if isinstance(op, ops.Sign):
        return Step(op.input, 0.0, SIGN)
    if isinstance(op, (ops.Cast, ops.Copy, ops.Detach)):
        if isinstance(op, ops.Cast) and not op.dtype.is_floating_point:
            return None
        found = read(op.input, left - 1)
        return None if found is None else found.map(float)
    if isinstance(op, ops.Where):
        found = read(op.condition, left - 1)
        hi, lo = uniform(op.left), uniform(op.right)
        if found is None or hi is None or lo is None:
            return None
        return found.map(lambda one: hi if one else lo)
    if isinstance(op, ops.Neg):
        found = read(op.input, left - 1)
        return None if found is None else found.map(operator.neg)
    if type(op) in _ARITHMETIC and op.out.dtype.is_floating_point:  # type: ignore[union-attr]
        return _calculated(op, left - 1)
    return None


def _calculated(op: Any, left: int) -> Step | None:
    function = _ARITHMETIC[type(op)]
    number = uniform(op.right)
    if number is not None:
        if isinstance(op, ops.Div) and number == 0:
            return None
        found = read(op.left, left)
        return None if found is None else found.map(lambda one: function(one, number))
    number = uniform(op.left)
    found = read(op.right, left) if number is not None and not isinstance(op, ops.Div) else None
    return None if found is None else found.map(lambda one: function(number, one))


def after_sign(step: Step) -> Step:
    return step.map(lambda one: float((one > 0) - (one < 0)))


def after_comparison(step: Step, relation: str, number: float) -> Step:
    return step.map(lambda one: bool(_COMPARED[relation](one, number)))


def choice(rw: Rewriter, step: Step, like: ops.Op) -> Value:
    """A step of two values as a choice between them; declines if it has more."""
    one, other = min(step.values), max(step.values)
    rw.match(one != other)
    for high, low in ((other, one), (one, other)):
        asked = step.map(lambda found, high=high: found == high)
        rest = step.map(lambda found, low=low: found == low)
        if asked.relation is not None and all(
            a != b for a, b in zip(asked.values, rest.values, strict=True)
        ):
            condition = rw.emit(ops.Compare(step.left, step.right, asked.relation))
            dtype, device = like.out.dtype, like.out.meta.device
            # A tensor, so that the result has this dtype and not the default one.
            first = rw.emit(ops.Full((), high, dtype, device))
            return rw.emit(ops.Where(condition, first, low), like=like)
    rw.decline("the step has more than two values", near=False)


def uniform(operand: Any) -> float | None:
    """The one number that an operand consists of, if it is a literal."""
    if not isinstance(operand, Value):
        return float(operand) if isinstance(operand, (bool, int, float)) else None
    if operand.node.op == "get_attr":
        state = operand.builder.graph.states[str(operand.node.target)]
        small = 0 < state.tensor.numel() <= SMALL and not state.tensor.is_complex()
        if state.kind != "constant" or not small:
            return None
        low, high = float(state.tensor.min()), float(state.tensor.max())
        return low if low == high else None
    op = operand.op
    if isinstance(op, ops.Full):
        return uniform(op.fill_value)
    if isinstance(op, (ops.Reshape, ops.Expand, ops.Copy, ops.Detach, ops.Cast)):
        return uniform(op.input)
    if isinstance(op, ops.Neg) and (number := uniform(op.input)) is not None:
        return -number
    if isinstance(op, ops.Mul):
        left, right = uniform(op.left), uniform(op.right)
        return None if left is None or right is None else left * right
    return None
