"""A linear region turned around: from what its outputs weigh to what its inputs weigh.

    y = f(x) linear    =>    <r, f(x)> = <t(r), x>,    and W = t(E) for the tokens E of the identity

Every op hands what multiplies its output on to its operands: a product with M hands on the product with
its transpose, a sum over an axis repeats, a repetition sums, data movement goes the other way. Where a
region starts with the cheap parts and ends with the product with a dense matrix (a rotation of blocks in
front of a linear map), t(E) is the matrix itself, carried through the cheap parts; f(E) would multiply
the matrix with them once more. This is reverse mode differentiation of a linear function.
"""

from __future__ import annotations

from functools import singledispatch
from math import prod
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.affine import fixed
from graphopt.ir.ops.base import hint
from graphopt.ir.tokens import scaled, shaped, times
from graphopt.ir.value import Value

if TYPE_CHECKING:
    from graphopt.ir.linearity import Region


class Transpose:
    """What multiplies each value of a region in each of the `count` features of its end."""

    def __init__(self, region: Region, end: Value, count: int) -> None:
        self.region, self.count = region, count
        eye = ops.Eye(count, count, end.dtype, end.meta.device)
        self.given: dict[Any, list[Value]] = {
            end.node: [region.rw.emit(eye).reshape(*self.sizes(end))]
        }

    def weight(self) -> Value:
        """`W` `[out, in]`; declines where an op cannot be turned around."""
        region = self.region
        for node, step in reversed(list(region.steps.items())):
            if node in self.given:
                _turn(step.op, self)
        return self.dense(region.start).reshape(self.count, region.width())

    def dense(self, value: Value) -> Value:
        """What multiplies a value, `[count, ...]` laid out as its tokens are."""
        terms = self.given.get(value.node, [])
        self.region.rw.match(terms)
        total = terms[0]
        for one in terms[1:]:
            total = total + one
        self.given[value.node] = [total]
        return total

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """The shape of what multiplies a value."""
        return shaped(self.region.labels(value), value.shape, self.count)

    def give(self, value: Any, term: Value) -> None:
        """Add to what multiplies a value. Along axes that were repeated it is summed."""
        if fixed(value):
            return
        sizes = self.sizes(value)
        extra = term.ndim - len(sizes)
        term = term.sum(tuple(range(extra)))
        term = term.sum(
            [i for i, (a, b) in enumerate(zip(term.shape, sizes, strict=True)) if a != b == 1],
            keepdim=True,
        ).to(value.dtype)
        self.given.setdefault(value.node, []).append(term)

    def emit(self, op: ops.Op) -> Value:
        return self.region.rw.emit(op)


PRODUCTS = (ops.Linear, ops.Matmul, ops.Addmm, ops.Einsum)


def cheaper(region: Region, end: Value, width: int, size: int) -> bool:
    """Whether turning the region around takes no more FLOPs than applying it to the identity.

    Of two equal ways, this one has the rows of the weight for its rows.
    """
    forward = backward = 0.0
    ends, stack = set(), [end]
    while stack:  # the maps whose output is only added to others
        op = stack.pop().op
        if isinstance(op, PRODUCTS):
            ends.add(op.out.node)
        elif isinstance(op, (ops.Add, ops.Sub)):
            terms = (op.left, op.right)[: 1 if isinstance(op, ops.Sub) else 2]
            stack += [one for one in terms if isinstance(one, Value)]
    for node, step in region.steps.items():
        if not isinstance(step.op, PRODUCTS):
            continue
        tokens = prod(
            hint(length) // one.inside
            for one, length in zip(step.labels, step.op.out.shape, strict=True)
            if one.tokens
        )
        flops = step.op.flops / max(tokens, 1)
        first = isinstance(step.op, ops.Linear) and step.op.input == region.start
        forward += 0.0 if first and region.inside == 1 else width * flops
        backward += 0.0 if node in ends else size * flops
    return backward <= forward


@singledispatch
def _turn(op: Any, to: Transpose) -> None:
    to.region.rw.decline(f"{type(op).__name__} is not turned around", near=False)


@_turn.register
def _(op: ops.Linear, to: Transpose) -> None:
    to.give(op.input, times(to.dense(op.out), op.weight))


@_turn.register
def _(op: ops.Matmul, to: Transpose) -> None:
    if not fixed(op.right):
        to.give(op.right, _flipped(op.left) @ to.dense(op.out))
    else:
        to.give(op.left, times(to.dense(op.out), _flipped(op.right)))


@_turn.register
def _(op: ops.Addmm, to: Transpose) -> None:
    to.give(op.left, scaled(times(to.dense(op.out), _flipped(op.right)), op.alpha))


def _flipped(matrix: Value) -> Value:
    *rest, a, b = range(matrix.ndim)
    return matrix.permute(*rest, b, a)


@_turn.register
def _(op: ops.Einsum, to: Transpose) -> None:
    terms, _, output = op.equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    at = next(i for i, one in enumerate(op.tensors) if not fixed(one))
    others = {one for i, term in enumerate(letters) if i != at for one in term}
    to.region.rw.match(set(letters[at]) <= others | set(output))  # none is summed alone
    turned = ",".join([output, *(one for i, one in enumerate(letters) if i != at)])
    tensors = (to.dense(op.out), *(one for i, one in enumerate(op.tensors) if i != at))
    to.give(op.tensors[at], to.emit(ops.Einsum(f"{turned}->{letters[at]}", tensors)))


@_turn.register(ops.Mul)
@_turn.register(ops.Div)
def _(op: Any, to: Transpose) -> None:
    value, factor = (op.right, op.left) if fixed(op.left) else (op.left, op.right)
    to.give(value, to.emit(type(op)(to.dense(op.out), factor)))


@_turn.register(ops.Add)
@_turn.register(ops.Sub)
def _(op: Any, to: Transpose) -> None:
    term = to.dense(op.out)
    to.give(op.left, term)
    to.give(op.right, -term if isinstance(op, ops.Sub) else term)


@_turn.register
def _(op: ops.Neg, to: Transpose) -> None:
    to.give(op.input, -to.dense(op.out))


@_turn.register(ops.Copy)
@_turn.register(ops.Cast)
@_turn.register(ops.Dropout)
def _(op: Any, to: Transpose) -> None:
    to.give(op.input, to.dense(op.out))


@_turn.register
def _(op: ops.Expand, to: Transpose) -> None:
    to.give(op.input, to.dense(op.out))


@_turn.register
def _(op: ops.Permute, to: Transpose) -> None:
    back = sorted(range(len(op.dims)), key=lambda axis: op.dims[axis])
    to.give(op.input, to.dense(op.out).permute(*back))


@_turn.register
def _(op: ops.Reshape, to: Transpose) -> None:
    to.give(op.input, to.dense(op.out).reshape(*to.sizes(op.input)))


@_turn.register(ops.Sum)
@_turn.register(ops.Mean)
def _(op: Any, to: Transpose) -> None:
    sizes, dims = to.sizes(op.input), {dim % op.input.ndim for dim in op.dims}
    kept = [1 if axis in dims else size for axis, size in enumerate(sizes)]
    term = to.dense(op.out).reshape(*kept)
    if isinstance(op, ops.Mean):
        term = term / prod(sizes[axis] for axis in dims)
    to.give(op.input, term.expand(*sizes))


@_turn.register
def _(op: ops.Slice, to: Transpose) -> None:
    whole, part = op.input.shape[op.dim], op.out.shape[op.dim]
    to.region.rw.match(op.step == 1 and isinstance(whole, int) and isinstance(op.start, int | None))
    start = slice(op.start, None).indices(whole)[0]
    _placed(op.input, to.dense(op.out), op.dim, start, whole - start - part, to)


@_turn.register
def _(op: ops.Select, to: Transpose) -> None:
    dim, whole = op.dim % op.input.ndim, op.input.shape[op.dim]
    sizes = list(to.sizes(op.input))
    sizes[dim] = 1
    at = op.index % whole
    _placed(op.input, to.dense(op.out).reshape(*sizes), dim, at, whole - at - 1, to)


def _placed(value: Value, term: Value, dim: int, before: int, after: int, to: Transpose) -> None:
    """What multiplies a part of a value: the rest of it does not matter."""
    inner = [0, 0] * (value.ndim - 1 - dim)
    to.give(value, to.emit(ops.Pad(term, (*inner, before, after))))


@_turn.register
def _(op: ops.Pad, to: Transpose) -> None:
    term = to.dense(op.out)
    for i, (before, after) in enumerate(zip(op.pad[::2], op.pad[1::2], strict=True)):
        dim = op.out.ndim - 1 - i
        to.region.rw.match(before >= 0 and after >= 0)  # else it cuts
        if before or after:
            term = to.emit(ops.Slice(term, dim, before, before + to.sizes(op.input)[dim]))
    to.give(op.input, term)


@_turn.register(ops.Cat)
@_turn.register(ops.Stack)
def _(op: Any, to: Transpose) -> None:
    term, at, dim = to.dense(op.out), 0, op.dim % op.out.ndim
    for one in op.tensors:
        length = 1 if isinstance(op, ops.Stack) else one.shape[dim]
        if not fixed(one):
            part = to.emit(ops.Slice(term, dim, at, at + length))
            to.give(one, part.reshape(*to.sizes(one)))
        at += length


@_turn.register
def _(op: ops.Flip, to: Transpose) -> None:
    to.give(op.input, to.emit(ops.Flip(to.dense(op.out), op.dims)))


@_turn.register
def _(op: ops.Roll, to: Transpose) -> None:
    back = ops.Roll(to.dense(op.out), tuple(-one for one in op.shifts), op.dims)
    to.give(op.input, to.emit(back))
