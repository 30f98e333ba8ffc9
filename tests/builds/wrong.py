"""A user's pass whose rewrite is wrong."""

from __future__ import annotations

from graphopt import Algebraic, RewritePass, Rewriter, rewrite
from graphopt.ir import ops


@rewrite(contract=Algebraic(), unproved="it is wrong on purpose")
def forget_relu(op: ops.Relu, rw: Rewriter):
    """relu(x) = -x"""
    return rw.emit(ops.Neg(op.input))


class ForgetRelu(RewritePass):
    """Makes a relu a negation."""

    name = "forget-relu"
    rewrites = (forget_relu,)
