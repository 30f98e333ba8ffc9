"""Scales and shifts in front of a comparison move into its threshold.

    s x + t > theta   =   sgn(s) x > (theta - t) / |s|      for s != 0,
                          t > theta                         for s = 0: the same with 1 for |s|

for >=, < and <= too: a negative scale turns the comparison around, a scale of zero makes it constant. So
an eval-mode batch norm in front of a spike (MPBN, Guo et al., arXiv 2308.08359), element-wise or per
channel, costs no more than the threshold that was there. What is compared may be read elsewhere, as a
membrane potential is; what is only there to be compared goes away.

    sign(s x + t)     =   sign(sgn(s) x + t / |s|),         with 0 for the sign of 0, as torch has it

for binary networks: the signs go into the map that computes x, or into those that read the result. Where
x is a map of integers, as an XNOR convolution is, the threshold goes halfway between two integers, and
nothing about the result is rounded (docs/thresholds.md). A threshold of the run that is smaller than x
stays one (INSTA-BNN, arXiv 2204.07439).

The published fold of MPBN, (theta - bias) sqrt(var) / weight + mean, leaves out the negative and the zero
scale and eps. Spikes are equal but where the source is within rounding of a tie, which the check of every
site counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import fixed, same_shape
from graphopt.ir.many import Many
from graphopt.ir.rewrite import Rewrite, Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass
from graphopt.passes.thresholds import steps
from graphopt.passes.thresholds.chain import AROUND, Chain, collect, is_sign
from graphopt.passes.thresholds.emit import sign_of, turned
from graphopt.passes.thresholds.facts import Facts
from graphopt.passes.thresholds.integral import between, integral

_COMPARED = "a comparison is no polynomial; tests/passes/test_fold_thresholds.py takes the three signs apart"


@rewrite(unproved=_COMPARED)
def fold_threshold(compare: ops.Compare, rw: Rewriter) -> Value:
    """Scales and shifts in front of a comparison move into what it compares with."""
    return _compared(compare, rw, Facts(rw.graph))


@rewrite(unproved=_COMPARED)
def fold_sign(sign: ops.Sign, rw: Rewriter) -> Value:
    """Scales and shifts in front of a sign go into the maps around it, or become a threshold."""
    return _signed(sign, rw, Facts(rw.graph))


@rewrite(unproved=_COMPARED)
def choice_as_sign(where: ops.Where, rw: Rewriter) -> Value:
    """1 where an integer is above a threshold, else -1: the sign of what is left above it."""
    return _chosen(where, rw, Facts(rw.graph))


@rewrite(unproved=_COMPARED)
def choice_of_numbers(where: ops.Where, rw: Rewriter) -> Value:
    """A choice between tensors of one number each, such as ones_like(x), is one between the numbers."""
    given = [one for one in (where.left, where.right) if isinstance(one, Value)]
    rw.match(any(not one.is_constant for one in given))
    high, low = steps.uniform(where.left), steps.uniform(where.right)
    rw.match(high is not None and low is not None)
    rw.match(same_shape(where.condition.shape, where.out.shape))
    first = rw.emit(ops.Full((), high, where.out.dtype, where.out.meta.device))  # type: ignore[arg-type]
    return rw.emit(ops.Where(where.condition, first, low), like=where)  # type: ignore[arg-type]


@rewrite(unproved=_COMPARED)
def step_of_step(outer: ops.Sign | ops.Compare, rw: Rewriter) -> Value:
    """A sign or comparison of what takes two or three numbers as values takes them itself."""
    if isinstance(outer, ops.Sign):
        step = steps.read(outer.input)
        rw.match(step is not None)
        assert step is not None
        step = steps.after_sign(step)
        if step.values == steps.SIGN and step.right == 0.0 and isinstance(step.left, Value):
            return rw.emit(ops.Sign(step.left), like=outer)
        return steps.choice(rw, step, outer)
    number, step = steps.uniform(outer.right), steps.read(outer.left)
    rw.match(number is not None and step is not None)
    assert number is not None and step is not None
    found = steps.after_comparison(step, outer.relation, number)
    rw.match(found.relation is not None)
    assert found.relation is not None
    return rw.emit(ops.Compare(found.left, found.right, found.relation), like=outer)


@rewrite(unproved=_COMPARED)
def step_as_choice(op: ops.Mul | ops.Div | ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """2 [x > t] - 1 and its like: 1 where x > t, else -1."""
    step = steps.read(op.out)
    rw.match(step is not None)
    assert step is not None
    rw.match(sorted(set(step.values)) == [-1.0, 1.0])
    return steps.choice(rw, step, op)


@rewrite(unproved=_COMPARED)
def heaviside_as_comparison(op: ops.Heaviside, rw: Rewriter) -> Value:
    """heaviside(x, 1) = [x >= 0], heaviside(x, 0) = [x > 0]."""
    at_zero = steps.uniform(op.right)
    rw.match(at_zero in (0.0, 1.0) and isinstance(op.left, Value))
    assert isinstance(op.left, Value)
    rw.match(same_shape(op.left.shape, op.out.shape))
    relation = "ge" if at_zero else "gt"
    return rw.emit(ops.Compare(op.left, 0.0, relation), like=op).to(op.out.dtype)


# -- how ------------------------------------------------------------------------------------------


def _compared(compare: ops.Compare, rw: Rewriter, facts: Facts) -> Value:
    rw.match(compare.relation in AROUND)
    value, threshold, relation = compare.left, compare.right, compare.relation
    if fixed(value) or (isinstance(threshold, Value) and _smaller(value, threshold)):
        value, threshold, relation = threshold, value, AROUND[relation]
    rw.match(isinstance(value, Value) and value.dtype.is_floating_point)
    assert isinstance(value, Value) and not isinstance(threshold, complex)
    if not isinstance(threshold, Value) and (steps_apart := _flattened(value.op)) is not None:
        rw.match(rw.only_user(value, compare))
        count = steps_apart.input.shape[0]
        moved = _moved(rw, compare, steps_apart, steps_apart.input, threshold, relation, facts)
        return Many(moved, count, False).flat()
    if isinstance(threshold, Value) and not threshold.is_constant:
        rw.match(value.op is not None)
        small = _smaller(threshold, value)
        if not small:
            collect(rw, value, compare, None, relation, facts)
            rw.decline(
                "the threshold is another value of the same size, which would have to be scaled instead"
            )
    return _moved(rw, compare, compare, value, threshold, relation, facts)


def _flattened(op: ops.Op | None) -> ops.Reshape | None:
    """A reshape of [T, N, ...] to [T * N, ...]: what has an entry for each of T is on [T, N, ...]."""
    if not isinstance(op, ops.Reshape) or op.input.ndim != op.out.ndim + 1:
        return None
    apart = isinstance(op.input.shape[0], int) and same_shape(op.input.shape[2:], op.out.shape[1:])
    return op if apart else None


def _moved(
    rw: Rewriter, compare: ops.Compare, reader: ops.Op, value: Value, threshold: Any, relation: str,
    facts: Facts,
) -> Value:  # fmt: skip
    """`value`, which `reader` reads, against a threshold, with what stands in front of it taken off."""
    chain = collect(rw, value, reader, threshold, relation, facts)
    chain, known = integral(rw, chain, facts)
    rw.match(chain.shift is not None or chain.through
             or (chain.scale is not None and not is_sign(chain.scale)))  # fmt: skip
    sign, moved = chain.normal(rw, facts)
    if known is not None:
        moved = between(rw, moved, known)
    inner = chain.value
    if isinstance(sign, Value):
        inner = turned(rw, chain, sign)
    elif sign is not None:
        relation, moved = AROUND[relation], moved if moved is None else -moved
    if isinstance(moved, Value):
        moved = moved.to(value.dtype)
    result = rw.emit(ops.Compare(inner, 0.0 if moved is None else moved, relation), like=compare)
    if chain.at_run_time:
        rw.pays((*chain.off, compare), result)
    return result


def _signed(sign: ops.Sign, rw: Rewriter, facts: Facts) -> Value:
    rw.match(sign.input.dtype.is_floating_point and not sign.input.is_constant)
    exact = facts.integers.of(sign.input) is not None
    chain = collect(rw, sign.input, sign, None, None, facts)
    chain, known = integral(rw, chain, facts)
    scaled = chain.scale is not None and chain.scale != -1 and not is_sign(chain.scale)
    rw.match(scaled or chain.through or (known is not None and not exact))
    turn, moved = chain.normal(rw, facts)
    if known is not None:
        moved = between(rw, moved, known)
    return sign_of(rw, chain, turn, moved, known, sign)


# A choice of 1 where y is in a relation to theta, else -1, is one with > or >=, perhaps of -y and -theta.
_CHOSEN = {
    ("gt", 1.0): (False, "gt"), ("ge", 1.0): (False, "ge"),
    ("lt", 1.0): (True, "gt"), ("le", 1.0): (True, "ge"),
    ("gt", -1.0): (True, "ge"), ("ge", -1.0): (True, "gt"),
    ("lt", -1.0): (False, "ge"), ("le", -1.0): (False, "gt"),
}  # fmt: skip


def _chosen(where: ops.Where, rw: Rewriter, facts: Facts) -> Value:
    high, low = steps.uniform(where.left), steps.uniform(where.right)
    rw.match(high is not None and low is not None and (high, low) in ((1.0, -1.0), (-1.0, 1.0)))
    compare = rw.producer(where.condition, ops.Compare)
    value, threshold, relation = compare.left, compare.right, compare.relation
    rw.match((relation, high) in _CHOSEN and isinstance(value, Value) and fixed(threshold))
    assert isinstance(value, Value) and high is not None and not isinstance(threshold, complex)
    rw.match(value.dtype == where.out.dtype and same_shape(value.shape, where.out.shape))
    rw.match(rw.only_user(compare, where))
    around, relation = _CHOSEN[relation, high]
    chain = collect(rw, value, compare, threshold, None, facts)
    chain, known = integral(rw, chain, facts)
    rw.match(known is not None)
    assert known is not None
    if around:
        chain = _around(chain)
    turn, moved = chain.normal(rw, facts)
    moved = between(rw, moved, known, relation)
    return sign_of(rw, chain, turn, moved, known, where, into_map=True)


def _around(chain: Chain) -> Chain:
    """-(s x + t) against -theta."""
    scale, shift, threshold = (
        one if one is None else -one for one in (chain.scale, chain.shift, chain.threshold)
    )
    scale = -1.0 if scale is None else scale
    return dataclasses.replace(chain, scale=scale, shift=shift, threshold=threshold)


def _smaller(one: Any, other: Any) -> bool:
    """Whether a value is broadcast to the shape of another one."""
    if not isinstance(one, Value) or not isinstance(other, Value):
        return False
    return not same_shape(one.shape, other.shape) and one.ndim <= other.ndim and all(
        (isinstance(a, int) and a == 1) or str(a) == str(b)
        for a, b in zip(reversed(one.shape), reversed(other.shape), strict=False)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FoldThresholds(RewritePass):
    """Batch norms, scales and shifts in front of comparisons and signs move into thresholds."""

    name = "fold-thresholds"
    rewrites = (
        heaviside_as_comparison, choice_of_numbers, step_as_choice, step_of_step, fold_threshold,
        fold_sign, choice_as_sign,
    )  # fmt: skip


def _at_hand(one: Rewrite, function: Callable[..., Value]) -> Rewrite:
    """A rewrite that takes the values of parameters for granted."""
    return dataclasses.replace(
        one, function=lambda op, rw: function(op, rw, Facts(rw.graph, at_hand=True))
    )


@dataclasses.dataclass(frozen=True)
class SettleThresholds(RewritePass):
    """As fold-thresholds, for parameters as they are now: positive slopes, weights that are integers."""

    name = "settle-thresholds"
    rewrites = (
        heaviside_as_comparison, choice_of_numbers, step_as_choice, step_of_step,
        _at_hand(fold_threshold, _compared), _at_hand(fold_sign, _signed),
        _at_hand(choice_as_sign, _chosen),
    )  # fmt: skip
