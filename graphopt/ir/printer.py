"""Graphs as text that a person can read and diff.

    graph(x: f32[s0, 3, 224, 224])
      conv2d: f32[s0, 64, 112, 112] = Conv(x, @conv1.weight, None, stride=(2, 2), ...)  # conv1
      return conv2d

States are written `@name`; fields at their defaults are left out. Below a scan stands its step:

      scan: (f32[4, s0, 8], f32[s0, 8]) = Scan(steps=4, states=(full_like,), xs=(linear,), others=())
        | step(v, x):  v = v + (x - v) / 2
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.value import Value

_PROGRAM: dict[Any, str] = {ops.Scan: "body", ops.WithGradient: "backward"}  # shown below the call
_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "b8", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def text(graph: Graph) -> str:
    """The whole graph, one call a line."""
    inputs = ", ".join(f"{node.name}: {type_text(node)}" for node in graph.inputs)
    lines = [f"graph({inputs})"]
    for node in graph.fx.nodes:
        if node.op == "call_function":
            where = graph.where(node)
            lines.append(f"  {line(graph, node)}" + (f"  # {where}" if where else ""))
            lines += [f"    | {one}" for one in below(graph, node)]
        elif node.op == "output":
            lines.append(f"  return {', '.join(_argument(one) for one in node.args[0])}")
    return "\n".join(lines)


def line(graph: Graph, node: fx.Node) -> str:
    """One call: name, type, op with its fields."""
    op = Builder(graph, node).view(node)
    if op is None:
        name = str(node.target).removeprefix("aten.")
        if not isinstance(node.target, torch._ops.OpOverload):
            name = getattr(node.target, "__name__", name)
        fields = [_argument(one) for one in node.args]
        fields += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    else:
        name, fields = type(op).__name__, []
        named = False
        for field in dataclasses.fields(op):
            value = getattr(op, field.name)
            if field.name in ("out", _PROGRAM.get(type(op))):
                continue
            if _is_default(field, value):
                named = True
                continue
            plain = isinstance(value, Value) or value is None
            named = named or not plain
            fields.append(f"{field.name}={_argument(value)}" if named else _argument(value))
    return f"{node.name}: {type_text(node)} = {name}({', '.join(fields)})"


def below(graph: Graph, node: fx.Node) -> list[str]:
    """What a call has inside of it: the formulas of a scan's step, or of a gradient."""
    op = Builder(graph, node).view(node)
    return op.formulas() if isinstance(op, (ops.Scan, ops.WithGradient)) else []


def type_text(node: fx.Node) -> str:
    """`f32[s0, 8]`, `(f32[2], f32[2])` for lists, `int` for sizes."""
    return _type(node.meta.get("val"))


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_type, value))})"
    if isinstance(value, (int, torch.SymInt)):
        return "int"
    return type(value).__name__


def _argument(value: Any) -> str:
    if isinstance(value, Value):
        value = value.node
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value)


def _is_default(field: Any, value: Any) -> bool:
    if isinstance(value, Value) or field.default is dataclasses.MISSING:
        return False
    return bool(value == field.default)
