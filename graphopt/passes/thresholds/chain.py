"""What stands in front of a comparison or a sign, taken off op by op.

    s f(x) + t  against  theta    becomes    s' x + t'  against  theta'

for scales and shifts by numbers, by parameters, or by values of the run that are smaller than x; for
strictly increasing f whose inverse at the threshold is known; for convolutions of integers whose weights
are integers times a scale per output channel.

With g = sgn(s) and tau = (theta - t) / |s| (1 for a scale of zero), s y + t against theta is g y against
tau, and for a function that is linear on both sides of zero, h its inverse,

    g f(x)  against  tau    =    g x  against  g h(g tau)        (tau where g = 0).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import combined, fixed, same, same_shape, total
from graphopt.ir.ops import widen
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.value import Value
from graphopt.passes.thresholds.elsewhere import stays_elsewhere
from graphopt.passes.thresholds.facts import Facts

AROUND = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}
_AFFINE = (ops.BatchNorm, ops.Neg, ops.Mul, ops.Div, ops.Add, ops.Sub)
_FIXING_ZERO = (ops.Tanh, ops.Erf, ops.Elu, ops.LeakyRelu, ops.PRelu, ops.Clamp)
_INCREASING = (*_FIXING_ZERO, ops.Relu, ops.Sigmoid, ops.Exp)


@dataclasses.dataclass(frozen=True)
class Chain:
    """`scale * value + shift` against `threshold`; None for a scale of 1, a shift and a threshold of 0.

    They broadcast to the shape of `value`, in at least float32. `reader` is what reads `value`, and
    `through` says whether more than scales and shifts were taken off; `off` is all that was.
    """

    value: Value
    reader: ops.Op
    scale: Value | float | None = None
    shift: Value | float | None = None
    threshold: Value | float | None = None
    through: bool = False
    off: tuple[ops.Op, ...] = ()

    @property
    def moved(self) -> Any:
        """The threshold less the shift."""
        minus = self.shift if self.shift is None else _negated(self.shift)
        return _total(self.threshold, minus)

    @property
    def at_run_time(self) -> bool:
        """Whether the shift or the threshold depends on the input."""
        return not fixed(self.shift) or not fixed(self.threshold)

    def normal(self, rw: Rewriter, facts: Facts) -> tuple[Value | float | None, Any]:
        """g and tau: `g * value` against tau means the same. g is the sign of the scale, None for 1."""
        scale, moved = self.scale, self.moved
        if scale is None:
            return None, moved
        if not isinstance(scale, Value):
            rw.match(scale != 0)
            return (None if scale > 0 else -1.0), _divided(rw, moved, abs(scale))
        if facts.positive(scale):
            return None, _divided(rw, moved, scale)
        sign, size = sign_and_size(rw, scale)
        return sign, _divided(rw, moved, size)


def sign_and_size(rw: Rewriter, scale: Value) -> tuple[Value, Value]:
    """-1, 0 or 1, and the absolute value with 1 for 0."""
    scale = widen(scale)
    zero = rw.emit(ops.Compare(scale, 0.0, "eq"))
    size = rw.emit(ops.Abs(scale)) + zero.to(scale.dtype)
    return rw.emit(ops.Sign(scale)), size


def is_sign(scale: Any) -> bool:
    """Whether this is the sign of a scale, as `sign_and_size` writes it."""
    op = scale.op if isinstance(scale, Value) else None
    while isinstance(op, (ops.Cast, ops.Reshape, ops.Expand)):
        op = op.input.op
    return isinstance(op, ops.Sign)


def collect(
    rw: Rewriter, value: Value, reader: ops.Op, threshold: Value | float | None,
    relation: str | None, facts: Facts,
) -> Chain:  # fmt: skip
    """The chain in front of `value`, as far as only what follows reads it; `relation` is None for a
    sign, which is the same as both > and <."""
    chain = Chain(value, reader, threshold=wide(threshold))
    while (op := chain.value.op) is not None:
        since = len(rw.made)
        longer = _longer(rw, chain, op, relation, facts)
        if longer is None or not _alike(longer.value, value):
            rw.rollback(since)
            break
        if not rw.only_user(chain.value, chain.reader):
            rw.rollback(since)
            rw.require(
                chain.value != value,
                f"{describe(value)} is read elsewhere too, so it has to be computed",
            )
            break
        if isinstance(op, ops.BatchNorm) and stays_elsewhere(rw, op):
            rw.rollback(since)
            rw.require(
                chain.value != value,
                f"{describe(value)} is computed in other places too, where it is read for more than "
                "comparisons: the steps of a loop stay alike",
            )
            break
        chain = dataclasses.replace(longer, off=(*chain.off, op))
    return chain


def _longer(
    rw: Rewriter, chain: Chain, op: ops.Op, relation: str | None, facts: Facts
) -> Chain | None:
    """The chain with `op`, which computes its value, taken off too."""
    if isinstance(op, _INCREASING):
        return _increasing(rw, chain, op, relation, facts)
    reader, found = op, _scaled(rw, op) if isinstance(op, _AFFINE) else None
    if isinstance(op, ops.Reshape):
        reader, found = _beside(rw, op, alone=not chain.off) or (op, None)
    if found is None:
        return None
    value, scale, shift = found
    moved = shift if shift is None else combined(shift, chain.scale)
    return dataclasses.replace(
        chain, value=value, reader=reader, scale=combined(chain.scale, scale),
        shift=_total(moved, chain.shift),
    )  # fmt: skip


# -- scales and shifts ------------------------------------------------------------------------------


def _scaled(rw: Rewriter, op: ops.Op) -> tuple[Value, Any, Any] | None:
    """x, s and t of s x + t, of shapes that broadcast with x, in at least float32; None for s of 1 and
    for t of 0. None for what is no scale and shift by parameters, numbers, or smaller values."""
    if isinstance(op, ops.BatchNorm):
        rw.require(
            not op.uses_batch_statistics,
            f"{describe(op.out)} normalizes with batch statistics; call model.eval() before optimizing",
        )
        shape = (-1, *(1,) * (op.input.ndim - 2))
        scale, shift = op.scale_and_shift()
        return op.input, scale.reshape(*shape), shift.reshape(*shape)
    if isinstance(op, ops.Neg):
        return op.input, -1.0, None
    assert isinstance(op, (ops.Mul, ops.Div, ops.Add, ops.Sub))
    left, right = op.left, op.right
    adds = isinstance(op, (ops.Add, ops.Sub))
    if _given(left, op.out, adds) and not isinstance(op, ops.Div):
        if isinstance(op, ops.Sub):  # t - x
            return None if _given(right, op.out, adds) else (right, -1.0, wide(left))  # type: ignore[return-value]
        left, right = right, left
    if _given(left, op.out, adds) or not _given(right, op.out, adds) or isinstance(right, complex):
        return None
    assert isinstance(left, Value)
    if isinstance(op, ops.Add):
        return left, None, wide(right)
    if isinstance(op, ops.Sub):
        return left, None, _negated(wide(right))
    if isinstance(right, Value):
        right = widen(right)
        return left, rw.emit(ops.Reciprocal(right)) if isinstance(op, ops.Div) else right, None
    if right == 0:
        return None
    return left, 1 / right if isinstance(op, ops.Div) else right, None


def _given(operand: Any, out: Value, smaller: bool) -> bool:
    """Whether an operand is a number, a parameter, or, where `smaller` ones will do, a value that is
    broadcast to the shape of `out`."""
    if fixed(operand):
        return True
    return smaller and operand.dtype == out.dtype and not same_shape(operand.shape, out.shape)


def _beside(
    rw: Rewriter, last: ops.Reshape, alone: bool
) -> tuple[ops.Op, tuple[Value, Any, Any]] | None:
    """What reads x, and what `_scaled` says of it, for scales and shifts of x in another shape with the
    same first axis, reshape(s reshape(x) + t): a norm of every element is written like that.

    Declines where nothing else is to be taken off (`alone`) and a value in between is read elsewhere."""
    shape, inner = last.out.shape, last.input.shape
    if not inner or not shape or not same(inner[0], shape[0]):
        return None
    value, reader = last.input, last
    scale: Any = None
    shift: Any = None
    shared: list[Value] = []
    while not isinstance(op := value.op, ops.Reshape):
        found = _scaled(rw, op) if isinstance(op, _AFFINE) else None
        if found is None:
            return None
        shared += [value] * (not rw.only_user(value, reader))
        reader, (value, times, plus) = op, found  # type: ignore[assignment]
        if not same_shape(value.shape, inner) or not (fixed(times) and fixed(plus)):
            return None
        shift = _total(plus if plus is None else combined(plus, scale), shift)
        scale = combined(scale, times)
    x = op.input
    if reader is last or not same_shape(x.shape, shape):
        return None
    shared += [value] * (not rw.only_user(value, reader))
    if shared:
        rw.require(
            not alone,
            f"{describe(shared[0])} is read elsewhere too, so it has to be computed",
        )
        return None
    times, plus = _spread(scale, inner, shape), _spread(shift, inner, shape)
    return None if times is None or plus is None else (op, (x, times[0], plus[0]))


def _spread(one: Any, inner: tuple[Any, ...], shape: tuple[Any, ...]) -> tuple[Any] | None:
    """A parameter that broadcasts to `inner` as one that broadcasts to `shape`, each with the same
    first axis; None if it differs along that, or sizes are not known."""
    if not isinstance(one, Value) or one.ndim == 0:
        return (one,)
    sizes = (1,) * (len(inner) - one.ndim) + one.shape
    if not same(sizes[0], 1):
        return None
    per_channel = min(len(inner), len(shape)) > 1 and same(inner[1], shape[1])
    if per_channel and all(same(size, 1) for size in sizes[2:]):
        return (one.reshape(sizes[1], *(1,) * (len(shape) - 2)),)
    if not all(isinstance(size, int) for size in (*inner[1:], *shape[1:])):
        return None
    return (one.reshape(*sizes[1:]).expand(*inner[1:]).reshape(*shape[1:]),)


# -- increasing functions -----------------------------------------------------------------------------


def _increasing(
    rw: Rewriter, chain: Chain, op: Any, relation: str | None, facts: Facts
) -> Chain | None:
    """g f(x) against tau as g x against what f takes there."""
    if isinstance(op, (ops.LeakyRelu, ops.PRelu)):
        slope = _slope(op)
        if not facts.positive(slope):
            rw.require(
                chain.scale is not None or chain.moved is not None,
                f"the slopes of {describe(op.out)} are not known to be positive"
                + (" everywhere" if facts.at_hand else ", whatever training makes of them"),
            )
            return None
        sign, moved = chain.normal(rw, facts)
        if moved is None:
            return _past(chain, op, sign, None)
        return _past(chain, op, sign, _through_slope(rw, slope, sign, moved))
    if isinstance(chain.scale, Value) and not facts.positive(chain.scale):
        # Any sign: only zero is known to stay where it is.
        strict = not isinstance(op, ops.Clamp) or _inside(op, 0.0, None)
        if chain.moved is None and isinstance(op, _FIXING_ZERO) and strict and _rises(op):
            return dataclasses.replace(chain, value=op.input, reader=op, through=True)
        return None
    sign, moved = chain.normal(rw, facts)
    if isinstance(moved, Value):
        return None
    if sign is not None and relation is not None:
        relation = AROUND[relation]
    at = (moved or 0.0) * (1.0 if sign is None else -1.0)
    start = _inverse(op, at, relation)
    if start is None:
        return None
    return _past(chain, op, sign, start * (1.0 if sign is None else -1.0) or None)


def _past(chain: Chain, op: Any, sign: Any, threshold: Any) -> Chain:
    return Chain(op.input, op, sign, None, threshold, through=True)


def _slope(op: ops.LeakyRelu | ops.PRelu) -> Value | float:
    """The slope below zero, laid out for the values."""
    if isinstance(op, ops.LeakyRelu):
        return op.negative_slope
    slope = widen(op.weight)
    return (
        slope.reshape() if slope.shape == (1,) else slope.reshape(-1, *(1,) * (op.input.ndim - 2))
    )


def _through_slope(rw: Rewriter, slope: Any, sign: Any, moved: Any) -> Any:
    """g h(g tau), and tau where g = 0, for h(y) = y above zero and y / slope below."""
    if (
        not isinstance(moved, Value)
        and not isinstance(slope, Value)
        and not isinstance(sign, Value)
    ):
        at = moved if sign is None else sign * moved
        at = at if at >= 0 else at / slope
        return at if sign is None else sign * at
    if not isinstance(moved, Value):
        like = slope if isinstance(slope, Value) else sign
        assert isinstance(like, Value)
        moved = rw.emit(ops.Full((), moved, like.dtype, like.meta.device))
    at = moved if sign is None else moved * sign
    below = rw.emit(ops.Clamp(at, None, 0.0))
    at = rw.emit(ops.Relu(at)) + _divided(rw, below, slope)
    if sign is None:
        return at
    if not isinstance(sign, Value):
        return at * sign
    return rw.emit(ops.Where(rw.emit(ops.Compare(sign, 0.0, "eq")), moved, at * sign))


def _rises(op: Any) -> bool:
    """Whether the options of a function are those with which it is strictly increasing."""
    if isinstance(op, ops.Elu):
        return op.alpha > 0 and op.scale > 0 and op.input_scale > 0
    return True


def _inside(op: Any, at: float, relation: str | None) -> bool:
    """Whether limiting to [min, max] changes nothing about the comparison with a number."""
    low, high = (0.0, None) if isinstance(op, ops.Relu) else (op.min, op.max)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if not all(isinstance(one, (int, float)) for one in (low, high)):
        return False
    above = low <= at if relation in ("gt", "le") else low < at
    below = at <= high if relation in ("ge", "lt") else at < high
    return above and below


def _inverse(op: Any, at: float, relation: str | None) -> float | None:
    """Where an increasing function has the value `at`; None where that is not known."""
    if isinstance(op, (ops.Relu, ops.Clamp)):
        return at if _inside(op, at, relation) else None
    if isinstance(op, ops.Tanh):
        return math.atanh(at) if abs(at) < 1 else None
    if isinstance(op, ops.Sigmoid):
        return math.log(at) - math.log1p(-at) if 0 < at < 1 else None
    if isinstance(op, ops.Exp):
        return math.log(at) if at > 0 else None
    return 0.0 if at == 0 and _rises(op) else None


# -- small things -----------------------------------------------------------------------------------


def _divided(rw: Rewriter, one: Any, by: Any) -> Any:
    if one is None:
        return None
    if not isinstance(by, Value):
        return one / by if by != 1 else one
    return rw.emit(ops.Reciprocal(by)) * one if not isinstance(one, Value) else widen(one) * rw.emit(
        ops.Reciprocal(by)
    )  # fmt: skip


def _negated(one: Any) -> Any:
    op = one.op if isinstance(one, Value) else None
    if isinstance(op, ops.Neg):
        return op.input
    if isinstance(op, ops.Sub) and isinstance(op.right, Value):
        return op.right - op.left if isinstance(op.left, Value) else op.right + -op.left
    return -one


def _total(left: Any, right: Any) -> Any:
    """The sum, None for zero; a difference where one of the two is negated."""
    for one, other in ((left, right), (right, left)):
        op = other.op if isinstance(other, Value) and one is not None else None
        if isinstance(op, ops.Neg):
            inner = widen(op.input, one) if isinstance(one, Value) else op.input
            if isinstance(one, Value):
                return widen(one, inner) - inner
            return inner.builder.emit(ops.Sub(one, inner))
    return total(left, right)


def _alike(inner: Value, value: Value) -> bool:
    return same_shape(inner.shape, value.shape) and inner.dtype == value.dtype


def wide(one: Any) -> Any:
    return widen(one) if isinstance(one, Value) else one
