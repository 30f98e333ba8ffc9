"""Statements of a kernel: loads, formulas and stores of expressions over tiles.

A tile has axes that are blocks of loop axes. Where a block can reach beyond its loop axis, a guard
keeps accesses inside: a mask is the guards of the axes that an offset changes with, and the
conditions of padding and joining.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch

from graphopt.backends.triton import loops, scalars
from graphopt.backends.triton.region import Outside
from graphopt.backends.triton.text import docstring, index_text

HEADER = "import triton\nimport triton.language as tl\n"
DEVICE = "\nfrom graphopt.backends.triton import device\n"


# Names that the printed text uses for itself.
RESERVED = {"tl", "device", "triton", "float", "range", "start", "tiles", "inside", "inside_i",
            "inside_j", "inside_k", "inside_kt"}  # fmt: skip


def size_names(sizes: Sequence[sympy.Symbol]) -> dict[str, str]:
    """What the symbolic sizes are called in a kernel: n, or n0, n1, ..."""
    return {s.name: f"n{k}" if len(sizes) > 1 else "n" for k, s in enumerate(sizes)}


def strided_axes(inputs: Sequence[loops.Buffer]) -> tuple[tuple[int, int], ...]:
    """The (input, axis) whose strides are arguments of the kernel."""
    return tuple(
        (number, axis) for number, one in enumerate(inputs)
        for axis, stride in enumerate(one.strides)
        if stride.is_Symbol and stride.name == f"{one.name}_stride{axis}"
    )  # fmt: skip


class Emitter:
    """Prints expressions line by line.

    Attributes:
        lines: the body so far.
        texts: the name (or literal) of every value computed so far.
        guards: the mask that an axis needs, by axis.
        letters: for every axis of the tile, its flat index and the loop axes that it runs through.
    """

    def __init__(
        self, inputs: Sequence[loops.Buffer], stores: Sequence[loops.Store],
        sizes: Sequence[sympy.Symbol], wide: bool,
    ) -> None:  # fmt: skip
        self.inputs = inputs
        self.stores = stores
        self.sizes = size_names(sizes)
        self.wide = wide
        self.lines: list[str] = []
        self.depth = 1
        self.texts: dict[loops.Expr, str] = {}
        self.guards: dict[sympy.Symbol, str] = {}
        self.letters: dict[str, set[sympy.Symbol]] = {}
        self.taken = {*RESERVED, *self.sizes.values()}
        self.taken |= {store.buffer.name for store in stores}

    # -- text ---------------------------------------------------------------------------------

    def index(self, e: sympy.Expr) -> str:
        return index_text(e, self.sizes)

    def bound(self, size: sympy.Expr) -> str:
        """A size as an operand."""
        return self.index(size) if size.is_Integer or size.is_Symbol else f"({self.index(size)})"

    def line(self, text: str) -> None:
        self.lines.append(f"{'    ' * self.depth}{text}".rstrip())

    def name(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.taken:
            name, count = f"{wish}_{count}", count + 1
        self.taken.add(name)
        return name

    def block(self, first: str, block: str) -> str:
        """The positions of a block of one axis from its first one."""
        first += ".to(tl.int64)" if self.wide and "program_id" in first else ""
        scaled = f"{first} * {block}" if "program_id" in first else first
        return f"{scaled} + tl.arange(0, {block})"

    def across(self, first: str, block: str, axis: str) -> str:
        """The same as a row or a column of a tile: `axis` is "[:, None]" or "[None, :]"."""
        text = self.block(first, block)
        if self.wide and "program_id" not in first:
            return f"({text}).to(tl.int64){axis}"
        return (
            f"({text}){axis}" if "program_id" in first else f"{first} + tl.arange(0, {block}){axis}"
        )

    def axes(self, flat: str, axes: Sequence[loops.Axis], used: set[sympy.Symbol]) -> None:
        """The loop axes from their common position."""
        below: sympy.Expr = sympy.Integer(1)
        found = []
        for number in range(len(axes) - 1, -1, -1):
            axis = axes[number]
            text = flat if below == 1 else f"{flat} // {self.bound(below)}"
            if number > 0:
                text += f" % {self.bound(axis.size)}"
            if axis.symbol in used and axis.symbol.name != flat:
                found.append(f"{axis.symbol} = {text}")
            below = sympy.expand(below * axis.size)
        for line in reversed(found):
            self.line(line)

    def function(self, name: str, blocks: Sequence[str], title: str, notes: list[str]) -> str:
        """The whole source, around the lines so far."""
        pointers = [f"{one.name}_ptr" for one in self.inputs]
        pointers += [store.buffer.name for store in self.stores]
        numbers = [*self.sizes.values()]
        numbers += [str(self.inputs[n].strides[axis]) for n, axis in strided_axes(self.inputs)]
        parameters = [*pointers, *numbers, *(f"{one}: tl.constexpr" for one in blocks)]
        signature = f"def {name}({', '.join(parameters)}):"
        if len(signature) > 100:
            signature = f"def {name}(\n" + "".join(f"    {one},\n" for one in parameters) + "):"
        heading = "\n".join(f"    {line}".rstrip() for line in docstring(title, notes))
        body = "\n".join(self.lines)
        header = HEADER + (DEVICE if "device." in body else "")
        return f"{header}\n\n@triton.jit\n{signature}\n{heading}\n{body}\n"

    # -- memory -------------------------------------------------------------------------------

    def mask(self, symbols: set[sympy.Symbol], conditions: Iterable[sympy.Expr] = ()) -> str:
        """The condition of an access at an offset in these axes; empty if none is needed."""
        parts = dict.fromkeys(text for axis, text in self.guards.items() if axis in symbols)
        return " & ".join([*parts, *map(self.condition, conditions)])

    def condition(self, at_least_zero: sympy.Expr) -> str:
        terms = sympy.Add.make_args(at_least_zero)
        left = sympy.Add(*[term for term in terms if term.as_coeff_Mul()[0] > 0])
        return f"({self.index(left)} >= {self.index(left - at_least_zero)})"

    def load(self, one: loops.Load, other: str = "", raw: bool = False) -> str:
        """The text of a load; `raw` leaves half types as they are."""
        symbols = loops.axes_of(one)
        places = {symbol.name: self.emit(position) for symbol, position in one.at}
        offset = index_text(one.offset, {**self.sizes, **places})
        pointer = f"{one.buffer.name}_ptr" + ("" if offset == "0" else f" + {offset}")
        asked = {symbol for index in one.conditions for symbol in index.free_symbols} - symbols
        for letter, axes in self.letters.items():
            if asked & axes and not symbols & axes:  # a mask is no larger than what it masks
                pointer += f" + 0 * {letter}"
        mask = self.mask(symbols, one.conditions)
        for name, (_, position) in zip(places.values(), one.at, strict=True):
            inside = f"({name} >= 0) & ({name} < {self.bound(position.size)})"
            mask = f"{mask} & {inside}" if mask else inside
        text = f"tl.load({', '.join(filter(None, [pointer, mask, other if mask else '']))})"
        if one.buffer.dtype != one.dtype and not raw:
            text += f".to({scalars.spelled(one.dtype)})"
        return text

    def store(self, store: loops.Store, letters: Iterable[str]) -> None:
        """A store from a tile with these axes; one of size 1 is not in the offset."""
        value = self.emit(store.value)
        symbols = store.offset.free_symbols
        parts = [] if store.offset == 0 else [self.index(store.offset)]
        guards = set(symbols)
        for letter in letters:
            if not symbols & self.letters[letter]:
                parts.insert(0, letter)
                guards.add(sympy.Symbol(letter))
        mask = self.mask(guards)
        target = f"{store.buffer.name} + {' + '.join(parts)}"
        self.line(f"tl.store({', '.join(filter(None, [target, value, mask]))})")

    # -- values -------------------------------------------------------------------------------

    def emit(self, one: loops.Expr) -> str:
        """The name (or literal) of a value, computed before if it was not yet."""
        if one not in self.texts:
            self._emit(one)
        return self.texts[one]

    def assign(self, one: loops.Expr, text: str, wish: str = "") -> None:
        name = self.name(wish or getattr(one, "label", "value"))
        self.line(f"{name} = {text}")
        self.texts[one] = name

    def reduced(self, one: loops.Expr) -> None:
        """Compute a value that combines several points, if this kind of kernel has such."""
        raise Outside(f"no source for {type(one).__name__}")

    def _emit(self, one: loops.Expr) -> None:
        if isinstance(one, loops.Load):
            self.assign(one, self.load(one), one.buffer.name)
        elif isinstance(one, loops.Constant):
            self.texts[one] = constant(one)
        elif isinstance(one, loops.Iota):
            text, dtype = self.index(one.value), scalars.spelled(one.dtype)
            if one.value.free_symbols & set().union(*self.letters.values()):
                self.assign(one, f"({text}).to({dtype})", "position")
            else:
                self.assign(one, f"tl.full([1], {text}, {dtype})", "size")
        elif isinstance(one, loops.Cast):
            self.texts[one] = self._cast(one)
        elif isinstance(one, loops.Choose):
            inside = " & ".join(map(self.condition, one.conditions))
            then, other = self.emit(one.then), self.emit(one.other)
            self.assign(one, f"tl.where({inside}, {then}, {other})", "chosen")
        elif isinstance(one, loops.Position):
            self._position(one)
        elif isinstance(one, loops.Call):
            self._call(one)
        else:
            self.reduced(one)

    def _position(self, one: loops.Position) -> None:
        """A position, which a kernel compiled with checks refuses if it is outside of its axis."""
        text, size = self.emit(one.value), self.bound(one.size)
        if one.wraps:
            text = f"tl.where({text} < 0, {text} + {size}, {text})"
        if self.wide and one.value.dtype != torch.int64:
            text = f"{text}.to(tl.int64)"
        self.assign(one, text, f"{one.value.buffer.name}_at")
        name = self.texts[one]
        mask = self.mask(loops.axes_of(one.value), one.value.conditions)
        checked = f'({name} >= 0) & ({name} < {size}), "index out of range"'
        self.line(f"tl.device_assert({checked}{f', mask={mask}' if mask else ''})")

    def _call(self, one: loops.Call) -> None:
        entry = scalars.TABLE[one.target]
        operands = iter([self.emit(arg) for arg in one.args])
        options: Mapping[str, object] = {k: v for k, v in one.options.items() if k != "given"}
        given = one.options["given"]
        texts = [next(operands) if name in given else "" for name in entry.operands]
        self.assign(one, entry.text(one.compute, *texts, **options))

    def _cast(self, one: loops.Cast) -> str:
        text = self.emit(one.value)
        if isinstance(one.value, loops.Constant):
            text = f"tl.full([1], {text}, {scalars.spelled(one.value.dtype)})"
        if one.dtype == torch.bool:
            return text if one.value.dtype == torch.bool else f"({text} != 0)"
        if one.through is not None:
            text += f".to({scalars.spelled(one.through)})"
        return f"{text}.to({scalars.spelled(one.dtype)})"


def constant(one: loops.Constant) -> str:
    """A literal; one that float32 would round is given its type."""
    text = scalars.literal(one.value, one.dtype)
    if one.dtype == torch.float64:
        value = float(one.value)
        try:
            plain = struct.unpack("f", struct.pack("f", value))[0] == value or value != value
        except OverflowError:
            plain = False
        return text if plain else f"tl.full([1], {text}, tl.float64)"
    return text
