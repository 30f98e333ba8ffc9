"""Masks of attention that are parameters are read without their gradients.

    attention(q, k, v, mask)  =  attention(q, k, v, detach(mask))

For graphs that are run only, behind `materialize`: torch's fused kernels take no mask that requires a
gradient, even where none is computed. 64 windows of 3 x 49 x 32 with a bias, in us on one core: 4756 with a
parameter as mask, 1578 with the same numbers detached. Another kernel rounds otherwise.
"""

from __future__ import annotations

import dataclasses

from graphopt.ir import ops
from graphopt.ir.rewrite import Rewriter, rewrite
from graphopt.ir.value import Value
from graphopt.passes.base import RewritePass


@rewrite(
    unproved="a detached value is that value; "
    "tests/passes/test_recognize_attention.py compares attention with and without"
)
def detach_mask(op: ops.Attention, rw: Rewriter) -> Value:
    """A mask made of parameters is detached."""
    mask = op.attn_mask
    rw.match(isinstance(mask, Value) and mask.dtype.is_floating_point)
    assert isinstance(mask, Value)
    base = mask
    while isinstance(inner := base.op, (ops.Expand, ops.Reshape, ops.Permute)):
        base = inner.input
    rw.match(base.is_constant and not isinstance(base.op, ops.Detach))
    rw.match(not isinstance(mask.op, ops.Detach))
    return rw.emit(op.replace(attn_mask=rw.emit(ops.Detach(mask))), like=op)


@dataclasses.dataclass(frozen=True)
class DetachMasks(RewritePass):
    """Attention reads parameters as masks without their gradients."""

    name = "detach-masks"
    rewrites = (detach_mask,)
