"""What every affine op does to tokens: which it keeps apart, and what it makes of others.

A rule, `step`, declines where an op is not affine in what depends on the start of a region or mixes its
tokens; else it returns the labels of the output, and how the op is applied to other tokens.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from functools import singledispatch
from math import prod
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.affine import fixed, same, same_shape
from graphopt.ir.ops.base import hint
from graphopt.ir.rewrite import describe
from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.linearity import Region

# How a value of the region looks for other tokens: from what its operands look like. None is zero.
Emit = Callable[["Tokens"], Value | None]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What an axis runs over: some axes of the start, and for each of their entries `inside` entries
    of a token. Without tokens, the axis lies inside of one."""

    tokens: tuple[int, ...] = ()
    inside: int = 1


Labels = tuple[Axis, ...]
INSIDE = Axis()


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a region: the labels of its output, and how to apply it to other tokens."""

    op: ops.Op
    labels: Labels
    emit: Emit


@dataclasses.dataclass
class Tokens:
    """The values of a region for `count` other tokens: those of the identity, without what is added
    on the way; or, with it, the token 0, or all rows of a table."""

    region: Region
    count: int
    identity: bool
    found: dict[Any, Value | None] = dataclasses.field(default_factory=dict)

    def at(self, value: Any) -> Any:
        """A value for these tokens, None for zero."""
        if not isinstance(value, Value) or value.is_constant:
            return None if self.identity else value
        if value == self.region.start:
            return self.dense(value)
        if value.node not in self.found:
            self.found[value.node] = self.region.steps[value.node].emit(self)
        return self.found[value.node]

    def dense(self, value: Value) -> Value | None:
        """As `at`, with the identity written out."""
        if value != self.region.start:
            return self.at(value)  # type: ignore[no-any-return]
        if not self.identity:
            return None
        eye = ops.Eye(self.count, self.count, value.dtype, value.meta.device)
        return self.emit(eye).reshape(*self.sizes(value))

    def is_identity(self, value: Value) -> bool:
        return self.identity and value == self.region.start and self.region.inside == 1

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """The shape of a value for these tokens."""
        return self.shaped(self.region.labels(value), value.shape)

    def shaped(self, labels: Labels, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return shaped(labels, shape, self.count)

    def emit(self, op: ops.Op) -> Value:
        return self.region.rw.emit(op)


def shaped(labels: Labels, shape: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """A shape with `count` tokens in the place of those there are."""
    return tuple(
        one.inside * (count if 0 in one.tokens else 1) if one.tokens else size
        for one, size in zip(labels, shape, strict=True)
    )


# -- the ops ------------------------------------------------------------------------------------


@singledispatch
def step(op: Any, region: Region) -> Step:
    """The step of a region that an op is.

    Raises:
        Declined: if it is not affine, or mixes tokens.
    """
    raise NotImplementedError


def _inside(region: Region, value: Value, *axes: int) -> Labels:
    """The labels of a value whose `axes` an op mixes: they must lie inside a token."""
    labels = region.labels(value)
    for axis in axes:
        region.rw.require(
            not labels[axis].tokens,
            f"what reads {describe(value)} mixes its tokens with each other",
        )
    return labels


def _apart(region: Region, constant: Any, labels: Labels, without: int = 0) -> None:
    """A constant must be the same for all tokens. `labels` are those of the value that it meets;
    `without` so many axes at its end, which are no axes of the value."""
    if not isinstance(constant, Value):
        return
    sizes = constant.shape[: constant.ndim - without]
    for one, size in zip(reversed(labels), reversed(sizes), strict=False):
        region.rw.require(
            not one.tokens or same(size, 1), f"{describe(constant)} differs from token to token"
        )


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
    labels = _inside(region, op.input, op.input.ndim - 1)
    region.rw.require(
        fixed(op.weight) and fixed(op.bias), f"the weight of {describe(op.out)} is computed"
    )

    def emit(tokens: Tokens) -> Value | None:
        shape = tokens.shaped(labels, op.out.shape)
        if tokens.is_identity(op.input):
            return op.weight.permute(1, 0).reshape(*shape)
        x = tokens.at(op.input)
        bias = None if op.bias is None else tokens.at(op.bias)
        if x is None:
            return None if bias is None else bias.expand(*shape)  # type: ignore[no-any-return]
        return tokens.emit(ops.Linear(x, op.weight, bias))

    return Step(op, labels, emit)


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
        rows = _inside(region, op.left, op.left.ndim - 1)
        _apart(region, right, rows[:-2], without=2)
        missing = max(0, right.ndim - op.left.ndim)
        labels: Labels = (*(INSIDE,) * missing, *rows[:-1], INSIDE)
        return Step(op, labels, _mapped(op, left=op.left))
    region.rw.require(
        fixed(op.left), f"{describe(op.out)} multiplies what depends on its input twice"
    )
    region.rw.match(op.left.ndim >= 2 and op.right.ndim >= 2)
    columns = _inside(region, op.right, op.right.ndim - 2)
    _apart(region, op.left, columns[:-2], without=2)
    missing = max(0, op.left.ndim - op.right.ndim)
    labels = (*(INSIDE,) * missing, *columns[:-2], INSIDE, columns[-1])
    return Step(op, labels, _mapped(op, right=op.right))


def _mapped(op: Any, **operands: Value) -> Emit:
    """An op that is linear in one operand, applied to other tokens."""
    ((name, value),) = operands.items()

    def emit(tokens: Tokens) -> Value | None:
        x = tokens.at(value)
        return None if x is None else tokens.emit(op.replace(**{name: x}))

    return emit


@step.register(ops.Addmm)
def _(op: ops.Addmm, region: Region) -> Step:
    region.rw.require(
        fixed(op.right) and fixed(op.input) and op.left.ndim == 2,
        f"an operand of {describe(op.out)} is computed",
    )
    labels = _inside(region, op.left, 1)
    _apart(region, op.input, labels)

    def emit(tokens: Tokens) -> Value | None:
        x, bias = tokens.at(op.left), tokens.at(op.input)
        product = None if x is None else tokens.emit(ops.Matmul(x, op.right)) * op.alpha
        if bias is None:
            return product
        bias = (bias * op.beta).expand(*tokens.shaped(labels, op.out.shape))
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
    _apart(region, factor, labels)
    labels = (*(INSIDE,) * (op.out.ndim - len(labels)), *labels)
    name = "left" if op.left is value else "right"
    return Step(op, labels, _mapped(op, **{name: value}))


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
            _apart(region, one, labels)
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
    return Step(op, region.labels(op.input), _mapped(op, input=op.input))


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
    return Step(op, region.labels(op.input), _mapped(op, input=op.input))


@step.register(ops.Permute)
def _(op: ops.Permute, region: Region) -> Step:
    labels = region.labels(op.input)
    return Step(op, tuple(labels[dim] for dim in op.dims), _mapped(op, input=op.input))


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
    labels = _inside(region, op.input, *(dim % ndim for dim in dims))
    return Step(op, labels, _mapped(op, input=op.input))


@step.register(ops.Select)
def _(op: ops.Select, region: Region) -> Step:
    dim = op.dim % op.input.ndim
    labels = _inside(region, op.input, dim)
    return Step(op, labels[:dim] + labels[dim + 1 :], _mapped(op, input=op.input))


@step.register(ops.Index)
def _(op: ops.Index, region: Region) -> Step:
    region.rw.require(fixed(op.index), f"{describe(op.out)} depends on an index that is computed")
    labels = _inside(region, op.input, op.dim)
    picked = (INSIDE,) * op.index.ndim
    return Step(
        op, (*labels[: op.dim], *picked, *labels[op.dim + 1 :]), _mapped(op, input=op.input)
    )


@step.register(ops.Sum)
@step.register(ops.Mean)
def _(op: Any, region: Region) -> Step:
    labels = _inside(region, op.input, *op.dims)
    if not op.keepdim:
        labels = tuple(one for axis, one in enumerate(labels) if axis not in op.dims)
    return Step(op, labels, _mapped(op, input=op.input))


@step.register(ops.Pad)
def _(op: ops.Pad, region: Region) -> Step:
    region.rw.require(
        op.mode != "constant" or not op.value, f"{describe(op.out)} pads with a constant"
    )
    labels = _inside(region, op.input, *op.axes)
    return Step(op, labels, _mapped(op, input=op.input))


@step.register(ops.Repeat)
def _(op: ops.Repeat, region: Region) -> Step:
    labels = region.labels(op.input)
    labels = (*(INSIDE,) * (len(op.repeats) - len(labels)), *labels)
    region.rw.require(
        all(not one.tokens or count == 1 for one, count in zip(labels, op.repeats, strict=True)),
        f"{describe(op.out)} repeats tokens",
    )
    return Step(op, labels, _mapped(op, input=op.input))


@step.register(ops.Cat)
@step.register(ops.Stack)
def _(op: Any, region: Region) -> Step:
    new = isinstance(op, ops.Stack)
    dim = op.dim % op.out.ndim
    varying = [one for one in op.tensors if not fixed(one)]
    labels = region.labels(varying[0])
    for one in op.tensors:
        if fixed(one):
            _apart(region, one, labels)
        else:
            region.rw.require(
                region.labels(one) == labels, f"{describe(op.out)} joins different tokens"
            )
    if not new:
        _inside(region, varying[0], dim)

    def emit(tokens: Tokens) -> Value | None:
        found = []
        for one in op.tensors:
            shape = tokens.shaped(labels, one.shape)
            x = tokens.at(one)
            if x is None:
                x = tokens.emit(ops.Full(shape, 0.0, one.dtype, one.meta.device))
            found.append(x if same_shape(x.shape, shape) else x.expand(*shape))
        return tokens.emit(op.replace(tensors=tuple(found)))

    return Step(op, (*labels[:dim], INSIDE, *labels[dim:]) if new else labels, emit)


AFFINE = tuple(cls for cls in step.registry if cls is not object)
