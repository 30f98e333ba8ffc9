"""What every op does to labels.

A rule says which axes of its operands meet, and which of them come out. Ops without a rule fix the
labels of all they read. Data movement has no rules: it is executed (`Coupling.moved`).
"""

from __future__ import annotations

import operator
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels.labels import Coupling, Labels, Layers
from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.ops.base import hint
from graphopt.ir.value import Value

MOVEMENT = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Split, ops.Flip, ops.Roll,
    ops.PixelShuffle, ops.PixelUnshuffle, ops.ChannelShuffle, ops.Repeat, ops.RepeatInterleave,
)  # fmt: skip
_MOVEMENT_TOO = {"unbind.int", "unfold.default", "rot90.default", "swapaxes.default"}


class Trace:
    """The labels of every value of a graph, at the sizes of the example."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.coupling = graph, Coupling()
        self.labels: dict[fx.Node, Any] = {}
        self.statistics: dict[fx.Node, str] = {}
        self.builder = Builder(graph, next(iter(reversed(graph.fx.nodes))))
        for node in graph.fx.nodes:
            self._visit(node)

    def of(self, value: Value) -> Labels:
        found = self.labels[value.node]
        assert isinstance(found, Labels)
        return found

    def __getitem__(self, value: Value) -> Labels:
        return self.of(value)

    def _visit(self, node: fx.Node) -> None:
        found = node.meta.get("val")
        if node.op == "output":
            for one in node.all_input_nodes:
                self._fix(one, "it is an output of the model")
            return
        if node.op == "placeholder" or not _tensors(found):
            self.labels[node] = _blank(found)
            if node.target is torch.ops.aten.sym_size.int:
                source, axis = node.args
                self.fix(self.labels[source], [axis], f"{node.name} is its size")  # type: ignore[index]
            elif node.op == "call_function":
                for one in node.all_input_nodes:
                    self._fix(one, f"{node.name} reads it")
            return
        if node.op == "get_attr" or not node.all_input_nodes:
            labels = Labels(_shape(found))
            labels.fresh = {axis for axis, size in enumerate(labels.shape) if size > 1}
            self.labels[node] = labels
            return
        if node.target is operator.getitem:
            source, index = node.args
            self.labels[node] = self.labels[source][index]  # type: ignore[index]
            return
        op = self.builder.view(node)
        made: Any = None
        if isinstance(op, MOVEMENT) or _moves_one(node):
            made = self._moved(node)
        elif op is not None and rule.dispatch(type(op)) is not rule.dispatch(object):
            made = rule(op, self)
        elif is_overload(node.target) and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            made = self.elementwise(_shape(found), *self._operands(node))
        if made is None:
            for one in node.all_input_nodes:
                self._fix(one, f"{getattr(node.target, '__name__', node.target)} is not understood")
            made = _blank(found)
        self.labels[node] = made

    def _operands(self, node: fx.Node) -> list[Labels]:
        found = [self.labels[one] for one in node.all_input_nodes]
        return [one for one in found if isinstance(one, Labels)]

    def _moved(self, node: fx.Node) -> Any:
        source: Any = node.args[0]
        labels = self.labels[source]
        if not isinstance(labels, Labels):
            return None
        for other in node.all_input_nodes:
            if other is not source and _tensors(other.meta.get("val")):
                return None

        def run(spread: Tensor) -> Any:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda one: spread if one is source else hint(one.meta["val"]),
            )
            return node.target(*_plain(args), **_plain(kwargs))  # type: ignore[operator]

        found = node.meta["val"]
        several = isinstance(found, (list, tuple))
        shapes = [_shape(one) for one in (found if several else [found])]
        results = self.coupling.moved(labels, run, shapes)
        return results if several else results[0]

    def _fix(self, node: fx.Node, reason: str) -> None:
        found = self.labels[node]
        for one in found if isinstance(found, list) else [found]:
            if one is not None:
                self.fix(one, range(len(one.shape)), reason)

    # -- for the rules --------------------------------------------------------------------------

    def fix(self, labels: Labels, axes: Any, reason: str) -> None:
        """Nothing of these axes may go away."""
        for axis in axes:
            axis %= len(labels.shape)
            self.coupling.fix(labels.layers(axis), reason)
            labels.fresh.discard(axis)
            labels.reasons.setdefault(axis, reason)

    def join(self, reason: str, *sides: tuple[Labels, int]) -> Layers:
        given = [(labels, axis % len(labels.shape)) for labels, axis in sides]
        return self.coupling.join(given, reason)

    def meets(self, labels: Labels, axis: int, layers: Layers) -> None:
        """An axis of a parameter meets entries with these layers."""
        size = labels.shape[axis]
        self.join("it meets what is fixed", (labels, axis), (Labels((size,), {0: layers}), 0))

    def elementwise(self, shape: tuple[int, ...], *operands: Labels) -> Labels:
        """The labels of values that are combined entry by entry, with broadcasting."""
        out = Labels(shape)
        for axis in range(len(shape)):
            sides = []
            for one in operands:
                at = axis - len(shape) + len(one.shape)
                if at < 0:
                    continue
                if one.shape[at] == shape[axis]:
                    sides.append((one, at))
                else:
                    self.fix(one, [at], "it is repeated for all entries of an axis")
            if sides and shape[axis] > 1:
                out.axes[axis] = self.join("it meets what is fixed", *sides)
        out.axes = {axis: layers for axis, layers in out.axes.items() if layers}
        return out

    def passed(self, labels: Labels, shape: tuple[int, ...], *without: int) -> Labels:
        """The labels of a value that keeps all axes but some, whose labels are fixed."""
        self.coupling.materialize(labels)
        without = tuple(axis % len(labels.shape) for axis in without)
        self.fix(labels, without, "entries along the axis are mixed with their neighbours")
        return Labels(
            shape, {axis: layers for axis, layers in labels.axes.items() if axis not in without}
        )


def _tensors(found: Any) -> bool:
    if isinstance(found, (list, tuple)):
        return any(isinstance(one, Tensor) for one in found)
    return isinstance(found, Tensor)


def _blank(found: Any) -> Any:
    if isinstance(found, Tensor):
        return Labels(_shape(found))
    if isinstance(found, (list, tuple)):
        return [_blank(one) for one in found]
    return None


def _shape(found: Any) -> tuple[int, ...]:
    return tuple(hint(size) for size in found.shape)


def _plain(argument: Any) -> Any:
    """An argument with example sizes for symbolic ones."""
    if isinstance(argument, torch.SymInt):
        return hint(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(_plain, argument))
    if isinstance(argument, dict):
        return {key: _plain(value) for key, value in argument.items()}
    return argument


def _moves_one(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in _MOVEMENT_TOO


# -- rules ----------------------------------------------------------------------------------------


@singledispatch
def rule(op: Any, t: Trace) -> Labels | None:
    return None


def _out(op: ops.Op) -> tuple[int, ...]:
    return _shape(op.out.meta)


@rule.register(ops.Copy)
@rule.register(ops.Detach)
@rule.register(ops.Cast)
@rule.register(ops.Dropout)
def _(op: Any, t: Trace) -> Labels | None:
    return t.passed(t[op.input], _out(op))


@rule.register(ops.Linear)
def _(op: ops.Linear, t: Trace) -> Labels | None:
    x, weight = t[op.input], t[op.weight]
    t.join("it is read by a map whose inputs are fixed", (x, -1), (weight, 1))
    out = t.passed(x, _out(op))
    sides = [(weight, 0)] + ([(t[op.bias], 0)] if op.bias is not None else [])
    out.axes[len(out.shape) - 1] = t.join("its bias is fixed", *sides)
    return out


@rule.register(ops.Matmul)
def _(op: ops.Matmul, t: Trace) -> Labels | None:
    return _product(t, t[op.left], t[op.right], _out(op))


def _product(t: Trace, left: Labels, right: Labels, shape: tuple[int, ...]) -> Labels | None:
    if len(left.shape) < 2 or len(right.shape) < 2:
        return None
    for one in (left, right):
        t.coupling.materialize(one)
    t.join("it is multiplied with what is fixed", (left, -1), (right, -2))
    out = t.elementwise(shape[:-2], *(_leading(one) for one in (left, right)))
    found = Labels(shape, dict(out.axes))
    for one, axis in ((left, -2), (right, -1)):
        found.axes[len(shape) + axis] = one.layers(axis)
    return found


def _leading(labels: Labels) -> Labels:
    """The labels of the batch axes of a matrix."""
    count = len(labels.shape) - 2
    return Labels(
        labels.shape[:-2], {axis: one for axis, one in labels.axes.items() if axis < count}
    )


@rule.register(ops.Addmm)
def _(op: ops.Addmm, t: Trace) -> Labels | None:
    product = _product(t, t[op.left], t[op.right], _out(op))
    return None if product is None else t.elementwise(_out(op), product, t[op.input])


@rule.register(ops.Einsum)
def _(op: ops.Einsum, t: Trace) -> Labels | None:
    left, arrow, output = op.equation.replace(" ", "").partition("->")
    if not arrow or "." in op.equation:
        return None
    sides: dict[str, list[tuple[Labels, int]]] = {}
    for letters, tensor in zip(left.split(","), op.tensors, strict=True):
        if len(set(letters)) < len(letters):
            return None
        for axis, letter in enumerate(letters):
            sides.setdefault(letter, []).append((t[tensor], axis))
    out = Labels(_out(op))
    for letter, given in sides.items():
        layers = t.join("it is multiplied with what is fixed", *given)
        if letter in output:
            out.axes[output.index(letter)] = layers
    return out


@rule.register(ops.Embedding)
def _(op: ops.Embedding, t: Trace) -> Labels | None:
    weight, indices = t[op.weight], t[op.indices]
    t.fix(weight, [0], "its rows are looked up")
    t.fix(indices, range(len(indices.shape)), "it says what is looked up")
    shape = _out(op)
    return Labels(shape, {len(shape) - 1: t.join("", (weight, 1))})


@rule.register(ops.Conv)
def _(op: ops.Conv, t: Trace) -> Labels | None:
    x, weight, shape = t[op.input], t[op.weight], _out(op)
    axis = len(shape) - op.rank - 1
    t.fix(weight, range(2, len(weight.shape)), "a kernel runs along the axis")
    into, out_of = (0, 1) if op.transposed else (1, 0)
    bias = [] if op.bias is None else [(t[op.bias], 0)]
    out = t.passed(x, shape, *range(axis + 1, len(x.shape)))
    if op.groups == 1:
        t.join("it is read by a map whose inputs are fixed", (x, axis), (weight, into))
        out.axes[axis] = t.join("its bias is fixed", (weight, out_of), *bias)
        return out
    return _grouped(op, t, x, weight, bias, out, axis)


def _grouped(
    op: ops.Conv, t: Trace, x: Labels, weight: Labels, bias: list[Any], out: Labels, axis: int
) -> Labels:
    """Whole groups go away, or the same channels of every group, whichever is finer."""
    ins, outs = x.shape[axis] // op.groups, out.shape[axis] // op.groups
    first = weight.shape[0]  # the axis with the channels of all groups, whichever side they are on
    each = first // op.groups
    t.coupling.materialize(x)
    known = x.layers(axis)
    if op.groups >= min(ins, outs) and len(known) == 1:
        layers = known[0].reshape(op.groups, ins)
        t.coupling.couple(layers[:, 1:], layers[:, :1])
        t.fix(weight, [1], "it is shared by the groups")
        t.meets(weight, 0, (np.repeat(layers[:, 0], each),))
        out.axes[axis] = (np.repeat(layers[:, 0], outs),)
    else:
        into = tuple(_shared(t, one, op.groups) for one in known)
        made = t.coupling.new(outs)
        all_in, all_out = (
            tuple(np.tile(one, op.groups) for one in into),
            (np.tile(made, op.groups),),
        )
        t.meets(weight, 0, all_in if op.transposed else all_out)
        t.meets(weight, 1, (made,) if op.transposed else into)
        out.axes[axis] = all_out
    if bias:
        out.axes[axis] = t.join("its bias is fixed", (out, axis), *bias)
    return out


def _shared(t: Trace, layer: Any, groups: int) -> Any:
    """The labels of the channels of one group, coupled with those of the others."""
    rows = layer.reshape(groups, -1)
    t.coupling.couple(rows[1:], rows[:1])
    return rows[0]


# -- norms ----------------------------------------------------------------------------------------


@rule.register(ops.BatchNorm)
@rule.register(ops.InstanceNorm)
def _(op: Any, t: Trace) -> Labels | None:
    return _per_channel(t, op, [op.weight, op.bias, op.running_mean, op.running_var])


def _per_channel(t: Trace, op: Any, vectors: list[Any]) -> Labels:
    x = t[op.input]
    t.coupling.materialize(x)
    out = Labels(x.shape, dict(x.axes))
    sides = [(t[one], 0) for one in vectors if one is not None]
    out.axes[1] = t.join("it is normalized with what is fixed", (x, 1), *sides)
    return out


@rule.register(ops.PRelu)
def _(op: ops.PRelu, t: Trace) -> Labels | None:
    single = t[op.weight].shape in ((), (1,))
    return t.passed(t[op.input], _out(op)) if single else _per_channel(t, op, [op.weight])


@rule.register(ops.GroupNorm)
def _(op: ops.GroupNorm, t: Trace) -> Labels | None:
    out = _per_channel(t, op, [op.weight, op.bias])
    if op.num_groups not in (1, out.shape[1]):
        for layer in out.layers(1):
            _shared(t, layer, op.num_groups)
    if op.num_groups != out.shape[1] and out.layers(1):
        t.statistics[op.out.node] = "mean and variance over the channels of a group"
    return out


@rule.register(ops.LayerNorm)
@rule.register(ops.RMSNorm)
def _(op: Any, t: Trace) -> Labels | None:
    x = t[op.input]
    t.coupling.materialize(x)
    out = Labels(x.shape, dict(x.axes))
    count = len(op.normalized_shape)
    vectors = [one for one in (op.weight, getattr(op, "bias", None)) if one is not None]
    for i in range(count):
        axis = len(x.shape) - count + i
        sides = [(t[one], i) for one in vectors]
        out.axes[axis] = t.join("it is normalized with what is fixed", (x, axis), *sides)
        if out.axes[axis]:
            t.statistics[op.out.node] = "statistics over the axis"
    return out


@rule.register(ops.Softmax)
@rule.register(ops.LogSoftmax)
def _(op: Any, t: Trace) -> Labels | None:
    out = t.passed(t[op.input], _out(op))
    if out.layers(op.dim):
        t.statistics[op.out.node] = "softmax over the axis"
    return out


# -- reductions -----------------------------------------------------------------------------------


@rule.register(ops.Sum)
@rule.register(ops.Mean)
def _(op: Any, t: Trace) -> Labels | None:
    x = t[op.input]
    t.coupling.materialize(x)
    dims = {dim % len(x.shape) for dim in op.dims}
    kept = [axis for axis in range(len(x.shape)) if op.keepdim or axis not in dims]
    if isinstance(op, ops.Mean) and any(x.layers(dim) for dim in dims):
        t.statistics[op.out.node] = "mean over the axis"
    return Labels(
        _out(op),
        {i: x.layers(axis) for i, axis in enumerate(kept) if axis not in dims and x.layers(axis)},
    )


@rule.register(ops.AvgPool)
@rule.register(ops.AdaptiveAvgPool)
@rule.register(ops.MaxPool)
@rule.register(ops.Upsample)
def _(op: Any, t: Trace) -> Labels | None:
    shape = _out(op)
    rank = len(shape) - 2
    return t.passed(t[op.input], shape, *range(-rank, 0))


@rule.register(ops.CumSum)
def _(op: ops.CumSum, t: Trace) -> Labels | None:
    return t.passed(t[op.input], _out(op), op.dim)


# -- joining and picking ----------------------------------------------------------------------------


@rule.register(ops.Cat)
def _(op: ops.Cat, t: Trace) -> Labels | None:
    shape, parts = _out(op), [t[one] for one in op.tensors]
    if any(len(one.shape) != len(shape) for one in parts):
        return None
    dim, out = op.dim % len(shape), Labels(shape)
    for one in parts:
        t.coupling.materialize(one)
    for axis in range(len(shape)):
        if axis != dim:
            out.axes[axis] = t.join(
                "it is joined with what is fixed", *((one, axis) for one in parts)
            )
    depth = max(len(one.layers(dim)) for one in parts)
    out.axes[dim] = tuple(
        np.concatenate([
            one.layers(dim)[i] if i < len(one.layers(dim)) else np.zeros(one.shape[dim], np.int64)
            for one in parts
        ])
        for i in range(depth)
    )  # fmt: skip
    return out


@rule.register(ops.Stack)
def _(op: ops.Stack, t: Trace) -> Labels | None:
    shape, parts = _out(op), [t[one] for one in op.tensors]
    joined = t.elementwise(parts[0].shape, *parts)
    dim = op.dim % len(shape)
    return Labels(shape, {axis + (axis >= dim): layers for axis, layers in joined.axes.items()})


@rule.register(ops.Pad)
def _(op: ops.Pad, t: Trace) -> Labels | None:
    x, shape = t[op.input], _out(op)
    t.coupling.materialize(x)
    out = Labels(shape, dict(x.axes))
    for i, (before, after) in enumerate(zip(op.pad[::2], op.pad[1::2], strict=True)):
        axis = len(shape) - 1 - i
        if not (before or after) or not x.layers(axis):
            continue
        if op.mode != "constant" or before < 0 or after < 0 or len(x.layers(axis)) > 1:
            t.fix(x, [axis], "its border is padded")
            out.axes.pop(axis)
        else:  # what is padded may go away as well as not
            ends = t.coupling.new(before), t.coupling.new(after)
            out.axes[axis] = (np.concatenate([ends[0], x.layers(axis)[0], ends[1]]),)
    return out


@rule.register(ops.IndexSelect)
@rule.register(ops.Index)
def _(op: Any, t: Trace) -> Labels | None:
    if not op.index.is_constant:
        return t.passed(t[op.input], _out(op), op.dim) if op.index.ndim == 1 else None
    x, index = t[op.input], t[op.index]
    dim = op.dim % len(x.shape)
    t.coupling.materialize(x)
    t.fix(x, [dim], "it is looked up")
    t.fix(index, range(len(index.shape)), "it says what is looked up")
    extra = op.index.ndim - 1
    return Labels(
        _out(op),
        {axis + (extra if axis > dim else 0): one for axis, one in x.axes.items() if axis != dim},
    )


@rule.register(ops.Attention)
def _(op: ops.Attention, t: Trace) -> Labels | None:
    query, key, value = (t[one] for one in (op.query, op.key, op.value))
    if op.enable_gqa or len({len(one.shape) for one in (query, key, value)}) > 1:
        return None
    ndim, shape = len(query.shape), _out(op)
    t.join("it is multiplied with what is fixed", (query, -1), (key, -1))
    tokens = t.join("it is multiplied with what is fixed", (key, -2), (value, -2))
    t.coupling.fix(tokens, "softmax runs along the axis")
    out = Labels(shape)
    masks = [] if op.attn_mask is None else [t[op.attn_mask]]
    for axis in range(ndim - 2):
        sides = [(one, axis) for one in (query, key, value)]
        for mask in masks:
            at = axis - ndim + len(mask.shape)
            if at >= 0 and mask.shape[at] == query.shape[axis]:
                sides.append((mask, at))
            elif at >= 0:
                t.fix(mask, [at], "it is repeated for all entries of an axis")
        out.axes[axis] = t.join("its heads are fixed", *sides)
    for mask in masks:
        t.fix(mask, [-1, -2], "it masks tokens")
    out.axes[ndim - 2] = query.layers(-2)
    out.axes[ndim - 1] = value.layers(-1)
    return out
