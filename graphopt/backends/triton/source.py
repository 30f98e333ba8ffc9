"""Prints a loop description as Triton source.

Pointwise: a program computes BLOCK points. Rows: a program computes ROWS rows, their columns at once
in one tile if they fit (persistent), else COLUMNS at a time, in one pass per level of reductions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import sympy
import torch

from graphopt.backends.triton import loops, scalars
from graphopt.backends.triton.emit import Emitter, strided_axes
from graphopt.backends.triton.text import formulas, shape_text

PERSISTENT = 16384  # the most columns held in one tile
EVEN = 1024  # pointwise counts that this divides need no mask: no block is larger then


@dataclasses.dataclass(frozen=True)
class Printed:
    """Source text, and what a launch must know.

    Attributes:
        form: "pointwise", "persistent", "looped" or "product".
        strides: the (input, axis) whose strides are arguments after the sizes.
        even: whether the block must divide EVEN.
    """

    text: str
    form: str
    strides: tuple[tuple[int, int], ...]
    even: bool = False


def printed(kernel: loops.Kernel, title: str, wide: bool = False) -> Printed:
    """The source of a kernel; `wide` computes offsets in 64 bits.

    Raises:
        Outside: if it has no form that Triton takes.
    """
    printer = _Pointwise if not kernel.columns else _Rows
    return printer(kernel, wide).print(title)


def notes(kernel: loops.Kernel | loops.Product, sizes: dict[str, str]) -> list[str]:
    """What the docstring says after the title: formulas and tensors."""
    tensors = [
        f"{one.name}: {shape_text(one, sizes)}"
        for one in (*kernel.inputs, *(store.buffer for store in kernel.stores))
    ]
    return [*(f"    {line}" for line in formulas(kernel)), "", *tensors]


class _Printer(Emitter):
    def __init__(self, kernel: loops.Kernel, wide: bool) -> None:
        super().__init__(kernel.inputs, kernel.stores, kernel.sizes, wide)
        self.kernel = kernel
        self.depends = loops.dependence(kernel)
        self.letters["i"] = {axis.symbol for axis in kernel.rows}
        self.taken |= {"i", "j", *(axis.symbol.name for axis in (*kernel.rows, *kernel.columns))}
        indices = [index for one in kernel.expressions() for index in one.indices]
        indices += [store.offset for store in kernel.stores]
        self.used = {symbol for index in indices for symbol in index.free_symbols}

    def guard(self, letter: str, axes: tuple[loops.Axis, ...], text: str) -> None:
        """Let `text` guard a flat index: its outermost loop axis alone can be out of range."""
        self.guards[axes[0].symbol if axes else sympy.Symbol(letter)] = text
        self.guards[sympy.Symbol(letter)] = text


class _Pointwise(_Printer):
    def print(self, title: str) -> Printed:
        kernel = self.kernel
        even = kernel.row_count.as_coeff_Mul()[0] % EVEN == 0
        self.line(f"i = {self.block('tl.program_id(0)', 'BLOCK')}")
        if not even:
            self.line(f"inside = i < {self.index(kernel.row_count)}")
            self.guard("i", kernel.rows, "inside")
        self.axes("i", kernel.rows, self.used)
        for store in kernel.stores:
            self.store(store, "i")
        text = self.function(kernel.name, ["BLOCK"], title, notes(kernel, self.sizes))
        return Printed(text, "pointwise", strided_axes(kernel.inputs), even)


class _Rows(_Printer):
    def __init__(self, kernel: loops.Kernel, wide: bool) -> None:
        super().__init__(kernel, wide)
        count = kernel.column_count
        self.columns = {axis.symbol for axis in kernel.columns}
        self.letters["j"] = self.columns
        self.looped = not (count.is_Integer and count <= PERSISTENT)
        self.exact = not self.looped and int(count).bit_count() == 1

    def print(self, title: str) -> Printed:
        kernel = self.kernel
        self.line(f"i = {self.across('tl.program_id(0)', 'ROWS', '[:, None]')}")
        self.line(f"inside_i = i < {self.index(kernel.row_count)}")
        self.guard("i", kernel.rows, "inside_i")
        self.axes("i", kernel.rows, self.used)
        if not self.exact:
            self.guard("j", kernel.columns, "inside_j")
        if self.looped:
            self._passes()
        else:
            self.line("j = tl.arange(0, COLUMNS)[None, :]")
            self._columns()
            for store in kernel.stores:
                self.store(store, "i" if store.per_row else "ij")
        text = self.function(kernel.name, ["ROWS", "COLUMNS"], title, notes(kernel, self.sizes))
        return Printed(text, "looped" if self.looped else "persistent", strided_axes(kernel.inputs))

    def _columns(self) -> None:
        if not self.exact:
            self.line(f"inside_j = j < {self.index(self.kernel.column_count)}")
        self.axes("j", self.kernel.columns, self.used)

    # -- more columns than one tile holds -------------------------------------------------------

    def _passes(self) -> None:
        for level in self._levels():
            self._pass(level)
        for store in self.kernel.stores:
            if store.per_row:
                self.store(store, "i")
        full = [store for store in self.kernel.stores if not store.per_row]
        if full:
            self._row_values(*(store.value for store in full))
            self._loop()
            for store in full:
                self.store(store, "ij")
            self.depth -= 1

    def _loop(self) -> None:
        self.line(f"for start in range(0, {self.index(self.kernel.column_count)}, COLUMNS):")
        self.depth += 1
        self.line(f"j = {self.across('start', 'COLUMNS', '[None, :]')}")
        self._columns()

    def _levels(self) -> Iterable[list[loops.Reduce]]:
        """The reductions in the order of their passes."""
        level: dict[loops.Expr, int] = {}
        for one in self.kernel.expressions():
            below = max((level[operand] for operand in one.operands), default=0)
            level[one] = below + isinstance(one, loops.Reduce)
        reductions = [one for one in level if isinstance(one, loops.Reduce)]
        for number in sorted({level[one] for one in reductions}):
            yield [one for one in reductions if level[one] == number]

    def _pass(self, reductions: list[loops.Reduce]) -> None:
        """One loop over the columns that accumulates some reductions."""
        self._row_values(*(one.body for one in reductions))
        partial = {}
        for one in reductions:
            partial[one] = self.name(f"{one.label}_partial")
            start, dtype = identity(one), scalars.spelled(one.dtype)
            self.line(f"{partial[one]} = tl.full([ROWS, COLUMNS], {start}, {dtype})")
        outside = dict(self.texts)
        self._loop()
        for one in reductions:
            value = self._masked(one)
            if one.kind in ("sum", "mean"):
                self.line(f"{partial[one]} += {value}")
            else:
                word = "maximum" if one.kind == "max" else "minimum"
                nan = ", propagate_nan=tl.PropagateNan.ALL" if one.dtype.is_floating_point else ""
                self.line(f"{partial[one]} = tl.{word}({partial[one]}, {value}{nan})")
        self.depth -= 1
        self.texts = outside
        for one in reductions:
            self.assign(one, self._folded(one, partial[one]))

    def _row_values(self, *roots: loops.Expr) -> None:
        """Compute before a loop what does not change in it."""
        for one in loops.walk(*roots):
            below = [each for each in loops.walk(one) if isinstance(each, loops.Reduce)]
            if not self.depends[one] & self.columns and all(each in self.texts for each in below):
                self.emit(one)

    # -- reductions ---------------------------------------------------------------------------

    def reduced(self, one: loops.Expr) -> None:
        if not isinstance(one, loops.Reduce):
            super().reduced(one)
        else:
            self.assign(one, self._folded(one, self._masked(one)))

    def _masked(self, one: loops.Reduce) -> str:
        """What is reduced, on a whole tile, neutral outside of the columns."""
        value = self.emit(one.body)
        if self.exact and not self.depends[one.body] & self.columns:
            value = f"tl.broadcast_to({value}, [ROWS, COLUMNS])"
        return value if self.exact else f"tl.where(inside_j, {value}, {identity(one)})"

    def _folded(self, one: loops.Reduce, tile: str) -> str:
        if one.kind in ("sum", "mean"):
            text = f"tl.sum({tile}, 1, keep_dims=True)"
            return text if one.kind == "sum" else f"{text} / {self.bound(self.kernel.column_count)}"
        if one.dtype.is_floating_point:
            return f"device.row_{one.kind}({tile}, 1)"
        return f"tl.{one.kind}({tile}, 1, keep_dims=True)"


def identity(one: loops.Reduce) -> str:
    """The value that changes nothing when it is reduced too."""
    if one.kind in ("sum", "mean"):
        return "0.0" if one.dtype.is_floating_point else "0"
    if one.dtype.is_floating_point:
        return 'float("-inf")' if one.kind == "max" else 'float("inf")'
    limits = torch.iinfo(one.dtype)
    return str(limits.min if one.kind == "max" else limits.max)
