"""What every affine op does to tokens: which it keeps apart, and what it makes of others.

A rule, `step`, declines where an op is not affine in what depends on the start of a region or mixes its
tokens; else it returns the labels of the output, and how the op is applied to other tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.affine import same
from graphopt.ir.rewrite import describe
from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.linearity import Region

# How a value of the region looks for other tokens: from what its operands look like. None is zero.
Emit = Callable[["Tokens"], Value | None]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What an axis runs over: some axes of the start, and for each of their entries `inside` entries
    of a token. Without tokens, the axis lies inside of one."""

    tokens: tuple[int, ...] = ()
    inside: int = 1


Labels = tuple[Axis, ...]
INSIDE = Axis()


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a region: the labels of its output, and how to apply it to other tokens."""

    op: ops.Op
    labels: Labels
    emit: Emit


@dataclasses.dataclass
class Tokens:
    """The values of a region for `count` other tokens: those of the identity, without what is added
    on the way; or, with it, the token 0, or all rows of a table."""

    region: Region
    count: int
    identity: bool
    found: dict[Any, Value | None] = dataclasses.field(default_factory=dict)

    def at(self, value: Any) -> Any:
        """A value for these tokens, None for zero."""
        if not isinstance(value, Value) or value.is_constant:
            return None if self.identity else value
        if value == self.region.start:
            return self.dense(value)
        if value.node not in self.found:
            self.found[value.node] = self.region.steps[value.node].emit(self)
        return self.found[value.node]

    def dense(self, value: Value) -> Value | None:
        """As `at`, with the identity written out."""
        if value != self.region.start:
            return self.at(value)  # type: ignore[no-any-return]
        if not self.identity:
            return None
        eye = ops.Eye(self.count, self.count, value.dtype, value.meta.device)
        return self.emit(eye).reshape(*self.sizes(value))

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """The shape of a value for these tokens."""
        return self.shaped(self.region.labels(value), value.shape)

    def shaped(self, labels: Labels, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return shaped(labels, shape, self.count)

    def emit(self, op: ops.Op) -> Value:
        return self.region.rw.emit(op)


def is_identity(value: Value) -> bool:
    """Whether the rows of a value are those of an identity matrix, in their order."""
    op = value.op
    while isinstance(op, ops.Reshape):
        op = op.input.op
    return isinstance(op, ops.Eye) and op.m in (None, op.n) and value.shape[-1] == op.n


def times(value: Value, matrix: Value) -> Value:
    """`value @ matrix`, which is the matrix where the value is the identity."""
    if matrix.ndim == 2 and is_identity(value):
        return matrix.reshape(*value.shape[:-1], matrix.shape[-1])
    return value @ matrix


def scaled(value: Value, factor: Any) -> Value:
    return value if factor == 1 else value * factor


def is_full(value: Any) -> bool:
    """Whether a value is one number everywhere, for as many tokens as there are."""
    return isinstance(value, Value) and isinstance(value.op, ops.Full)


def shaped(labels: Labels, shape: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """A shape with `count` tokens in the place of those there are."""
    return tuple(
        one.inside * (count if 0 in one.tokens else 1) if one.tokens else size
        for one, size in zip(labels, shape, strict=True)
    )


# -- rules ----------------------------------------------------------------------------------------


@singledispatch
def step(op: Any, region: Region) -> Step:
    """The step of a region that an op is.

    Raises:
        Declined: if it is not affine, or mixes tokens.
    """
    raise NotImplementedError


def inside(region: Region, value: Value, *axes: int) -> Labels:
    """The labels of a value whose `axes` an op mixes: they must lie inside a token."""
    labels = region.labels(value)
    for axis in axes:
        region.rw.require(
            not labels[axis].tokens,
            f"what reads {describe(value)} mixes its tokens with each other",
        )
    return labels


def apart(region: Region, constant: Any, labels: Labels, without: int = 0) -> None:
    """A constant must be the same for all tokens. `labels` are those of the value that it meets;
    `without` so many axes at its end, which are no axes of the value."""
    if not isinstance(constant, Value):
        return
    sizes = constant.shape[: constant.ndim - without]
    for one, size in zip(reversed(labels), reversed(sizes), strict=False):
        region.rw.require(
            not one.tokens or same(size, 1), f"{describe(constant)} differs from token to token"
        )


def mapped(op: Any, **operands: Value) -> Emit:
    """An op that is linear in one operand, applied to other tokens."""
    ((name, value),) = operands.items()

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(value)
        return None if x is None else tokens.emit(op.replace(**{name: x}))

    return emit
