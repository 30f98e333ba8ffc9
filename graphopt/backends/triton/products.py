"""Products of matrices with the pointwise ops before and after them.

    out[b, i, j] = epilogue(sum_k left(b, i, k) * right(b, k, j))

for linear layers, matmul, and convolutions of 1 x 1, which are a product over the channels for every
image. What precedes is computed where an operand is loaded, what follows on the accumulated tile.
float32 is multiplied as such (never as tf32); float64 products are the framework's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.triton import kinds, loops, scalars, views
from graphopt.backends.triton.emit import Emitter, strided_axes
from graphopt.backends.triton.index import Index, equal
from graphopt.backends.triton.lower import Domain, Lowering, cast
from graphopt.backends.triton.merge import merge_groups
from graphopt.backends.triton.region import Outside
from graphopt.backends.triton.source import Printed, notes

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INNER = 128  # inner lengths that this divides need no mask


@dataclasses.dataclass(frozen=True)
class Form:
    """A product in terms of its output's index.

    Attributes:
        left, right: the operands, and their index for an output's index and an inner one.
        bias: what is added, broadcast to the output, if anything; `bias_index` as above.
        inner: the length of the sum.
        rows, columns: which axes of the output are the matrix's; the others are batch.
    """

    left: fx.Node
    right: fx.Node
    bias: fx.Node | None
    inner: sympy.Expr
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    kind: str

    def left_index(self, index: Index, k: sympy.Expr) -> Index:
        if self.kind == "conv":
            return (index[1], k, *[sympy.Integer(0)] * (len(index) - 2))
        if self.kind == "linear":
            return (*index[:-1], k)
        return views.broadcast((*index[:-1], k), views.shape(self.left))

    def right_index(self, index: Index, k: sympy.Expr, stride: Sequence[int]) -> Index:
        if self.kind == "conv":
            spatial = [one * step for one, step in zip(index[2:], stride, strict=True)]
            return (index[0], k, *spatial)
        if self.kind == "linear":
            return (index[-1], k)
        return views.broadcast((*index[:-2], k, index[-1]), views.shape(self.right))

    def bias_index(self, index: Index) -> Index:
        assert self.bias is not None
        if self.kind == "conv":
            return (index[1],)
        return views.broadcast(index, views.shape(self.bias))


def form_of(node: fx.Node) -> Form:
    """How a product is computed; raises Outside if it is not for these kernels."""
    given = kinds.bind(node)
    rank = node.meta["val"].ndim
    if node.meta["val"].dtype not in DTYPES:
        raise Outside(f"products in {str(node.meta['val'].dtype).removeprefix('torch.')}")
    if node.target in kinds.CONVOLUTIONS:
        form = _convolution(given, rank)
    elif node.target is aten.linear.default:
        inner, rows, columns = views.shape(given["weight"])[1], tuple(range(rank - 1)), (rank - 1,)
        form = Form(given["input"], given["weight"], given["bias"], inner, rows, columns, "linear")
    else:
        left = given.get("mat1", given.get("batch1", given.get("self")))
        right = given.get("mat2", given.get("batch2", given.get("other")))
        assert left is not None and right is not None
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            raise Outside("a scaled product")
        if min(left.meta["val"].ndim, right.meta["val"].ndim) < 2:
            raise Outside("a product with a vector")
        bias = given["self"] if left is not given["self"] else None
        form = Form(left, right, bias, views.shape(left)[-1], (rank - 2,), (rank - 1,), "matmul")
    if form.inner == 1:
        raise Outside("a product of inner length 1")
    return form


def _convolution(given: dict[str, object], rank: int) -> Form:
    image, weight = given["input"], given["weight"]
    assert isinstance(image, fx.Node) and isinstance(weight, fx.Node)
    sizes = views.shape(weight)
    plain = (
        all(one == 1 for one in sizes[2:])
        and given["groups"] == 1
        and given.get("transposed", False) is False
        and all(one == 0 for one in _each(given["padding"], rank))
        and image.meta["val"].ndim == rank
    )
    if not plain:
        raise Outside("a convolution over more than one place")
    bias = given["bias"]
    assert bias is None or isinstance(bias, fx.Node)
    return Form(weight, image, bias, sizes[1], (1,), tuple(range(2, rank)), "conv")


def _each(value: object, rank: int) -> list[int]:
    """An argument per spatial axis; one number stands for all."""
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * (rank - 2) if len(values) == 1 else values


class ProductLowering(Lowering):
    """The expressions of a group with one product in it, over the product's output."""

    def __init__(
        self, members: Sequence[fx.Node], node: fx.Node, strided: frozenset[fx.Node] = frozenset()
    ) -> None:
        super().__init__(members, Domain(views.shape(node)), strided)
        self.node = node
        self.form = form_of(node)
        self.inner = (
            self.ranges.axis("k", self.form.inner),
            self.ranges.axis("kt", self.form.inner),
        )
        self.accumulated: loops.Expr | None = None

    def product(self, name: str, outputs: Sequence[fx.Node]) -> loops.Product:
        """The kernel that stores `outputs`; raises Outside if the group is not one."""
        stores = self.stores(outputs)
        if self.accumulated is None:
            raise Outside("no output needs the product")
        rest = set(range(len(self.axes))) - {*self.form.rows, *self.form.columns}
        groups = [self.group(axes) for axes in (rest, self.form.rows, self.form.columns)]
        sizes = tuple(sorted({*self.sizes(stores), *self.form.inner.free_symbols}, key=str))
        groups, stores, ranges = merge_groups(groups, "bij", stores, self.ranges)
        batch, rows, columns = groups
        inputs = tuple(self.buffers.values())
        return loops.Product(
            name, batch, rows, columns, self.form.inner, inputs, stores, sizes, ranges,
            tuple(self.required),
        )  # fmt: skip

    def special(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        if node is not self.node:
            raise Outside("two products")
        if not all(map(equal, index, self.axes)) or conditions:
            raise Outside(f"{node.name} is needed in another order than it is computed in")
        stride = _each(kinds.bind(node).get("stride", 1), len(index))
        left = self.value(self.form.left, self.form.left_index(index, self.inner[0]))
        right = self.value(self.form.right, self.form.right_index(index, self.inner[1], stride))
        value: loops.Expr = loops.Accumulated(
            torch.float32, f"{node.name}_sum", self.form.kind, left, right
        )
        self.accumulated = value
        if self.form.bias is not None:
            bias = cast(self.value(self.form.bias, self.form.bias_index(index)), torch.float32)
            options = {"alpha": 1, "given": ("self", "other")}
            value = loops.Call(torch.float32, node.name, aten.add.Tensor, (value, bias), options,
                               torch.float32)  # fmt: skip
        return value

    def _value(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        # Operands are computed again in every tile that reads them.
        if node in self.members and node.meta["kind"] == "reduction":
            raise Outside("a reduction beside a product")
        return super()._value(node, index, conditions)


class ProductPrinter(Emitter):
    """Prints a product: tiles of ROWS x COLUMNS, INNER at a time."""

    def __init__(self, kernel: loops.Product, operand: torch.dtype, wide: bool) -> None:
        super().__init__(kernel.inputs, kernel.stores, kernel.sizes, wide)
        self.kernel = kernel
        self.operand = operand
        groups = {"b": kernel.batch, "i": kernel.rows, "j": kernel.columns}
        self.letters = {name: {axis.symbol for axis in axes} for name, axes in groups.items()}
        self.letters |= {
            name: {sympy.Symbol(name, integer=True, nonnegative=True)} for name in ("k", "kt")
        }
        names = {symbol.name for symbols in self.letters.values() for symbol in symbols}
        self.taken |= {"b", "i", "j", "k", "kt", "tiles", *names}
        indices = [index for one in kernel.expressions() for index in one.indices]
        indices += [store.offset for store in kernel.stores]
        self.used = {symbol for index in indices for symbol in index.free_symbols}

    def print(self, title: str) -> Printed:
        kernel = self.kernel
        rows, columns, batch, _ = kernel.extent
        wide = ".to(tl.int64)" if self.wide else ""
        self.line(f"tiles = tl.cdiv({self.index(columns)}, COLUMNS)")
        self.line(f"i = (tl.program_id(0){wide} // tiles * ROWS + tl.arange(0, ROWS))[:, None]")
        self.line(f"inside_i = i < {self.index(rows)}")
        self.line(
            f"j = (tl.program_id(0){wide} % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]"
        )
        self.line(f"inside_j = j < {self.index(columns)}")
        if batch != 1:
            self.line(f"b = tl.program_id(1){wide}")
        for letter, axes in (("b", kernel.batch), ("i", kernel.rows), ("j", kernel.columns)):
            self.axes(letter, axes, self.used)
            if letter != "b":
                self.guards[axes[0].symbol if axes else sympy.Symbol(letter)] = f"inside_{letter}"
                self.guards[sympy.Symbol(letter)] = f"inside_{letter}"
        self._accumulate()
        for store in kernel.stores:
            self.store(store, "ij")
        blocks = ["ROWS", "COLUMNS", "INNER"]
        text = self.function(kernel.name, blocks, title, notes(kernel, self.sizes))
        return Printed(text, "product", strided_axes(kernel.inputs))

    def _accumulate(self) -> None:
        """The loop over the inner axis."""
        (one,) = [e for e in self.kernel.expressions() if isinstance(e, loops.Accumulated)]
        exact = self.kernel.inner % INNER == 0
        inner = self.index(self.kernel.inner)
        total = self.name(one.label)
        self.line(f"{total} = tl.zeros([ROWS, COLUMNS], tl.float32)")
        outside = dict(self.texts)
        self.line(f"for start in range(0, {inner}, INNER):")
        self.depth += 1
        self.line(f"k = {self.across('start', 'INNER', '[None, :]')}")
        self.line(f"kt = {self.across('start', 'INNER', '[:, None]')}")
        for letter in () if exact else ("k", "kt"):
            self.line(f"inside_{letter} = {letter} < {inner}")
            (symbol,) = self.letters[letter]
            self.guards[symbol] = f"inside_{letter}"
        left = self._operand(one.left, "i", "k", "[ROWS, INNER]", exact)
        right = self._operand(one.right, "j", "kt", "[INNER, COLUMNS]", exact)
        precision = ', input_precision="ieee"' if self.operand == torch.float32 else ""
        self.line(f"{total} = tl.dot({left}, {right}, {total}{precision})")
        self.depth -= 1
        self.texts = {**outside, one: total}

    def _operand(self, one: loops.Expr, outer: str, inner: str, tile: str, exact: bool) -> str:
        """A tile of an operand, 0 beyond the inner length."""
        symbols = {
            s for each in loops.walk(one) for index in each.indices for s in index.free_symbols
        }
        whole = bool(symbols & self.letters[outer]) and bool(symbols & self.letters[inner])
        if isinstance(one, loops.Load) and whole and one.buffer.dtype == self.operand:
            name = self.name(one.buffer.name)
            self.line(f"{name} = {self.load(one, 'other=0.0', raw=True)}")
            return name
        text = self.emit(one)
        if not whole:
            text = f"tl.broadcast_to({text}, {tile})"
        if not exact:
            text = f"tl.where(inside_{inner}, {text}, 0.0)"
        name = self.name("operand")
        self.line(f"{name} = {text}.to({scalars.spelled(self.operand)})")
        return name
