"""What is the same along an axis is computed once, and repeated where it is read.

    f(expand(c), ...)              =  expand(f(c, ...))       f elementwise, along other axes, or a lookup
    x + expand(c)                  =  x + c                   where x has the shape already
    attention(q, k, v, expand(m))  =  attention(q, k, v, m)

for parameters and literals c, which become one stored constant in `materialize` then. Positions and causal
masks that a model computes for every sample of a batch of any size are all of this kind: repeated first, and
compared, counted and looked up afterwards. Works on calls of any op that torch declares elementwise, besides
the few below.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph, is_overload, is_pure
from graphopt.ir.ops.base import Call, overload
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.sizes import same, same_shape
from graphopt.ir.value import Value
from graphopt.passes.base import Pass

_ELEMENTWISE = ("aten::__and__", "aten::__or__", "aten::__xor__", "aten::to", "aten::type_as")
_ALONG = (
    "aten::cumsum",
    "aten::diff",
    "aten::slice",
    "aten::softmax",
    "aten::select",
    "aten::flip",
)


@rewrite
def drop_expanded_operand(op: ops.Add | ops.Sub | ops.Mul | ops.Div, rw: Rewriter) -> Value:
    """x + expand(c) = x + c, where x has the shape of the sum."""
    for field, other in (("right", op.left), ("left", op.right)):
        value = getattr(op, field)
        expand = value.op if isinstance(value, Value) else None
        if not isinstance(expand, ops.Expand) or not isinstance(other, Value):
            continue
        if same_shape(other.shape, op.out.shape):
            return rw.emit_like(op, **{field: expand.input})
    rw.decline("no operand is repeated", near=False)


@rewrite
def drop_expanded_mask(op: ops.Attention, rw: Rewriter) -> Value:
    """attention(q, k, v, expand(m)) = attention(q, k, v, m), for leading axes; its kernels differ in
    whether they repeat the last two."""
    expand = rw.producer(op.attn_mask, ops.Expand)
    mask = expand.input
    rw.match(mask.ndim >= 2 and same_shape(mask.shape[-2:], expand.out.shape[-2:]))
    return rw.emit_like(op, attn_mask=mask)


@dataclasses.dataclass(frozen=True)
class _Thin:
    """A value that is `twin` repeated along `axes`, of which `twin` has one entry."""

    twin: Value
    axes: frozenset[int]


class _Thinner:
    """Finds what is repeated, and writes each such value without repeating."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.thin: dict[fx.Node, _Thin] = {}
        self.made: list[fx.Node] = []
        self.sizes: list[tuple[Any, Any]] = []  # symbolic sizes, and how they are written

    def visit(self, node: fx.Node) -> None:
        """Enter `node` if it is repeated."""
        if not isinstance(node.meta.get("val"), torch.Tensor) or not is_overload(node.target):
            return
        if self.graph.is_constant(node) or not is_pure(node):
            return
        builder = Builder(self.graph, node)
        call = Call(node, builder)
        found = self._expand(call) or self._through(call)
        self.made += builder.made
        if found is not None and found.axes and found.twin.is_constant:
            self.thin[node] = found

    def repeated(self, node: fx.Node) -> tuple[Value, list[fx.Node]] | None:
        """The twin of `node`, expanded, and what was emitted for it; None where a size is not known."""
        thin, shape = self.thin[node], node.meta["val"].shape
        builder = Builder(self.graph, node)
        sizes: list[Any] = [-1] * len(shape)
        for axis in thin.axes:
            written = next((by for size, by in self.sizes if same(size, shape[axis])), None)
            written = shape[axis] if isinstance(shape[axis], int) else written
            if written is None:
                return None
            sizes[axis] = written
        out = builder.emit(ops.Expand(Value(thin.twin.node, builder), tuple(sizes)))
        return out, builder.made

    # -- rules ------------------------------------------------------------------------------------

    def _expand(self, call: Call) -> _Thin | None:
        op = call.builder.view(call.node)
        if not isinstance(op, ops.Expand) or not op.input.is_constant:
            return None
        missing = op.out.ndim - op.input.ndim
        own = (1,) * missing + op.input.shape
        axes = [a for a, (b, c) in enumerate(zip(own, op.out.shape, strict=True)) if not same(b, c)]
        for axis in axes:
            written = op.shape[axis]
            if isinstance(written, Value):
                self.sizes.append((op.out.shape[axis], written))
        return _Thin(op.input.reshape(*own) if missing else op.input, frozenset(axes))

    def _through(self, call: Call) -> _Thin | None:
        tensors = [one for one in call.node.all_input_nodes
                   if isinstance(one.meta.get("val"), torch.Tensor)]  # fmt: skip
        if not any(one in self.thin for one in tensors):
            return None
        name = call.target._schema.name
        if name == "aten::index":
            return self._index(call)
        if not all(one in self.thin or self.graph.is_constant(one) for one in tensors):
            return None
        if torch.Tag.pointwise in call.target.tags or name in _ELEMENTWISE:
            return self._elementwise(call, tensors)
        if name == "aten::embedding":
            return self._again(call, call["indices"].node, lambda axes: axes)
        if isinstance(call.builder.view(call.node), ops.Reshape):
            return self._reshape(call)
        return self._along(call, tensors) if name in _ALONG else None

    def _again(self, call: Call, source: fx.Node, move: Any) -> _Thin | None:
        """The same call on the twin of `source`, whose axes `move` to others (None: nowhere)."""
        if source not in self.thin:
            return None
        axes = move(self.thin[source].axes)
        return None if axes is None else _Thin(self._emit(call), frozenset(axes))

    def _emit(self, call: Call, **changes: Any) -> Value:
        arguments = {**{name: self._twin(one) for name, one in call.arguments.items()}, **changes}
        return call.builder.call(call.target, arguments)

    def _twin(self, argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(self._twin, argument))
        if isinstance(argument, Value) and argument.node in self.thin:
            return Value(self.thin[argument.node].twin.node, argument.builder)
        return argument

    def _elementwise(self, call: Call, tensors: list[fx.Node]) -> _Thin | None:
        ndim = call.out.ndim
        axes = set(range(ndim))
        for one in tensors:
            missing = ndim - one.meta["val"].ndim
            thin = self.thin[one].axes if one in self.thin else frozenset()
            axes -= {
                axis + missing for axis, size in enumerate(one.meta["val"].shape)
                if axis not in thin and not same(size, 1)
            }  # fmt: skip
        axes = {axis for axis in axes if not same(call.out.shape[axis], 1)}
        return _Thin(self._emit(call), frozenset(axes)) if axes else None

    def _along(self, call: Call, tensors: list[fx.Node]) -> _Thin | None:
        """Along axes that are not repeated, of tensors that are repeated alike."""
        source = call["self"].node
        given = call.arguments.get("dim", call.arguments.get("dims"))
        dims = {
            dim % call["self"].ndim for dim in (given if isinstance(given, tuple) else (given,))
        }
        alike = {self.thin[one].axes if one in self.thin else None for one in tensors}
        selects = call.target._schema.name == "aten::select"

        def move(axes: frozenset[int]) -> Any:
            if dims & axes or len(alike) > 1:
                return None
            return {axis - (selects and axis > min(dims)) for axis in axes}

        return self._again(call, source, move)

    def _reshape(self, call: Call) -> _Thin | None:
        """Axes of size 1 that come and go."""
        source = call["self"]
        old = [axis for axis, size in enumerate(source.shape) if not same(size, 1)]
        new = [axis for axis, size in enumerate(call.out.shape) if not same(size, 1)]
        if source.node not in self.thin or not same_shape(
            [source.shape[axis] for axis in old], [call.out.shape[axis] for axis in new]
        ):
            return None
        thin = self.thin[source.node]
        axes = frozenset(b for a, b in zip(old, new, strict=True) if a in thin.axes)
        shape = [1 if axis in axes else size for axis, size in enumerate(call.out.shape)]
        if not all(isinstance(size, int) for size in shape):
            return None
        return _Thin(Value(thin.twin.node, call.builder).reshape(*shape), axes)

    def _index(self, call: Call) -> _Thin | None:
        """Entries of a repeated tensor: the indices along repeated axes do not matter but for their
        shape."""
        source, indices = call["self"], call["indices"]
        if source.node not in self.thin or len(indices) != source.ndim or None in indices:
            return None
        if any(one.dtype == torch.bool for one in indices):
            return None
        repeated = self.thin[source.node].axes
        kept = [one for axis, one in enumerate(indices) if axis not in repeated]
        if not all(one.is_constant for one in kept):
            return None
        ndim = call.out.ndim
        grown = {
            axis + ndim - one.ndim
            for one in kept for axis, size in enumerate(one.shape) if not same(size, 1)
        }  # fmt: skip
        axes = [
            axis for axis in range(ndim) if axis not in grown and not same(call.out.shape[axis], 1)
        ]
        device = call.out.meta.device
        first = call.builder.emit(ops.Full((1,) * ndim, 0, torch.int64, device))
        chosen = tuple(first if axis in repeated else one for axis, one in enumerate(indices))
        return _Thin(self._emit(call, indices=chosen), frozenset(axes))


@dataclasses.dataclass(frozen=True)
class SinkExpands(Pass):
    """Positions and masks that are repeated for a batch are computed once, then repeated."""

    name = "sink-expands"

    def run(self, session: Session) -> None:
        graph = session.graph
        thinner = _Thinner(graph)
        for node in graph.calls:
            thinner.visit(node)
        known = set(thinner.thin)
        expand = overload("expand.default")
        for node in known:
            if node.target is expand or all(user in known for user in node.users):
                continue
            found = thinner.repeated(node)
            if found is not None:
                session.replace("sink-expand", Exact(), node, found[0].node, found[1])
        graph.eliminate_dead_code()
        session.run(self.all_rewrites())

    @classmethod
    def all_rewrites(cls) -> Any:
        return (drop_expanded_operand, drop_expanded_mask)
