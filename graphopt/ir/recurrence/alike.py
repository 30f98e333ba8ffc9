"""When operations of two steps are the same, and how they differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.affine import same_shape
from graphopt.ir.recurrence.steps import filled, tensor

# What takes a number as last argument takes a tensor there as well, with the same meaning.
_TAKING = {
    f"aten::{one}" for one in ("add", "sub", "mul", "div", "gt", "ge", "lt", "le", "eq", "ne")
}


def taking_tensor(call: fx.Node) -> Any:
    """The operator that takes a tensor where a call of one of these, without further arguments, has a
    number; None for other calls, and where a tensor would be rounded (to a half)."""
    schema = getattr(call.target, "_schema", None)
    if schema is None or schema.name not in _TAKING or len(call.args) != 2 or call.kwargs:
        return None
    left, right = call.args
    if not isinstance(left, fx.Node) or type(right) not in (int, float):
        return None
    if tensor(left).dtype not in (torch.float32, torch.float64):
        return None
    return call.target.overloadpacket.Tensor  # type: ignore[union-attr]


def difference(a: fx.Node, b: fx.Node) -> str:
    """b instead of a, in words."""
    left, right = tensor(a), tensor(b)
    if left.dtype != right.dtype or not same_shape(left.shape, right.shape):
        kinds = (f"{one.dtype} {list(one.shape)}".removeprefix("torch.") for one in (right, left))
        found, expected = kinds
        return f"{b.name} is {found}, expected {expected} as {a.name}"
    if a.target is b.target and a.op == "call_function":
        other, own = literals(b), literals(a)
        if len(other) == len(own) and other != own:
            numbers = [[one[1] for one in some if one is not None] for some in (other, own)]
            return f"{b.name} ({b.target}) with {numbers[0]}, expected {numbers[1]} as {a.name}"
    return f"{b.name} ({b.target}), expected {a.name} ({a.target})"


def same_constant(a: fx.Node, b: fx.Node) -> bool:
    value = filled(a)
    return value is not None and value == filled(b) and tensor(a).dtype == tensor(b).dtype


def flat(node: fx.Node) -> list[Any]:
    return [*node.args, *(node.kwargs[key] for key in sorted(node.kwargs))]


def literals(node: fx.Node) -> list[Any]:
    return [None if isinstance(one, fx.Node) else (type(one), one) for one in flat(node)]
