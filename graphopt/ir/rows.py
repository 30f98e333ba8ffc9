"""Which ops can be applied to the operands of several calls at once, and how.

    stack(f(x_1), ..., f(x_n))  =  f*(stack(x_1, ..., x_n))

Either f leaves every row of axis 0 alone (a convolution, a pool, attention) and f* is f on [n * rows, ...]:
then values are kept flat, so that a chain of such ops has nothing between them. Or f* is f with the axes
that it names moved by one, on [n, rows, ...]: a sum over the batch, a reshape that splits it. `form` knows
both for every op view, and for any op that torch tags as pointwise; what it does not know is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

from graphopt.ir import ops
from graphopt.ir.affine import same
from graphopt.ir.many import Many, Pointwise, Slot, existing, in_order, slots, with_tensors
from graphopt.ir.ops.base import Op
from graphopt.ir.value import Value

INPUT: frozenset[Slot] = frozenset({("input", 0)})


# -- what an op does to rows ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Form:
    """How an op is applied to many: to the rows of all, or, `flat` being false, to all one after the
    other; with other fields, by their number. `either`: that as well, where rows would be copied.
    `spread`: what is the same for all is repeated."""

    flat: bool
    changes: Callable[[int], dict[str, Any]] = lambda count: {}
    spread: bool = False
    either: bool = False

    def emit(self, op: Op, data: Mapping[Slot, Many]) -> Many:
        """The op on `data`; its other tensors are the same for all."""
        count = next(iter(data.values())).count
        flat = self.flat and not (self.either and not all(one.is_free for one in data.values()))
        tensors = {slot: one.flat() if flat else one.stacked() for slot, one in data.items()}
        builder = op.out.builder
        if self.spread:
            for slot, one in slots(op).items():
                if slot not in data:
                    tensors[slot] = one.expand(count, *(-1,) * one.ndim)
        made = with_tensors(op, tensors)
        made = dataclasses.replace(made, **self.changes(count))
        return Many(builder.emit(made, like=op), count, flat)

    def is_free(self, values: Sequence[Value]) -> bool:
        """Whether some values can be had for it without moving them."""
        if existing(values) is not None:
            return True
        found = in_order(values)
        return found is not None and (not self.flat or self.either or found[0].is_free)


FLAT, EITHER, STACKED = Form(True), Form(True, either=True), Form(False)
Found = Form | str
Data = frozenset[Slot]


@singledispatch
def form(op: Any, data: Data) -> Found:
    """How an op is applied to many values in the slots `data`, or why it cannot be; the reason is empty
    where nothing is known of it."""
    return ""


def _row_wise(*values: Value) -> bool:
    """Whether all have the same axis 0."""
    return all(one.ndim and same(one.shape[0], values[0].shape[0]) for one in values)


def _broadcast(op: Op, data: Data) -> Found:
    out, rank = op.out, op.out.ndim
    given = slots(op)
    mine = [given[slot] for slot in data]
    others = [one for slot, one in given.items() if slot not in data]
    if any(one.ndim != rank for one in mine):
        return "its operands differ in their number of axes"
    if not rank and len({one.dtype for one in given.values()}) > 1:
        return (
            "it promotes numbers"  # a tensor without axes does not count where one with axes does
        )
    alike = all(one.ndim < rank or same(one.shape[0], 1) for one in others)
    return EITHER if rank and alike and _row_wise(out, *mine) else STACKED


for _cls in (ops.Unary, ops.Binary, ops.Compare, ops.Where, ops.Cast, ops.Copy, ops.Detach, ops.Pow,
             Pointwise):  # fmt: skip
    form.register(_cls, _broadcast)


@form.register
def _(op: ops.Dropout, data: Data) -> Found:
    return "it drops at random" if op.train else _broadcast(op, data)


@form.register
def _(op: ops.PRelu, data: Data) -> Found:
    return FLAT if data == INPUT and op.input.ndim >= 2 else ""


# Ops on images with channels; without a batch axis, one after the other is their batch.


def _image(op: Any, data: Data, rank: int) -> Found:
    if data != INPUT:
        return "its parameters differ"
    return FLAT if op.input.ndim == rank + 2 else STACKED if op.input.ndim == rank + 1 else ""


@form.register(ops.Conv)
@form.register(ops.AdaptiveAvgPool)
def _(op: Any, data: Data) -> Found:
    return _image(op, data, op.rank)


@form.register(ops.AvgPool)
@form.register(ops.MaxPool)
def _(op: Any, data: Data) -> Found:
    return _image(op, data, len(op.kernel_size))


@form.register(ops.Upsample)
@form.register(ops.InstanceNorm)
def _(op: Any, data: Data) -> Found:
    return _image(op, data, op.input.ndim - 2)


@form.register(ops.GroupNorm)
@form.register(ops.ChannelShuffle)
def _(op: Any, data: Data) -> Found:
    return _image(op, data, op.input.ndim - 2) if op.input.ndim >= 2 else ""


@form.register
def _(op: ops.BatchNorm, data: Data) -> Found:
    if op.uses_batch_statistics:
        return "it normalizes with batch statistics"
    return _image(op, data, op.input.ndim - 2)


@form.register(ops.PixelShuffle)
@form.register(ops.PixelUnshuffle)
def _(op: Any, data: Data) -> Found:
    return FLAT if op.input.ndim > 3 else STACKED


# Ops on the last axes.


@form.register
def _(op: ops.Linear, data: Data) -> Found:
    if data != INPUT:
        return "its parameters differ"
    return FLAT if op.input.ndim >= 2 else STACKED


@form.register(ops.LayerNorm)
@form.register(ops.RMSNorm)
def _(op: Any, data: Data) -> Found:
    if data != INPUT:
        return "its parameters differ"
    return FLAT if op.input.ndim > len(op.normalized_shape) else STACKED


@form.register
def _(op: ops.Matmul, data: Data) -> Found:
    if min(op.left.ndim, op.right.ndim) < 2:
        return "it multiplies by a vector"
    if data == {("left", 0)} and op.right.ndim == 2:
        return FLAT
    found = _broadcast(op, data)
    return STACKED if found == EITHER and op.out.ndim == 2 else found


@form.register
def _(op: ops.Addmm, data: Data) -> Found:
    rows = op.input.ndim == 2 and not same(op.input.shape[0], 1)
    if data != {("left", 0)} or op.left.ndim != 2 or rows:
        return "it adds what differs"
    return FLAT


@form.register
def _(op: ops.Attention, data: Data) -> Found:
    if not {("query", 0), ("key", 0), ("value", 0)} <= data:
        return "its operands differ"
    if op.dropout_p:
        return "it drops at random"
    found = _broadcast(op, data)
    return found if op.out.ndim >= 3 else ""


@form.register
def _(op: ops.Embedding, data: Data) -> Found:
    if data != {("indices", 0)}:
        return "its parameters differ"
    return FLAT if op.indices.ndim else STACKED


# Ops along axes that they name.


def _along(
    ndim: int, dims: Sequence[int], rename: Callable[[tuple[int, ...]], dict[str, Any]]
) -> Form:
    """An op along `dims`, which `rename` gives it anew."""
    found = tuple(dim % ndim for dim in dims)
    if 0 not in found:
        return FLAT
    return Form(False, lambda count: rename(tuple(dim + 1 for dim in found)))


@form.register(ops.Softmax)
@form.register(ops.LogSoftmax)
@form.register(ops.CumSum)
@form.register(ops.Slice)
@form.register(ops.Select)
@form.register(ops.IndexSelect)
@form.register(ops.Index)
@form.register(ops.RepeatInterleave)
def _(op: Any, data: Data) -> Found:
    if data != INPUT:
        return "its indices differ"
    if op.dim is None or not op.input.ndim:
        return ""
    return _along(op.input.ndim, (op.dim,), lambda dims: {"dim": dims[0]})


@form.register(ops.Flip)
@form.register(ops.Roll)
@form.register(ops.Sum)
@form.register(ops.Mean)
def _(op: Any, data: Data) -> Found:
    if not op.dims or not op.input.ndim:
        return ""
    return _along(op.input.ndim, op.dims, lambda dims: {"dims": dims})


@form.register
def _(op: ops.Gather, data: Data) -> Found:
    if len(data) < 2 or not op.input.ndim:
        return "its indices are the same for all"
    found = _along(op.input.ndim, (op.dim,), lambda dims: {"dim": dims[0]})
    if found == FLAT and not _row_wise(op.input, op.index):
        return Form(False, lambda count: {"dim": op.dim % op.input.ndim + 1})
    return found


@form.register(ops.Cat)
@form.register(ops.Stack)
def _(op: Any, data: Data) -> Found:
    dim = op.dim % op.out.ndim
    given = slots(op)
    if dim and len(data) == len(given) and _row_wise(*given.values()):
        return FLAT
    return Form(False, lambda count: {"dim": dim + 1}, spread=True)


@form.register
def _(op: ops.Permute, data: Data) -> Found:
    if op.dims and op.dims[0] == 0:
        return FLAT
    return Form(False, lambda count: {"dims": (0, *(dim + 1 for dim in op.dims))})


@form.register
def _(op: ops.Reshape, data: Data) -> Found:
    sizes = [size if isinstance(size, int) else -1 for size in op.out.shape]
    if op.input.ndim and op.out.ndim and same(op.input.shape[0], op.out.shape[0]):
        if -1 not in sizes[1:]:
            return Form(True, lambda count: {"shape": (-1, *sizes[1:])})
    if sizes.count(-1) > 1:
        return "it has several dynamic sizes"
    return Form(False, lambda count: {"shape": (count, *sizes)})


@form.register
def _(op: ops.Expand, data: Data) -> Found:
    before, after = op.input.shape, op.out.shape
    if len(before) != len(after):
        return "it adds axes"
    sizes = [-1 if same(a, b) else b for a, b in zip(before, after, strict=True)]
    if not all(isinstance(size, int) for size in sizes):
        return "it has dynamic sizes"
    if sizes and sizes[0] == -1:
        return Form(True, lambda count: {"shape": tuple(sizes)})
    return Form(False, lambda count: {"shape": (-1, *sizes)})


@form.register
def _(op: ops.Repeat, data: Data) -> Found:
    if len(op.repeats) != op.input.ndim or not op.input.ndim:
        return "it adds axes"
    if op.repeats[0] == 1:
        return FLAT
    return Form(False, lambda count: {"repeats": (1, *op.repeats)})


@form.register
def _(op: ops.Pad, data: Data) -> Found:
    if 0 not in op.axes:
        return FLAT
    return STACKED if op.mode == "constant" else "it pads the batch"


# -- what siblings are found by -------------------------------------------------------------------

_ROWS = {
    ops.Conv: "input", ops.Linear: "input", ops.Embedding: "indices", ops.Addmm: "left",
    ops.BatchNorm: "input", ops.GroupNorm: "input", ops.LayerNorm: "input", ops.RMSNorm: "input",
    ops.InstanceNorm: "input",
}  # fmt: skip


def rows_of(op: Op) -> Slot | None:
    """Where a site with parameters has its rows: an op that several calls are known by, whatever they
    read."""
    name = _ROWS.get(type(op))
    if isinstance(op, ops.Matmul) and op.left.is_constant != op.right.is_constant:
        name = "right" if op.left.is_constant else "left"
    return (name, 0) if name is not None and len(slots(op)) > 1 else None
