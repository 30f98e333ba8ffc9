"""Attention that is written out, read from the graph: a product of matrices, a softmax, another product.

    scores = q k^T,   changed by numbers, terms and masks,   weights = softmax(scores),   weights v

in any usual spelling (matmul, bmm, baddbmm, einsum; casts, copies and reshapes in between). What is made of
it is up to who reads: one op (`recognize-attention`), or another attention (`graphopt.training.swaps`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import fx

from graphopt.ir import ops
from graphopt.ir.ops.base import Call, overload
from graphopt.ir.value import Value

Product = ops.Matmul | ops.Addmm | ops.Einsum
_FILLS = [overload(name) for name in ("masked_fill.Scalar", "masked_fill.Tensor")]


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of the scores, with the value it results in.

    scale: times the number `operand`.      tensor: times or over the value `operand`.
    term: plus `operand`, negated or not.   mask: other values where a mask says so.
    shape: the same elements under another shape (casts and copies too).
    """

    kind: Literal["scale", "tensor", "term", "mask", "shape"]
    out: Value
    operand: Value | complex | None = None
    negative: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """The `product` of queries and keys, `steps` from there to the input of `softmax`, and `after` it up to
    what meets the values: the operand `side` of `root`."""

    root: ops.Matmul | ops.Einsum
    side: int
    product: Product
    steps: tuple[Step, ...]
    softmax: ops.Softmax
    after: tuple[Step, ...]

    @property
    def along_keys(self) -> bool:
        """Whether the softmax is over the last axis."""
        return self.softmax.dim % self.softmax.out.ndim == self.softmax.out.ndim - 1

    @property
    def weights_shared(self) -> bool:
        """Whether the weights are read elsewhere too."""
        weights = (self.softmax.out, *(step.out for step in self.after))
        return any(len(one.users) > 1 for one in weights)

    @property
    def scores_shared(self) -> bool:
        """Whether the scores are read elsewhere too."""
        scores = (self.product.out, *(step.out for step in self.steps))
        return any(len(one.users) > 1 for one in scores)


def read(op: Any) -> Attention | None:
    """The attention that an op completes, if it is written out."""
    if not isinstance(op, (ops.Matmul, ops.Einsum)):
        return None
    operands = (op.left,) if isinstance(op, ops.Matmul) else op.tensors
    for side, value in enumerate(operands):
        after: list[Step] = []
        while (inner := _idle(value)) is not None:
            after.append(Step("shape", value))
            value = inner
        if isinstance(softmax := value.op, ops.Softmax):
            found = _scores(softmax.input, set())
            if found is not None:
                return Attention(op, side, *found, softmax, tuple(reversed(after)))
    return None


def _idle(value: Value) -> Value | None:
    """What a value has the elements of, in the same order."""
    op: Any = value.op
    if isinstance(op, (ops.Cast, ops.Copy, ops.Reshape, ops.Expand)):
        return op.input
    return op.input if isinstance(op, ops.Dropout) and not op.train else None


def _scores(value: Any, seen: set[fx.Node]) -> tuple[Product, tuple[Step, ...]] | None:
    """The product that scores are made of and its changes, the first one first."""
    if not isinstance(value, Value) or value.node in seen:
        return None
    seen.add(value.node)
    op: Any = value.op
    if isinstance(op, (ops.Matmul, ops.Addmm, ops.Einsum)):
        return op, ()
    for inner, step in _changes(value, op):
        if (found := _scores(inner, seen)) is not None:
            return found[0], (*found[1], step)
    return None


def _changes(value: Value, op: Any) -> list[tuple[Any, Step]]:
    """Every operand that the last op of some scores may be a change of, and that change."""
    if (inner := _idle(value)) is not None:
        return [(inner, Step("shape", value))]
    if value.node.target in _FILLS:
        return [(Call(value.node, value.builder)["self"], Step("mask", value))]
    if isinstance(op, ops.Neg):
        return [(op.input, Step("scale", value, -1.0))]
    if not isinstance(op, (ops.Where, ops.Add, ops.Sub, ops.Mul, ops.Div)):
        return []
    left, right = op.left, op.right
    if isinstance(op, ops.Where):
        return [(left, Step("mask", value)), (right, Step("mask", value))]
    if isinstance(op, ops.Add):
        return [(left, Step("term", value, right)), (right, Step("term", value, left))]
    if isinstance(op, ops.Sub):
        return [(left, Step("term", value, right, negative=True))]
    if isinstance(op, ops.Mul):
        return [(left, _times(value, right)), (right, _times(value, left))]
    if isinstance(right, (int, float)):
        return [(left, Step("scale", value, 1.0 / right))] if right else []
    return [(left, Step("tensor", value))]


def _times(value: Value, factor: Any) -> Step:
    kind: Literal["scale", "tensor"] = "scale" if isinstance(factor, (int, float)) else "tensor"
    return Step(kind, value, factor)
