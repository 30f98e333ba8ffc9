"""Labels through values whose gradient is given: those of the results, if the backward works by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.channels.trace import Trace, rule, shape_of
from graphopt.ir.ops.gradient import backward_of

_KEEPS = {
    "to",
    "clone",
    "detach",
    "alias",
    "contiguous",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
}
_MASKS = {"ge", "gt", "le", "lt", "eq", "ne", "logical_and", "logical_or", "logical_not", "bitwise_and",
          "bitwise_or", "bitwise_not", "__and__", "__or__"}  # fmt: skip


@rule.register(ops.WithGradient)
def _(op: ops.WithGradient, t: Trace) -> Any:
    shapes = [shape_of(one) for one in op.out.meta]
    operands = [*op.results, *op.inputs, *op.saved]
    if any(shape_of(one.meta) != shapes[0] for one in operands):
        return None
    if not all(map(_by_entry, backward_of(op.backward).graph.graph.nodes)):
        return None
    together = t.elementwise(shapes[0], *(t[one] for one in operands))
    return [together for _ in shapes]


def _by_entry(node: fx.Node) -> bool:
    """Whether an op treats every entry of equally large tensors alike, and apart from the others."""
    if node.op != "call_function":
        return True
    name = _name(node)
    if name == "full":
        return node.args[0] in ([], ())
    if name in ("index", "index_put"):  # by a mask
        mask, *rest = list(node.args[1])  # type: ignore[arg-type]
        return not rest and isinstance(mask, fx.Node) and _name(mask) in _MASKS
    return name in _KEEPS | _MASKS or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]
