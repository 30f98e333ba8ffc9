"""Large parameter expressions, evaluated in blocks of rows that stay in the cache.

    W + s B A    =    [ W[a:b] + s B[a:b] A    for all blocks of rows a:b ]

Evaluating op by op in float64 would write and read eight bytes per element and op to memory; by blocks,
only the parameters are read and the rounded result is written. A block of a node needs the same rows
of some of its inputs and others as a whole: `_by_rows` says which, for the ops it knows. What it does
not know is evaluated as a whole, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.interpret import Evaluator, lift, lift_dtype, lift_dtypes
from graphopt.ir.sizes import same_shape

BLOCK = 1 << 17  # elements of a block
LEAST = 1 << 17  # elements of an expression worth taking apart

_REDUCING = {"sum.dim_IntList", "mean.dim", "amax.default", "amin.default", "norm.ScalarOpt_dim",
             "linalg_vector_norm.default", "linalg_norm.default"}  # fmt: skip
_SAME = {"detach.default", "clone.default", "contiguous.default", "alias.default", "to.dtype",
         "_to_copy.default"}  # fmt: skip
_IN_PLACE = {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"}
_RESHAPES = {"reshape.default", "view.default", "unsqueeze.default", "squeeze.dim"}

# What computes the rows a:b of one node; `values` holds those of the nodes before it.
Compute = Callable[[list[Any], int, int], Tensor]


class Tiles:
    """Evaluates nodes of a graph that depend on parameters alone, lifted to float64."""

    def __init__(self, graph: Graph, whole: Evaluator) -> None:
        self.graph, self.whole = graph, whole

    @torch.no_grad()
    def rounded(self, node: fx.Node) -> Tensor | None:
        """The value of a node, rounded once to its dtype; None if blocks do not help."""
        fake: Tensor = node.meta["val"]
        parts = _stacked(node)
        if (
            fake.numel() < LEAST
            or not fake.is_floating_point()
            or all(_by_rows(part) is None for part in parts)
        ):
            return None
        result = torch.empty(
            fake.shape, dtype=fake.dtype, device=fake.device, memory_format=layout(fake)
        )
        start = 0
        for part in parts:
            rows = part.meta["val"].shape[0]
            self._fill(result[start : start + rows], part, part.meta["val"].numel())
            start += rows
        return result

    def value(self, node: fx.Node) -> Any:
        """The value of a node in float64, the large reductions in it taken block by block."""
        for one in _reductions(node):
            (reduced,) = _by_rows(one) or [one]
            fake, size = one.meta["val"], reduced.meta["val"].numel()
            if size >= LEAST and self.whole.known(one) is None:
                value = torch.empty(fake.shape, dtype=lift_dtype(fake.dtype), device=fake.device)
                self._fill(value, one, size)
                self.whole.keep(one, value)
        return self.whole.evaluate(node)

    def _fill(self, result: Tensor, node: fx.Node, size: int) -> None:
        """Write the value of a node, by blocks of rows; `size`: elements of the largest value."""
        rows = result.shape[0]
        count = max(1, BLOCK * rows // size)
        steps = _Steps(self, node).steps
        for a in range(0, rows, count):
            b = min(a + count, rows)
            values: list[Any] = []
            for step in steps:
                values.append(step.compute(values, a, b))
                for place in step.last:
                    values[place] = None
            result[a:b] = values[-1]


@dataclasses.dataclass
class _Step:
    compute: Compute
    reads: list[int] = dataclasses.field(default_factory=list)
    view: bool = False  # the memory of what it reads
    foreign: bool = False  # memory of a parameter or of a value that is kept
    last: list[int] = dataclasses.field(default_factory=list)  # whose last reader it is


class _Steps:
    """What computes a block of a node, its inputs first."""

    def __init__(self, tiles: Tiles, node: fx.Node) -> None:
        self.tiles = tiles
        self.places: dict[fx.Node, int] = {}
        self.steps: list[_Step] = []
        self.sums: list[tuple[int, _Sum]] = []
        self._place(node)
        for at, step in enumerate(self.steps):
            for read in step.reads:
                if all(read not in later.reads for later in self.steps[at + 1 :]):
                    step.last.append(read)
        for at, one in self.sums:
            apart = one.beside is None or self._memory(one.beside) != self._memory(one.into)
            one.in_place = apart and self._free(one.into, at)

    def _memory(self, at: int) -> int:
        """The step whose memory the value of a step is in."""
        while self.steps[at].view:
            (at,) = self.steps[at].reads
        return at

    def _free(self, at: int, reader: int) -> bool:
        """Whether no step after `reader` needs what is in the memory of the value of step `at`."""
        memory = self._memory(at)
        return not self.steps[memory].foreign and all(
            self._memory(read) != memory
            for later in self.steps[reader + 1 :]
            for read in later.reads
        )

    def _place(self, node: fx.Node) -> int:
        if node not in self.places:
            step = self._step(node)
            self.places[node] = len(self.steps)
            self.steps.append(step)
        return self.places[node]

    def _step(self, node: fx.Node) -> _Step:
        by_rows = _by_rows(node)
        if by_rows is None:
            value = self.tiles.value(node)
            return _Step(lambda values, a, b: value[a:b], foreign=True)
        if node.op == "get_attr":
            state = self.tiles.graph.states[str(node.target)]
            tensor = state.tensor.detach() if state.exact is None else state.exact()
            dtype = lift_dtype(tensor.dtype)
            return _Step(lambda values, a, b: tensor[a:b].to(dtype), foreign=tensor.dtype == dtype)
        if _name(node) in _RESHAPES:
            at, rest = self._place(by_rows[0]), node.meta["val"].shape[1:]
            return _Step(lambda values, a, b: values[at].reshape(b - a, *rest), [at], view=True)
        if _name(node) in _SAME and node.args[0] in by_rows:
            at = self._place(by_rows[0])
            dtype = lift_dtype(node.meta["val"].dtype)
            return _Step(lambda values, a, b: values[at].to(dtype), [at], view=True)
        if (found := _sum_of_product(node)) is not None:
            return self._sum_of_product(*found)
        known = {one: self.tiles.value(one) for one in node.all_input_nodes if one not in by_rows}
        inner = {one: _Place(self._place(one)) for one in by_rows}
        spelled: Any = fx.map_arg(
            (node.args, node.kwargs),
            lambda one: inner.get(one, known.get(one)),  # type: ignore[arg-type, return-value]
        )
        args, kwargs = lift_dtypes(list(spelled[0])), lift_dtypes(spelled[1])
        reads = [one.at for one in inner.values()]
        target: Any = node.target
        how = _Sum(-1)
        if _name(node) in _IN_PLACE and node.args[0] in inner and _alike(node.args[0], node):
            how.into = inner[node.args[0]].at  # type: ignore[index]
            self.sums.append((len(self.steps), how))
            changing = getattr(torch.ops.aten, f"{_name(node)[:3]}_").Tensor

        def compute(values: list[Any], a: int, b: int) -> Tensor:
            given = [values[one.at] if isinstance(one, _Place) else one for one in args]
            call = changing if how.in_place else target
            return lift(call(*given, **kwargs))  # type: ignore[no-any-return]

        return _Step(compute, reads)

    def _sum_of_product(self, term: fx.Node, product: _Product) -> _Step:
        """`term + factor * left @ right` in one call."""
        right = lift(self.tiles.value(product.right))
        into, left = self._place(term), self._place(product.left)
        how = _Sum(into, beside=left)
        self.sums.append((len(self.steps), how))

        def compute(values: list[Any], a: int, b: int) -> Tensor:
            add = values[into].addmm_ if how.in_place else values[into].addmm
            return add(values[left], right, alpha=product.factor)  # type: ignore[no-any-return]

        return _Step(compute, [into, left])


@dataclasses.dataclass
class _Sum:
    """Whether a step may write its result over the value of the step `into`."""

    into: int
    beside: int | None = None  # must not be in the same memory
    in_place: bool = False


@dataclasses.dataclass(frozen=True)
class _Product:
    """factor * left @ right"""

    left: fx.Node
    right: fx.Node
    factor: float


def _sum_of_product(node: fx.Node) -> tuple[fx.Node, _Product] | None:
    """The term and the product that a node adds, if nothing else reads the product."""
    if _name(node) != "add.Tensor" or "alpha" in node.kwargs:
        return None
    for product, term in (node.args[:2], node.args[1::-1]):
        if not isinstance(product, fx.Node) or not isinstance(term, fx.Node) or term is product:
            continue
        found = _product(product)
        if found is not None and _alike(term, node) and _alike(product, node):
            return term, found
    return None


def _product(node: fx.Node, factor: float = 1.0) -> _Product | None:
    if len(node.users) > 1 or _by_rows(node) is None:
        return None
    first, second = (*node.args, None, None)[:2]
    if _name(node) in ("matmul.default", "mm.default") and node.meta["val"].ndim == 2:
        return _Product(first, second, factor)  # type: ignore[arg-type]
    if _name(node) == "detach.default":
        return _product(first, factor)  # type: ignore[arg-type]
    if _name(node) == "mul.Tensor" and isinstance(first, fx.Node):
        if isinstance(second, (int, float)):
            return _product(first, factor * second)
    return None


def _alike(one: Any, other: fx.Node) -> bool:
    """Whether two nodes have the same shape and, lifted, the same dtype."""
    if not isinstance(one, fx.Node):
        return False
    here, there = one.meta["val"], other.meta["val"]
    return same_shape(here.shape, there.shape) and lift_dtype(here.dtype) == lift_dtype(there.dtype)


class _Place:
    """Stands for the value of a step among the arguments of another one."""

    def __init__(self, at: int) -> None:
        self.at = at


def layout(value: Tensor) -> torch.memory_format:
    """The memory format that a tensor is in, the contiguous one if in none."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.ndim)
    if channels_last is None or value.is_contiguous():
        return torch.contiguous_format
    found = value.is_contiguous(memory_format=channels_last)
    return channels_last if found else torch.contiguous_format


def _stacked(node: fx.Node) -> list[fx.Node]:
    """The nodes whose rows, one after the other, are those of a node."""
    if _name(node) != "cat.default" or _dim(node):
        return [node]
    parts: Any = node.args[0]
    return [part for one in parts for part in _stacked(one)]


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", "")
    return name if node.op == "call_function" and is_overload(node.target) else ""


def _dim(node: fx.Node) -> Any:
    """The axis along which a node works, its second argument."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _reductions(node: fx.Node) -> list[fx.Node]:
    """The outermost sums and norms of rows that a node is computed from."""
    found, seen, stack = [], {node}, [node]
    while stack:
        top = stack.pop()
        if _name(top) in _REDUCING and _by_rows(top) is not None:
            found.append(top)
            continue
        stack += (fresh := [one for one in top.all_input_nodes if one not in seen])
        seen.update(fresh)
    return found


def _by_rows(node: fx.Node) -> list[fx.Node] | None:
    """The inputs of which a block of rows of a node needs the same rows, of others it needs all; None
    if that is not known."""
    value, name = node.meta.get("val"), _name(node)
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    if node.op == "get_attr":
        return []
    rows, first = value.shape[0], node.args[0] if node.args else None
    if not name or rows < 2:
        return None
    inputs = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
    if torch.Tag.pointwise in node.target.tags or name in _SAME:  # type: ignore[union-attr]
        return [one for one in inputs if _rows(one, value.ndim) == rows]
    if not isinstance(first, fx.Node):
        return None
    if name in ("matmul.default", "mm.default", "linear.default") and value.ndim == 2:
        return [first] if first not in node.args[1:] else None
    if name in _REDUCING:
        place = 2 if "norm" in name else 1  # after the order of a norm
        dims: Any = node.args[place] if len(node.args) > place else None
        dims = [dims] if isinstance(dims, int) else dims
        ndim = first.meta["val"].ndim
        return [first] if dims and all(dim % ndim for dim in dims) else None
    if name in _RESHAPES and _rows(first, first.meta["val"].ndim) == rows:
        return [first]
    return None


def _rows(node: fx.Node, ndim: int) -> int | None:
    shape = node.meta["val"].shape
    return shape[0] if len(shape) == ndim and ndim else None
