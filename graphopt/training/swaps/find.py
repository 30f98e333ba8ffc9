"""Layer norms, RMS norms and attentions in a graph, in any of their usual spellings.

    x or c = x - mean(x),   times or over   1 / sqrt(m + eps),   m = mean(x^2), mean(c^2) or var(x)
    softmax(s q k^T) v                      for a number s

along one axis, casts and views aside; a norm's gain and shift are parameters (or what is computed from
parameters, such as 1 + w) that multiply and shift the result along that axis. Nothing here knows a class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.ir import attention, ops
from graphopt.ir.affine import same, same_shape
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.ops.base import Call, overload
from graphopt.ir.value import Value

_VARIANCES = [overload(name) for name in ("var.dim", "var.correction")]
_DEVIATIONS = [overload(name) for name in ("std.dim", "std.correction")]


@dataclasses.dataclass(frozen=True)
class Site:
    """A value that a norm or an attention computes: what is replaced, from `inputs` on."""

    out: fx.Node
    inputs: tuple[fx.Node, ...]
    reason: str = ""  # why it cannot be swapped


@dataclasses.dataclass(frozen=True)
class NormSite(Site):
    """`inputs` is the one value that is normalized along `axis`."""

    axis: int = 0
    eps: float = 0.0
    gain: fx.Node | None = None
    shift: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSite(Site):
    """`inputs` are queries `[..., m, d]`, keys `[..., n, d]` (`[..., d, n]` if `transposed`), values."""

    transposed: bool = False


def find_norms(graph: Graph) -> Iterator[NormSite]:
    """All layer norms and RMS norms, in graph order."""
    builder = Builder(graph, graph.output)
    for node in graph.calls:
        core = _core(builder.view(node))
        if core is not None and not core.x.is_constant:
            yield _norm(builder, node, core)


def find_attentions(graph: Graph) -> Iterator[AttentionSite]:
    """All attentions with softmax, in graph order."""
    builder = Builder(graph, graph.output)
    for node in graph.calls:
        found = _attention(builder.view(node))
        if found is not None:
            yield found


# -- norms ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Core:
    """A normalization of `x` along `axes`; `gain` is what the numerator was multiplied by before."""

    x: Value
    axes: tuple[int, ...]
    eps: float
    gain: Value | None = None


def _core(op: Any) -> _Core | None:
    """The normalization that an op completes, its gain and shift aside."""
    if isinstance(op, (ops.LayerNorm, ops.RMSNorm)):
        ndim = op.input.ndim
        eps = torch.finfo(op.input.dtype).eps if op.eps is None else op.eps
        return _Core(op.input, tuple(range(ndim - len(op.normalized_shape), ndim)), eps)
    if isinstance(op, ops.Mul):
        for value, factor in ((op.left, op.right), (op.right, op.left)):
            if isinstance(value, Value) and isinstance(factor, Value):
                found = _over(value, _inverted(_view_of(factor)))
                if found is not None:
                    return found
    if isinstance(op, ops.Div) and isinstance(op.left, Value) and isinstance(op.right, Value):
        return _over(op.left, _root(_view_of(op.right)))
    return None


def _inverted(factor: Value) -> Value | None:
    """z of `1 / sqrt(z)`."""
    op = factor.op
    if isinstance(op, ops.Rsqrt):
        return op.input
    if isinstance(op, ops.Pow) and op.exponent == -0.5:
        return op.input
    if isinstance(op, ops.Reciprocal):
        return _root(op.input)
    if isinstance(op, ops.Div) and op.left == 1 and isinstance(op.right, Value):
        return _root(op.right)
    return None


def _root(value: Value) -> Value | None:
    """z of `sqrt(z)`; of a standard deviation (plus a number) itself."""
    op = value.op
    if isinstance(op, ops.Sqrt):
        return op.input
    if isinstance(op, ops.Pow) and op.exponent == 0.5:
        return op.input
    return value if _plus(value)[0].node.target in _DEVIATIONS else None


def _over(numerator: Value, z: Value | None) -> _Core | None:
    """`numerator / sqrt(z)` as a norm."""
    if z is None:
        return None
    value = _plain(numerator)
    found = _normalized(value, *_plus(z))
    op = value.op
    if found is None and isinstance(op, ops.Mul):
        for one, gain in ((op.left, op.right), (op.right, op.left)):
            if isinstance(one, Value) and isinstance(gain, Value) and gain.is_constant:
                core = _normalized(_plain(one), *_plus(z))
                return None if core is None else dataclasses.replace(core, gain=gain)
    return found


def _normalized(value: Value, moment: Value, eps: float) -> _Core | None:
    """`value / sqrt(moment + eps)` as a norm."""
    centred, inner = _centred(value), _view_of(moment)
    if inner.node.target in (*_VARIANCES, *_DEVIATIONS):
        call = Call(inner.node, inner.builder)
        of, dims = _plain(call["self"]), call.arguments.get("dim")
        if centred is None or dims is None or of not in (centred[0], value):
            return None
        axes = tuple(dim % of.ndim for dim in ((dims,) if isinstance(dims, int) else dims))
    else:
        if not isinstance(inner.op, ops.Mean) or _plain(_squared(inner.op.input)) != value:
            return None
        axes = inner.op.dims
    if centred is not None:
        return _Core(*centred, eps) if centred[1] == axes else None
    return _Core(value, axes, eps)


def _centred(value: Value) -> tuple[Value, tuple[int, ...]] | None:
    """x and the axes of `x - mean(x)`."""
    op = value.op
    if not (isinstance(op, ops.Sub) and isinstance(op.left, Value) and isinstance(op.right, Value)):
        return None
    mean = _view_of(op.right).op
    if not isinstance(mean, ops.Mean) or _plain(mean.input) != _plain(op.left):
        return None
    return _plain(op.left), mean.dims


def _squared(value: Value) -> Value:
    """x of `x^2`; the value itself if it is no square."""
    op = _plain(value).op
    if isinstance(op, ops.Pow) and op.exponent == 2:
        return op.input
    if isinstance(op, ops.Mul) and isinstance(op.left, Value) and op.left == op.right:
        return op.left
    return value


def _plus(value: Value) -> tuple[Value, float]:
    """A value without the number that is added to it, and the number."""
    op = value.op
    if isinstance(op, ops.Add):
        for term, number in ((op.left, op.right), (op.right, op.left)):
            if isinstance(term, Value) and isinstance(number, (int, float)):
                return term, float(number)
    return value, 0.0


def _plain(value: Value) -> Value:
    """What a value is a cast or a copy of."""
    while isinstance(value.op, (ops.Cast, ops.Copy, ops.Detach)):
        value = value.op.input
    return value


def _view_of(value: Value) -> Value:
    """What a value is a cast, a copy, or a reshaped or repeated version of."""
    while isinstance(value.op, (ops.Cast, ops.Copy, ops.Expand, ops.Reshape)):
        value = value.op.input
    return value


def _norm(builder: Builder, node: fx.Node, core: _Core) -> NormSite:
    """The norm that `node` completes, with the gain and shift behind it."""
    x, axes, reason = core.x, core.axes, ""
    if len(axes) != 1:
        reason = f"it normalizes over {len(axes)} axes, expected that of the channels alone"
    elif axes[0] == 0:
        reason = "it normalizes along the axis of the batch"
    elif not isinstance(x.shape[axes[0]], int):
        reason = "its number of channels is dynamic"
    elif core.gain is not None and not _lies_along(core.gain, axes[0], x):
        reason = "its gain is not a vector over the channels"
    if reason:
        return NormSite(node, (x.node,), reason)
    op: Any = builder.view(node)
    known = [core.gain or getattr(op, "weight", None), getattr(op, "bias", None)]
    gain, shift = (None if one is None else one.node for one in known)
    at = last = node
    while len(at.users) == 1:
        (user,) = at.users
        op = builder.view(user)
        if isinstance(op, (ops.Cast, ops.Copy)):
            if op.out.dtype == x.dtype and last is at:
                last = user
            at = user
            continue
        factor = _vector(op, at, axes[0], x) if isinstance(op, (ops.Mul, ops.Add)) else None
        if isinstance(op, ops.Mul) and factor is not None and gain is None and shift is None:
            gain = factor
        elif isinstance(op, ops.Add) and factor is not None and shift is None:
            shift = factor
        else:
            break
        at = last = user
    return NormSite(last, (x.node,), "", axes[0], core.eps, gain, shift)


def _vector(op: Any, value: fx.Node, axis: int, x: Value) -> fx.Node | None:
    """The parameter along `axis` that a product or sum has beside `value`."""
    others = [
        one for one in (op.left, op.right) if isinstance(one, Value) and one.node is not value
    ]
    if len(others) != 1 or not others[0].is_constant or not same_shape(op.out.shape, x.shape):
        return None
    return others[0].node if _lies_along(others[0], axis, x) else None


def _lies_along(vector: Value, axis: int, x: Value) -> bool:
    """Whether a parameter broadcasts with x as a vector along one of its axes."""
    shape = (1,) * (x.ndim - vector.ndim) + tuple(vector.shape)
    along = all(same(size, 1) for i, size in enumerate(shape) if i != axis)
    return along and len(shape) == x.ndim and same(shape[axis], x.shape[axis])


# -- attention ------------------------------------------------------------------------------------


def _attention(op: Any) -> AttentionSite | None:
    """The attention that an op completes."""
    if isinstance(op, ops.Attention):
        inputs = op.query.node, op.key.node, op.value.node
        reason = ""
        if op.is_causal:
            reason = "it is causal: linear attention sums over all keys"
        elif op.attn_mask is not None:
            reason = "it has a mask or a bias, which linear attention has no place for"
        elif op.dropout_p:
            reason = "it drops weights at random in eval mode too"
        elif op.enable_gqa:
            reason = "its queries share keys in groups"
        return AttentionSite(op.out.node, inputs, reason)
    found = attention.read(op)
    if found is None:
        return None
    root, product, reason = found.root, found.product, ""
    if isinstance(root, ops.Einsum):
        return AttentionSite(root.out.node, (), "it is written as an einsum")
    for step in found.steps:
        reason = reason or _changed(step)
    if isinstance(product, ops.Addmm):
        reason = reason or _CHANGES["term"]
    if not found.along_keys:
        reason = "its softmax is not along the keys"
    elif found.weights_shared:
        reason = "its weights are read elsewhere too"
    elif isinstance(product, ops.Einsum):
        reason = "its scores are written as an einsum"
    elif product.left.ndim != root.out.ndim or product.right.ndim != root.right.ndim:
        reason = "its weights are reshaped before they meet the values"
    if reason or not isinstance(product, ops.Matmul):
        return AttentionSite(root.out.node, (), reason)
    inputs = product.left.node, product.right.node, root.right.node
    return AttentionSite(root.out.node, inputs, transposed=True)


def _changed(step: attention.Step) -> str:
    """Why scores that were changed so are not q k^T times a positive number, empty if they are."""
    if step.kind == "scale":
        assert isinstance(step.operand, (int, float))
        return "" if step.operand > 0 else "its scores change their sign"
    return _CHANGES.get(step.kind, "")


_CHANGES = {
    "mask": "its scores are masked",
    "term": "a mask or a bias is added to its scores",
    "tensor": "its scores are multiplied by a tensor",
}


def square(tokens: Any) -> bool:
    """Whether so many tokens fill a square."""
    return isinstance(tokens, int) and tokens > 0 and math.isqrt(tokens) ** 2 == tokens
