"""Graphs of calls as text: JSON in which only names of ops stand, so that reading runs no code.

For programs that an op carries in an argument, as `graphopt::with_gradient` does. The text of a graph with
two inputs is

    {"nodes": [["x", "placeholder", "x", [], {"dict": []}],
     ["y", "placeholder", "y", [], {"dict": []}],
     ["mul", "call_function", "aten::mul.Tensor", [{"node": "x"}, {"node": "y"}], {"dict": []}],
     ["output", "output", "output", [{"tuple": [{"node": "mul"}]}], {"dict": []}]]}
"""

from __future__ import annotations

import json
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.ops.base import overload

# Python functions on symbolic sizes that a graph may call; nothing else is ever looked up.
_FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne",
        "lt", "le", "gt", "ge", "and_", "or_", "not_", "abs")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_max", "sym_min", "sym_not", "sym_float", "sym_int", "sym_ite")},
}  # fmt: skip
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_TAGGED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class TextError(ValueError):
    """A graph that cannot be written as text, or text that is not one."""


def write(graph: fx.Graph, **more: Any) -> str:
    """A graph as text; `more` is plain data that stands beside it.

    Raises:
        TextError: for calls and arguments that have no portable name.
    """
    nodes = [
        [node.name, node.op, target_name(node), encode(list(node.args)), encode(node.kwargs)]
        for node in graph.nodes
    ]
    return json.dumps({**more, "nodes": nodes}, separators=(",", ":"), allow_nan=False)


def read(text: str) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The graph that a text holds, as a callable, and what stands beside it.

    Raises:
        TextError: if it is not such a text, or names what is unknown here.
    """
    try:
        data = json.loads(text)
        entries = data.pop("nodes")
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for name, kind, target, args, kwargs in entries:
            if kind not in ("placeholder", "call_function", "output"):
                raise TextError(f"{name} is a {kind}, expected a call, an input or the output")
            nodes[name] = graph.create_node(
                kind, target_of(kind, target), tuple(decode(args, nodes)), decode(kwargs, nodes),
                name=name,
            )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextError(f"not the text of a graph: {error!r}") from error
    return fx.GraphModule(nn.Module(), graph), data


def target_name(node: fx.Node) -> str:
    """The portable name of what a node calls."""
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return f"{schema.name}.{schema.overload_name or 'default'}"
    name = _NAMES.get(node.target)
    if name is None:
        raise TextError(f"{node.name}: {node.target} has no portable name")
    return name


def target_of(kind: str, name: str) -> Any:
    """The inverse of `target_name`."""
    if kind != "call_function":
        return name
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    found = overload(name) if "::" in name else None
    if not isinstance(found, torch._ops.OpOverload):
        raise TextError(f"unknown op {name}; is the library that defines it imported?")
    return found


def encode(value: Any) -> Any:
    """Arguments as JSON; nodes, tuples and torch's enumerations become tagged objects."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(one) for one in value]}
    if isinstance(value, list):
        return [encode(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[key, encode(one)] for key, one in value.items()]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, _TAGGED):
        return {"torch": type(value).__name__, "value": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    raise TextError(f"an argument of type {type(value).__name__} cannot be saved")


def decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(one, nodes) for one in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return nodes[value["node"]]
    if "tuple" in value:
        return tuple(decode(one, nodes) for one in value["tuple"])
    if "dict" in value:
        return {key: decode(one, nodes) for key, one in value["dict"]}
    if "float" in value:
        return float(value["float"])
    if "slice" in value:
        return slice(*(decode(one, nodes) for one in value["slice"]))
    if value.get("torch") == "device":
        return torch.device(value["value"])
    found = getattr(torch, value["value"], None)
    if not isinstance(found, _TAGGED):
        raise TextError(f"unknown torch constant {value['value']!r}")
    return found
