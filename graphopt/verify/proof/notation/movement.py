"""Index notation of data movement."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.verify.proof.algebra import Space
from graphopt.verify.proof.notation.base import (
    Index,
    Reader,
    Sizes,
    _axes,
    _same,
    entry,
    literally,
    sizes,
    unknown,
)
from graphopt.verify.proof.polynomials import sym
from graphopt.verify.proof.terms import Delta, Expr, Inside, factor, number


@sizes.register
def _(op: ops.Reshape) -> Sizes:
    known = prod(size for size in op.shape if not literally(size, -1))
    total = prod(op.input.shape)
    if all(not literally(size, -1) for size in op.shape):
        _same(known, total, "elements of a reshape")
    return tuple(total // known if literally(size, -1) else size for size in op.shape)


@entry.register
def _(op: ops.Reshape, at: Index, r: Reader) -> Expr:
    read: list[Any] = []
    after, before = sizes(op), op.input.shape
    for new, old in _apart(r.space, after, before):
        read += unravel(r.space, ravel(at[new], after[new]), before[old])
    return r.at(op.input, tuple(read))


def _apart(space: Space, after: Sizes, before: Sizes) -> Iterator[tuple[slice, slice]]:
    """Neighbouring axes that are reshaped among themselves: cut where as much lies in front."""
    fronts = [space.resolve(sym(prod(before[:i]))) for i in range(len(before))]
    i = j = 0
    for new in range(1, len(after)):
        front = space.resolve(sym(prod(after[:new])))
        old = next((old for old in range(i + 1, len(before)) if fronts[old] == front), None)
        if old is not None:
            yield slice(j, new), slice(i, old)
            i, j = old, new
    yield slice(j, len(after)), slice(i, len(before))


def ravel(at: Index, shape: Sizes) -> Any:
    linear: Any = sp.Integer(0)
    for i, size in zip(at, shape, strict=True):
        linear = linear * sym(size) + i
    return linear


def unravel(space: Space, linear: Any, shape: Sizes) -> Index:
    reads: list[Any] = []
    for size in reversed(shape[1:]):
        linear, digit = space.divmod(linear, sym(size))
        reads.append(digit)
    return (*([linear] if shape else []), *reversed(reads))


@sizes.register
def _(op: ops.Permute) -> Sizes:
    return tuple(op.input.shape[dim] for dim in op.dims)


@entry.register
def _(op: ops.Permute, at: Index, r: Reader) -> Expr:
    return r.at(op.input, tuple(at[op.dims.index(axis)] for axis in range(len(at))))


@sizes.register
def _(op: ops.Expand) -> Sizes:
    missing = len(op.shape) - op.input.ndim
    own = (None,) * missing + op.input.shape
    result = []
    for want, have in zip(op.shape, own, strict=True):
        keep = literally(want, -1)
        if have is not None and not keep and not literally(have, 1):
            _same(want, have, "an expanded size")
        result.append(have if keep else want)
    return tuple(result)


@entry.register
def _(op: ops.Expand, at: Index, r: Reader) -> Expr:
    return r.broadcast(op.input, at)


@sizes.register
def _(op: ops.RepeatInterleave) -> Sizes:
    if op.dim is None:
        return (prod(op.input.shape) * op.repeats,)
    dim = op.dim % op.input.ndim
    shape = op.input.shape
    return (*shape[:dim], shape[dim] * op.repeats, *shape[dim + 1 :])


@entry.register
def _(op: ops.RepeatInterleave, at: Index, r: Reader) -> Expr:
    if op.dim is None:
        whole, _ = r.space.divmod(at[0], sym(op.repeats))
        return r.at(op.input, unravel(r.space, whole, op.input.shape))
    dim = op.dim % op.input.ndim
    whole, _ = r.space.divmod(at[dim], sym(op.repeats))
    return r.at(op.input, (*at[:dim], whole, *at[dim + 1 :]))


@sizes.register
def _(op: ops.Repeat) -> Sizes:
    own = (1,) * (len(op.repeats) - op.input.ndim) + op.input.shape
    return tuple(n * k for n, k in zip(own, op.repeats, strict=True))


@entry.register
def _(op: ops.Repeat, at: Index, r: Reader) -> Expr:
    own = at[len(at) - op.input.ndim :]
    return r.at(op.input, tuple(
        r.space.divmod(i, sym(n))[1] for i, n in zip(own, op.input.shape, strict=True)
    ))  # fmt: skip


def _bounds(op: ops.Slice) -> tuple[Any, Any]:
    (dim,) = _axes((op.dim,), op.input.ndim)
    size = op.input.shape[dim]
    start = 0 if op.start is None else op.start
    end = size if op.end is None or (type(op.end) is int and op.end > 1 << 60) else op.end
    if type(start) is int and start < 0:
        start = size + start
    if type(end) is int and end < 0:
        end = size + end
    if start < 0:
        start = 0
    if end < 0:
        end = 0
    if end > size:
        end = size
    if start > end:
        start = end
    return start, end


@sizes.register
def _(op: ops.Slice) -> Sizes:
    start, end = _bounds(op)
    shape = list(op.input.shape)
    dim = op.dim % op.input.ndim
    shape[dim] = end - start if literally(op.step, 1) else (end - start + op.step - 1) // op.step
    return tuple(shape)


@entry.register
def _(op: ops.Slice, at: Index, r: Reader) -> Expr:
    start, _ = _bounds(op)
    dim = op.dim % op.input.ndim
    i = sym(start) + sym(op.step) * at[dim]
    return r.at(op.input, (*at[:dim], i, *at[dim + 1 :]))


@sizes.register
def _(op: ops.Select) -> Sizes:
    dim = op.dim % op.input.ndim
    return (*op.input.shape[:dim], *op.input.shape[dim + 1 :])


@entry.register
def _(op: ops.Select, at: Index, r: Reader) -> Expr:
    dim = op.dim % op.input.ndim
    index = op.index
    if type(index) is int and index < 0:
        index = op.input.shape[dim] + index
    return r.at(op.input, (*at[:dim], sym(index), *at[dim:]))


@sizes.register
def _(op: ops.Cat) -> Sizes:
    shape = list(op.tensors[0].shape)
    (dim,) = _axes((op.dim,), len(shape))
    for tensor in op.tensors[1:]:
        for axis, size in enumerate(tensor.shape):
            if axis != dim:
                _same(size, shape[axis], "sizes of a concatenation")
    shape[dim] = sum(tensor.shape[dim] for tensor in op.tensors)
    return tuple(shape)


@entry.register
def _(op: ops.Cat, at: Index, r: Reader) -> Expr:
    result, start = Expr(), sp.Integer(0)
    dim = op.dim % len(at)
    for tensor in op.tensors:
        i, size = at[dim] - start, sym(tensor.shape[dim])
        result = result + r.masked(tensor, (*at[:dim], i, *at[dim + 1 :]), {dim: size})
        start = start + size
    return result


@sizes.register
def _(op: ops.Stack) -> Sizes:
    first = op.tensors[0].shape
    dim = op.dim % (len(first) + 1)
    for tensor in op.tensors[1:]:
        for a, b in zip(tensor.shape, first, strict=True):
            _same(a, b, "sizes of a stack")
    return (*first[:dim], len(op.tensors), *first[dim:])


@entry.register
def _(op: ops.Stack, at: Index, r: Reader) -> Expr:
    dim = op.dim % len(at)
    rest = (*at[:dim], *at[dim + 1 :])
    result = Expr()
    for i, tensor in enumerate(op.tensors):
        result = result + r.space.product(factor(Delta(at[dim] - i)), r.at(tensor, rest))
    return result


@sizes.register
def _(op: ops.Pad) -> Sizes:
    shape = list(op.input.shape)
    for i in range(len(op.pad) // 2):
        shape[-1 - i] = op.pad[2 * i] + shape[-1 - i] + op.pad[2 * i + 1]
    return tuple(shape)


@entry.register
def _(op: ops.Pad, at: Index, r: Reader) -> Expr:
    reads = list(at)
    masked: dict[int, Any] = {}
    for i in range(len(op.pad) // 2):
        axis = len(at) - 1 - i
        size = sym(op.input.shape[axis])
        reads[axis] = at[axis] - sym(op.pad[2 * i])
        if literally(op.pad[2 * i], 0) and literally(op.pad[2 * i + 1], 0):
            continue
        if op.mode == "constant":
            masked[axis] = size
        elif op.mode == "circular":
            reads[axis] = r.space.divmod(reads[axis] + size, size)[1]
        else:
            reads[axis] = sp.Function(op.mode)(r.space.resolve(reads[axis]), size)
    result = r.masked(op.input, tuple(reads), masked)
    if op.value is None or literally(op.value, 0) or not masked:
        return result
    inside = r.space.product(*(factor(Inside(reads[axis], n)) for axis, n in masked.items()))
    outside: Expr = (number(1) - inside) * sym(op.value)
    return result + outside


@sizes.register
def _(op: ops.PixelShuffle) -> Sizes:
    *lead, c, h, w = op.input.shape
    r = op.upscale_factor
    return (*lead, c // (r * r), h * r, w * r)


@entry.register
def _(op: ops.PixelShuffle, at: Index, r: Reader) -> Expr:
    *lead, c, y, x = at
    k = sym(op.upscale_factor)
    (h, a), (w, b) = r.space.divmod(y, k), r.space.divmod(x, k)
    return r.at(op.input, (*lead, c * k * k + a * k + b, h, w))


@sizes.register
def _(op: ops.PixelUnshuffle) -> Sizes:
    *lead, c, h, w = op.input.shape
    r = op.downscale_factor
    return (*lead, c * r * r, h // r, w // r)


@entry.register
def _(op: ops.PixelUnshuffle, at: Index, r: Reader) -> Expr:
    *lead, c, y, x = at
    k = sym(op.downscale_factor)
    rest, b = r.space.divmod(c, k)
    channel, a = r.space.divmod(rest, k)
    return r.at(op.input, (*lead, channel, y * k + a, x * k + b))


@entry.register
def _(op: ops.ChannelShuffle, at: Index, r: Reader) -> Expr:
    groups = sym(op.groups)
    per = sym(op.input.shape[1] // op.groups)
    j, g = r.space.divmod(at[1], groups)
    return r.at(op.input, (at[0], g * per + j, *at[2:]))


@entry.register
def _(op: ops.Flip, at: Index, r: Reader) -> Expr:
    dims = {dim % len(at) for dim in op.dims}
    return r.at(op.input, tuple(
        sym(op.input.shape[axis]) - 1 - i if axis in dims else i for axis, i in enumerate(at)
    ))  # fmt: skip


@entry.register
def _(op: ops.Roll, at: Index, r: Reader) -> Expr:
    if not op.dims:
        return unknown(op, at, r)
    reads = list(at)
    for shift, dim in zip(op.shifts, op.dims, strict=True):
        size = sym(op.input.shape[dim])
        reads[dim] = r.space.divmod(reads[dim] - sym(shift), size)[1]
    return r.at(op.input, tuple(reads))
