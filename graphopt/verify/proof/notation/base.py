"""The tables `sizes` and `entry`, and what their entries read operands with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

from graphopt.ir.value import Value
from graphopt.verify.proof.algebra import (
    Delta,
    Expr,
    Space,
    element,
    factor,
    number,
    sym,
)

Sizes = tuple[Any, ...]
Index = tuple[Any, ...]


class ShapeError(ValueError):
    """Operands that do not fit; torch would raise."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Gives entries of operands: `at(value, index)`, for numbers too."""

    space: Space
    at: Callable[[Any, Index], Expr]

    def broadcast(self, operand: Any, at: Index) -> Expr:
        """An entry of an operand that broadcasts against an output with index `at`."""
        if not isinstance(operand, Value):
            return number(sym(operand))
        shape = operand.shape
        own = at[len(at) - len(shape) :]
        return self.at(operand, tuple(
            0 if literally(size, 1) else i for size, i in zip(shape, own, strict=True)
        ))  # fmt: skip

    def masked(self, value: Any, at: Index, axes: dict[int, Any], sure: Index = ()) -> Expr:
        """An entry of a value that is 0 where the index of one of `axes` is not inside its size;
        along axes in `sure` it always is.

        Written as sum_u [u = index] value[u], so that what computes the value sees an index in range.
        """
        reads, bound, masks = list(at), [], []
        for axis, size in axes.items():
            u = self.space.index(sym(size), "u")
            masks.append(factor(Delta(at[axis] - u, sym(size) if axis in sure else None)))
            reads[axis] = u
            bound.append(u)
        return self.space.sum(bound, self.space.product(*masks, self.at(value, tuple(reads))))

    def indices(self, shape: Sequence[Any], name: str) -> Index:
        return tuple(self.space.index(sym(size), name) for size in shape)


def exponential(power: Expr, r: Reader) -> Expr:
    """exp(a + b) as exp(a) exp(b)."""
    parts = [r.space.call("exp", (), (Expr((term,)),)) for term in r.space.normal(power).terms]
    if len(parts) > 1:
        r.space.laws["exp(a + b) = exp(a) exp(b)"] = None
    return r.space.product(*parts)


def literally(size: Any, value: int) -> bool:
    """Whether a size is this very number, whatever the symbols stand for."""
    return bool(sym(size) == value)


@singledispatch
def sizes(op: Any) -> Sizes:
    """The shape of the output; by default that of the input."""
    return tuple(op.input.shape)


@singledispatch
def entry(op: Any, at: Index, r: Reader) -> Expr:
    """The output's entry at an index."""
    return unknown(op, at, r)


def unknown(op: Any, at: Index, r: Reader, homogeneous: bool = False) -> Expr:
    """An entry of a tensor that the operands and options determine, but nobody knows how; where
    `homogeneous`, f(c x) = c f(x) for c > 0 is applied."""
    outside: list[Expr] = []

    def name(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(map(name, value)) + ")"
        if not isinstance(value, Value):
            return str(sym(value)) if isinstance(value, (int, float)) else str(value)
        generic = tuple(
            r.space.named(f"@{axis}:{sym(size)}", size) for axis, size in enumerate(value.shape)
        )
        inside = r.space.normal(r.at(value, generic))
        if homogeneous and inside.terms:
            rest, common = r.space.positive_content(inside)
            if common is not None and not any(one.indices() for one, _ in common.terms[0].factors):
                inside = r.space.normal(rest)
                outside.append(common)
                r.space.laws[f"{type(op).__name__}(c x) = c {type(op).__name__}(x) for c > 0"] = (
                    None
                )
        return f"{inside}: [{', '.join(map(str, value.shape))}]"

    fields = [one.name for one in dataclasses.fields(op) if one.name != "out"]
    options = ", ".join(name(getattr(op, field)) for field in fields)
    return r.space.product(*outside, element(f"{type(op).__name__}({options})", at))


def broadcast_sizes(*operands: Any) -> Sizes:
    shapes = [one.shape for one in operands if isinstance(one, Value)]
    result: list[Any] = []
    for axis in range(-max(map(len, shapes), default=0), 0):
        size: Any = 1
        for shape in shapes:
            if -axis <= len(shape) and not literally(shape[axis], 1):
                if literally(size, 1):
                    size = shape[axis]
                elif size != shape[axis]:
                    raise ShapeError(f"sizes {size} and {shape[axis]} do not broadcast")
        result.append(size)
    return tuple(result)


def _same(a: Any, b: Any, what: str) -> None:
    if a != b:
        raise ShapeError(f"{what}: {a} and {b} differ")


def _axes(dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    if any(not -ndim <= dim < ndim for dim in dims):
        raise ShapeError(f"dims {list(dims)} of a tensor of {ndim} axes")
    return tuple(dim % ndim for dim in dims)


def _spread(sizes: Any, rank: int) -> Sizes:
    found = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return found * rank if len(found) == 1 else found
