"""The index notation of each op: the output's sizes and its entry at an index.

`sizes(op)` and `entry(op, at, reader)` are tables by op view, as the affine laws are. An op without
an entry is an unknown function: equal operands and options give equal results, nothing more is
known. This table is what a proof trusts; tests/verify/test_notation.py holds it against torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from math import prod
from typing import Any

import sympy as sp

from graphopt.ir import ops
from graphopt.ir.value import Value
from graphopt.verify.proof.algebra import (
    Call,
    Delta,
    Expr,
    Inside,
    Space,
    element,
    factor,
    number,
    sym,
)

Sizes = tuple[Any, ...]
Index = tuple[Any, ...]


class ShapeError(ValueError):
    """Operands that do not fit; torch would raise."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Gives entries of operands: `at(value, index)`, for numbers too."""

    space: Space
    at: Callable[[Any, Index], Expr]

    def broadcast(self, operand: Any, at: Index) -> Expr:
        """An entry of an operand that broadcasts against an output with index `at`."""
        if not isinstance(operand, Value):
            return number(sym(operand))
        shape = operand.shape
        own = at[len(at) - len(shape) :]
        return self.at(operand, tuple(
            0 if literally(size, 1) else i for size, i in zip(shape, own, strict=True)
        ))  # fmt: skip

    def masked(self, value: Any, at: Index, axes: dict[int, Any], sure: Index = ()) -> Expr:
        """An entry of a value that is 0 where the index of one of `axes` is not inside its size;
        along axes in `sure` it always is.

        Written as sum_u [u = index] value[u], so that what computes the value sees an index in range.
        """
        reads, bound, masks = list(at), [], []
        for axis, size in axes.items():
            u = self.space.index(sym(size), "u")
            masks.append(factor(Delta(at[axis] - u, sym(size) if axis in sure else None)))
            reads[axis] = u
            bound.append(u)
        return self.space.sum(bound, self.space.product(*masks, self.at(value, tuple(reads))))

    def indices(self, shape: Sequence[Any], name: str) -> Index:
        return tuple(self.space.index(sym(size), name) for size in shape)


def literally(size: Any, value: int) -> bool:
    """Whether a size is this very number, whatever the symbols stand for."""
    return bool(sym(size) == value)


@singledispatch
def sizes(op: Any) -> Sizes:
    """The shape of the output; by default that of the input."""
    return tuple(op.input.shape)


@singledispatch
def entry(op: Any, at: Index, r: Reader) -> Expr:
    """The output's entry at an index."""
    return unknown(op, at, r)


def unknown(op: Any, at: Index, r: Reader) -> Expr:
    """An entry of a tensor that the operands and options determine, but nobody knows how."""

    def name(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(map(name, value)) + ")"
        if not isinstance(value, Value):
            return str(sym(value)) if isinstance(value, (int, float)) else str(value)
        generic = tuple(
            r.space.named(f"@{axis}:{sym(size)}", size) for axis, size in enumerate(value.shape)
        )
        return f"{r.space.normal(r.at(value, generic))}: [{', '.join(map(str, value.shape))}]"

    fields = [one.name for one in dataclasses.fields(op) if one.name != "out"]
    options = ", ".join(name(getattr(op, field)) for field in fields)
    return element(f"{type(op).__name__}({options})", at)


def broadcast_sizes(*operands: Any) -> Sizes:
    shapes = [one.shape for one in operands if isinstance(one, Value)]
    result: list[Any] = []
    for axis in range(-max(map(len, shapes), default=0), 0):
        size: Any = 1
        for shape in shapes:
            if -axis <= len(shape) and not literally(shape[axis], 1):
                if literally(size, 1):
                    size = shape[axis]
                elif size != shape[axis]:
                    raise ShapeError(f"sizes {size} and {shape[axis]} do not broadcast")
        result.append(size)
    return tuple(result)


def _same(a: Any, b: Any, what: str) -> None:
    if a != b:
        raise ShapeError(f"{what}: {a} and {b} differ")


# -- convolution and products -------------------------------------------------------------------


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
        padded, sure = {}, ()
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
    if op.bias is not None:
        if op.bias.ndim != 1:
            raise ShapeError(f"a bias of {op.bias.ndim} axes")
        _same(op.bias.shape[0], op.weight.shape[0], "the bias and the output features")
    return (*op.input.shape[:-1], op.weight.shape[0])


@entry.register
def _(op: ops.Linear, at: Index, r: Reader) -> Expr:
    (c,) = r.indices((op.weight.shape[1],), "c")
    read = r.space.product(r.at(op.weight, (at[-1], c)), r.at(op.input, (*at[:-1], c)))
    result = r.space.sum((c,), read)
    return result if op.bias is None else result + r.at(op.bias, at[-1:])


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
    product = _matmul(op.left, op.right, at, r) * sym(op.alpha)
    return product + r.broadcast(op.input, at) * sym(op.beta)


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


# -- normalization ------------------------------------------------------------------------------


@entry.register
def _(op: ops.BatchNorm, at: Index, r: Reader) -> Expr:
    if op.uses_batch_statistics:
        return unknown(op, at, r)
    assert op.running_mean is not None and op.running_var is not None
    channel = (at[1],)
    variance = r.at(op.running_var, channel) + number(op.eps)
    r.space.laws["var + eps > 0"] = None
    scale = r.space.power(variance, sp.Rational(-1, 2))
    if op.weight is not None:
        scale = r.space.product(scale, r.at(op.weight, channel))
    result = r.space.product(r.at(op.input, at) - r.at(op.running_mean, channel), scale)
    return result if op.bias is None else result + r.at(op.bias, channel)


def _normalize(op: Any, at: Index, r: Reader, over: Index, reads: Index, centre: bool) -> Expr:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps), statistics over the indices `over`."""
    s = r.space
    count = prod((s.range[v] for v in over), start=sp.Integer(1))
    value = r.at(op.input, at)
    if centre:
        value = value - s.sum(over, r.at(op.input, reads)) * (1 / count)
        apart = tuple(s.index(s.range[v], "m") for v in over)
        swap = dict(zip(over, apart, strict=True))
        other = tuple(sym(i).xreplace(swap) for i in reads)
        inner = r.at(op.input, reads) - s.sum(apart, r.at(op.input, other)) * (1 / count)
    else:
        inner = r.at(op.input, reads)
    square = s.sum(over, s.product(inner, inner)) * (1 / count)
    s.laws["mean square + eps > 0"] = None
    return s.product(value, s.power(square + number(op.eps), sp.Rational(-1, 2)))


@entry.register(ops.LayerNorm)
@entry.register(ops.RMSNorm)
def _(op: Any, at: Index, r: Reader) -> Expr:
    if op.eps is None:
        return unknown(op, at, r)
    last = len(op.normalized_shape)
    over = r.indices(op.input.shape[-last:], "m")
    reads = (*at[: len(at) - last], *over)
    result = _normalize(op, at, r, over, reads, isinstance(op, ops.LayerNorm))
    if op.weight is not None:
        result = r.space.product(result, r.at(op.weight, at[-last:]))
    bias = getattr(op, "bias", None)
    return result if bias is None else result + r.at(bias, at[-last:])


@entry.register
def _(op: ops.GroupNorm, at: Index, r: Reader) -> Expr:
    per = op.input.shape[1] // op.num_groups
    group, _ = r.space.divmod(at[1], per)
    (c,) = r.indices((per,), "m")
    rest = r.indices(op.input.shape[2:], "m")
    over = (c, *rest)
    result = _normalize(op, at, r, over, (at[0], group * per + c, *rest), True)
    if op.weight is not None:
        result = r.space.product(result, r.at(op.weight, (at[1],)))
    return result if op.bias is None else result + r.at(op.bias, (at[1],))


@entry.register
def _(op: ops.Softmax, at: Index, r: Reader) -> Expr:
    dim = op.dim % op.input.ndim
    (j,) = r.indices((op.input.shape[dim],), "j")

    def exponential(i: Any) -> Expr:
        return r.space.call("exp", (), (r.at(op.input, (*at[:dim], i, *at[dim + 1 :])),))

    total = r.space.sum((j,), exponential(j))
    return r.space.product(exponential(at[dim]), r.space.power(total, -1))


@entry.register
def _(op: ops.Dropout, at: Index, r: Reader) -> Expr:
    """In training, a mask of its own for every call."""
    return element(f"Dropout {op.out}", at) if op.train else r.at(op.input, at)


# -- elementwise --------------------------------------------------------------------------------


@sizes.register
def _(op: ops.Binary) -> Sizes:
    return broadcast_sizes(op.left, op.right)


@sizes.register
def _(op: ops.Compare) -> Sizes:
    return broadcast_sizes(op.left, op.right)


@sizes.register
def _(op: ops.Where) -> Sizes:
    return broadcast_sizes(op.condition, op.left, op.right)


@entry.register
def _(op: ops.Add, at: Index, r: Reader) -> Expr:
    return r.broadcast(op.left, at) + r.broadcast(op.right, at)


@entry.register
def _(op: ops.Sub, at: Index, r: Reader) -> Expr:
    return r.broadcast(op.left, at) - r.broadcast(op.right, at)


@entry.register
def _(op: ops.Mul, at: Index, r: Reader) -> Expr:
    return r.space.product(r.broadcast(op.left, at), r.broadcast(op.right, at))


@entry.register
def _(op: ops.Div, at: Index, r: Reader) -> Expr:
    inverse = r.space.power(r.broadcast(op.right, at), -1)
    return r.space.product(r.broadcast(op.left, at), inverse)


@entry.register
def _(op: ops.Pow, at: Index, r: Reader) -> Expr:
    exponent = sp.nsimplify(sym(op.exponent), rational=True)
    if not exponent.is_Rational:
        return r.space.call("pow", (exponent,), (r.at(op.input, at),))
    return r.space.power(r.at(op.input, at), exponent)


@entry.register
def _(op: ops.Neg, at: Index, r: Reader) -> Expr:
    return -r.at(op.input, at)


@entry.register
def _(op: ops.Rsqrt, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), sp.Rational(-1, 2))


@entry.register
def _(op: ops.Sqrt, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), sp.Rational(1, 2))


@entry.register
def _(op: ops.Reciprocal, at: Index, r: Reader) -> Expr:
    return r.space.power(r.at(op.input, at), -1)


@entry.register
def _(op: ops.Activation, at: Index, r: Reader) -> Expr:
    name = type(op).__name__.lower()
    fields = [one.name for one in dataclasses.fields(op) if one.name not in ("input", "out")]
    options = tuple(getattr(op, one) for one in fields)
    inner = r.at(op.input, at)
    if any(isinstance(one, Value) for one in options):
        return unknown(op, at, r)
    if op.idempotent:
        form = r.space.normal(inner)
        if len(form.terms) == 1 and form.terms[0].coefficient == 1 and not form.terms[0].bound:
            factors = form.terms[0].factors
            if len(factors) == 1 and factors[0][1] == 1:
                one = factors[0][0]
                if isinstance(one, Call) and (one.name, one.parameters) == (name, _plain(options)):
                    r.space.laws[f"{name}({name}(x)) = {name}(x)"] = None
                    return form
    return r.space.call(name, _plain(options), (inner,), op.positively_homogeneous)


def _plain(options: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(sym(one) if isinstance(one, (int, float)) else one for one in options)


@entry.register
def _(op: ops.Compare, at: Index, r: Reader) -> Expr:
    operands = (r.broadcast(op.left, at), r.broadcast(op.right, at))
    return r.space.call(op.relation, (), operands, idempotent=True)


@entry.register
def _(op: ops.Where, at: Index, r: Reader) -> Expr:
    s, condition = r.space, r.broadcast(op.condition, at)
    chosen = s.product(condition, r.broadcast(op.left, at))
    return chosen + s.product(number(1) - condition, r.broadcast(op.right, at))


@entry.register(ops.Copy)
@entry.register(ops.Detach)
def _(op: Any, at: Index, r: Reader) -> Expr:
    return r.at(op.input, at)


@entry.register
def _(op: ops.Cast, at: Index, r: Reader) -> Expr:
    """A cast between floating dtypes rounds, which a proof over the reals does not see."""
    if op.dtype.is_floating_point and op.input.dtype.is_floating_point:
        return r.at(op.input, at)
    return unknown(op, at, r)


@sizes.register
def _(op: ops.Full) -> Sizes:
    return tuple(op.size)


@entry.register
def _(op: ops.Full, at: Index, r: Reader) -> Expr:
    return number(sym(op.fill_value))


@sizes.register
def _(op: ops.Eye) -> Sizes:
    return (op.n, op.n if op.m is None else op.m)


@entry.register
def _(op: ops.Eye, at: Index, r: Reader) -> Expr:
    return factor(Delta(at[0] - at[1]))


# -- data movement ------------------------------------------------------------------------------


@sizes.register
def _(op: ops.Reshape) -> Sizes:
    known = prod(size for size in op.shape if not literally(size, -1))
    total = prod(op.input.shape)
    if all(not literally(size, -1) for size in op.shape):
        _same(known, total, "elements of a reshape")
    return tuple(total // known if literally(size, -1) else size for size in op.shape)


@entry.register
def _(op: ops.Reshape, at: Index, r: Reader) -> Expr:
    return r.at(op.input, unravel(r.space, ravel(at, sizes(op)), op.input.shape))


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
    return result + (number(1) - inside) * sym(op.value)


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


# -- sums and averages --------------------------------------------------------------------------


def _axes(dims: Sequence[int], ndim: int) -> tuple[int, ...]:
    if any(not -ndim <= dim < ndim for dim in dims):
        raise ShapeError(f"dims {list(dims)} of a tensor of {ndim} axes")
    return tuple(dim % ndim for dim in dims)


@sizes.register
def _(op: ops.Reduce) -> Sizes:
    dims = _axes(op.dims, op.input.ndim)
    return tuple(
        1 if axis in dims else size
        for axis, size in enumerate(op.input.shape) if op.keepdim or axis not in dims
    )  # fmt: skip


@entry.register
def _(op: ops.Reduce, at: Index, r: Reader) -> Expr:
    dims = _axes(op.dims, op.input.ndim)
    over = r.indices([op.input.shape[dim] for dim in dims], "j")
    summed = dict(zip(dims, over, strict=True))
    kept = iter(at)
    reads = []
    for axis in range(op.input.ndim):
        if axis in summed:
            reads.append(summed[axis])
            if op.keepdim:
                next(kept)
        else:
            reads.append(next(kept))
    result = r.space.sum(over, r.at(op.input, tuple(reads)))
    if isinstance(op, ops.Mean):
        count = prod((sym(op.input.shape[dim]) for dim in dims), start=sp.Integer(1))
        result = result * (1 / count)
    return result


@entry.register
def _(op: ops.CumSum, at: Index, r: Reader) -> Expr:
    dim = op.dim % len(at)
    size = op.input.shape[dim]
    (j,) = r.indices((size,), "j")
    until = factor(Inside(at[dim] - j, sym(size)))
    read = r.at(op.input, (*at[:dim], j, *at[dim + 1 :]))
    return r.space.sum((j,), r.space.product(until, read))


def _spread(sizes: Any, rank: int) -> Sizes:
    found = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return found * rank if len(found) == 1 else found


def _window(op: Any) -> tuple[Sizes, Sizes, Sizes]:
    name = next(name for name in ("avg_pool", "max_pool") if name in str(op.targets[0]))
    rank = op.input.ndim - 2 if len(op.kernel_size) == 1 else len(op.kernel_size)
    if op.out is not None and op.out.node.op == "call_function" and name in str(op.out.node.target):
        rank = int(str(op.out.node.target).partition(name)[2][0])
    kernel = _spread(op.kernel_size, rank)
    return kernel, _spread(op.stride or kernel, rank), _spread(op.padding, rank)


@sizes.register(ops.AvgPool)
@sizes.register(ops.MaxPool)
def _(op: Any) -> Sizes:
    if op.ceil_mode:
        raise ShapeError("ceil_mode has no index notation")
    kernel, stride, padding = _window(op)
    lead = op.input.ndim - len(kernel)
    dilation = _spread(getattr(op, "dilation", 1), len(kernel))
    space = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            op.input.shape[lead:], kernel, stride, padding, dilation, strict=True
        )
    ]
    return (*op.input.shape[:lead], *space)


@entry.register
def _(op: ops.AvgPool, at: Index, r: Reader) -> Expr:
    kernel, stride, padding = _window(op)
    lead = op.input.ndim - len(kernel)
    image = op.input.shape[lead:]

    def places(k: Index) -> Index:
        return tuple(
            sym(s) * p + j - sym(a)
            for p, j, s, a in zip(at[lead:], k, stride, padding, strict=True)
        )

    def masks(source: Index) -> list[Expr]:
        return [
            factor(Inside(i, sym(size)))
            for i, size, a in zip(source, image, padding, strict=True) if not literally(a, 0)
        ]  # fmt: skip

    k = r.indices(kernel, "k")
    source = places(k)
    padded = {lead + i: size for i, size in enumerate(image)}
    sure = tuple(lead + i for i, a in enumerate(padding) if literally(a, 0))
    total = r.space.sum(k, r.masked(op.input, (*at[:lead], *source), padded, sure))
    if op.divisor_override is not None:
        return total * (1 / sym(op.divisor_override))
    if op.count_include_pad:
        return total * (1 / prod(map(sym, kernel), start=sp.Integer(1)))
    j = r.indices(kernel, "k")
    count = r.space.sum(j, r.space.product(*masks(places(j))))
    return r.space.product(total, r.space.power(count, -1))


@sizes.register
def _(op: ops.AdaptiveAvgPool) -> Sizes:
    return (*op.input.shape[: op.input.ndim - op.rank], *op.output_size)


@sizes.register
def _(op: ops.Upsample) -> Sizes:
    if op.output_size is not None:
        return (*op.input.shape[:2], *op.output_size)
    scaled = [
        n * int(k) if float(k).is_integer() else math.floor(n * k)
        for n, k in zip(op.input.shape[2:], op.scale_factors, strict=True)
    ]
    return (*op.input.shape[:2], *scaled)


@entry.register(ops.AdaptiveAvgPool)
@entry.register(ops.Upsample)
def _(op: Any, at: Index, r: Reader) -> Expr:
    """Separate unknown weights along each axis, which add up to 1."""
    lead = op.input.ndim - op.rank
    image = op.input.shape[lead:]
    over = r.indices(image, "j")
    options = (getattr(op, name, None) for name in ("kind", "align_corners", "scale_factors"))
    kind = " ".join(map(str, (type(op).__name__, *options)))
    weights = [
        element(f"{kind}:{sym(size)}->{sym(to)}", (p, j), sym(size))
        for size, to, p, j in zip(image, sizes(op)[lead:], at[lead:], over, strict=True)
    ]
    return r.space.sum(over, r.space.product(*weights, r.at(op.input, (*at[:lead], *over))))
