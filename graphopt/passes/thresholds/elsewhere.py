"""Norms that stay as they are because others of the same loop do."""

from __future__ import annotations

from typing import Any

from graphopt.ir import ops
from graphopt.ir.many import slots
from graphopt.ir.rewrite import Rewriter

MOST_BETWEEN = 64  # ops between the norms of two steps


def stays_elsewhere(rw: Rewriter, norm: ops.BatchNorm) -> bool:
    """Whether another call of a norm has several readers, as all have whose result is a state: then the
    last one of a loop, which nothing follows, is no gain. Where every step has a norm of its own, it is
    the one before that counts."""
    mean = norm.running_mean
    calls = [rw.view(user) for user in mean.users] if mean is not None else []
    return any(
        isinstance(one, ops.BatchNorm) and one.weight == norm.weight and len(one.out.users) > 1
        for one in calls if one is not None and one.out != norm.out
    ) or _follows_a_state(rw, norm)  # fmt: skip


def _follows_a_state(rw: Rewriter, norm: ops.BatchNorm) -> bool:
    """Whether what a norm reads is made element by element of a norm that has several readers, with
    parameters of the same shapes."""

    def kinds(one: ops.BatchNorm) -> list[Any]:
        given = (one.weight, one.bias, one.running_mean, one.running_var)
        return [None if value is None else str(value.shape) for value in given]

    stack, seen = [norm.input], set[Any]()
    while stack and len(seen) < MOST_BETWEEN:
        value = stack.pop()
        op = value.op
        if value.node in seen or value.is_constant:
            continue
        seen.add(value.node)
        if isinstance(op, ops.BatchNorm):
            if len(value.users) > 1 and kinds(op) == kinds(norm):
                return True
        elif isinstance(op, (ops.Binary, ops.Unary, ops.Compare, ops.Where, ops.Cast)):
            stack += slots(op).values()
    return False
