"""Identities, duplicates and dead code. Nothing here changes a dtype or a shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph, is_pure
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.sizes import same_shape
from graphopt.ir.value import Value
from graphopt.passes.base import Pass

aten = torch.ops.aten
MASK = 1 << 24  # elements of masks that are looked at


def uniform(operand: Any, limit: int = 4096) -> float | None:
    """The one number that an operand consists of, if it is a literal of at most `limit` elements; None
    otherwise."""
    if not isinstance(operand, Value):
        return operand if isinstance(operand, (int, float)) else None
    if operand.node.op == "get_attr":
        state = operand.builder.graph.states[str(operand.node.target)]
        tensor = state.tensor
        if state.kind != "constant" or not 0 < tensor.numel() <= limit or tensor.is_complex():
            return None
        first = tensor.flatten()[0]
        return float(first) if bool((tensor == first).all()) else None
    op = operand.op
    if isinstance(op, ops.Full):
        return uniform(op.fill_value)
    if isinstance(op, (ops.Reshape, ops.Expand, ops.Permute, ops.Copy, ops.Detach)):
        return uniform(op.input, limit)
    if isinstance(op, ops.Cast):
        number = uniform(op.input, limit)
        return number if number in (0.0, 1.0) else None
    return None


def _same_type(value: Value, rw: Rewriter, out: Value) -> Value:
    """`value`, if it has the dtype and shape of what it replaces; declines silently otherwise."""
    rw.match(value.dtype == out.dtype and same_shape(value.shape, out.shape))
    return value


@rewrite(contract=Exact())
def drop_times_one(op: ops.Mul | ops.Div, rw: Rewriter) -> Value:
    """x * 1 = 1 * x = x / 1 = x."""
    if uniform(op.right) == 1 and isinstance(op.left, Value):
        return _same_type(op.left, rw, op.out)
    rw.match(isinstance(op, ops.Mul) and uniform(op.left) == 1 and isinstance(op.right, Value))
    return _same_type(op.right, rw, op.out)  # type: ignore[arg-type]


@rewrite
def drop_plus_zero(op: ops.Add | ops.Sub, rw: Rewriter) -> Value:
    """x + 0 = 0 + x = x - 0 = x, but for the sign of a zero."""
    if uniform(op.right) == 0 and isinstance(op.left, Value):
        return _same_type(op.left, rw, op.out)
    rw.match(isinstance(op, ops.Add) and uniform(op.left) == 0 and isinstance(op.right, Value))
    return _same_type(op.right, rw, op.out)  # type: ignore[arg-type]


@rewrite(contract=Exact())
def drop_power_one(op: ops.Pow, rw: Rewriter) -> Value:
    """x ** 1 = x."""
    rw.match(op.exponent == 1)
    return _same_type(op.input, rw, op.out)


@rewrite(contract=Exact())
def drop_double_negation(outer: ops.Neg, rw: Rewriter) -> Value:
    """-(-x) = x."""
    return rw.producer(outer.input, ops.Neg).input


@rewrite(contract=Exact())
def drop_repeated_relu(outer: ops.Relu, rw: Rewriter) -> Value:
    """relu(relu(x)) = relu(x)."""
    return rw.producer(outer.input, ops.Relu).out


@rewrite
def merge_factors(outer: ops.Mul, rw: Rewriter) -> Value:
    """(x * a) * b = x * (a b) for numbers a, b."""
    return _merge(outer, rw, ops.Mul, lambda a, b: a * b)


@rewrite
def merge_terms(outer: ops.Add, rw: Rewriter) -> Value:
    """(x + a) + b = x + (a + b) for numbers a, b."""
    return _merge(outer, rw, ops.Add, lambda a, b: a + b)


def _merge(outer: Any, rw: Rewriter, cls: Any, combine: Any) -> Value:
    rw.match(isinstance(outer.right, float) and outer.out.dtype.is_floating_point)
    inner = rw.producer(outer.left, cls)
    rw.match(isinstance(inner.right, float) and isinstance(inner.left, Value))
    rw.match(rw.only_user(inner, outer) and inner.left.dtype == outer.out.dtype)
    return rw.emit_like(outer, left=inner.left, right=combine(inner.right, outer.right))


@rewrite(contract=Exact())
def drop_dropout(op: ops.Dropout, rw: Rewriter) -> Value:
    """Dropout is the identity when it does not train."""
    rw.match(not op.train)
    return op.input


@rewrite(contract=Exact())
def drop_cast(op: ops.Cast, rw: Rewriter) -> Value:
    """A cast to the dtype a value already has."""
    rw.match(op.input.dtype == op.dtype)
    return op.input


@rewrite(contract=Exact())
def merge_casts(outer: ops.Cast, rw: Rewriter) -> Value:
    """cast(cast(x, wide), dtype) = cast(x, dtype) if `wide` holds every value of x."""
    inner = rw.producer(outer.input, ops.Cast)
    source, wide = inner.input.dtype, inner.dtype
    rw.match(source.is_floating_point and torch.promote_types(source, wide) == wide)
    return rw.emit_like(outer, input=inner.input) if source != outer.dtype else inner.input


@rewrite(contract=Exact())
def drop_copy(op: ops.Copy, rw: Rewriter) -> Value:
    """A copy of a value that nobody writes to."""
    rw.match(not any(map(reads_strides, op.out.users)))
    return op.input


def reads_strides(node: fx.Node) -> bool:
    """Whether an op's meaning depends on the memory layout of its input."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name in ("aten::as_strided", "aten::view", "aten::view_as_complex", "aten::stride")


@rewrite(contract=Exact())
def drop_view(
    op: ops.Reshape | ops.Permute | ops.Expand | ops.Slice | ops.Pad | ops.Repeat, rw: Rewriter
) -> Value:
    """A view (or a padding, or a tiling) that leaves everything where it is."""
    if isinstance(op, ops.Permute):
        rw.match(op.dims == tuple(range(len(op.dims))))
    elif isinstance(op, ops.Slice):
        rw.match(op.step == 1 and op.start in (0, None))
    elif isinstance(op, ops.Pad):
        rw.match(not any(op.pad))
    return _same_type(op.input, rw, op.out)


@rewrite(
    contract=Exact(),
    unproved="it changes the spelling of a call, which index notation does not see; every site is "
    "compared bit for bit",
)
def spell_out_shape(op: ops.Reshape | ops.Expand, rw: Rewriter) -> Value:
    """reshape_as(x, y) = reshape(x, y.shape): y is not read any more."""
    rw.match(len(rw.root.all_input_nodes) == 2 and len(rw.root.args) == 2)
    rw.match(
        rw.root.target in (aten.reshape_as.default, aten.view_as.default, aten.expand_as.default)
    )
    if isinstance(op, ops.Reshape):
        rw.match(sum(not isinstance(size, int) for size in op.shape) <= 1)
        return rw.emit_like(op)
    missing = len(op.shape) - op.input.ndim
    own = (None,) * missing + op.input.shape
    shape = tuple(
        -1 if mine is not None and str(mine) == str(size) else size
        for size, mine in zip(op.shape, own, strict=True)
    )
    rw.match(all(isinstance(size, int) for size in shape))
    return rw.emit_like(op, shape=shape)


@rewrite(contract=Exact())
def merge_permutes(outer: ops.Permute, rw: Rewriter) -> Value:
    """permute(permute(x, p), q) = permute(x, p[q])."""
    inner = rw.producer(outer.input, ops.Permute)
    dims = tuple(inner.dims[axis] for axis in outer.dims)
    if dims == tuple(range(len(dims))):
        return inner.input
    return rw.emit_like(outer, input=inner.input, dims=dims)


@rewrite(contract=Exact())
def merge_reshapes(outer: ops.Reshape, rw: Rewriter) -> Value:
    """reshape(reshape(x, s), t) = reshape(x, t), where nobody else reads the first; else the two have
    it in common, as the maps of one input need."""
    inner = rw.producer(outer.input, ops.Reshape)
    shape = outer.out.shape
    if same_shape(shape, inner.input.shape):
        return inner.input
    rw.match(rw.only_user(inner, outer))
    rw.match(sum(not isinstance(size, int) for size in shape) <= 1)
    return rw.emit_like(outer, input=inner.input, shape=shape)


@rewrite(contract=Exact())
def drop_single_cat(op: ops.Cat, rw: Rewriter) -> Value:
    """cat([x]) = x."""
    rw.match(len(op.tensors) == 1)
    return _same_type(op.tensors[0], rw, op.out)


@rewrite(
    unproved="it reads the entries of the mask; tests/passes/test_sink_expands.py draws masks, and every "
    "site is checked in float64"
)
def drop_fixed_mask(op: ops.Attention, rw: Rewriter) -> Value:
    """A literal mask that hides nothing goes; one that hides what comes later is the option for that."""
    mask = op.attn_mask
    rw.match(isinstance(mask, Value) and not op.is_causal)
    assert isinstance(mask, Value)
    nothing = 1.0 if mask.dtype == torch.bool else 0.0
    if uniform(mask, MASK) == nothing:
        return rw.emit_like(op, attn_mask=None)
    rw.match(mask.dtype == torch.bool and _is_causal(mask))
    rw.match(mask.shape[-2:] == (op.query.shape[-2], op.key.shape[-2]))
    return rw.emit_like(op, attn_mask=None, is_causal=True)


def _is_causal(mask: Value) -> bool:
    """Whether a literal is a lower triangle `[..., n, n]` of ones."""
    if mask.node.op != "get_attr" or mask.ndim < 2:
        return False
    state = mask.builder.graph.states[str(mask.node.target)]
    tensor, n = state.tensor, mask.shape[-1]
    if state.kind != "constant" or not 0 < tensor.numel() <= MASK or tensor.shape[-2] != n:
        return False
    return bool((tensor == torch.ones(n, n, dtype=torch.bool, device=tensor.device).tril()).all())


def merge_duplicates(session: Session) -> int:
    """Equal calls on equal arguments are computed once. Returns how many were merged."""
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(session.graph.fx.nodes):
        if node.op != "call_function" or not is_pure(node) or reads_written(session.graph, node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        twin = seen.setdefault(key, node)
        if twin is node:
            continue
        if session.replace("merge-duplicates", Exact(), node, twin):
            session.erase_dead([node])
            merged += 1
    return merged


def reads_written(graph: Graph, node: fx.Node) -> bool:
    return any(one.op == "get_attr" and str(one.target) in graph.mutated
               for one in node.all_input_nodes)  # fmt: skip


def _key(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return (list, *map(_key, argument))
    if isinstance(argument, dict):
        return tuple((key, _key(value)) for key, value in sorted(argument.items()))
    if isinstance(argument, fx.Node):
        return argument
    return type(argument), repr(argument)  # 1, 1.0 and True are different arguments


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Dead code, duplicates, identities in all their spellings, no-op views, eval dropout."""

    name = "canonicalize"
    rewrites = (
        drop_times_one, drop_plus_zero, drop_power_one, drop_double_negation, drop_repeated_relu,
        merge_factors, merge_terms, drop_dropout, drop_cast, merge_casts, drop_copy, drop_view,
        spell_out_shape, merge_permutes, merge_reshapes, drop_single_cat, drop_fixed_mask,
    )  # fmt: skip

    def run(self, session: Session) -> None:
        session.graph.eliminate_dead_code()
        while session.run(self.rewrites) + merge_duplicates(session):
            pass
        session.graph.eliminate_dead_code()

    @classmethod
    def all_rewrites(cls) -> Any:
        return cls.rewrites
