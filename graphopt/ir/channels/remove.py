"""Groups removed from a graph: parameters cut, and every size that is written out adapted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder, positional
from graphopt.ir.channels.groups import Groups
from graphopt.ir.channels.labels import Vector
from graphopt.ir.channels.trace import has_tensors, name_of
from graphopt.ir.graph import Graph, State
from graphopt.ir.ops.base import hint
from graphopt.ir.value import Value

Kept = dict[int, Vector]
_SHAPED = {"reshape", "view", "_unsafe_view", "unflatten"}  # write out all their sizes


class CannotRemove(ValueError):
    """An op whose sizes cannot be adapted."""


def remove(groups: Groups, gone: Iterable[int]) -> Graph:
    """The graph without some groups, given by their labels; the graph of `groups` is not changed.

    Raises:
        CannotRemove: if all entries of an axis would go away, or an op cannot be adapted.
    """
    graph = groups.graph.clone()
    _Removal(groups, graph, gone).run()
    return graph


class _Removal:
    def __init__(self, groups: Groups, graph: Graph, gone: Iterable[int]) -> None:
        self.groups, self.graph = groups, graph
        self.kept: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, Any] = {}
        self._source: dict[fx.Node, fx.Node] = {}
        lost = groups.lost(gone)
        for node, source in zip(graph.fx.nodes, groups.graph.fx.nodes, strict=True):
            self._source[node] = source
            self.kept[node] = found = groups.kept(source, lost)
            self.sizes[node] = source.meta.get("val")
            for one in found if isinstance(found, list) else [found]:
                for axis, entries in one.items():
                    if not len(entries):
                        raise CannotRemove(
                            f"all entries of axis {axis} of {node.name} ({graph.where(node)}) "
                            "would go away"
                        )

    def run(self) -> None:
        for node in list(self.graph.fx.nodes):
            if node.op == "get_attr":
                self._cut_state(node)
            elif node.op == "call_function":
                try:
                    self._adapt(node)
                except (RuntimeError, ValueError) as error:
                    said = " ".join(str(error).split())
                    raise CannotRemove(f"{node.name} ({self.graph.where(node)}): {said}") from error

    def _cut_state(self, node: fx.Node) -> None:
        kept = self.kept[node]
        if not kept:
            return
        state = self.graph.states[str(node.target)]
        exact, tensor = state.exact, _cut(state.tensor.detach(), kept)
        if state.kind == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=state.tensor.requires_grad)
        self.graph.states[str(node.target)] = dataclasses.replace(
            state, tensor=tensor, exact=None if exact is None else lambda: _cut(exact(), kept)
        )
        node.meta["val"] = self.graph.fake_mode.from_tensor(tensor, static_shapes=True)

    def _adapt(self, node: fx.Node) -> None:
        builder = Builder(self.graph, node)
        touched = self.kept[node] or any(self.kept.get(one) for one in node.all_input_nodes)
        if touched:
            if not any(has_tensors(one.meta.get("val")) for one in node.all_input_nodes):
                self._cut_constant(node)
                return
            op = builder.view(node)
            new = None if op is None else adapt(op, self)
            if new is not None:
                node.target, arguments = new.build()
                node.args, node.kwargs = positional(node.target, arguments)
            if isinstance(op, ops.Reshape) and (new or name_of(node) in _SHAPED):
                self._fits(node, new or op)
            node.meta["val"] = _narrowed(node.meta["val"], self.kept[node])

    def _fits(self, node: fx.Node, op: Any) -> None:
        """The sizes that are written out hold the entries that stay."""
        sizes = [hint(one.meta["val"]) if isinstance(one, fx.Node) else hint(one)
                 for one in map(_node, getattr(op, "shape", ()))]  # fmt: skip
        have = math.prod(self.size(op.input, axis) for axis in range(op.input.ndim))
        known = math.prod(one for one in sizes if one != -1)
        if sizes and (have % known if -1 in sizes else known != have):
            raise CannotRemove(
                f"{node.name} ({self.graph.where(node)}): sizes {sizes} do not hold {have} entries"
            )

    def _cut_constant(self, node: fx.Node) -> None:
        """A tensor made from nothing: the entries that stay are picked from it."""
        users = list(node.users)
        following = node.next
        builder = Builder(self.graph, following)
        value = builder.value(node)
        for axis, entries in self.kept[node].items():
            value = self.pick(value, axis, entries)
        self.kept[value.node], self.sizes[value.node] = self.kept[node], self.sizes[node]
        for user in users:
            user.replace_input_with(node, value.node)

    def pick(self, value: Value, axis: int, entries: Vector) -> Value:
        """Entries of an axis."""
        index = torch.from_numpy(np.ascontiguousarray(entries)).to(value.meta.device)
        name = f"kept_{len(self.graph.states)}"
        node = self.graph.add_state(name, State(index, "constant"))
        return value.builder.emit(ops.IndexSelect(value, axis, value.builder.value(node)))

    # -- for the rules ------------------------------------------------------------------------

    def of(self, value: Value) -> Kept:
        found = self.kept.get(value.node, {})
        return found if isinstance(found, dict) else {}

    def constant(self, value: Value) -> torch.Tensor:
        """What a value that depends on parameters alone was before anything was removed."""
        found = self.groups.trace.constants.evaluate(self._source[value.node])
        assert isinstance(found, torch.Tensor)
        return found.cpu()

    def before(self, value: Value) -> tuple[int, ...]:
        """The sizes of a value before anything was removed."""
        return tuple(hint(size) for size in self.sizes[value.node].shape)

    def size(self, value: Value, axis: int) -> int:
        kept = self.of(value).get(axis)
        return self.before(value)[axis] if kept is None else len(kept)

    def written(self, shape: tuple[Any, ...], out: Value) -> tuple[Any, ...]:
        """A shape as it is written, with what stays in place of what was there."""
        kept = self.of(out)
        return tuple(
            len(kept[axis]) if axis in kept and isinstance(size, int) and size != -1 else size
            for axis, size in enumerate(shape)
        )


def _node(one: Any) -> Any:
    return one.node if isinstance(one, Value) else one


def _narrowed(found: Any, kept: Any) -> Any:
    """Fake tensors with the sizes that stay, laid out in memory as before."""
    if isinstance(kept, list):
        return type(found)(map(_narrowed, found, kept))
    if not kept:
        return found
    sizes, strides, step = list(found.shape), list(found.stride()), 1
    for axis, entries in kept.items():
        part = Fraction(len(entries), hint(sizes[axis]))  # the size may be a multiple of a symbol
        sizes[axis] = sizes[axis] * part.numerator // part.denominator
    for axis in sorted(range(found.ndim), key=lambda one: (hint(found.stride(one)), -one)):
        strides[axis] = step
        step = step * sizes[axis]
    mode = found.fake_mode  # asked directly: its dispatcher takes five times as long
    meta = torch.empty_strided(sizes, strides, dtype=found.dtype, device="meta")
    return mode.fake_tensor_converter.from_meta_and_device(mode, meta, found.device)


def _cut(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    for axis, entries in kept.items():
        tensor = tensor.index_select(axis, torch.from_numpy(entries).to(tensor.device))
    return tensor


@singledispatch
def adapt(op: Any, r: _Removal) -> ops.Op | None:
    """The op with its sizes adapted; None if it says none."""
    return None


@adapt.register(ops.Reshape)
def _(op: ops.Reshape, r: _Removal) -> ops.Op | None:
    target = getattr(op.out.node.target, "__name__", "")
    if target.split(".")[0] in ("flatten", "unsqueeze", "squeeze", "view_as", "reshape_as"):
        return None
    shape = op.shape
    if target.startswith("unflatten"):
        sizes = [size if isinstance(size, int) else -1 for size in op.shape]
        shape = tuple(sizes)
    shape = r.written(shape, op.out)
    computed = [axis for axis in r.of(op.out) if not isinstance(shape[axis], int)]
    if len(computed) == 1 and -1 not in shape:  # as batch * channels: what is left
        shape = tuple(-1 if axis in computed else size for axis, size in enumerate(shape))
    return op.replace(shape=shape)


@adapt.register(ops.Expand)
def _(op: ops.Expand, r: _Removal) -> ops.Op | None:
    if "expand_as" in str(op.out.node.target):
        return None
    return op.replace(shape=r.written(op.shape, op.out))


@adapt.register(ops.Slice)
def _(op: ops.Slice, r: _Removal) -> ops.Op | None:
    dim = op.dim % op.input.ndim
    kept = r.of(op.input).get(dim)
    if kept is None:
        return None
    size = r.before(op.input)[dim]
    picked = np.arange(size)[slice(_number(op.start), _number(op.end), op.step)]
    stays = np.flatnonzero(np.isin(kept, picked))
    if len(stays) and len(stays) == stays[-1] - stays[0] + 1:
        return op.replace(start=int(stays[0]), end=int(stays[-1]) + 1, step=1)
    return _picked(op, r, dim, stays)


def _number(bound: Any) -> int | None:
    return (
        None if bound is None else hint(bound) if not isinstance(bound, Value) else hint(bound.meta)
    )


def _picked(op: Any, r: _Removal, dim: int, entries: Vector) -> ops.Op:
    index = torch.from_numpy(np.ascontiguousarray(entries)).to(op.input.meta.device)
    node = r.graph.add_state(f"kept_{len(r.graph.states)}", State(index, "constant"))
    return ops.IndexSelect(op.input, dim, op.out.builder.value(node))


@adapt.register(ops.Roll)
@adapt.register(ops.Flip)
@adapt.register(ops.ChannelShuffle)
def _(op: Any, r: _Removal) -> ops.Op | None:
    """Entries that change places along one axis: those that stay, in their new order."""
    if isinstance(op, ops.ChannelShuffle):
        moved = [1]
    else:
        moved = [dim % op.input.ndim for dim in op.dims] or list(range(op.input.ndim))
    cut = [dim for dim in moved if dim in r.of(op.input)]
    if not cut or isinstance(op, ops.Flip):
        return None
    if len(moved) > 1:
        raise CannotRemove(f"{op.out.node.name} moves entries of several axes")
    (dim,) = cut
    size = r.before(op.input)[dim]
    numbers = torch.arange(size).view(1, size) if dim == 1 else torch.arange(size).view(size, 1)
    if isinstance(op, ops.ChannelShuffle):
        order = (
            torch.channel_shuffle(numbers.view(1, size, 1, 1).double(), op.groups).flatten().long()
        )
    else:
        order = torch.arange(size).roll(op.shifts[0])
    kept = r.of(op.input)[dim]
    place = {int(entry): i for i, entry in enumerate(kept)}
    new = np.array([place[one] for one in order.tolist() if one in place], dtype=np.int64)
    return _picked(op, r, dim, new)


@adapt.register(ops.IndexSelect)
@adapt.register(ops.Index)
def _(op: Any, r: _Removal) -> ops.Op | None:
    """The numbers of entries, counted among those that stay."""
    if not op.index.is_constant:
        return None
    dim, index = op.dim % op.input.ndim, r.constant(op.index)
    for axis in range(index.ndim):
        if (stays := r.of(op.out).get(dim + axis)) is not None:
            index = index.index_select(axis, torch.from_numpy(stays))
    size = r.before(op.input)[dim]
    kept = r.of(op.input).get(dim, np.arange(size))
    place = torch.zeros(size, dtype=index.dtype)
    place[torch.from_numpy(kept)] = torch.arange(len(kept), dtype=index.dtype)
    made = r.graph.add_state(f"kept_{len(r.graph.states)}", State(place[index], "constant"))
    return op.replace(index=op.out.builder.value(made))  # type: ignore[no-any-return]


@adapt.register(ops.Select)
def _(op: ops.Select, r: _Removal) -> ops.Op | None:
    dim = op.dim % op.input.ndim
    kept = r.of(op.input).get(dim)
    if kept is None:
        return None
    at = op.index % r.before(op.input)[dim]
    return op.replace(index=int(np.searchsorted(kept, at)))


@adapt.register(ops.Split)
def _(op: ops.Split, r: _Removal) -> ops.Op | None:
    dim = op.dim % op.input.ndim
    if dim not in r.of(op.input):
        return None
    pieces = r.sizes[op.out.node]
    sizes = [
        len(kept[dim]) if dim in kept else hint(piece.shape[dim])
        for piece, kept in zip(pieces, r.kept[op.out.node], strict=True)
    ]
    return op.replace(split=tuple(sizes))


@adapt.register(ops.RepeatInterleave)
@adapt.register(ops.Repeat)
def _(op: Any, r: _Removal) -> ops.Op | None:
    return None


@adapt.register(ops.Conv)
def _(op: ops.Conv, r: _Removal) -> ops.Op | None:
    if op.groups == 1:
        return None
    axis = op.out.ndim - op.rank - 1
    kept = r.of(op.input).get(axis)
    if kept is None:
        return None
    each = r.before(op.input)[axis] // op.groups
    left = np.bincount(kept // each, minlength=op.groups)
    if not np.isin(left, (0, each)).all():
        return None  # the same channels of every group
    return op.replace(groups=int((left > 0).sum()))


@adapt.register(ops.LayerNorm)
@adapt.register(ops.RMSNorm)
def _(op: Any, r: _Removal) -> ops.Op | None:
    ndim, count = op.input.ndim, len(op.normalized_shape)
    return op.replace(  # type: ignore[no-any-return]
        normalized_shape=tuple(r.size(op.input, ndim - count + i) for i in range(count))
    )


@adapt.register(ops.GroupNorm)
def _(op: ops.GroupNorm, r: _Removal) -> ops.Op | None:
    if op.num_groups == r.before(op.input)[1]:
        return op.replace(num_groups=r.size(op.input, 1))
    return None


@adapt.register(ops.Attention)
def _(op: ops.Attention, r: _Removal) -> ops.Op | None:
    if op.scale is None and op.query.ndim - 1 in r.of(op.query):
        return op.replace(scale=r.before(op.query)[-1] ** -0.5)
    return None


@adapt.register(ops.Pad)
def _(op: ops.Pad, r: _Removal) -> ops.Op | None:
    pad, ndim = list(op.pad), op.out.ndim
    for i in range(len(pad) // 2):
        dim = ndim - 1 - i
        kept = r.of(op.out).get(dim)
        if kept is None or not (pad[2 * i] or pad[2 * i + 1]):
            continue
        before, size = pad[2 * i], r.before(op.out)[dim]
        pad[2 * i : 2 * i + 2] = [
            int((kept < before).sum()),
            int((kept >= size - pad[2 * i + 1]).sum()),
        ]
    return op.replace(pad=tuple(pad)) if pad != list(op.pad) else None
