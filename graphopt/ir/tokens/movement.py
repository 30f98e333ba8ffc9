"""Data movement and sums over axes: all within a token, or of whole tokens."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.affine import fixed, same, same_shape
from graphopt.ir.ops.base import hint
from graphopt.ir.rewrite import describe
from graphopt.ir.tokens.core import (
    INSIDE,
    Axis,
    Labels,
    Step,
    Tokens,
    apart,
    inside,
    is_full,
    mapped,
    step,
)
from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.linearity import Region


@step.register(ops.Permute)
def _(op: ops.Permute, region: Region) -> Step:
    labels = region.labels(op.input)
    return Step(op, tuple(labels[dim] for dim in op.dims), mapped(op, input=op.input))


@step.register(ops.Expand)
def _(op: ops.Expand, region: Region) -> Step:
    labels = region.labels(op.input)
    labels = (*(INSIDE,) * (op.out.ndim - len(labels)), *labels)
    region.rw.require(
        all(
            one.tokens or isinstance(size, int)
            for one, size in zip(labels, op.out.shape, strict=True)
        ),
        f"{describe(op.out)} repeats tokens",
    )

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(op.input)
        return None if x is None else x.expand(*tokens.shaped(labels, op.out.shape))

    return Step(op, labels, emit)


@step.register(ops.Reshape)
def _(op: ops.Reshape, region: Region) -> Step:
    after = op.out.shape
    labels = _regrouped(region, op, region.labels(op.input), after)

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(op.input)
        return None if x is None else x.reshape(*tokens.shaped(labels, after))

    return Step(op, labels, emit)


def _regrouped(region: Region, op: ops.Reshape, labels: Labels, after: tuple[Any, ...]) -> Labels:
    """The labels after a reshape, which takes the axes apart, in order, and puts them together
    differently. What is inside a token may be split; tokens stay outside of it."""
    sizes = region.start.shape
    reason = f"{describe(op.out)} lays its tokens out in another way"
    left: list[tuple[bool, Any]] = []  # (True, an axis of the start) or (False, a size inside)
    for one, size in zip(labels, op.input.shape, strict=True):
        left += [(True, axis) for axis in one.tokens]
        inside = one.inside if one.tokens else size
        region.rw.require(isinstance(inside, int), reason)
        left += [(False, inside)] if inside != 1 else []
    found = []
    for size in after:
        tokens: list[int] = []
        inside = 1
        if left and left[0][0] and same(size, 1) and same(sizes[left[0][1]], 1):
            tokens.append(left.pop(0)[1])
        while not same(prod(sizes[axis] for axis in tokens) * inside, size):
            region.rw.require(left, reason)
            is_token, what = left.pop(0)
            if is_token:
                region.rw.require(inside == 1, f"{describe(op.out)} puts tokens inside of tokens")
                tokens.append(what)
                continue
            have = prod(hint(sizes[axis]) for axis in tokens) * inside
            wanted = hint(size) // have
            if wanted % what:  # a part of it
                region.rw.require(wanted and what % wanted == 0, reason)
                left.insert(0, (False, what // wanted))
                what = wanted
            region.rw.require(what != 1, reason)
            inside *= what
        found.append(Axis(tuple(tokens), inside) if tokens else INSIDE)
    region.rw.require(all(one and same(sizes[what], 1) for one, what in left), reason)
    return tuple(found)


# -- ops along some axes ------------------------------------------------------------------------


@step.register(ops.Slice)
@step.register(ops.Flip)
@step.register(ops.Roll)
@step.register(ops.CumSum)
@step.register(ops.IndexSelect)
@step.register(ops.RepeatInterleave)
@step.register(ops.Fourier)
def _(op: Any, region: Region) -> Step:
    region.rw.require(
        all(fixed(one) for one in (getattr(op, "index", None), getattr(op, "repeats", None))),
        f"{describe(op.out)} depends on an index that is computed",
    )
    ndim = op.input.ndim
    dims = op.dims if hasattr(op, "dims") else (op.dim,)
    region.rw.require(dims and None not in dims, f"{describe(op.out)} mixes all axes")
    labels = inside(region, op.input, *(dim % ndim for dim in dims))
    return Step(op, labels, mapped(op, input=op.input))


@step.register(ops.Select)
def _(op: ops.Select, region: Region) -> Step:
    dim = op.dim % op.input.ndim
    labels = inside(region, op.input, dim)
    return Step(op, labels[:dim] + labels[dim + 1 :], mapped(op, input=op.input))


@step.register(ops.Index)
def _(op: ops.Index, region: Region) -> Step:
    region.rw.require(fixed(op.index), f"{describe(op.out)} depends on an index that is computed")
    labels = inside(region, op.input, op.dim)
    picked = (INSIDE,) * op.index.ndim
    return Step(op, (*labels[: op.dim], *picked, *labels[op.dim + 1 :]), mapped(op, input=op.input))


@step.register(ops.Sum)
@step.register(ops.Mean)
def _(op: Any, region: Region) -> Step:
    labels = inside(region, op.input, *op.dims)
    if not op.keepdim:
        labels = tuple(one for axis, one in enumerate(labels) if axis not in op.dims)
    return Step(op, labels, mapped(op, input=op.input))


@step.register(ops.Pad)
def _(op: ops.Pad, region: Region) -> Step:
    region.rw.require(
        op.mode != "constant" or not op.value, f"{describe(op.out)} pads with a constant"
    )
    labels = inside(region, op.input, *op.axes)
    return Step(op, labels, mapped(op, input=op.input))


@step.register(ops.Repeat)
def _(op: ops.Repeat, region: Region) -> Step:
    labels = region.labels(op.input)
    labels = (*(INSIDE,) * (len(op.repeats) - len(labels)), *labels)
    region.rw.require(
        all(not one.tokens or count == 1 for one, count in zip(labels, op.repeats, strict=True)),
        f"{describe(op.out)} repeats tokens",
    )
    return Step(op, labels, mapped(op, input=op.input))


@step.register(ops.Cat)
@step.register(ops.Stack)
def _(op: Any, region: Region) -> Step:
    new = isinstance(op, ops.Stack)
    dim = op.dim % op.out.ndim
    varying = [one for one in op.tensors if not fixed(one) and not is_full(one)]
    region.rw.match(varying)
    labels = region.labels(varying[0])
    for one in op.tensors:
        if is_full(one):
            continue
        if fixed(one):
            apart(region, one, labels)
        else:
            region.rw.require(
                region.labels(one) == labels, f"{describe(op.out)} joins different tokens"
            )
    if not new:
        inside(region, varying[0], dim)

    def emit(tokens: Tokens) -> Value | None:
        found = []
        for one in op.tensors:
            shape = tokens.shaped(labels, one.shape)
            x = None if is_full(one) else tokens.at(one)
            if x is None:
                number = one.op.fill_value if is_full(one) and not tokens.identity else 0.0
                x = tokens.emit(ops.Full(shape, number, one.dtype, one.meta.device))
            found.append(x if same_shape(x.shape, shape) else x.expand(*shape))
        return tokens.emit(op.replace(tensors=tuple(found)))

    return Step(op, (*labels[:dim], INSIDE, *labels[dim:]) if new else labels, emit)
