"""Which values are integers, or multiples of another unit, within bounds: an abstract interpretation.

    sign(x) in {-1, 0, 1},   [x > t] in {0, 1},   a sum over n taps of x w in n [min x w, max x w]

A value of this kind that is small beside 1 / eps of its dtype is computed without rounding, in whatever
order sums are taken: a comparison of it with a number halfway between two integers never is a tie, and
rounding never decides it. Numbers are taken to be no nan.

What is known of parameters is known of their expressions (`sign(W)`), whatever W becomes in training;
with `at_hand` also of their present values, for Deploy mode.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from functools import singledispatchmethod
from typing import Any

import torch

from graphopt.ir import ops
from graphopt.ir.affine import fixed
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Evaluator
from graphopt.ir.value import Value

DEEPEST = 64  # ops that are followed from a value towards what it is computed from
UNITS = (1.0, 0.5)
_ROUNDING = (ops.Add, ops.Sub, ops.Mul, ops.Sum, ops.Conv, ops.Linear, ops.Cast)
_ROUNDED = ("aten::floor", "aten::ceil", "aten::round", "aten::trunc")


@dataclasses.dataclass(frozen=True)
class Multiples:
    """Multiples of `unit` (a power of two) from `low` to `high`, which may be infinite."""

    low: float
    high: float
    unit: float = 1.0

    @property
    def size(self) -> float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))

    def exact_in(self, dtype: torch.dtype) -> bool:
        """Whether their sums and differences with multiples of half the unit, of twice their size at
        most, are numbers of `dtype`."""
        return dtype.is_floating_point and self.size + 1 <= self.unit / 8 / torch.finfo(dtype).eps

    def __or__(self, other: Multiples) -> Multiples:
        return Multiples(
            min(self.low, other.low), max(self.high, other.high), min(self.unit, other.unit)
        )

    def __add__(self, other: Multiples) -> Multiples:
        return Multiples(self.low + other.low, self.high + other.high, min(self.unit, other.unit))

    def __neg__(self) -> Multiples:
        return Multiples(-self.high, -self.low, self.unit)

    def __mul__(self, other: Multiples) -> Multiples:
        ends = [_times(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return Multiples(min(ends), max(ends), self.unit * other.unit)

    def repeated(self, times: int) -> Multiples:
        """The sum of so many of them, or of fewer."""
        return Multiples(min(0.0, self.low) * times, max(0.0, self.high) * times, self.unit)


BITS = Multiples(0.0, 1.0)
SIGNS = Multiples(-1.0, 1.0)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


class Integers:
    """What is known of the values of a graph; ask anew once the graph has changed."""

    def __init__(self, graph: Graph, at_hand: bool = False) -> None:
        self.graph, self.at_hand = graph, at_hand
        self._known: dict[Any, Multiples | None] = {}
        self._evaluator: Evaluator | None = None
        self._depth = 0

    def of(self, operand: Any) -> Multiples | None:
        """What an operand is a multiple of, and its bounds; None if nothing is known."""
        if not isinstance(operand, Value):
            return _number(operand)
        if not operand.is_tensor:
            return None
        node = operand.node
        if node not in self._known:
            if self._depth == DEEPEST:
                return None
            self._depth += 1
            self._known[node] = self._of(operand)
            self._depth -= 1
        return self._known[node]

    def _of(self, value: Value) -> Multiples | None:
        if value.dtype is torch.bool:
            return BITS
        found = None
        if value.node.op == "call_function":
            op = value.op
            found = self._unseen(value) if op is None else self._entry(op)
            if found is not None and isinstance(op, _ROUNDING) and value.dtype.is_floating_point:
                found = found if found.exact_in(value.dtype) else None
        elif value.node.op == "get_attr":
            state = self.graph.states[str(value.node.target)]
            if state.kind == "constant":
                return _values(state.tensor)
        if found is None and self.at_hand and value.is_constant:
            if self._evaluator is None:
                self._evaluator = Evaluator(self.graph)
            return _values(self._evaluator.evaluate(value.node))
        return found

    def _all(self, *operands: Any) -> list[Multiples] | None:
        """What is known of all operands, None if of one of them nothing is: parameters come last, for
        their values may have to be computed."""
        found: dict[int, Multiples] = {}
        for index, one in sorted(enumerate(operands), key=lambda pair: fixed(pair[1])):
            known = self.of(one)
            if known is None:
                return None
            found[index] = known
        return [found[index] for index in range(len(operands))]

    def _unseen(self, value: Value) -> Multiples | None:
        """Ops without a view."""
        name = getattr(getattr(value.node.target, "_schema", None), "name", "")
        if name not in _ROUNDED or not value.dtype.is_floating_point:
            return None
        inner = self.of(value.builder.value(value.node.all_input_nodes[0]))
        return inner or Multiples(-math.inf, math.inf)

    # -- op by op: an op without an entry is unknown ----------------------------------------------

    @singledispatchmethod
    def _entry(self, op: Any) -> Multiples | None:
        return None

    @_entry.register
    def _(self, op: ops.Sign) -> Multiples | None:
        return SIGNS

    @_entry.register
    def _(self, op: ops.Compare) -> Multiples | None:
        return BITS

    @_entry.register
    def _(self, op: ops.Heaviside) -> Multiples | None:
        at_zero = self.of(op.right)
        return None if at_zero is None else BITS | at_zero

    @_entry.register
    def _(self, op: ops.Full) -> Multiples | None:
        return _number(op.fill_value)

    @_entry.register
    def _(self, op: ops.Where) -> Multiples | None:
        both = self._all(op.left, op.right)
        return None if both is None else both[0] | both[1]

    @_entry.register
    def _(self, op: ops.Add) -> Multiples | None:
        both = self._all(op.left, op.right)
        return None if both is None else both[0] + both[1]

    @_entry.register
    def _(self, op: ops.Sub) -> Multiples | None:
        both = self._all(op.left, op.right)
        return None if both is None else both[0] + -both[1]

    @_entry.register
    def _(self, op: ops.Mul) -> Multiples | None:
        both = self._all(op.left, op.right)
        return None if both is None else both[0] * both[1]

    @_entry.register
    def _(self, op: ops.Neg) -> Multiples | None:
        inner = self.of(op.input)
        return None if inner is None else -inner

    @_entry.register
    def _(self, op: ops.Abs) -> Multiples | None:
        inner = self.of(op.input)
        return None if inner is None else Multiples(0.0, inner.size, inner.unit)

    @_entry.register
    def _(self, op: ops.Relu) -> Multiples | None:
        return self._between(op.input, 0.0, None)

    @_entry.register
    def _(self, op: ops.Clamp) -> Multiples | None:
        return self._between(op.input, op.min, op.max)

    def _between(self, value: Value, low: float | None, high: float | None) -> Multiples | None:
        inner = self.of(value)
        if inner is None:
            return None
        for limit in (low, high):
            if limit is not None and math.isfinite(limit):
                if (known := _number(limit)) is None:
                    return None
                inner = dataclasses.replace(inner, unit=min(inner.unit, known.unit))
        floor = -math.inf if low is None else low
        ceiling = math.inf if high is None else high
        return dataclasses.replace(
            inner,
            low=min(max(inner.low, floor), ceiling), high=min(max(inner.high, floor), ceiling),
        )  # fmt: skip

    @_entry.register
    def _(self, op: ops.Cast) -> Multiples | None:
        inner = self.of(op.input)
        if inner is None or op.dtype is torch.bool or inner.unit < 1:
            return None
        return inner

    @_entry.register(ops.Copy)
    @_entry.register(ops.Detach)
    @_entry.register(ops.Reshape)
    @_entry.register(ops.Permute)
    @_entry.register(ops.Expand)
    @_entry.register(ops.Repeat)
    @_entry.register(ops.RepeatInterleave)
    @_entry.register(ops.Slice)
    @_entry.register(ops.Select)
    @_entry.register(ops.Flip)
    @_entry.register(ops.Roll)
    @_entry.register(ops.PixelShuffle)
    @_entry.register(ops.PixelUnshuffle)
    @_entry.register(ops.ChannelShuffle)
    @_entry.register(ops.IndexSelect)
    @_entry.register(ops.MaxPool)
    def _(self, op: Any) -> Multiples | None:
        return self.of(op.input)

    @_entry.register
    def _(self, op: ops.Dropout) -> Multiples | None:
        return None if op.train else self.of(op.input)

    @_entry.register
    def _(self, op: ops.Pad) -> Multiples | None:
        inner = self.of(op.input)
        if inner is None or op.mode != "constant":
            return inner
        border = _number(op.value or 0.0)
        return None if border is None else inner | border

    @_entry.register(ops.Cat)
    @_entry.register(ops.Stack)
    def _(self, op: Any) -> Multiples | None:
        pieces = self._all(*op.tensors)
        return None if pieces is None else functools.reduce(operator.or_, pieces)

    @_entry.register
    def _(self, op: ops.Sum) -> Multiples | None:
        inner, sizes = self.of(op.input), [op.input.shape[axis] for axis in op.dims]
        if inner is None or not all(isinstance(size, int) for size in sizes):
            return None
        return inner.repeated(math.prod(sizes))

    @_entry.register(ops.Conv)
    @_entry.register(ops.Linear)
    def _(self, op: Any) -> Multiples | None:
        known = self._all(op.input, op.weight, 0.0 if op.bias is None else op.bias)
        if known is None:
            return None
        taps = op.weight.shape[1:] if isinstance(op, ops.Linear) or not op.transposed else (
            op.weight.shape[0], *op.weight.shape[2:]
        )  # fmt: skip
        if not all(isinstance(size, int) for size in taps):
            return None
        return (known[0] * known[1]).repeated(math.prod(taps)) + known[2]


def _number(number: Any) -> Multiples | None:
    if isinstance(number, (bool, int, float)) and math.isfinite(number):
        for unit in UNITS:
            if number % unit == 0:
                return Multiples(float(number), float(number), unit)
    return None


def _values(tensor: Any) -> Multiples | None:
    """What the elements of a tensor have in common."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex() or not tensor.numel():
        return None
    tensor = tensor.detach()
    if tensor.is_sparse or not bool(tensor.isfinite().all()):
        return None
    low, high = float(tensor.min()), float(tensor.max())
    if not tensor.is_floating_point():
        return Multiples(low, high)
    for unit in UNITS:
        if bool((tensor % unit == 0).all()):
            return Multiples(low, high, unit)
    return None
