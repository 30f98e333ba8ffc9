"""Pointwise expression graphs as lines of Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion

from graphopt.backends.triton import scalars
from graphopt.backends.triton.families.common import tensor
from graphopt.backends.triton.kinds import bind, unsupported
from graphopt.backends.triton.region import Outside
from graphopt.backends.triton.scalars import register, spelled


def lines(graph: fx.Graph, operands: Sequence[str]) -> tuple[list[str], list[str]]:
    """(assignments, names of what the graph returns). `operands` are the placeholders' names; values
    are held in `register(dtype)`.

    Raises:
        Outside: naming an operation without a formula.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = dict(zip(inputs, operands, strict=True))
    printed: list[str] = []
    taken = {*operands, "i", "t", "inside", "count", "rest", "tl", "device"}
    for node in graph.nodes:
        if node.op == "call_function":
            name = node.name.lstrip("_")
            while name in taken:
                name += "_"
            taken.add(name)
            printed.append(f"{name} = {formula(node, names)}")
            names[node] = name
    (returned,) = graph.output_node().args
    return printed, [names[one] for one in returned]  # type: ignore


def formula(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """A node's expression over the names of what it reads."""
    entry = scalars.TABLE.get(node.target)
    if entry is None:
        raise Outside(f"{node.name} ({node.target}) is not pointwise or has no formula")
    if why := unsupported(node, tensor(node)):
        raise Outside(f"{node.name} ({node.target}): {why}")
    arguments = bind(node)
    computed = entry.compute(arguments)
    texts = []
    for name in entry.operands:
        if (value := arguments.pop(name)) is None:
            texts.append("")
            continue
        typed = entry.typed is None or name in entry.typed
        texts.append(_operand(value, computed if typed else None, names))
    arguments.pop("dtype", None)
    text = entry.text(computed, *texts, **arguments)
    dtype, held = tensor(node).dtype, register(tensor(node).dtype)
    made = torch.bool if entry.promotion is Promotion.ALWAYS_BOOL else computed
    if node.target is torch.ops.aten._to_copy.default and dtype != held:
        if computed.is_floating_point:
            return f"{text}.to({spelled(dtype)}).to({spelled(held)})"
        rounded = "" if computed == torch.bool else f".to({spelled(dtype)}).to({spelled(held)})"
        return f"{text}.to({spelled(held)}){rounded}"
    if made == held:
        return text
    return f"({text} != 0)" if held == torch.bool else f"({text}).to({spelled(held)})"


def _operand(value: Any, dtype: torch.dtype | None, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        held = register(tensor(value).dtype)
        return names[value] if dtype in (None, held) else f"{names[value]}.to({spelled(dtype)})"
    text = scalars.literal(value, dtype or torch.bool)
    if dtype == torch.float64 and float(numpy.float32(value)) != value:
        return f"tl.full([], {text}, tl.float64)"  # a literal alone may become float32
    return text


def flops(graph: fx.Graph) -> int:
    """Floating-point operations per element."""
    entries = (scalars.TABLE.get(node.target) for node in graph.nodes)
    return sum(entry.flops for entry in entries if entry is not None)
