"""Branches as convolutions, or as linear maps: what composes, adds up, and reads as one.

    compose:  W2 (W1 x + b1) + b2    =  (W2 W1) x + (W2 b1 + b2)
    add:      (W1 x + b1) + (W2 x + b2)  =  (W1 + W2) x + (b1 + b2)

A map is an `ops.Conv` or `ops.Linear` that need not be in the graph: a weight, a bias and a geometry,
applied to its `input`. Padding is what makes a map of an image differ from a matrix; the conditions
say where it matters. Sources: DBB (arXiv 2103.13425), RepVGG (2101.03697).
"""

from __future__ import annotations

from math import prod
from typing import Any

from graphopt.ir import ops
from graphopt.ir.borders import bias_map, ones_channel
from graphopt.ir.ops import plus, widen
from graphopt.ir.rewrite import Rewriter, describe
from graphopt.ir.value import Value

Map = ops.Conv | ops.Linear


def source(value: Value) -> Value | None:
    """What `value` may be a map of: the input of the op that computes it; None if it is no map."""
    op = value.op
    if isinstance(op, ops.Conv):
        return op.input if op.channel_axis == 1 and not op.transposed else None
    if isinstance(op, ops.BatchNorm):
        return None if op.uses_batch_statistics else op.input
    if isinstance(op, ops.Pad):
        return None if margins(op) is None else op.input
    if isinstance(op, ops.AvgPool):
        padding = op.padding if isinstance(op.padding, tuple) else (op.padding,)
        return op.input if _static(*op.kernel_size, *op.stride, *padding) else None
    return None


def as_map(rw: Rewriter, value: Value, start: Value, like: Map) -> Any:
    """`value` as a map of `start`, in the rank and with the groups of `like`."""
    if value == start:
        return identity(rw, start, like)
    op = value.op
    if isinstance(op, (ops.Conv, ops.Linear)):
        return op if op.input == start else compose_maps(rw, op, as_map(rw, op.input, start, like))
    assert isinstance(like, ops.Conv)
    if isinstance(op, ops.AvgPool):
        return compose_maps(rw, average(rw, op, like), as_map(rw, op.input, start, like))
    if isinstance(op, ops.Pad):
        return _framed(rw, op, as_map(rw, op.input, start, like))
    assert isinstance(op, ops.BatchNorm)
    scale, shift = op.scale_and_shift()
    inner = as_map(rw, op.input, start, like)
    bias = shift if inner.bias is None else plus(widen(inner.bias) * scale, shift)
    assert bias is not None
    return inner.replace(weight=inner.scale_out(scale), bias=bias.to(inner.weight.dtype))


def identity(rw: Rewriter, value: Value, like: Map) -> Any:
    """The identity: `weight[o, i mod (C / groups), 0] = 1` where o = i."""
    if isinstance(like, ops.Linear):
        size, dtype = value.shape[-1], like.weight.dtype
        return ops.Linear(value, rw.emit(ops.Eye(size, size, dtype, like.weight.meta.device)))
    channels, groups = like.in_channels, like.groups
    per, ones = channels // groups, (1,) * like.rank
    eye = rw.emit(ops.Eye(per, per, like.weight.dtype, like.weight.meta.device))
    weight = eye.reshape(1, per, per).expand(groups, per, per).reshape(channels, per, *ones)
    return ops.Conv(value, weight, None, ones, (0,) * like.rank, ones, groups)


def average(rw: Rewriter, pool: ops.AvgPool, like: ops.Conv) -> ops.Conv:
    """An average pooling: `weight[o, i mod (C / groups), k] = 1 / size of the window`."""
    kernel, rank = pool.kernel_size, like.rank
    stride, padding = pool.stride or kernel, pool.padding
    padding = padding if isinstance(padding, tuple) else (padding,) * rank
    rw.require(len(kernel) == rank, f"{describe(pool.out)} pools over another number of axes")
    rw.require(not pool.ceil_mode, f"{describe(pool.out)} rounds its output size up")
    rw.require(
        pool.count_include_pad or not any(padding),
        f"{describe(pool.out)} divides by fewer pixels at the border",
    )
    one: ops.Conv = identity(rw, pool.input, like)
    weight = one.weight / (pool.divisor_override or prod(kernel))
    weight = weight.expand(*weight.shape[:2], *kernel)
    return one.replace(weight=weight, stride=tuple(stride), padding=tuple(padding))


def margins(pad: ops.Pad) -> tuple[int, ...] | None:
    """The zeros put on both sides of each spatial axis, behind samples and channels; None if a side
    gets more, or anything else, or as many as a dynamic size says."""
    if pad.mode != "constant" or pad.value or not _static(*pad.pad):
        return None
    before, after = pad.pad[::2], pad.pad[1::2]
    rank = pad.input.ndim - 2
    if len(before) > rank or before != after or any(size < 0 for size in before):
        return None
    return (0,) * (rank - len(before)) + before[::-1]


def _framed(rw: Rewriter, pad: ops.Pad, inner: ops.Conv) -> ops.Conv:
    """A map of one pixel at a time, its output in a frame of zeros: it makes that of padded zeros."""
    sizes = margins(pad)
    rw.require(
        sizes is not None and len(sizes) == inner.rank, f"{describe(pad.out)} pads otherwise"
    )
    assert sizes is not None
    rw.require(
        _pointwise(inner) and not any(padded(inner)) and inner.bias is None,
        f"{describe(pad.out)} pads with zeros what is none where its input is",
    )
    return inner.replace(padding=tuple(a * s for a, s in zip(sizes, inner.stride, strict=True)))


# -- compose ------------------------------------------------------------------------------------


def compose_maps(rw: Rewriter, outer: Map, inner: Map) -> Any:
    """The map that applies `inner`, then `outer`.

    Padding of `outer` puts zeros around what `inner` computes; that is what `inner` makes of zeros
    around its own input if it reads one pixel at a time, along the axes that are padded, and adds
    nothing.
    """
    if isinstance(outer, ops.Linear) and isinstance(inner, ops.Linear):
        first, second = widen(inner.weight, outer.weight), widen(outer.weight, inner.weight)
        bias = outer.bias
        if inner.bias is not None:
            moved = (second * widen(inner.bias, second)).sum((1,))
            bias = plus(bias, moved.to(outer.weight.dtype))
        return inner.replace(weight=(second @ first).to(outer.weight.dtype), bias=bias)
    assert isinstance(outer, ops.Conv) and isinstance(inner, ops.Conv)
    _plain(rw, outer, inner)
    if any(padded(outer)):
        rw.require(
            all(map(_commutes, padded(outer), inner.kernel, padded(inner))),
            f"{_named(outer)} pads what {_named(inner)} computes from more than one "
            "pixel, so that its border sees zeros where the merged one would see pixels",
        )
        rw.require(
            inner.bias is None,
            f"{_named(outer)} pads with zeros where {_named(inner)} adds its bias",
        )
    dilation, into, onto = _steps(outer, inner)
    outer, inner = same_groups(rw, outer, inner)
    groups = inner.groups
    bias = outer.bias
    if inner.bias is not None:
        kernel = outer.response_kernel(inner.bias)
        bias = plus(bias, kernel.sum(tuple(range(1, kernel.ndim))).to(outer.weight.dtype))
    # W[o, i, t] = sum_m,b W2[o, m, b] W1[m, i, (t - onto b) / into]: a transposed convolution of W1
    # by W2, the inner inputs taking the place of the samples.
    first, second = inner.weight.permute(1, 0, *range(2, 2 + inner.rank)), _swapped(outer)
    full = rw.emit(
        ops.Conv(first, second, None, into, (0,) * outer.rank, onto, groups, True,
                 (0,) * outer.rank)
    )  # fmt: skip
    weight = full.permute(1, 0, *range(2, full.ndim))
    stride = tuple(a * b for a, b in zip(inner.stride, outer.stride, strict=True))
    padding = tuple(
        p + a * s for p, s, a in zip(padded(inner), inner.stride, padded(outer), strict=True)
    )
    return inner.replace(
        weight=weight, bias=bias, stride=stride, padding=padding, dilation=dilation
    )


def composed(rw: Rewriter, outer: ops.Conv, inner: ops.Conv) -> Value:
    """`outer` of `inner`, emitted. Where `outer` pads with zeros what `inner` adds a bias to, the
    bias is added apart, without the border."""
    _plain(rw, outer, inner)
    bias, plain = inner.bias, inner.replace(bias=None)
    one_pixel = _pointwise(inner) and not any(padded(inner))
    if bias is None or not any(padded(outer)) or not one_pixel:
        return rw.emit(compose_maps(rw, outer, inner), like=inner)

    def with_map() -> Value:
        merged = compose_maps(rw, outer, plain)
        return rw.emit(merged, like=inner) + bias_map(outer, bias, rw)

    def with_ones() -> Value:
        merged = compose_maps(rw, outer, plain)
        return rw.emit(ones_channel(merged, outer.response_kernel(bias), rw), like=inner)

    return rw.cheapest(with_map, with_ones)


def _steps(outer: ops.Conv, inner: ops.Conv) -> tuple[tuple[Any, ...], ...]:
    """How far apart the taps of the merged kernel are, and in these units those of the inner and
    of the outer one."""
    ones = (1,) * outer.rank
    reach = tuple(d * s for d, s in zip(outer.dilation, inner.stride, strict=True))
    if _pointwise(inner):
        return reach, ones, ones
    if _pointwise(outer) or inner.dilation == reach:
        return inner.dilation, ones, ones
    return ones, inner.dilation, reach


def _swapped(conv: ops.Conv) -> Value:
    """The weight with input channels in front, as a transposed convolution has it:
    `[I, O / groups, *kernel]` from `[O, I / groups, *kernel]`."""
    groups, per = conv.groups, conv.weight.shape[1]
    rows = conv.out_channels // groups
    blocks = conv.weight.reshape(groups, rows, per, *conv.kernel)
    swapped = blocks.permute(0, 2, 1, *range(3, blocks.ndim))
    return swapped.reshape(groups * per, rows, *conv.kernel)


# -- add ----------------------------------------------------------------------------------------


def add_maps(rw: Rewriter, left: Map, right: Map) -> Any:
    """The map whose output is the sum of two, which must see the same windows of the same input.

    Windows are the same if they have the same middle, `padding - dilation (kernel - 1) / 2`, and
    move by the same stride; the smaller kernel then becomes the middle of the larger one.
    """
    if isinstance(left, ops.Linear) and isinstance(right, ops.Linear):
        return left.replace(
            weight=plus(left.weight, right.weight), bias=plus(left.bias, right.bias)
        )
    assert isinstance(left, ops.Conv) and isinstance(right, ops.Conv)
    _plain(rw, left, right)
    rw.require(
        left.stride == right.stride,
        f"{_named(left)} and {_named(right)} move by different strides",
    )
    rw.require(
        _middle(left) == _middle(right),
        f"the windows of {_named(left)} and {_named(right)} are not aligned",
    )
    left, right = same_groups(rw, left, right)
    left, right = _same_dilation(rw, left, right)
    padding = tuple(a if a >= b else b for a, b in zip(padded(left), padded(right), strict=True))
    weight = plus(_grown(rw, left, padding), _grown(rw, right, padding))
    bias = plus(left.bias, right.bias)
    return left.replace(weight=weight, bias=bias, padding=padding)


def _middle(conv: ops.Conv) -> tuple[Any, ...]:
    return tuple(
        2 * p - d * (k - 1)
        for p, d, k in zip(padded(conv), conv.dilation, conv.kernel, strict=True)
    )


def _grown(rw: Rewriter, conv: ops.Conv, padding: tuple[Any, ...]) -> Value:
    """The weight with zero taps around it, as many as the padding grows."""
    amounts: list[Any] = []
    for had, has, step in zip(padded(conv), padding, conv.dilation, strict=True):
        count = (has - had) // step
        rw.require(count * step == has - had, f"{_named(conv)} falls between the taps")
        amounts = [count, count, *amounts]
    if all(type(count) is int and count == 0 for count in amounts):
        return conv.weight
    return rw.emit(ops.Pad(conv.weight, tuple(amounts)))


def _same_dilation(rw: Rewriter, left: ops.Conv, right: ops.Conv) -> tuple[ops.Conv, ops.Conv]:
    if left.dilation == right.dilation:
        return left, right
    if _pointwise(left):
        return left.replace(dilation=right.dilation), right
    if _pointwise(right):
        return left, right.replace(dilation=left.dilation)
    return undilated(rw, left), undilated(rw, right)


def undilated(rw: Rewriter, conv: ops.Conv) -> ops.Conv:
    """The same map with zeros for the taps between: every kernel a transposed convolution by 1."""
    weight, per, ones, none = conv.weight, conv.weight.shape[1], (1,) * conv.rank, (0,) * conv.rank
    one = rw.emit(ops.Full((per, 1, *ones), 1.0, weight.dtype, weight.meta.device))
    spread = ops.Conv(weight, one, None, conv.dilation, none, ones, per, True, none)
    return conv.replace(weight=rw.emit(spread), dilation=ones)


# -- both ---------------------------------------------------------------------------------------


def same_groups(rw: Rewriter, left: ops.Conv, right: ops.Conv) -> tuple[ops.Conv, ops.Conv]:
    """Maps with as many groups as each other; one with a single group makes the other one dense."""
    if left.groups == right.groups:
        return left, right
    if left.groups == 1:
        return left, dense(rw, right)
    rw.require(right.groups == 1, f"{_named(left)} and {_named(right)} differ in their groups")
    return dense(rw, left), right


def dense(rw: Rewriter, conv: ops.Conv) -> ops.Conv:
    """The same map with one group: blocks on the diagonal, zeros elsewhere."""
    groups, weight, ones = conv.groups, conv.weight, (1,) * conv.rank
    per, rows = weight.shape[1], conv.out_channels // groups
    eye = rw.emit(ops.Eye(groups, groups, weight.dtype, weight.meta.device))
    blocks = weight.reshape(groups, rows, 1, per, *conv.kernel)
    blocks = blocks * eye.reshape(groups, 1, groups, 1, *ones)
    whole = blocks.reshape(groups * rows, groups * per, *conv.kernel)
    return conv.replace(weight=whole, groups=1)


def _plain(rw: Rewriter, *maps: ops.Conv) -> None:
    for one in maps:
        rw.require(not one.transposed, f"{_named(one)} is transposed")
        rw.require(
            not isinstance(one.padding, str),
            f"{_named(one)} pads its two sides differently",
        )
    left, right = maps
    rw.require(
        left.rank == right.rank and left.input.ndim == right.input.ndim,
        f"{_named(left)} and {_named(right)} are of different ranks",
    )


def _named(conv: ops.Conv) -> str:
    return "a branch" if conv.out is None else describe(conv.out)


def _static(*sizes: Any) -> bool:
    """Whether no size is dynamic: comparing one would fix it."""
    return all(isinstance(size, int) for size in sizes)


def _commutes(outer: int, kernel: Any, inner: int) -> bool:
    """Whether zeros that a map sees at both ends of an axis are those of the input of the map before."""
    return not outer or (kernel == 1 and not inner)


def _pointwise(conv: ops.Conv) -> bool:
    return all(size == 1 for size in conv.kernel)


def padded(conv: ops.Conv) -> tuple[int, ...]:
    """The padding of a map that has been found to pad both sides alike."""
    assert isinstance(conv.padding, tuple)
    return conv.padding
