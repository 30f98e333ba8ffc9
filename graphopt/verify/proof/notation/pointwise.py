"""Index notation of elementwise ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.ir.value import Value
from graphopt.verify.proof.notation.base import (
    Index,
    Reader,
    Sizes,
    broadcast_sizes,
    entry,
    sizes,
    unknown,
)
from graphopt.verify.proof.polynomials import sym
from graphopt.verify.proof.terms import Call, Delta, Expr, factor, number


@sizes.register
def _(op: ops.Binary) -> Sizes:
    return broadcast_sizes(op.left, op.right)


@sizes.register
def _(op: ops.Compare) -> Sizes:
    return broadcast_sizes(op.left, op.right)


@sizes.register
def _(op: ops.Where) -> Sizes:
    return broadcast_sizes(op.condition, op.left, op.right)


@entry.register
def _(op: ops.Add, at: Index, r: Reader) -> Expr:
    return r.broadcast(op.left, at) + r.broadcast(op.right, at)


@entry.register
def _(op: ops.Sub, at: Index, r: Reader) -> Expr:
    return r.broadcast(op.left, at) - r.broadcast(op.right, at)


@entry.register
def _(op: ops.Mul, at: Index, r: Reader) -> Expr:
    return r.space.product(r.broadcast(op.left, at), r.broadcast(op.right, at))


@entry.register
def _(op: ops.Div, at: Index, r: Reader) -> Expr:
    inverse = r.space.power(r.broadcast(op.right, at), -1)
    return r.space.product(r.broadcast(op.left, at), inverse)


@entry.register
def _(op: ops.Pow, at: Index, r: Reader) -> Expr:
    exponent = sp.nsimplify(sym(op.exponent), rational=True)
    if not exponent.is_Rational:
        return r.space.call("pow", (exponent,), (r.at(op.input, at),))
    return r.space.power(r.at(op.input, at), exponent)


@entry.register
def _(op: ops.Neg, at: Index, r: Reader) -> Expr:
    return -r.at(op.input, at)


@entry.register
def _(op: ops.Rsqrt, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), sp.Rational(-1, 2))


@entry.register
def _(op: ops.Sqrt, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), sp.Rational(1, 2))


@entry.register
def _(op: ops.Reciprocal, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), -1)


@entry.register
def _(op: ops.Activation, at: Index, r: Reader) -> Expr:
    name = type(op).__name__.lower()
    fields = [one.name for one in dataclasses.fields(op) if one.name not in ("input", "out")]
    options = tuple(getattr(op, one) for one in fields)
    inner = r.at(op.input, at)
    if any(isinstance(one, Value) for one in options):
        return unknown(op, at, r)
    if op.idempotent:
        form = r.space.normal(inner)
        if len(form.terms) == 1 and form.terms[0].coefficient == 1 and not form.terms[0].bound:
            factors = form.terms[0].factors
            if len(factors) == 1 and factors[0][1] == 1:
                one = factors[0][0]
                if isinstance(one, Call) and (one.name, one.parameters) == (name, _plain(options)):
                    r.space.laws[f"{name}({name}(x)) = {name}(x)"] = None
                    return form
    return r.space.call(name, _plain(options), (inner,), op.positively_homogeneous)


@entry.register
def _(op: ops.PRelu, at: Index, r: Reader) -> Expr:
    """relu(x) + slope (x - relu(x))"""
    x = r.at(op.input, at)
    positive = r.space.call("relu", (), (x,), True)
    slope = r.at(op.weight, (at[1] if op.weight.shape[0] != 1 and len(at) > 1 else 0,))
    return positive + r.space.product(slope, x - positive)


def _plain(options: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(sym(one) if isinstance(one, (int, float)) else one for one in options)


@entry.register
def _(op: ops.Compare, at: Index, r: Reader) -> Expr:
    operands = (r.broadcast(op.left, at), r.broadcast(op.right, at))
    return r.space.call(op.relation, (), operands, idempotent=True)


@entry.register
def _(op: ops.Heaviside, at: Index, r: Reader) -> Expr:
    s, (x, at_zero) = r.space, (r.broadcast(one, at) for one in op.operands)
    above, zero = (s.call(one, (), (x, number(0)), idempotent=True) for one in ("gt", "eq"))
    return above + s.product(zero, at_zero)


@entry.register
def _(op: ops.Where, at: Index, r: Reader) -> Expr:
    s, condition = r.space, r.broadcast(op.condition, at)
    chosen = s.product(condition, r.broadcast(op.left, at))
    return chosen + s.product(number(1) - condition, r.broadcast(op.right, at))


@entry.register(ops.Copy)
@entry.register(ops.Detach)
def _(op: Any, at: Index, r: Reader) -> Expr:
    return r.at(op.input, at)


@entry.register
def _(op: ops.Cast, at: Index, r: Reader) -> Expr:
    """A cast between floating dtypes rounds, which a proof over the reals does not see."""
    if op.dtype.is_floating_point and op.input.dtype.is_floating_point:
        return r.at(op.input, at)
    return unknown(op, at, r)


@sizes.register
def _(op: ops.Full) -> Sizes:
    return tuple(op.size)


@entry.register
def _(op: ops.Full, at: Index, r: Reader) -> Expr:
    return number(sym(op.fill_value))


@sizes.register
def _(op: ops.Eye) -> Sizes:
    return (op.n, op.n if op.m is None else op.m)


@entry.register
def _(op: ops.Eye, at: Index, r: Reader) -> Expr:
    return factor(Delta(at[0] - at[1]))
