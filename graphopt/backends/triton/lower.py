"""From a group of nodes to the loop description of one kernel.

A value is a function of an index: an elementwise node passes the index on to its operands, a view
changes it (`views`), a node outside the group becomes a load. So a group may be composed freely, as
long as every output is some order of the group's points, and every reduction is asked for at its own
row.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.triton import kinds, loops, scalars, views
from graphopt.backends.triton.index import ZERO, Index, Ranges, equal, product
from graphopt.backends.triton.region import Outside

aten = torch.ops.aten
MOST_PLACES = 4  # that one element of a node is computed at: more is a kernel of its own


class Domain:
    """The points of a kernel: a shape, and which of its axes are reduced (the columns)."""

    def __init__(self, shape: Index, reduced: Iterable[int] = ()) -> None:
        self.shape = shape
        self.reduced = frozenset(reduced)
        self.kept = tuple(s for i, s in enumerate(shape) if i not in self.reduced)
        self.points = product(shape)
        self.row_count = product(self.kept)

    def place(self, shape: Index) -> str:
        """How often a node of this shape is stored: per "point", per "row", or not at all: ""."""
        size = product(shape)
        if equal(size, self.points):
            return "point"
        return "row" if self.reduced and equal(size, self.row_count) else ""


def domain_of(node: fx.Node) -> Domain:
    """The points that a node by itself is computed over."""
    if node.meta["kind"] != "reduction":
        return Domain(views.shape(node))
    given = kinds.bind(node)
    shape = views.shape(given["self"])
    return Domain(shape, reduced_axes(given, len(shape)))


def reduced_axes(given: Mapping[str, Any], rank: int) -> list[int]:
    dims = given.get("dim")
    return [dim % rank for dim in dims] if dims else list(range(rank))


class Lowering:
    """The expressions of one group of nodes over one domain."""

    def __init__(
        self, members: Iterable[fx.Node], domain: Domain, strided: frozenset[fx.Node] = frozenset()
    ) -> None:
        self.members = set(members)
        self.domain = domain
        self.strided = strided
        self.ranges = Ranges()
        self.axes = tuple(
            self.ranges.axis(f"{'j' if axis in domain.reduced else 'i'}{axis}", size)
            for axis, size in enumerate(domain.shape)
        )
        self.buffers: dict[fx.Node, loops.Buffer] = {}
        self._values: dict[Any, loops.Expr] = {}
        self._places: dict[fx.Node, set[tuple[Index, Index]]] = {}
        self._names: set[str] = set()
        self._lookups: dict[Any, sympy.Expr] = {}
        self._positions: dict[sympy.Expr, loops.Position] = {}
        self.required: dict[sympy.Expr, None] = {}

    # -- the whole ----------------------------------------------------------------------------

    def kernel(self, name: str, outputs: Sequence[fx.Node]) -> loops.Kernel:
        """The kernel that stores `outputs`.

        Raises:
            Outside: if the group is not one kernel over this domain.
        """
        stores = self.stores(outputs)

        reduced = self.domain.reduced
        return loops.Kernel(
            name, self.group(set(range(len(self.axes))) - reduced), self.group(reduced),
            tuple(self.buffers.values()), stores, self.sizes(stores), self.ranges,
            tuple(self.required),
        )  # fmt: skip

    def group(self, axes: Iterable[int]) -> tuple[loops.Axis, ...]:
        """The loops over some axes of the domain, outermost first."""
        pairs = [(self.axes[axis], self.domain.shape[axis]) for axis in sorted(axes)]
        return tuple(loops.Axis(symbol, size) for symbol, size in pairs if size != 1)

    def stores(self, outputs: Sequence[fx.Node]) -> tuple[loops.Store, ...]:
        found = []
        for node in outputs:
            value, offset, per_row = self.output(node)
            shape, dtype = views.shape(node), node.meta["val"].dtype
            buffer = loops.Buffer(self._name(f"{node.name}_out"), dtype, shape, dense(shape))
            found.append(loops.Store(buffer, offset, value, per_row))
        return tuple(found)

    def output(self, node: fx.Node) -> tuple[loops.Expr, sympy.Expr, bool]:
        """A node's value, where it is stored, and whether once per row."""
        shape = views.shape(node)
        place = self.domain.place(shape)
        if not place:
            raise Outside(f"{node.name} has other points than its group")
        axes, source = self.axes, self.domain.shape
        if place == "row":
            axes, source = self.row_axes, self.domain.kept
        index = axes if source == shape else self.ranges.reshaped(axes, source, shape)
        return self.value(node, index), self.ranges.flat(axes, source), place == "row"

    @property
    def row_axes(self) -> Index:
        return tuple(a for i, a in enumerate(self.axes) if i not in self.domain.reduced)

    def sizes(self, stores: Sequence[loops.Store]) -> tuple[sympy.Symbol, ...]:
        found: set[sympy.Symbol] = set()
        for one in loops.walk(*(store.value for store in stores)):
            found.update(*(index.free_symbols for index in one.indices))
        for size in (*self.domain.shape, *self.required):
            found |= size.free_symbols
        found -= set(self.ranges.size)
        found -= {s for b in self.buffers.values() for stride in b.strides
                  for s in stride.free_symbols if s.name.startswith(f"{b.name}_stride")}  # fmt: skip
        return tuple(sorted(found, key=str))

    # -- values -------------------------------------------------------------------------------

    def value(self, node: fx.Node, index: Index, conditions: Index = ()) -> loops.Expr:
        """A node at an index; loads happen only where the conditions hold."""
        key = (node, index, conditions)
        if key not in self._values:
            self._values[key] = self._value(node, index, conditions)
        return self._values[key]

    def _value(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        kind = node.meta["kind"]
        if kind == "view":
            source = kinds.bind(node)["self"]
            return self.value(source, views.source_index(node, index, self.ranges), conditions)
        if kind == "creation":
            return self._created(node, index)
        if node not in self.members:
            return self._load(node, index, conditions)
        places = self._places.setdefault(node, set())
        places.add((index, conditions))
        if len(places) > MOST_PLACES:
            raise Outside(f"{node.name} would be computed {len(places)} times")
        if kind == "reduction":
            return self._reduce(node, index)
        if node.target in kinds.LOOKUPS:
            return self._looked_up(node, index, conditions)
        if node.target is aten.cat.default:
            return self._cat(node, index, conditions)
        if node.target is aten.constant_pad_nd.default:
            return self._pad(node, index, conditions)
        if node.target is aten._to_copy.default:
            return self._copied(node, index, conditions)
        if kind != "pointwise":
            return self.special(node, index, conditions)
        return self._call(node, index, conditions)

    def special(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        """A member of another kind, in lowerings that have such."""
        raise Outside(f"{node.name} is a {node.meta['kind']}")

    def _operand(self, argument: Any, index: Index, conditions: Index) -> loops.Expr:
        if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
            place = views.broadcast(index, views.shape(argument))
            return self.value(argument, place, conditions)
        if isinstance(argument, fx.Node):
            return loops.Iota(torch.int64, views.whole(argument))
        if isinstance(argument, bool):
            return loops.Constant(torch.bool, argument)
        return loops.Constant(
            torch.float64 if isinstance(argument, float) else torch.int64, argument
        )

    def _call(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        entry = scalars.TABLE[node.target]
        given = kinds.bind(node)
        compute = entry.compute(given)
        typed = entry.typed or entry.operands
        used, args = [], []
        for name in entry.operands:
            if given[name] is not None:
                value = self._operand(given[name], index, conditions)
                args.append(cast(value, compute) if name in typed or
                            isinstance(value, loops.Constant) else value)  # fmt: skip
                used.append(name)
        options = {k: v for k, v in given.items() if k not in entry.operands}
        options["given"] = tuple(used)
        return loops.Call(self._result(node), node.name, node.target, tuple(args), options, compute)

    def _result(self, node: fx.Node) -> torch.dtype:
        return scalars.register(node.meta["val"].dtype)

    def _copied(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        given = kinds.bind(node)
        dtype = node.meta["val"].dtype
        value = self._operand(given["self"], index, conditions)
        wider = given["self"].meta["val"].dtype == dtype
        through = dtype if dtype in scalars.HALF and not wider else None
        return cast(value, scalars.register(dtype), through)

    def _load(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        if node not in self.buffers:
            tensor = node.meta["val"]
            if tensor.dtype not in kinds.DTYPES:
                raise Outside(f"no kernels for {tensor.dtype}")
            name, shape = self._name(label(node)), views.shape(node)
            strides = dense(shape)
            if node in self.strided:
                strides = tuple(
                    sympy.Symbol(f"{name}_stride{axis}", integer=True) for axis in range(len(shape))
                )
            self.buffers[node] = loops.Buffer(name, tensor.dtype, shape, strides)
        buffer = self.buffers[node]
        offset = sum((i * s for i, s in zip(index, buffer.strides, strict=True)), ZERO)
        key = (node, offset := self.ranges.joined(offset), conditions)
        at = tuple((s, self._positions[s]) for s in sorted(offset.free_symbols, key=str)
                   if s in self._positions)  # fmt: skip
        asked = {s for one in conditions for s in one.free_symbols}
        if asked & set(self._positions):
            raise Outside(f"{node.name} is read where a looked-up position allows it")
        dtype = scalars.register(buffer.dtype)
        return self._values.setdefault(key, loops.Load(dtype, buffer, offset, conditions, at))

    def _created(self, node: fx.Node, index: Index) -> loops.Expr:
        given, dtype = kinds.bind(node), self._result(node)
        if node.target is aten.arange.start_step:
            start, step = given["start"], given["step"]
            if all(isinstance(one, (int, fx.Node)) for one in (start, step)):
                position = views.whole(start) + views.whole(step) * index[0]
                return cast(loops.Iota(torch.int64, sympy.expand(position)), dtype)
            raise Outside("a range with fractional steps")
        filler = given["s" if node.target is aten.scalar_tensor.default else "fill_value"]
        return cast(self._operand(filler, (), ()), dtype)

    def _reduce(self, node: fx.Node, index: Index) -> loops.Expr:
        """A reduction at its own row: its operand at every column."""
        given = kinds.bind(node)
        source = given["self"]
        shape = views.shape(source)
        if not self.domain.reduced or not equal(product(shape), self.domain.points):
            raise Outside(f"{node.name} reduces other points than its group has")
        axes = set(reduced_axes(given, len(shape)))
        full = self.ranges.reshaped(self.axes, self.domain.shape, shape)
        kept = tuple(one for axis, one in enumerate(full) if axis not in axes)
        if len(index) == len(shape):
            index = tuple(one for axis, one in enumerate(index) if axis not in axes)
        rows = set().union(*(one.free_symbols for one in self.row_axes))
        columns = set().union(*(one.free_symbols for one in self.axes)) - rows
        if any(one.free_symbols & columns for one in kept) or any(
            full[axis].free_symbols & rows for axis in axes
        ):
            raise Outside(f"{node.name} reduces other axes than its group")
        if not all(map(equal, index, kept)):
            raise Outside(f"{node.name} is needed at another row")
        dtype = self._result(node)
        body = cast(self.value(source, full), dtype)
        if not columns:  # of one column: every kind of reduction is the value itself
            return body
        kind = kinds.REDUCTIONS[node.target]  # type: ignore[index]
        return loops.Reduce(dtype, node.name, kind, body)

    # -- values that come from one of several places -------------------------------------------

    def _looked_up(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        """A value at positions that tensors from outside tell."""
        found = kinds.lookup(node)
        if isinstance(found, str):
            raise Outside(found)
        start, end = found.start, found.start + found.rank
        rest = iter((*index[:start], *index[end:]))
        place = []
        for dim, size in enumerate(views.shape(found.source)):
            positions = found.indices.get(dim)
            if positions is None:
                place.append(next(rest))
                continue
            where = views.broadcast(index[start:end], views.shape(positions))
            value = self.value(positions, where, conditions)
            place.append(self._position(node, value, size, found.wraps))
        return self.value(found.source, tuple(place), conditions)

    def _position(
        self, node: fx.Node, value: loops.Expr, size: sympy.Expr, wraps: bool
    ) -> sympy.Expr:
        """The index that a value stands for: itself if it is a known one, or a symbol that the load
        reads first. What the kernel computes before could not be checked in time."""
        if isinstance(value, loops.Iota):
            for one in self._unproved(value.value, size - 1 - value.value):
                self._require(node, one)
            return value.value
        if not isinstance(value, loops.Load) or value.at or size == 1:
            raise Outside(f"{node.name} is looked up at positions that its kernel computes")
        key = (value, size, wraps)
        if key not in self._lookups:
            self._lookups[key] = symbol = self.ranges.axis(self._name(f"{node.name}_at"), size)
            self._positions[symbol] = loops.Position(value.dtype, value, size, wraps)
        return self._lookups[key]

    def _require(self, node: fx.Node, condition: sympy.Expr) -> None:
        """Let the kernel run only where the sizes make `condition` at least 0 at every point."""
        bound = self.ranges.least(condition)
        if bound is None or bound.is_Integer:
            raise Outside(f"{node.name} is looked up at a range that does not fit into its axis")
        self.required[bound] = None

    def _unproved(self, *conditions: sympy.Expr) -> Index:
        return tuple(one for one in conditions if not self.ranges.nonnegative(one))

    def _cat(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        given = kinds.bind(node)
        parts = [one for one in given["tensors"] if product(views.shape(one)) != 0]
        dim = given["dim"] % len(index)
        start: sympy.Expr = ZERO
        choices = []
        for part in parts:
            size = views.shape(part)[dim]
            inner = (*index[:dim], index[dim] - start, *index[dim + 1 :])
            below = self._unproved(start + size - 1 - index[dim])
            inside = (*conditions, *below, *self._unproved(index[dim] - start))
            choices.append((below, cast(self.value(part, inner, inside), self._result(node))))
            start += size
        value = choices.pop()[1]
        for below, choice in reversed(choices):
            value = loops.Choose(choice.dtype, below, choice, value) if below else choice
        return value

    def _pad(self, node: fx.Node, index: Index, conditions: Index) -> loops.Expr:
        given = kinds.bind(node)
        source, found = given["self"], list(index)
        limits: list[sympy.Expr] = []
        for count, before in enumerate(given["pad"][::2]):
            dim = len(index) - 1 - count
            found[dim] = index[dim] - views.whole(before)
            limits += self._unproved(found[dim], views.shape(source)[dim] - 1 - found[dim])
        value = self.value(source, tuple(found), (*conditions, *limits))
        filler = cast(self._operand(given["value"] or 0, (), ()), value.dtype)
        return loops.Choose(value.dtype, tuple(limits), value, filler) if limits else value

    # -- names --------------------------------------------------------------------------------

    def _name(self, wish: str) -> str:
        wish = name = identifier(wish)
        count = 1
        while name in self._names:
            name, count = f"{wish}_{count}", count + 1
        self._names.add(name)
        return name


RESERVED = {"tl", "triton", "device", "i", "j", "k", "float", "range", "inside", "n"}


def identifier(wish: str) -> str:
    """A name that a kernel, or a tensor in one, may have in the source: `and` becomes `and_`."""
    name = wish.strip("_") or "kernel"
    if not name.isidentifier():
        name = f"x_{name}"
    return f"{name}_" if keyword.iskeyword(name) or name in RESERVED else name


def label(node: fx.Node) -> str:
    """A readable name for a tensor: the module and field of a state, else the node's name."""
    if node.op == "get_attr":
        return "_".join(part for part in str(node.target).split(".")[-2:] if not part.isdigit())
    return node.name


def dense(shape: Index) -> Index:
    """The strides of a tensor whose elements lie one after the other."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def cast(value: loops.Expr, dtype: torch.dtype, through: torch.dtype | None = None) -> loops.Expr:
    if isinstance(value, loops.Constant) and through is None:
        return loops.Constant(dtype, value.value)
    if value.dtype == dtype and through is None:
        return value
    return loops.Cast(dtype, value, through)
