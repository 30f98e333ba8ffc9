"""Several values as one, and ops as functions of the tensors that they read.

Values of one type are one either flat, [count * rows, ...], or one after the other along a new axis 0. Where
they are parts of a tensor, in order, they are that tensor: nothing moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same, same_shape
from graphopt.ir.builder import Builder
from graphopt.ir.graph import is_overload
from graphopt.ir.ops.base import Call, Op, overload
from graphopt.ir.value import Value

Slot = tuple[
    str, int
]  # a field of an op view that holds a tensor, and the place in it if it is a tuple


# -- ops as functions of their tensors ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pointwise(Op):
    """A call that torch tags as pointwise and that has no view of its own."""

    target: Any
    arguments: tuple[tuple[str, Any], ...]

    def build(self) -> tuple[Any, dict[str, Any]]:
        return self.target, dict(self.arguments)


def acting(node: fx.Node, builder: Builder) -> Op | None:
    """The view of a call that computes one tensor; None for what nothing is known of."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    view = builder.view(node)
    if view is None and is_overload(node.target) and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        call = Call(node, builder)
        return Pointwise(node.target, tuple(call.arguments.items()), out=call.out)
    return view


def slots(op: Op) -> dict[Slot, Value]:
    """The tensors that an op reads, by the place that they have in its view."""
    found: dict[Slot, Value] = {}
    for name, value in _fields(op):
        for place, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(one, Value) and one.is_tensor:
                found[name, place] = one
    return found


def literals(op: Op) -> tuple[Any, ...]:
    """All else that says what an op computes, to be compared."""
    found: list[Any] = [type(op), getattr(op, "target", None)]
    if not isinstance(op, (ops.Reshape, ops.Expand)):  # these are what comes out
        for name, value in _fields(op):
            for one in value if isinstance(value, tuple) else (value,):
                if not isinstance(one, Value):
                    found.append((name, type(one), repr(one)))
                else:
                    found.append((name, None if one.is_tensor else one.node))
    return (*found, type_of(op.out))


def type_of(value: Value) -> tuple[Any, ...]:
    """Shape and dtype, to be compared."""
    return (value.dtype, *map(str, value.shape))


def with_tensors(op: Op, changes: Mapping[Slot, Value]) -> Op:
    """An op on other tensors."""
    found: dict[str, Any] = {}
    for (name, place), value in changes.items():
        before = found.get(name, dict(_fields(op))[name])
        if isinstance(before, tuple):
            found[name] = (*before[:place], value, *before[place + 1 :])
        else:
            found[name] = value
    if isinstance(op, Pointwise):
        pairs = tuple((name, found.get(name, value)) for name, value in op.arguments)
        return op.replace(arguments=pairs)
    return op.replace(**found)


def _fields(op: Op) -> Sequence[tuple[str, Any]]:
    if isinstance(op, Pointwise):
        return op.arguments
    return [(name, getattr(op, name)) for name in sorted(op.field_names())]


# -- several values as one ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Many:
    """`count` values of one type as one: flat, [count * rows, ...], or one after the other along a new
    axis 0."""

    value: Value
    count: int
    is_flat: bool

    def _unflattened(self) -> Value | None:
        """What the value is the unflattened of."""
        op = self.value.op
        if isinstance(op, ops.Reshape) and same_shape(op.input.shape[1:], self.value.shape[2:]):
            return op.input
        return None

    @property
    def is_free(self) -> bool:
        """Whether the rows of all are a view."""
        if self.is_flat or self._unflattened() is not None:
            return True
        fake = self.value.meta
        return fake.ndim > 1 and same(fake.stride(0), fake.shape[1] * fake.stride(1))

    def flat(self) -> Value:
        """The rows of all."""
        if self.is_flat:
            return self.value
        before = self._unflattened()
        if before is not None:
            return before
        return self.value.builder.call(
            overload("flatten.using_ints"), {"self": self.value, "start_dim": 0, "end_dim": 1}
        )

    def stacked(self) -> Value:
        """One after the other along a new axis 0; the number of their rows may be dynamic."""
        if not self.is_flat:
            return self.value
        return self.value.builder.call(
            overload("unflatten.int"), {"self": self.value, "dim": 0, "sizes": [self.count, -1]}
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a value: its entries along `dim`, or slices of `rows` of axis 0."""

    value: Value
    dim: int
    rows: int = 0

    @property
    def count(self) -> int | None:
        """How many there are; None if that is dynamic."""
        size = self.value.shape[self.dim]
        return size // (self.rows or 1) if isinstance(size, int) else None

    def many(self, start: int, count: int) -> Many:
        """Some of them, one behind the other."""
        value, step = self.value, self.rows or 1
        if count != self.count:
            value = value.builder.emit(
                ops.Slice(value, self.dim, start * step, (start + count) * step)
            )
        if self.dim:
            value = value.permute(self.dim, *(i for i in range(value.ndim) if i != self.dim))
        return Many(value, count, bool(self.rows))

    @property
    def is_free(self) -> bool:
        """Whether the rows of all are a view."""
        if self.rows:
            return True
        fake = self.value.meta
        first = 1 if self.dim == 0 else 0
        if fake.ndim < 2:
            return False
        return same(fake.stride(self.dim), fake.shape[first] * fake.stride(first))


def part(value: Value) -> tuple[Parts, int] | None:
    """What a value is a part of, and which; None if it is computed from more or less than that."""
    op = value.op
    if isinstance(op, ops.Select) and isinstance(op.index, int):
        parts = Parts(op.input, op.dim % op.input.ndim)
        if op.index >= 0 or parts.count is not None:
            return parts, op.index if op.index >= 0 else op.index + (parts.count or 0)
    elif isinstance(op, ops.Slice) and op.dim == 0 and op.step == 1:
        whole, size, start = op.input.shape[0], op.out.shape[0], op.start or 0
        if all(isinstance(one, int) for one in (whole, size, start)) and 0 < size < whole:
            if whole % size == 0 and start % size == 0 and start >= 0:
                return Parts(op.input, 0, size), start // size
    return None


def in_order(values: Sequence[Value]) -> tuple[Parts, int] | None:
    """What some values are parts of, one behind the other, and the place of the first; None if they
    are not."""
    found = [part(one) for one in values]
    if found[0] is None:
        return None
    parts, start = found[0]
    wanted = [(parts, start + place) for place in range(len(values))]
    return found[0] if found == wanted else None


def existing(values: Sequence[Value]) -> Value | None:
    """The stack of some values, if it is computed already."""
    builder = values[0].builder
    for user in values[0].users:
        op = builder.view(user)
        if isinstance(op, ops.Stack) and op.dim == 0 and op.tensors == tuple(values):
            if user < builder.before:
                return op.out
    return None


def together(values: Sequence[Value]) -> Many:
    """Some values of one type as one; they are copied if nothing else is computed of them."""
    found = in_order(values)
    if found is not None:
        return found[0].many(found[1], len(values))
    stacked = existing(values)
    if stacked is None:
        stacked = values[0].builder.emit(ops.Stack(tuple(values), 0))
    return Many(stacked, len(values), False)
