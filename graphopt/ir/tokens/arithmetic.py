"""Products, sums and casts: which tokens they keep apart, and how other tokens take their place."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.affine import fixed, same, same_shape
from graphopt.ir.rewrite import describe
from graphopt.ir.tokens.core import (
    INSIDE,
    Labels,
    Step,
    Tokens,
    apart,
    inside,
    is_identity,
    mapped,
    scaled,
    step,
    times,
)
from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.linearity import Region


def _factors(region: Region, op: Any) -> tuple[Any, Any]:
    """The operand that depends on the start, and the other one, which must not."""
    left, right = op.left, op.right
    if fixed(left):
        left, right = right, left
    region.rw.require(
        fixed(right), f"{describe(op.out)} multiplies what depends on its input twice"
    )
    return left, right


@step.register(ops.Linear)
def _(op: ops.Linear, region: Region) -> Step:
    labels = inside(region, op.input, op.input.ndim - 1)
    region.rw.require(
        fixed(op.weight) and fixed(op.bias), f"the weight of {describe(op.out)} is computed"
    )

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(op.input)
        bias = None if op.bias is None else tokens.at(op.bias)
        if x is None:
            shape = tokens.shaped(labels, op.out.shape)
            return None if bias is None else bias.expand(*shape)  # type: ignore[no-any-return]
        if bias is None and is_identity(x):
            return times(x, op.weight.permute(1, 0))
        return tokens.emit(ops.Linear(x, op.weight, bias))

    return Step(op, labels, emit)


@step.register(ops.Conv)
def _(op: ops.Conv, region: Region) -> Step:
    """A convolution of single pixels, which is a linear map of the channels of each."""
    region.rw.require(
        pixelwise(op), f"{describe(op.out)} mixes the tokens of its window with each other"
    )
    labels = inside(region, op.input, 1)
    region.rw.require(
        fixed(op.weight) and fixed(op.bias), f"the weight of {describe(op.out)} is computed"
    )

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(op.input)
        bias = None if op.bias is None else tokens.at(op.bias)
        if x is None:
            shape = tokens.shaped(labels, op.out.shape)
            pixel = (1, -1, *(1,) * (op.out.ndim - 2))
            return None if bias is None else bias.reshape(*pixel).expand(*shape)  # type: ignore[no-any-return]
        return tokens.emit(op.replace(input=x, bias=bias))

    return Step(op, labels, emit)


def pixelwise(op: ops.Conv) -> bool:
    """Whether every pixel of the output is made of the same pixel of the input alone."""
    still = not isinstance(op.padding, str) and not any(op.padding)
    ones = all(same(one, 1) for one in op.weight.shape[2:]) and set(op.stride) == {1}
    return ones and still and not op.transposed and op.channel_axis == 1


@step.register(ops.Embedding)
def _(op: ops.Embedding, region: Region) -> Step:
    region.rw.match(fixed(op.weight) and op.indices == region.start)
    labels = region.tokens

    def emit(tokens: Tokens) -> Value | None:
        return op.weight.reshape(*tokens.shaped(labels, op.out.shape))

    return Step(op, labels, emit)


@step.register(ops.Matmul)
def _(op: ops.Matmul, region: Region) -> Step:
    if fixed(op.right):
        right: Value = op.right
        region.rw.match(right.ndim >= 2 and op.left.ndim >= 2)
        rows = inside(region, op.left, op.left.ndim - 1)
        apart(region, right, rows[:-2], without=2)
        missing = max(0, right.ndim - op.left.ndim)
        labels: Labels = (*(INSIDE,) * missing, *rows[:-1], INSIDE)

        def emit(tokens: Tokens) -> Value | None:
            x = tokens.at(op.left)
            return None if x is None else times(x, right)

        return Step(op, labels, emit)
    region.rw.require(
        fixed(op.left), f"{describe(op.out)} multiplies what depends on its input twice"
    )
    region.rw.match(op.left.ndim >= 2 and op.right.ndim >= 2)
    columns = inside(region, op.right, op.right.ndim - 2)
    apart(region, op.left, columns[:-2], without=2)
    missing = max(0, op.left.ndim - op.right.ndim)
    labels = (*(INSIDE,) * missing, *columns[:-2], INSIDE, columns[-1])
    return Step(op, labels, mapped(op, right=op.right))


@step.register(ops.Addmm)
def _(op: ops.Addmm, region: Region) -> Step:
    region.rw.require(
        fixed(op.right) and fixed(op.input) and op.left.ndim == 2,
        f"an operand of {describe(op.out)} is computed",
    )
    labels = inside(region, op.left, 1)
    apart(region, op.input, labels)

    def emit(tokens: Tokens) -> Value | None:
        x, bias = tokens.at(op.left), tokens.at(op.input)
        product = None if x is None else scaled(times(x, op.right), op.alpha)
        if bias is None:
            return product
        bias = scaled(bias, op.beta).expand(*tokens.shaped(labels, op.out.shape))
        return bias if product is None else product + bias  # type: ignore[no-any-return]

    return Step(op, labels, emit)


@step.register(ops.Einsum)
def _(op: ops.Einsum, region: Region) -> Step:
    varying = [i for i, one in enumerate(op.tensors) if not fixed(one)]
    region.rw.require(
        len(varying) == 1, f"{describe(op.out)} multiplies what depends on its input twice"
    )
    value = op.tensors[varying[0]]
    inputs, output = _letters(region, op)
    mine, labels = inputs[varying[0]], region.labels(value)
    region.rw.match(len(set(mine)) == len(mine))
    meaning = dict(zip(mine, labels, strict=True))
    others = "".join(letters for i, letters in enumerate(inputs) if i != varying[0])
    for letter, one in meaning.items():
        region.rw.require(
            not one.tokens or (letter in output and letter not in others),
            f"{describe(op.out)} mixes its tokens with each other",
        )

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(value)
        if x is None:
            return None
        tensors = tuple(x if i == varying[0] else one for i, one in enumerate(op.tensors))
        return tokens.emit(op.replace(tensors=tensors))

    return Step(op, tuple(meaning.get(letter, INSIDE) for letter in output), emit)


def _letters(region: Region, op: ops.Einsum) -> tuple[list[str], str]:
    """The letters of an equation, those of its ellipsis spelled out."""
    left, arrow, output = op.equation.replace(" ", "").partition("->")
    region.rw.match(arrow)
    terms = left.split(",")
    free = [one for one in string.ascii_letters if one not in op.equation]
    hidden = {
        one.ndim - len(term.replace("...", ""))
        for term, one in zip(terms, op.tensors, strict=True)
        if "..." in term
    }
    region.rw.match(len(hidden) <= 1)
    rest = "".join(free[: next(iter(hidden), 0)])
    return [term.replace("...", rest) for term in terms], output.replace("...", rest)


@step.register(ops.Mul)
@step.register(ops.Div)
def _(op: Any, region: Region) -> Step:
    if isinstance(op, ops.Div):
        region.rw.require(
            fixed(op.right), f"{describe(op.out)} divides by what depends on its input"
        )
    value, factor = _factors(region, op)
    labels = region.labels(value)
    apart(region, factor, labels)
    labels = (*(INSIDE,) * (op.out.ndim - len(labels)), *labels)
    name = "left" if op.left is value else "right"
    return Step(op, labels, mapped(op, **{name: value}))


@step.register(ops.Add)
@step.register(ops.Sub)
def _(op: Any, region: Region) -> Step:
    labels: Labels = (INSIDE,) * op.out.ndim
    for one in (op.left, op.right):
        if not fixed(one):
            found = region.labels(one)
            found = (*(INSIDE,) * (op.out.ndim - len(found)), *found)
            region.rw.require(
                not any(
                    a.tokens and b.tokens and a != b for a, b in zip(labels, found, strict=True)
                ),
                f"{describe(op.out)} adds different tokens",
            )
            labels = tuple(a if a.tokens else b for a, b in zip(labels, found, strict=True))
    for one in (op.left, op.right):
        if fixed(one):
            apart(region, one, labels)
        else:
            found = region.labels(one)
            region.rw.require(
                found == labels[len(labels) - len(found) :] and len(found) == len(labels),
                f"{describe(op.out)} adds different tokens",
            )

    def emit(tokens: Tokens) -> Value | None:
        left, right = tokens.at(op.left), tokens.at(op.right)
        if left is None and right is None:
            return None
        if left is not None and right is not None:
            both = tokens.emit(op.replace(left=left, right=right))
        elif right is None:
            both = left
        else:
            both = -right if isinstance(op, ops.Sub) else right
        shape = tokens.shaped(labels, op.out.shape)
        if not isinstance(both, Value):
            both = tokens.emit(ops.Full(shape, both, op.out.dtype, op.out.meta.device))
        return both if same_shape(both.shape, shape) else both.expand(*shape)

    return Step(op, labels, emit)


@step.register(ops.Neg)
@step.register(ops.Copy)
@step.register(ops.Real)
@step.register(ops.Imag)
@step.register(ops.Conj)
def _(op: Any, region: Region) -> Step:
    return Step(op, region.labels(op.input), mapped(op, input=op.input))


@step.register(ops.Dropout)
def _(op: ops.Dropout, region: Region) -> Step:
    region.rw.require(not op.train, f"{describe(op.out)} drops at random")
    return Step(op, region.labels(op.input), lambda tokens: tokens.at(op.input))


@step.register(ops.Cast)
def _(op: ops.Cast, region: Region) -> Step:
    dtype = op.dtype
    region.rw.require(
        dtype.is_floating_point or dtype.is_complex, f"{describe(op.out)} rounds to integers"
    )
    return Step(op, region.labels(op.input), mapped(op, input=op.input))
