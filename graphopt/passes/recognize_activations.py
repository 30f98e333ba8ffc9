"""Activations that are written out become one op.

    x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2   =   gelu(x, "tanh")
    x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))        =   gelu(x, "tanh")
    x (1 + erf(x / sqrt 2)) / 2                       =   gelu(x)
    x sigmoid(x)  =  x (1 + tanh(x / 2)) / 2          =   silu(x)
    x tanh(softplus(x))                               =   mish(x)
    x clamp(x + 3, 0, 6) / 6  =  x hardsigmoid(x)     =   hardswish(x)

Each left side is a polynomial in x and in t, one bounded function of a polynomial in x. Both polynomials are
read off the graph and compared with these, so every order of factors and terms, every way to write a power
and every number in front (a gelu without its half is two gelus) is the same to this pass. Numbers must be
those of the op up to rounding in float64: a constant that was cut to fewer digits is another function, and
is reported. Sources: Hendrycks and Gimpel, arXiv 1606.08415; Howard et al., arXiv 1905.02244; Misra, arXiv
1908.08681.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same_shape
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Operand, Value
from graphopt.passes.base import RewritePass
from graphopt.passes.canonicalize import uniform

Powers = tuple[int, int]  # of x and of t
Polynomial = dict[Powers, float]  # the coefficients

HIGHEST = 3  # power of x
DEEPEST = 5  # ops between the result, or the argument of t, and x
ROUNDING = 2.0**-50  # relative; numbers that are multiplied in another order
SHORTENED = 1e-5  # relative; numbers that are meant to be equal
_ARITHMETIC = (ops.Add, ops.Sub, ops.Mul, ops.Div, ops.Neg, ops.Pow)
_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for (i, j), a in left.items():
        for (k, m), b in right.items():
            found[i + k, j + m] = found.get((i + k, j + m), 0.0) + a * b
    return found


def _gelu_argument(scale: float) -> Polynomial:
    return {(1, 0): scale * _SLOPE, (3, 0): scale * _SLOPE * _CUBIC}


@dataclasses.dataclass(frozen=True)
class Law:
    """`outer(x, t(inner(x)))` is `make(x)`."""

    function: type[ops.Op]
    inner: Polynomial
    outer: Polynomial
    make: Callable[[Value], ops.Op]
    name: str


_HALF_SUM, _PRODUCT = {(1, 0): 0.5, (1, 1): 0.5}, {(1, 1): 1.0}  # x (1 + t) / 2 and x t
LAWS = (
    Law(ops.Tanh, _gelu_argument(1), _HALF_SUM, lambda x: ops.Gelu(x, "tanh"), "gelu"),
    Law(ops.Sigmoid, _gelu_argument(2), _PRODUCT, lambda x: ops.Gelu(x, "tanh"), "gelu"),
    Law(ops.Erf, {(1, 0): math.sqrt(0.5)}, _HALF_SUM, lambda x: ops.Gelu(x), "gelu"),
    Law(ops.Sigmoid, {(1, 0): 1.0}, _PRODUCT, lambda x: ops.Silu(x), "silu"),
    Law(ops.Tanh, {(1, 0): 0.5}, _HALF_SUM, lambda x: ops.Silu(x), "silu"),
    Law(ops.Softplus, {(1, 0): 1.0}, _PRODUCT, lambda x: ops.Mish(x), "mish"),
    Law(ops.Hardsigmoid, {(1, 0): 1.0}, _PRODUCT, lambda x: ops.Hardswish(x), "hardswish"),
    Law(ops.Clamp, {(1, 0): 1 / 6, (0, 0): 0.5}, _PRODUCT, lambda x: ops.Hardswish(x), "hardswish"),
)
_FUNCTIONS = tuple({law.function for law in LAWS} - {ops.Softplus})


@rewrite(
    unproved="index notation has no definitions of these functions; "
    "tests/passes/test_recognize_activations.py draws spellings, and every site is checked in float64"
)
def recognize_activation(op: ops.Mul | ops.Div | ops.Add, rw: Rewriter) -> Value:
    """A polynomial in x and in a bounded function of x is an activation of x."""
    rw.match(op.out.dtype.is_floating_point and not _scaled_next(rw, op.out))
    shortened = ""
    for gate in _gates(op):
        function, argument, size = _bounded(gate)
        for x in _inside(argument):
            if x.dtype != op.out.dtype or not same_shape(x.shape, op.out.shape):
                continue
            inner = _Reader({x: {(1, 0): 1.0}}).read(argument)
            if inner is None:
                continue
            inner = _times(inner, {(0, 0): 1 / size})
            laws = [law for law in LAWS if law.function is function]
            if not any(_ratio(inner, law.inner, SHORTENED) for law in laws):
                continue
            reader = _Reader({x: {(1, 0): 1.0}, gate.out: {(0, 1): size}})
            outer = reader.read(op.out)
            for law in laws:
                factor = None if outer is None else _ratio(outer, law.outer, SHORTENED)
                alike = _ratio(inner, law.inner, SHORTENED)
                if factor is None or alike is None or abs(alike - 1) > SHORTENED:
                    continue
                if not (_ratio(outer, law.outer, ROUNDING) and _equal(inner, law.inner)):
                    shortened = shortened or f"its numbers are those of {law.name} in fewer digits"
                    continue
                rw.match(not x.is_constant)
                rw.require(
                    reader.closed(op.out.node),
                    f"what {law.name} is written with is read elsewhere too",
                )
                one = abs(factor - 1) <= ROUNDING
                found = rw.emit(law.make(x), like=op)
                return found if one else found * factor
    rw.require(not shortened, shortened)
    rw.decline("no activation is written out here", near=False)


def _scaled_next(rw: Rewriter, value: Value) -> bool:
    """Whether all that happens to a value is that a number multiplies it, which is part of the formula."""
    reader = rw.view(value.users[0]) if len(value.users) == 1 else None
    if isinstance(reader, ops.Neg):
        return True
    return isinstance(reader, (ops.Mul, ops.Div)) and any(
        isinstance(one, (int, float)) for one in reader.operands
    )


def _gates(op: Any) -> Iterator[Any]:
    """The bounded functions among what sums and products make a value of."""
    for value in _inside(op.out):
        if isinstance(found := value.op, _FUNCTIONS):
            yield found


def _inside(value: Value) -> Iterator[Value]:
    """`value` and what it is computed from by arithmetic, the nearest first."""
    level, seen = [value], {value}
    for _ in range(DEEPEST + 1):
        yield from level
        below = []
        for one in level:
            op: Any = one.op
            if not isinstance(op, _ARITHMETIC):
                continue
            for other in op.operands if hasattr(op, "operands") else (op.input,):
                if isinstance(other, Value) and other.is_tensor and other not in seen:
                    seen.add(other)
                    below.append(other)
        level = below


def _bounded(gate: Any) -> tuple[type[ops.Op], Value, float]:
    """The law's function that a gate is, its argument, and the number that divides both of them: a
    clamp to [0, c] is c clamp(u / c, 0, 1)."""
    if isinstance(gate, ops.Clamp):
        high = gate.max if gate.min == 0 and gate.max is not None and gate.max > 0 else math.inf
        return ops.Clamp, gate.input, float(high)
    plus = gate.input.op if isinstance(gate, ops.Tanh) else None
    if isinstance(plus, ops.Softplus) and plus.beta == 1 and plus.threshold >= 20:
        return ops.Softplus, plus.input, 1.0
    return type(gate), gate.input, 1.0


class _Reader:
    """Values as polynomials in those that are known."""

    def __init__(self, known: Mapping[Value, Polynomial]) -> None:
        self.known = dict(known)
        self.gated: dict[fx.Node, None] = {}  # what depends on t

    def read(self, value: Operand, depth: int = DEEPEST) -> Polynomial | None:
        """The polynomial that an operand is, None if it is none."""
        if isinstance(value, Value) and value in self.known:
            found = self.known[value]
        elif (number := uniform(value)) is not None:
            return {(0, 0): float(number)} if number else {}
        elif not isinstance(value, Value) or not depth:
            return None
        else:
            read = self._computed(value.op, depth - 1)
            if read is None or any(i > HIGHEST or j > 1 for i, j in read):
                return None
            found = self.known[value] = read
        if any(j for _, j in found):
            self.gated[value.node] = None  # type: ignore[union-attr]
        return found

    def _computed(self, op: Any, depth: int) -> Polynomial | None:
        if not isinstance(op, _ARITHMETIC):
            return None
        if isinstance(op, (ops.Neg, ops.Pow)):
            power = -1 if isinstance(op, ops.Neg) else op.exponent
            if power not in (-1, 2, 3) or not (power > 0 or isinstance(op, ops.Neg)):
                return None
            base = self.read(op.input, depth)
            if base is None or power < 0:
                return base and _times(base, {(0, 0): -1.0})
            square = _times(base, base)
            return square if power == 2 else _times(square, base)
        left, right = self.read(op.left, depth), self.read(op.right, depth)
        if left is None or right is None:
            return None
        if isinstance(op, ops.Mul):
            return _times(left, right)
        if isinstance(op, ops.Div):
            return _times(left, {(0, 0): 1 / right[0, 0]}) if right.keys() == {(0, 0)} else None
        sign = -1.0 if isinstance(op, ops.Sub) else 1.0
        total = dict(left)
        for powers, number in right.items():
            total[powers] = total.get(powers, 0.0) + sign * number
        return {powers: number for powers, number in total.items() if number}

    def closed(self, root: fx.Node) -> bool:
        """Whether t, and what is made of it on the way to `root`, has no other reader."""
        return all(set(one.users) <= self.gated.keys() for one in self.gated if one is not root)


def _ratio(found: Polynomial | None, wanted: Polynomial, limit: float) -> float | None:
    """The number by which `wanted` is multiplied in `found`, None if that is not one number."""
    if found is None or found.keys() != wanted.keys():
        return None
    ratios = [found[powers] / wanted[powers] for powers in wanted]
    same = all(abs(one - ratios[0]) <= limit * abs(ratios[0]) for one in ratios)
    return ratios[0] if same and math.isfinite(ratios[0]) else None


def _equal(found: Polynomial, wanted: Polynomial) -> bool:
    ratio = _ratio(found, wanted, ROUNDING)
    return ratio is not None and abs(ratio - 1) <= ROUNDING


@dataclasses.dataclass(frozen=True)
class RecognizeActivations(RewritePass):
    """Formulas of GELU, SiLU, Mish and Hardswish become activations."""

    name = "recognize-activations"
    rewrites = (recognize_activation,)
