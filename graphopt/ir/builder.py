"""The builder: reads nodes as op views and writes op views as nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.ops import base
from graphopt.ir.value import Value


class Builder:
    """Emits nodes before a given position of a graph; remembers them, and whose views it gave."""

    def __init__(self, graph: Graph, before: fx.Node) -> None:
        self.graph = graph
        self.before = before
        self.made: list[fx.Node] = []
        self.seen: dict[fx.Node, None] = {}

    def value(self, node: fx.Node) -> Value:
        return Value(node, self)

    def view(self, node: fx.Node) -> base.Op | None:
        """The op view of a node; None for inputs, states and unknown ops."""
        op = base.view(node, self)
        if op is not None:
            self.seen[node] = None
        return op

    def same(self, left: fx.Node, right: fx.Node) -> bool:
        """Whether two nodes are one value."""
        return left is right

    def state(self, name: str) -> Value:
        """A parameter or buffer by name."""
        return Value(self.graph.read(name), self)

    def emit(self, op: base.Op, like: base.Op | None = None) -> Value:
        """Write an op into the graph. `like` names the op whose place in the source it takes.

        Raises whatever torch raises for impossible shapes or dtypes; the graph is then unchanged
        once the rewriter rolls back.
        """
        target, arguments = op.build()
        return self.call(target, arguments, like)

    def emit_once(self, op: base.Op, like: base.Op | None = None) -> Value:
        """`emit`, or an equal call on the same values that is computed before already."""
        target, arguments = op.build()
        args, kwargs = positional(target, arguments)
        for node in args[0].users:
            if (node.target, node.args, node.kwargs) == (
                target,
                args,
                kwargs,
            ) and node < self.before:
                return Value(node, self)
        return self.emit(op, like)

    def call(self, target: Any, arguments: dict[str, Any], like: base.Op | None = None) -> Value:
        args, kwargs = positional(target, arguments)
        with self.graph.fx.inserting_before(self.before):
            source = like.out.node if like is not None else None
            name = source.name if source is not None else None
            node = self.graph.fx.create_node("call_function", target, args, kwargs, name=name)
        self.made.append(node)
        for one in node.all_input_nodes:
            if not self.lift(one, node):
                raise ValueError(f"{one.name} is computed after {self.before.name}, which needs it")
        place = source if source is not None else self.before
        for key in ("where", "made_by") if source is None else ("where", "made_by", "absorbed"):
            if key in place.meta:
                node.meta[key] = place.meta[key]
        node.meta["val"] = infer(self.graph, target, args, kwargs)
        return Value(node, self)

    def lift(self, node: fx.Node, before: fx.Node) -> bool:
        """Move a node in front of another one, with all it depends on, if it is a parameter's or
        was emitted here. Whether it stands in front now."""
        if node < before:
            return True
        if node not in self.made and not self.graph.is_constant(node):
            return False
        if not all(self.lift(one, before) for one in node.all_input_nodes):
            return False
        before.prepend(node)
        return True

    def rollback(self, since: int = 0) -> None:
        """Erase everything emitted after the first `since` nodes."""
        for node in reversed(self.made[since:]):
            if not node._erased:
                self.graph.fx.erase_node(node)
        del self.made[since:]


def infer(graph: Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """The fake result of a call on fake arguments."""
    args, kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    with graph.fake_mode, torch.no_grad():
        return target(*args, **kwargs)


def _unwrap(argument: Any) -> Any:
    if isinstance(argument, Value):
        return argument.node
    if isinstance(argument, (tuple, list)):
        return [_unwrap(item) for item in argument]
    return argument


def positional(target: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Schema order, with trailing defaults left out: the spelling the printer and users expect."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    keep = 0
    for argument in target._schema.arguments:
        default = argument.default_value if argument.has_default_value() else None
        given = arguments.get(argument.name, default)
        value = _unwrap(given)
        at_default = (
            argument.has_default_value()
            and not isinstance(value, fx.Node)
            and (value == default or (default is None and value is None))
        )
        if argument.kwarg_only:
            if not at_default:
                kwargs[argument.name] = value
            continue
        args.append(value)
        if not at_default:
            keep = len(args)
    return tuple(args[:keep]), kwargs
