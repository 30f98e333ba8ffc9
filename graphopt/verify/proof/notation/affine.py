"""Index notation of convolutions and products."""

from __future__ import annotations

from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.ir.value import Value
from graphopt.verify.proof.algebra import Space
from graphopt.verify.proof.notation.base import (
    Index,
    Reader,
    ShapeError,
    Sizes,
    _same,
    broadcast_sizes,
    entry,
    exponential,
    literally,
    sizes,
    unknown,
)
from graphopt.verify.proof.polynomials import sym
from graphopt.verify.proof.terms import Delta, Expr, factor, number


def _padding(op: Any, s: Space | None = None) -> tuple[Any, ...]:
    if not isinstance(op.padding, str):
        return tuple(op.padding)
    return tuple(d * (k - 1) // 2 for d, k in zip(op.dilation, op.kernel, strict=True))


@sizes.register
def _(op: ops.Conv) -> Sizes:
    axis = op.channel_axis
    _same(op.input.shape[axis], op.in_channels, "channels of the input and of the weight")
    if op.bias is not None:
        _same(op.bias.shape[0], op.out_channels, "the bias and the output channels")
    space = []
    for i, size in enumerate(op.input.shape[axis + 1 :]):
        reach = op.dilation[i] * (op.kernel[i] - 1)
        if isinstance(op.padding, str):
            space.append(size)
        elif op.transposed:
            extra = op.output_padding[i] if op.output_padding else 0
            space.append((size - 1) * op.stride[i] - 2 * op.padding[i] + reach + extra + 1)
        else:
            space.append((size + 2 * op.padding[i] - reach - 1) // op.stride[i] + 1)
    return (*op.input.shape[:axis], op.out_channels, *space)


@entry.register
def _(op: ops.Conv, at: Index, r: Reader) -> Expr:
    axis = op.channel_axis
    batch, channel, places = at[:axis], at[axis], at[axis + 1 :]
    kernel = r.indices(op.kernel, "k")
    image = op.input.shape[axis + 1 :]
    padding = _padding(op)
    grouped = not literally(op.groups, 1)
    if op.transposed:
        (c,) = r.indices((op.in_channels // op.groups,), "c")
        group, inner = r.space.divmod(channel, op.weight.shape[1]) if grouped else (0, channel)
        source = r.indices(image, "p")
        masks = [
            factor(Delta(q + sym(a) - sym(s) * p - sym(d) * k))
            for q, p, k, s, d, a in zip(
                places, source, kernel, op.stride, op.dilation, padding, strict=True
            )
        ]
        padded: dict[int, Any] = {}
        sure: tuple[int, ...] = ()
        reads = group * (op.in_channels // op.groups) + c if grouped else c
        weight = r.at(op.weight, (reads, inner, *kernel))
        bound = (c, *source, *kernel)
    else:
        (c,) = r.indices((op.weight.shape[1],), "c")
        group = r.space.divmod(channel, op.out_channels // op.groups)[0] if grouped else 0
        reads = group * op.weight.shape[1] + c if grouped else c
        source = tuple(
            sym(s) * p + sym(d) * k - sym(a)
            for p, k, s, d, a in zip(places, kernel, op.stride, op.dilation, padding, strict=True)
        )
        masks = []
        padded = {axis + 1 + i: size for i, size in enumerate(image)}
        sure = tuple(
            axis + 1 + i for i, a in enumerate(padding)
            if literally(a, 0) and not isinstance(op.padding, str)
        )  # fmt: skip
        weight = r.at(op.weight, (channel, c, *kernel))
        bound = (c, *kernel)
    read = r.masked(op.input, (*batch, reads, *source), padded, sure)
    result = r.space.sum(bound, r.space.product(*masks, weight, read))
    return result if op.bias is None else result + r.at(op.bias, (channel,))


@sizes.register
def _(op: ops.Linear) -> Sizes:
    _same(op.input.shape[-1], op.weight.shape[1], "features of the input and of the weight")
    shape = (*op.input.shape[:-1], op.weight.shape[0])
    if op.bias is not None:  # torch takes any that broadcasts, where it takes it at all
        for have, want in zip(reversed(op.bias.shape), reversed(shape), strict=False):
            if not literally(have, 1):
                _same(have, want, "the bias and the output")
    return shape


@entry.register
def _(op: ops.Linear, at: Index, r: Reader) -> Expr:
    (c,) = r.indices((op.weight.shape[1],), "c")
    read = r.space.product(r.at(op.weight, (at[-1], c)), r.at(op.input, (*at[:-1], c)))
    result = r.space.sum((c,), read)
    return result if op.bias is None else result + r.broadcast(op.bias, at)


def _matmul_sizes(left: Value, right: Value) -> Sizes:
    _same(left.shape[-1], right.shape[-2 if right.ndim > 1 else -1], "the contracted sizes")
    lead = broadcast_sizes(_Lead(left), _Lead(right))
    rows = left.shape[-2:-1] if left.ndim > 1 else ()
    return (*lead, *rows, *(right.shape[-1:] if right.ndim > 1 else ()))


class _Lead(Value):
    """The batch axes of a matrix operand."""

    __slots__ = ()

    def __init__(self, of: Value) -> None:
        super().__init__(of.node, of.builder)

    @property
    def shape(self) -> tuple[Any, ...]:
        return super().shape[:-2]


def _matmul(left: Value, right: Value, at: Index, r: Reader) -> Expr:
    (c,) = r.indices(left.shape[-1:], "c")
    place = list(at)
    column = (place.pop(),) if right.ndim > 1 else ()
    row = (place.pop(),) if left.ndim > 1 else ()

    def lead(operand: Value) -> Index:
        own = operand.shape[:-2]
        read = place[len(place) - len(own) :]
        return tuple(0 if literally(n, 1) else i for n, i in zip(own, read, strict=True))

    a = r.at(left, (*lead(left), *row, c))
    b = r.at(right, (*lead(right), c, *column))
    return r.space.sum((c,), r.space.product(a, b))


@sizes.register
def _(op: ops.Matmul) -> Sizes:
    return _matmul_sizes(op.left, op.right)


@entry.register
def _(op: ops.Matmul, at: Index, r: Reader) -> Expr:
    return _matmul(op.left, op.right, at, r)


@sizes.register
def _(op: ops.Addmm) -> Sizes:
    return _matmul_sizes(op.left, op.right)


@entry.register
def _(op: ops.Addmm, at: Index, r: Reader) -> Expr:
    product: Expr = _matmul(op.left, op.right, at, r) * sym(op.alpha)
    term: Expr = r.broadcast(op.input, at) * sym(op.beta)
    return product + term


def _letters(op: ops.Einsum) -> tuple[list[str], str]:
    inputs, arrow, output = op.equation.replace(" ", "").partition("->")
    if not arrow:
        raise ShapeError(f"einsum {op.equation}: no explicit output")
    return inputs.split(","), output


@sizes.register
def _(op: ops.Einsum) -> Sizes:
    inputs, output = _letters(op)
    found: dict[str, Any] = {}
    for letters, tensor in zip(inputs, op.tensors, strict=True):
        for letter, size in zip(letters, tensor.shape, strict=True):
            _same(found.setdefault(letter, size), size, f"sizes of {letter}")
    return tuple(found[letter] for letter in output)


@entry.register
def _(op: ops.Einsum, at: Index, r: Reader) -> Expr:
    inputs, output = _letters(op)
    places = dict(zip(output, at, strict=True))
    bound = []
    for letters, tensor in zip(inputs, op.tensors, strict=True):
        for letter, size in zip(letters, tensor.shape, strict=True):
            if letter not in places:
                places[letter] = r.space.index(sym(size), letter)
                bound.append(places[letter])
    reads = [
        r.at(tensor, tuple(places[letter] for letter in letters))
        for letters, tensor in zip(inputs, op.tensors, strict=True)
    ]
    return r.space.sum(bound, r.space.product(*reads))


@sizes.register
def _(op: ops.Embedding) -> Sizes:
    return (*op.indices.shape, op.weight.shape[1])


@sizes.register
def _(op: ops.IndexSelect) -> Sizes:
    dim = op.dim % op.input.ndim
    return (*op.input.shape[:dim], op.index.shape[0], *op.input.shape[dim + 1 :])


@sizes.register
def _(op: ops.Gather) -> Sizes:
    return tuple(op.index.shape)


@sizes.register
def _(op: ops.Attention) -> Sizes:
    return (*op.query.shape[:-1], op.value.shape[-1])


@sizes.register
def _(op: ops.Attention) -> Sizes:
    _same(op.query.shape[-1], op.key.shape[-1], "the features of queries and keys")
    _same(op.key.shape[-2], op.value.shape[-2], "keys and values")
    return (*op.query.shape[:-1], op.value.shape[-1])


@entry.register
def _(op: ops.Attention, at: Index, r: Reader) -> Expr:
    if op.is_causal or op.dropout_p or op.enable_gqa:
        return unknown(op, at, r)
    *lead, i, e = at
    (j,) = r.indices((op.key.shape[-2],), "j")
    (d,) = r.indices((op.key.shape[-1],), "d")
    products = r.space.product(r.at(op.query, (*lead, i, d)), r.at(op.key, (*lead, j, d)))
    width = sym(op.query.shape[-1])
    scale = width ** sp.Rational(-1, 2) if op.scale is None else sym(op.scale)
    score = r.space.product(number(scale), r.space.sum((d,), products))
    if op.attn_mask is not None:
        score = score + r.broadcast(op.attn_mask, (*lead, i, j))
    weight = exponential(score, r)
    total = r.space.power(r.space.sum((j,), weight), -1)
    average = r.space.sum((j,), r.space.product(weight, r.at(op.value, (*lead, j, e))))
    return r.space.product(average, total)
