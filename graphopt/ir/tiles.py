"""Large parameter expressions, evaluated in blocks of rows that stay in the cache.

    W + s B A    =    [ W[a:b] + s B[a:b] A    for all blocks of rows a:b ]

Evaluating op by op in float64 would write and read eight bytes per element and op to memory; by blocks,
only the parameters are read and the rounded result is written. A block of a node needs the same rows
of some of its inputs and others as a whole: `_by_rows` says which, for the ops it knows. What it does
not know is evaluated as a whole, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.interpret import Evaluator, lift, lift_dtype, lift_dtypes
from graphopt.ir.sizes import same_shape

BLOCK = 1 << 16  # elements of a block
LEAST = 1 << 17  # elements of an expression worth taking apart

_REDUCING = {"sum.dim_IntList", "mean.dim", "amax.default", "amin.default", "norm.ScalarOpt_dim",
             "linalg_vector_norm.default", "linalg_norm.default"}  # fmt: skip
_SAME = {"detach.default", "clone.default", "contiguous.default", "alias.default", "to.dtype",
         "_to_copy.default"}  # fmt: skip
_IN_PLACE = {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"}
_RESHAPES = {"reshape.default", "view.default", "unsqueeze.default", "squeeze.dim"}

# What computes the rows a:b of one node; `values` holds those of the nodes before it.
Step = Callable[[list[Any], int, int], Tensor]


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
            count = max(1, BLOCK * rows // part.meta["val"].numel())
            steps = self._steps(part)
            for a in range(0, rows, count):
                b = min(a + count, rows)
                values: list[Any] = []
                for step in steps:
                    values.append(step(values, a, b))
                result[start + a : start + b] = values[-1]
            start += rows
        return result

    def _steps(self, node: fx.Node) -> list[Step]:
        """What computes a block of a node, its inputs first."""
        places: dict[fx.Node, int] = {}
        steps: list[Step] = []

        def place(one: fx.Node) -> int:
            if one not in places:
                step = self._step(one, place)
                places[one] = len(steps)
                steps.append(step)
            return places[one]

        place(node)
        return steps

    def _step(self, node: fx.Node, place: Callable[[fx.Node], int]) -> Step:
        by_rows = _by_rows(node)
        if by_rows is None:
            value = self.whole.evaluate(node)
            return lambda values, a, b: value[a:b]
        if node.op == "get_attr":
            state = self.graph.states[str(node.target)]
            tensor = state.tensor.detach() if state.exact is None else state.exact()
            dtype = lift_dtype(tensor.dtype)
            return lambda values, a, b: tensor[a:b].to(dtype)
        rest = node.meta["val"].shape[1:]
        if _name(node) in _RESHAPES:
            at = place(by_rows[0])
            return lambda values, a, b: values[at].reshape(b - a, *rest)
        known = {
            one: self.whole.evaluate(one) for one in node.all_input_nodes if one not in by_rows
        }
        inner = {one: _Place(place(one)) for one in by_rows}
        spelled: Any = fx.map_arg(
            (node.args, node.kwargs),
            lambda one: inner.get(one, known.get(one)),  # type: ignore[arg-type, return-value]
        )
        args, kwargs = lift_dtypes(list(spelled[0])), lift_dtypes(spelled[1])
        target: Any = node.target
        if _name(node) in _IN_PLACE and self._is_ours(node.args[0], node):
            target = getattr(torch.ops.aten, f"{_name(node)[:3]}_").Tensor

        def call(values: list[Any], a: int, b: int) -> Tensor:
            given = [values[one.at] if isinstance(one, _Place) else one for one in args]
            return lift(target(*given, **kwargs))  # type: ignore[no-any-return]

        return call

    def _is_ours(self, node: Any, reader: fx.Node) -> bool:
        """Whether the block of a node is read by one op only, which may write the result there."""
        if not isinstance(node, fx.Node) or len(node.users) > 1 or _by_rows(node) is None:
            return False
        here, there = node.meta["val"], reader.meta["val"]
        if not same_shape(here.shape, there.shape) or lift_dtype(here.dtype) != lift_dtype(
            there.dtype
        ):
            return False
        if node.op == "get_attr":  # a lifted copy, unless it is in float64 already
            state = self.graph.states[str(node.target)]
            return state.exact is None and state.tensor.dtype != lift_dtype(state.tensor.dtype)
        return _name(node) not in _RESHAPES | _SAME


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
