"""The loop description of a kernel: pure data between the graph and the source text.

    for every row (in parallel):          # the axes `rows`
        for every column:                 # the axes `columns`, none in a pointwise kernel
            store ... = expression

An expression is a DAG over loads. One with a `Reduce` in it needs a pass over the columns first.
Offsets and conditions are sympy expressions in the axes, sizes and strides (see `index`). Values
are held in register dtypes: half types as float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch

from graphopt.backends.triton.index import Index, Ranges, product


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor in memory, by the name of its pointer."""

    name: str
    dtype: torch.dtype
    shape: Index
    strides: Index


@dataclasses.dataclass(frozen=True, eq=False)
class Expr:
    """A value per point of the loops; `operands` are what it is computed from."""

    dtype: torch.dtype

    @property
    def operands(self) -> tuple[Expr, ...]:
        return ()

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        """The index expressions in it."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Load(Expr):
    """buffer[offset]; only where every one of `conditions` is at least 0.

    A symbol of the offset may stand for a value: `at` pairs it with the position looked up.
    """

    buffer: Buffer
    offset: sympy.Expr
    conditions: Index = ()
    at: tuple[tuple[sympy.Symbol, Position], ...] = ()

    @property
    def operands(self) -> tuple[Expr, ...]:
        return tuple(value for _, value in self.at)

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.offset, *self.conditions)


@dataclasses.dataclass(frozen=True, eq=False)
class Position(Expr):
    """A position along an axis of length `size`, from a tensor; from the end if it is negative and
    `wraps`. A load at a position outside of the axis reads nothing."""

    value: Load
    size: sympy.Expr
    wraps: bool

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.value,)

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.size,)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Expr):
    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Iota(Expr):
    """The value of an index expression."""

    value: sympy.Expr

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return (self.value,)


@dataclasses.dataclass(frozen=True, eq=False)
class Call(Expr):
    """An entry of the table of scalars; `compute` is the dtype of its operands."""

    label: str
    target: Any
    args: tuple[Expr, ...]
    options: Mapping[str, Any]
    compute: torch.dtype

    @property
    def operands(self) -> tuple[Expr, ...]:
        return self.args


@dataclasses.dataclass(frozen=True, eq=False)
class Cast(Expr):
    """A value in another register dtype; `through` is a half type that it is rounded to."""

    value: Expr
    through: torch.dtype | None = None

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.value,)


@dataclasses.dataclass(frozen=True, eq=False)
class Choose(Expr):
    """`then` where every condition is at least 0, else `other`."""

    conditions: Index
    then: Expr
    other: Expr

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.then, self.other)

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return self.conditions


@dataclasses.dataclass(frozen=True, eq=False)
class Reduce(Expr):
    """The sum, mean, max or min of `body` over the columns: a value per row."""

    label: str
    kind: str
    body: Expr

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.body,)


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulated(Expr):
    """A product's sum over its inner axis, for one row and column of a matrix; `kind` is the op."""

    label: str
    kind: str
    left: Expr
    right: Expr

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.left, self.right)


@dataclasses.dataclass(frozen=True)
class Axis:
    symbol: sympy.Symbol
    size: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Store:
    """buffer[offset] = value; `per_row` if once for every row rather than for every column."""

    buffer: Buffer
    offset: sympy.Expr
    value: Expr
    per_row: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """See the module docstring. `sizes` are the symbols that it gets as numbers; it may run only where
    every one of `required`, expressions in them, is at least 0."""

    name: str
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    inputs: tuple[Buffer, ...]
    stores: tuple[Store, ...]
    sizes: tuple[sympy.Symbol, ...]
    ranges: Ranges
    required: Index = ()

    @property
    def row_count(self) -> sympy.Expr:
        return product([axis.size for axis in self.rows])

    @property
    def column_count(self) -> sympy.Expr:
        return product([axis.size for axis in self.columns])

    @property
    def extent(self) -> Index:
        """How many rows and columns there are."""
        return self.row_count, self.column_count

    def expressions(self) -> Iterator[Expr]:
        """Every expression once, operands first."""
        return walk(*(store.value for store in self.stores))

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        """(bytes moved at least, floating-point operations)."""
        flops: sympy.Expr = sympy.Integer(0)
        points = product(self.extent)
        depends = dependence(self)
        columns = {axis.symbol for axis in self.columns}
        for one in self.expressions():
            if isinstance(one, Call):
                flops += (points if depends[one] & columns else self.row_count) * flops_of(one)
            elif isinstance(one, Reduce):
                flops += points
        return moved(self.stores, self.ranges), sympy.expand(flops)


def flops_of(call: Call) -> int:
    """Floating-point operations of one call, per element."""
    from graphopt.backends.triton.scalars import TABLE

    return TABLE[call.target].flops if call.compute.is_floating_point else 0


def moved(stores: tuple[Store, ...], ranges: Ranges) -> sympy.Expr:
    """The bytes that a kernel reads and writes if it touches every element once."""
    read: dict[Buffer, sympy.Expr] = {}
    for one in walk(*(store.value for store in stores)):
        if isinstance(one, Load):
            size = product(one.buffer.shape)
            axes = axes_of(one)
            reached = product([length for axis, length in ranges.size.items() if axis in axes])
            seen = read.get(one.buffer, sympy.Integer(0)) + reached
            read[one.buffer] = seen if ranges.nonnegative(size - seen) else sympy.Min(size, seen)
    total = sum(count * buffer.dtype.itemsize for buffer, count in read.items())
    for store in stores:
        total += product(store.buffer.shape) * store.buffer.dtype.itemsize
    return sympy.expand(total)


def axes_of(load: Load) -> set[sympy.Symbol]:
    """The axes that the place of a load changes with."""
    found: set[sympy.Symbol] = set(load.offset.free_symbols)
    for symbol, position in load.at:
        found = found - {symbol} | axes_of(position.value)
    return found


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of matrices for every point of `batch`, `inner` long; its stores hold one
    `Accumulated`, whose operands run over the axes k (left) and kt (right)."""

    name: str
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    inner: sympy.Expr
    inputs: tuple[Buffer, ...]
    stores: tuple[Store, ...]
    sizes: tuple[sympy.Symbol, ...]
    ranges: Ranges
    required: Index = ()

    @property
    def extent(self) -> Index:
        """How many rows, columns and points of the batch there are, and the inner length."""
        groups = (self.rows, self.columns, self.batch)
        return (*(product([axis.size for axis in one]) for one in groups), self.inner)

    def expressions(self) -> Iterator[Expr]:
        return walk(*(store.value for store in self.stores))

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        """(bytes moved at least, floating-point operations); operands count as computed once."""
        flops = 2 * product(self.extent)
        points = product(self.extent[:3])
        flops += sum(points * flops_of(one) for one in self.expressions() if isinstance(one, Call))
        return moved(self.stores, self.ranges), sympy.expand(flops)


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every expression under the roots once, operands first."""
    seen: set[Expr] = set()

    def visit(one: Expr) -> Iterator[Expr]:
        if one not in seen:
            seen.add(one)
            for operand in one.operands:
                yield from visit(operand)
            yield one

    for root in roots:
        yield from visit(root)


def dependence(kernel: Kernel) -> dict[Expr, set[sympy.Symbol]]:
    """The axes that each expression's value changes with; a reduction's does not with the columns."""
    columns = {axis.symbol for axis in kernel.columns}
    axes = columns | {axis.symbol for axis in kernel.rows}
    found: dict[Expr, set[sympy.Symbol]] = {}
    for one in kernel.expressions():
        symbols = {s for index in one.indices for s in index.free_symbols} & axes
        for operand in one.operands:
            symbols |= found[operand]
        found[one] = symbols - columns if isinstance(one, Reduce) else symbols
    return found
