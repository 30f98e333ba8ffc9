"""A general op of each class: the left-hand sides that proofs and tests are about.

`general(cls)(pattern, cls, shape)` makes an op whose output has `shape` (any, for None), with new
leaves for its operands and new sizes and numbers for its options. What cannot be general is a choice:
the rank, which operands are given, literals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from graphopt.ir import ops
from graphopt.ir.ops.base import Op

if TYPE_CHECKING:
    from graphopt.verify.proof.pattern import Pattern

Shape = Any
Make = Callable[["Pattern", Any, Shape], Op]
_TABLE: dict[type[Op], Make] = {}
AXES = ("n", "c", "h", "w", "d")


def general(cls: type[Op]) -> Make:
    """How to make a general `cls`.

    Raises:
        KeyError: if nobody has said how.
    """
    return _TABLE[cls]


@cache
def candidates(cls: type[Op]) -> tuple[type[Op], ...]:
    """The op classes with an entry that are a `cls`."""
    return tuple(one for one in _TABLE if issubclass(one, cls))


def entry(*classes: type[Op]) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        for cls in classes:
            _TABLE[cls] = make
        candidates.cache_clear()
        return make

    return enter


def _shape(p: Pattern, shape: Shape, ranks: tuple[int, ...] = (2, 3)) -> Shape:
    if shape is not None:
        return shape
    rank = p.choose(ranks, "rank")
    p.brief = rank > 3  # what may be left out was left out at the lower ranks
    return tuple(p.size(name) for name in AXES[:rank])


# -- convolution and products -------------------------------------------------------------------


@entry(ops.Conv)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    if shape is None:
        rank = p.choose((1, 2), "spatial axes")
        p.brief = rank > 1
        batched = p.brief or p.choose((True, False), "batched")
        names = ("n", "c", "h", "w") if batched else ("c", "h", "w")
        shape = tuple(p.size(name) for name in names[: rank + 1 + batched])
    else:
        options = [lead for lead in (1, 0) if 1 <= len(shape) - 1 - lead <= 3]
        p.feasible(options)
        batched = p.choose([bool(lead) for lead in options], "batched")
        rank = len(shape) - 1 - batched
    *batch, channels = shape[: batched + 1]
    groups, per_out = p.factors(channels)
    per_in = p.size("i")
    kernel = tuple(p.size("k") for _ in range(rank))
    transposed = p.choose((False, True), "transposed")
    stride = tuple(p.size("s") for _ in range(rank))
    dilation = tuple(p.size("d") for _ in range(rank))
    bias = p.optional(lambda: p.vector(channels, "b"))
    out = shape[batched + 1 :]
    if transposed:
        padding = tuple(p.size("a", 0) for _ in range(rank))
        image, extra = zip(*(
            p.spread(*one) for one in zip(out, kernel, stride, padding, dilation, strict=True)
        ), strict=True)  # fmt: skip
        weight = p.leaf((groups * per_in, per_out, *kernel), "W", constant=True)
        x = p.leaf((*batch, groups * per_in, *image))
        return cls(x, weight, bias, stride, padding, dilation, groups, True, extra)  # type: ignore[no-any-return]
    padding = tuple(p.size("a", 0) for _ in range(rank))
    image = tuple(
        p.covered(*one) for one in zip(out, kernel, stride, padding, dilation, strict=True)
    )
    weight = p.leaf((channels, per_in, *kernel), "W", constant=True)
    x = p.leaf((*batch, groups * per_in, *image))
    return cls(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


@entry(ops.Linear)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2, 3))
    features = p.size("i")
    weight = p.leaf((shape[-1], features), "W", constant=True)
    bias = p.optional(lambda: p.vector(shape[-1], "b"))
    return cls(p.leaf((*shape[:-1], features)), weight, bias)  # type: ignore[no-any-return]


@entry(ops.Matmul)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2, 3))
    p.feasible(len(shape) >= 2)
    inner = p.size("i")
    lead = shape[:-2] if p.choose((False, True), "batched right operand") else ()
    return cls(p.leaf((*shape[:-1], inner)), p.leaf((*lead, inner, shape[-1]), "y"))  # type: ignore[no-any-return]


@entry(ops.Addmm)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2,))
    p.feasible(len(shape) == 2)
    inner = p.size("i")
    term = p.leaf(shape[1:] if p.choose((True, False), "vector") else shape, "b")
    left, right = p.leaf((shape[0], inner)), p.leaf((inner, shape[1]), "y")
    if p.choose((True, False), "unscaled"):
        return cls(term, left, right)  # type: ignore[no-any-return]
    return cls(term, left, right, p.number("beta"), p.number("alpha"))  # type: ignore[no-any-return]


@entry(ops.Attention)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (3, 4))
    p.feasible(len(shape) >= 3)
    *lead, queries, width = shape
    keys, features = p.size("m"), p.size("d")
    query, key = p.leaf((*lead, queries, features), "q"), p.leaf((*lead, keys, features), "k")
    mask = p.leaf((queries, keys), "mask") if p.choose((False, True), "masked") else None
    scale = p.number("scale", positive=True)
    return cls(query, key, p.leaf((*lead, keys, width), "v"), mask, 0.0, False, scale)  # type: ignore[no-any-return]


# -- normalization ------------------------------------------------------------------------------


@entry(ops.BatchNorm)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2, 3, 4))
    p.feasible(len(shape) >= 2)
    x, c = p.leaf(shape), shape[1]
    training = p.flag("training")
    statistics = p.choose((True, False), "running statistics")
    weight = p.optional(lambda: p.vector(c, "gamma"))
    bias = p.optional(lambda: p.vector(c, "beta"))
    mean, var = (p.vector(c, "mean"), p.vector(c, "var")) if statistics else (None, None)
    return cls(x, weight, bias, mean, var, training, 0.1, p.number("eps", positive=True))  # type: ignore[no-any-return]


@entry(ops.LayerNorm, ops.RMSNorm)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2, 3))
    axes = p.choose(range(1, len(shape)), "normalized axes")
    last = shape[len(shape) - axes :]
    weight = p.optional(lambda: p.leaf(last, "gamma", constant=True))
    eps = p.number("eps", positive=True)
    if cls is ops.RMSNorm:
        return cls(p.leaf(shape), last, weight, eps)  # type: ignore[no-any-return]
    bias = p.optional(lambda: p.leaf(last, "beta", constant=True))
    return cls(p.leaf(shape), last, weight, bias, eps)  # type: ignore[no-any-return]


@entry(ops.GroupNorm)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (3,))
    groups, _ = p.factors(shape[1])
    weight = p.optional(lambda: p.vector(shape[1], "gamma"))
    bias = p.optional(lambda: p.vector(shape[1], "beta"))
    return cls(p.leaf(shape), groups, weight, bias, p.number("eps", positive=True))  # type: ignore[no-any-return]


@entry(ops.Softmax, ops.LogSoftmax)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape, (2, 3))
    return cls(p.leaf(shape), p.choose(range(len(shape)), "dim"))  # type: ignore[no-any-return]


@entry(ops.Dropout)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    return cls(p.leaf(_shape(p, shape)), 0.5, p.flag("training"))  # type: ignore[no-any-return]


# -- elementwise --------------------------------------------------------------------------------


@entry(ops.Add, ops.Sub, ops.Mul, ops.Div)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape)
    x = p.leaf(shape)
    kinds = ["tensor", "number", *range(len(shape))]
    kind = p.choose(kinds, "the other operand")
    if kind == "tensor":
        other: Any = p.leaf(shape, "y")
    elif kind == "number":
        other = p.number("c")
    else:  # a vector along one axis
        other = p.leaf((shape[kind], *(1,) * (len(shape) - 1 - kind)), "v")  # type: ignore[operator]
    if kind != "tensor" and p.choose((False, True), "on the left"):
        return cls(other, x)  # type: ignore[no-any-return]
    return cls(x, other)  # type: ignore[no-any-return]


@entry(
    ops.Neg, ops.Rsqrt, ops.Reciprocal, ops.Sqrt, ops.Relu, ops.Silu, ops.Sigmoid, ops.Tanh,
    ops.Hardswish, ops.Hardsigmoid, ops.Mish, ops.Exp, ops.Log, ops.Abs, ops.Erf, ops.Sin, ops.Cos,
    ops.Copy, ops.Detach,
)  # fmt: skip
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    return cls(p.leaf(_shape(p, shape)))  # type: ignore[no-any-return]


@entry(ops.Gelu)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    return cls(p.leaf(_shape(p, shape)), p.choose(("none", "tanh"), "approximate"))  # type: ignore[no-any-return]


@entry(ops.LeakyRelu, ops.Elu, ops.Softplus)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    return cls(p.leaf(_shape(p, shape)), p.number("slope", positive=True))  # type: ignore[no-any-return]


@entry(ops.PRelu)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = _shape(p, shape)
    count = shape[1] if len(shape) > 1 else 1  # channels are the second axis, if there is one
    return cls(p.leaf(shape), p.vector(count, "slope"))  # type: ignore[no-any-return]


@entry(ops.Clamp)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    low, high = p.choose(((True, True), (True, False), (False, True)), "limits")
    x = p.leaf(_shape(p, shape))
    return cls(x, p.number("low") if low else None, p.number("high") if high else None)  # type: ignore[no-any-return]


@entry(ops.Pow)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    return cls(p.leaf(_shape(p, shape)), p.choose((1, 2, 3, -1, 0.5), "exponent"))  # type: ignore[no-any-return]


@entry(ops.Cast)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    x = p.leaf(_shape(p, shape))
    return cls(x, x.dtype)  # type: ignore[no-any-return]


@entry(ops.Full)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    x = p.leaf(_shape(p, shape), constant=True)
    return cls(x.shape, p.number("value"), x.dtype, x.meta.device)  # type: ignore[no-any-return]


@entry(ops.Eye)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2,)))
    p.feasible(len(shape) == 2)
    x = p.leaf(shape, constant=True)
    return cls(*shape, x.dtype, x.meta.device)  # type: ignore[no-any-return]


# -- data movement ------------------------------------------------------------------------------


@entry(ops.Reshape)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    """One axis split off from its neighbour, two merged into one, or an axis of size 1."""
    shape = tuple(_shape(p, shape, (2, 3)))
    kinds = ["merges", "splits", "squeezes", "unsqueezes"]
    kind = p.choose(kinds[: 4 if len(shape) > 1 else 1], "the reshape")
    axis = p.choose(range(len(shape) - (kind == "splits")), "axis")
    before, after = shape[:axis], shape[axis + 1 :]
    if kind == "merges":
        source = (*before, *p.factors(shape[axis]), *after)
    elif kind == "splits":
        source = (*before, shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    elif kind == "squeezes":
        source = (*before, 1, *shape[axis:])
    else:
        p.equate(shape[axis], 1)
        source = (*before, *after)
    return cls(p.leaf(source), shape)  # type: ignore[no-any-return]


@entry(ops.Permute)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2, 3)))
    orders = list(itertools.permutations(range(len(shape))))
    if len(shape) > 3:  # the ones in use: channels moved to either end, neighbours exchanged
        n = len(shape)
        orders = [(0, *range(2, n), 1), (0, n - 1, *range(1, n - 1)), (1, 0, *range(2, n)),
                  tuple(range(n)), (*range(n - 2), n - 1, n - 2)]  # fmt: skip
    dims = p.choose(orders, "dims")
    return cls(p.leaf([shape[dims.index(axis)] for axis in range(len(shape))]), dims)  # type: ignore[no-any-return]


@entry(ops.Expand)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2, 3)))
    axis = p.choose([None, *range(len(shape))], "expanded axis")
    source = list(shape)
    if axis is not None:
        source[axis] = 1
    return cls(p.leaf(source), shape)  # type: ignore[no-any-return]


@entry(ops.Slice)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2,)))
    axis = p.choose(range(len(shape)), "dim")
    source = list(shape)
    if p.choose((True, False), "from the start"):
        source[axis] = shape[axis] + p.size("rest", 0)
        return cls(p.leaf(source), axis, 0, shape[axis])  # type: ignore[no-any-return]
    start = p.size("start")
    source[axis] = start + shape[axis]
    return cls(p.leaf(source), axis, start, start + shape[axis])  # type: ignore[no-any-return]


@entry(ops.Cat)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2, 4)))
    axis = p.choose(range(len(shape)), "dim")
    if p.choose((True, False), "of two"):
        parts = [(*shape[:axis], size, *shape[axis + 1 :]) for size in p.halves(shape[axis])]
        return cls((p.leaf(parts[0]), p.leaf(parts[1], "y")), axis)  # type: ignore[no-any-return]
    return cls((p.leaf(shape),), axis)  # type: ignore[no-any-return]


@entry(ops.Pad)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (3,)))
    mode = p.choose(("constant", "reflect", "replicate", "circular"), "mode")
    before, after = p.size("before", 0), p.size("after", 0)
    value = p.number("value") if mode == "constant" and p.choose((False, True), "value") else None
    inner = p.size("m")
    p.equate(shape[-1], before + inner + after)
    return cls(p.leaf((*shape[:-1], inner)), (before, after), mode, value)  # type: ignore[no-any-return]


@entry(ops.PixelShuffle)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (4,)))
    p.feasible(len(shape) >= 3)
    r, h, w = p.size("r"), p.size("h"), p.size("w")
    p.equate(shape[-2], h * r)
    p.equate(shape[-1], w * r)
    return cls(p.leaf((*shape[:-3], shape[-3] * r * r, h, w)), r)  # type: ignore[no-any-return]


@entry(ops.Flip)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2,)))
    return cls(p.leaf(shape), (p.choose(range(len(shape)), "dim"),))  # type: ignore[no-any-return]


# -- sums and averages --------------------------------------------------------------------------


@entry(ops.Sum, ops.Mean)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (2,)))
    keepdim = p.choose((True, False), "keepdim")
    if not keepdim:
        count = p.choose((1, 2), "axes summed")
        start = p.choose(range(len(shape) + 1), "from axis")
        new = tuple(p.size("m") for _ in range(count))
        dims = tuple(range(start, start + count))
        return cls(p.leaf((*shape[:start], *new, *shape[start:])), dims)  # type: ignore[no-any-return]
    pairs: list[tuple[int, ...]] = [(2, 3)] if len(shape) == 4 else []
    dims = p.choose([*((axis,) for axis in range(len(shape))), *pairs], "dims")
    source = list(shape)
    for dim in dims:
        p.equate(shape[dim], 1)
        source[dim] = p.size("m")
    return cls(p.leaf(source), dims, True)  # type: ignore[no-any-return]


@entry(ops.AvgPool, ops.MaxPool)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (3, 4)))
    p.feasible(len(shape) in (3, 4))
    rank = len(shape) - 2
    kernel = tuple(p.size("k") for _ in range(rank))
    stride = tuple(p.size("s") for _ in range(rank))
    padding = tuple(p.size("a", 0) for _ in range(rank))
    image = [
        p.covered(out, k, s, a, 1)
        for out, k, s, a in zip(shape[2:], kernel, stride, padding, strict=True)
    ]
    x = p.leaf((*shape[:2], *image))
    if cls is ops.MaxPool:
        return cls(x, kernel, stride, padding, (1,) * rank)  # type: ignore[no-any-return]
    counted = p.choose((True, False), "padding counts")
    divisor = p.size("divisor") if counted and p.choose((False, True), "divisor") else None
    return cls(x, kernel, stride, padding, False, counted, divisor)  # type: ignore[no-any-return]


@entry(ops.AdaptiveAvgPool)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (3, 4)))
    p.feasible(len(shape) in (3, 4))
    image = tuple(p.size("m") for _ in shape[2:])
    return cls(p.leaf((*shape[:2], *image)), shape[2:])  # type: ignore[no-any-return]


@entry(ops.Upsample)
def _(p: Pattern, cls: Any, shape: Shape) -> Op:
    shape = tuple(_shape(p, shape, (4,)))
    p.feasible(len(shape) == 4)
    image = tuple(p.size("m") for _ in shape[2:])
    kind = p.choose(("upsample_nearest2d.vec", "upsample_bilinear2d.vec"), "kind")
    corners = False if "bilinear" in kind else None
    return cls(p.leaf((*shape[:2], *image)), shape[2:], None, corners, ops.overload(kind))  # type: ignore[no-any-return]
