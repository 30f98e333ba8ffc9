"""What every op does to labels: a rule says which axes of its operands meet, and which come out."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.ir import ops
from graphopt.ir.channels.labels import Labels
from graphopt.ir.channels.trace import Trace, leading, rule, shape_of


def _out(op: ops.Op) -> tuple[int, ...]:
    return shape_of(op.out.meta)


@rule.register(ops.Copy)
@rule.register(ops.Detach)
@rule.register(ops.Cast)
@rule.register(ops.Dropout)
@rule.register(ops.CumSum)  # what is masked adds nothing
def _(op: Any, t: Trace) -> Labels | None:
    return t.passed(t[op.input], _out(op))


@rule.register(ops.Linear)
def _(op: ops.Linear, t: Trace) -> Labels | None:
    x, weight = t.read(t[op.input]), t[op.weight]
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
        t.read(one)
    t.join("it is multiplied with what is fixed", (left, -1), (right, -2))
    out = t.elementwise(shape[:-2], *(leading(one, 2) for one in (left, right)))
    found = Labels(shape, dict(out.axes))
    for one, axis in ((left, -2), (right, -1)):
        found.axes[len(shape) + axis] = one.layers(axis)
    return found


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
    x, weight, shape = t.read(t[op.input]), t[op.weight], _out(op)
    axis = len(shape) - op.rank - 1
    t.fix(weight, range(2, len(weight.shape)), "a kernel runs along the axis")
    into, out_of = (0, 1) if op.transposed else (1, 0)
    bias = [] if op.bias is None else [(t[op.bias], 0)]
    if _slides(op):
        t.coupling.materialize(x)
        out = Labels(shape, dict(x.axes))
        if x.layers(-1):
            t.statistics[op.out.node] = "a convolution over neighbours along the axis"
    else:
        out = t.passed(x, shape, *range(axis + 1, len(x.shape)))
    if op.groups == 1:
        t.join("it is read by a map whose inputs are fixed", (x, axis), (weight, into))
        out.axes[axis] = t.join("its bias is fixed", (weight, out_of), *bias)
        return out
    return _grouped(op, t, x, weight, bias, out, axis)


def _slides(op: ops.Conv) -> bool:
    """Whether one kernel runs along an axis and keeps its size, as along the channels of ECA."""
    same = op.out.shape[-1] is op.input.shape[-1] or op.out.shape[-1] == op.input.shape[-1]
    return op.rank == 1 and op.weight.shape[:2] == (1, 1) and op.stride == (1,) and bool(same)


def _grouped(
    op: ops.Conv, t: Trace, x: Labels, weight: Labels, bias: list[Any], out: Labels, axis: int
) -> Labels:
    """Whole groups go away, or the same channels of every group, whichever is finer."""
    ins, outs = x.shape[axis] // op.groups, out.shape[axis] // op.groups
    first = weight.shape[0]  # the axis with the channels of all groups, whichever side they are on
    each = first // op.groups
    t.coupling.materialize(x)
    known = x.layers(axis)
    if op.groups >= min(ins, outs) and known:
        layers = [one.reshape(op.groups, ins) for one in known]
        for one in layers:
            t.coupling.couple(one[:, 1:], one[:, :1])
        t.fix(weight, [1], "it is shared by the groups")
        t.meets(weight, 0, tuple(np.repeat(one[:, 0], each) for one in layers))
        out.axes[axis] = tuple(np.repeat(one[:, 0], outs) for one in layers)
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
    own = isinstance(op, ops.InstanceNorm) or op.uses_batch_statistics
    if own and any(layers for axis, layers in t[op.input].axes.items() if axis != 1):
        t.statistics[op.out.node] = "mean and variance over the axis"  # as of standardized weights
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


@rule.register(ops.Fourier)
def _(op: ops.Fourier, t: Trace) -> Labels | None:
    return t.passed(t[op.input], _out(op), *op.dims)


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
    x, dim, shape = t[op.input], op.dim % op.input.ndim, _out(op)
    if not op.index.is_constant:
        return t.passed(x, shape, dim) if op.index.ndim == 1 else None
    t.fix(t[op.index], range(op.index.ndim), "it says what is looked up")
    if dim in x.fresh:
        t.fix(x, [dim], "it is looked up")
    index = t.constants.evaluate(op.index.node)
    around = (slice(None),) * dim
    return t.coupling.moved(x, lambda spread: spread[(*around, index)], [shape])[0]


@rule.register(ops.Attention)
def _(op: ops.Attention, t: Trace) -> Labels | None:
    query, key, value = (t[one] for one in (op.query, op.key, op.value))
    if len({len(one.shape) for one in (query, key, value)}) > 1:
        return None
    ndim, shape = len(query.shape), _out(op)
    t.join("it is multiplied with what is fixed", (query, -1), (key, -1))
    tokens = t.join("it is multiplied with what is fixed", (key, -2), (value, -2))
    t.coupling.fix(tokens, "softmax runs along the axis")
    if op.enable_gqa:
        key, value = (_each_read(t, one, query.shape[-3]) for one in (key, value))
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


def _each_read(t: Trace, labels: Labels, heads: int) -> Labels:
    """The labels of keys or values, each head as often as a query reads it."""
    t.coupling.materialize(labels)
    axis = len(labels.shape) - 3
    times = heads // labels.shape[axis]
    axes = dict(labels.axes)
    axes[axis] = tuple(np.repeat(one, times) for one in labels.layers(axis))
    return Labels((*labels.shape[:axis], heads, *labels.shape[axis + 1 :]), axes)
