"""Maps of one input, side by side: one map with all their outputs.

    cat(W1 x + b1, W2 x + b2)  =  cat(W1, W2) x + cat(b1, b2)

    A f(V x) + B f(W x)  =  cat(A, B) f(cat(V, W) x),    f pointwise: a bottleneck beside an MLP

A concatenation becomes the map itself; maps that are read apart become slices of it, where that is
faster on the target: queries, keys and values; gates and what they gate; branches of an inception.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from graphopt.ir import ops
from graphopt.ir.driver import Session
from graphopt.ir.ops import plus
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass
from graphopt.passes.canonicalize import merge_duplicates


@rewrite
def stack_concatenated(cat: ops.Cat, rw: Rewriter) -> Value:
    """Convolutions or linear maps of one input whose outputs are concatenated are one."""
    tensors = cat.tensors
    for at, (left, right) in enumerate(itertools.pairwise(tensors)):
        pair: Any = left.op, right.op
        for cls in (ops.Conv, ops.Linear):
            if isinstance(pair[0], cls) and isinstance(pair[1], cls) and _alike(*pair):
                rw.match(_features(pair[0]) == cat.dim)
                rw.match(rw.only_user(left, cat) and rw.only_user(right, cat))
                wide = _stacked(rw, pair)
                rw.pays([*pair, *([cat] if len(tensors) == 2 else [])], wide)
                rest = (*tensors[:at], wide, *tensors[at + 2 :])
                return wide if len(rest) == 1 else rw.emit_like(cat, tensors=rest)
    rw.decline("no neighbours are maps of one input", near=False)


@rewrite
def stack_siblings(first: ops.Conv | ops.Linear, rw: Rewriter) -> Value:
    """Convolutions or linear maps of one input are slices of one."""
    cls: Any = ops.Conv if isinstance(first, ops.Conv) else ops.Linear
    siblings = [one for one in rw.readers(first.input, cls) if _alike(first, one)]
    rw.match(len(siblings) > 1 and siblings[0].out == first.out and not first.out.is_constant)
    wide = _stacked(rw, siblings)
    pieces, start = [], 0
    for one in siblings:
        pieces.append(wide.narrow(_features(one), start, one.weight.shape[0]))
        start += one.weight.shape[0]
    rw.pays(siblings, *pieces)
    for one, piece in list(zip(siblings, pieces, strict=True))[1:]:
        rw.replace(one.out, piece)
    return pieces[0]


@rewrite
def stack_added(op: ops.Add, rw: Rewriter) -> Value:
    """Linear maps of one activation of linear maps of one input add up to a wider one."""
    outer = [rw.producer(one, ops.Linear) for one in (op.left, op.right)]
    rw.match(all(rw.only_user(one, op) and one.weight.is_constant for one in outer))
    acts = [rw.producer(one.input, ops.Activation) for one in outer]
    rw.match(_same_function(*acts))
    inner = [rw.producer(one.input, ops.Linear) for one in acts]
    rw.match(_alike(*inner))
    chain = [*zip(acts, outer, strict=True), *zip(inner, acts, strict=True)]
    rw.match(all(rw.only_user(one, reader) for one, reader in chain))
    rw.match(outer[0].weight.dtype == outer[1].weight.dtype == op.out.dtype)
    hidden = rw.emit_like(acts[0], input=_stacked(rw, inner))
    weight = rw.emit(ops.Cat(tuple(one.weight for one in outer), 1))
    wide = rw.emit_like(
        outer[0], input=hidden, weight=weight, bias=plus(outer[0].bias, outer[1].bias)
    )
    rw.pays([op, *outer, *acts, *inner], wide)
    return wide


def _same_function(left: ops.Op, right: ops.Op) -> bool:
    """Whether two activations are one function, the same for all features."""
    kinds = ops.Activation.__subclasses__()
    if any(isinstance(left, one) != isinstance(right, one) for one in kinds):
        return False
    pairs = [(getattr(left, one), getattr(right, one)) for one in left.field_names() - {"input"}]
    return all(not isinstance(a, Value) and a == b for a, b in pairs)


def _features(one: Any) -> int:
    """The axis of the output that the rows of the weight make."""
    return one.channel_axis if isinstance(one, ops.Conv) else one.out.ndim - 1


def _alike(left: Any, right: Any) -> bool:
    """Whether two maps of one class read the same input in the same way."""
    if left.input != right.input or left.weight.dtype != right.weight.dtype:
        return False
    parameters = (left.weight, left.bias, right.weight, right.bias)
    if not all(one is None or one.is_constant for one in parameters):
        return False
    if isinstance(left, ops.Linear):
        return True
    return bool(
        not left.transposed and not right.transposed
        and left.groups == 1 and right.groups == 1
        and left.kernel == right.kernel and left.stride == right.stride
        and left.padding == right.padding and left.dilation == right.dilation
    )  # fmt: skip


def _stacked(rw: Rewriter, maps: Sequence[Any]) -> Value:
    weight = rw.emit(ops.Cat(tuple(one.weight for one in maps), 0))
    bias = None
    if any(one.bias is not None for one in maps):
        bias = rw.emit(ops.Cat(tuple(_bias(rw, one) for one in maps), 0))
    return rw.emit_like(maps[0], weight=weight, bias=bias)


def _bias(rw: Rewriter, one: Any) -> Value:
    if one.bias is not None:
        return one.bias  # type: ignore[no-any-return]
    weight = one.weight
    return rw.emit(ops.Full((weight.shape[0],), 0.0, weight.dtype, weight.meta.device))


@dataclasses.dataclass(frozen=True)
class StackSiblings(RewritePass):
    """Convolutions or linear maps of one input become one, where that is faster."""

    name = "stack-siblings"
    rewrites = (stack_added, stack_concatenated, stack_siblings)

    def run(self, session: Session) -> None:
        for one in self.rewrites:  # slices that are concatenated again are no siblings
            session.run([one])
        merge_duplicates(session)  # the same weights may be stacked for several inputs
