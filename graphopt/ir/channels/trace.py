"""Labels pushed through a graph.

A rule says which axes of the operands of an op meet, and which of them come out. Ops without a rule fix
the labels of all they read. Data movement has no rules: it is executed (`Coupling.moved`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.channels.labels import Coupling, Labels, Layers, Places
from graphopt.ir.graph import Graph, is_overload
from graphopt.ir.interpret import Evaluator
from graphopt.ir.ops.base import hint
from graphopt.ir.value import Value

MOVEMENT = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Select, ops.Split, ops.Flip, ops.Roll,
    ops.PixelShuffle, ops.PixelUnshuffle, ops.ChannelShuffle, ops.Repeat, ops.RepeatInterleave,
)  # fmt: skip
POINTWISE = (ops.Unary, ops.Binary, ops.Compare, ops.Where)
_MOVEMENT_TOO = {"unbind", "unfold", "rot90", "swapaxes"}


class Trace:
    """The labels of every value of a graph, at the sizes of the example; `known` is for `Coupling`,
    the axes of inputs and outputs (`free`) may be fixed or not."""

    def __init__(
        self, graph: Graph, known: Places | None = None,
        free: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.graph, self.coupling, self._free = graph, Coupling(known), free
        self.constants = Evaluator(graph)
        self.labels: dict[fx.Node, Any] = {}
        self.statistics: dict[fx.Node, str] = {}
        self.builder = Builder(graph, next(iter(reversed(graph.fx.nodes))))
        for node in graph.fx.nodes:
            self._visit(node)

    def of(self, value: Value) -> Labels:
        found = self.labels[value.node]
        assert isinstance(found, Labels)
        return found

    def __getitem__(self, value: Value) -> Labels:
        return self.of(value)

    def _visit(self, node: fx.Node) -> None:
        found = node.meta.get("val")
        if node.op == "output":
            for one in node.all_input_nodes if "outputs" not in self._free else ():
                self._fix(one, "it is an output of the model")
            return
        if node.op == "placeholder" or not has_tensors(found):
            self.labels[node] = _blank(found)
            if node.op == "placeholder" and "inputs" in self._free and isinstance(found, Tensor):
                self.labels[node].fresh = {
                    i for i, n in enumerate(found.shape) if isinstance(n, int)
                }
            if node.target is torch.ops.aten.sym_size.int:
                source, axis = node.args
                self.fix(self.labels[source], [axis], f"{node.name} is its size")  # type: ignore[index]
            elif node.op == "call_function":
                for one in node.all_input_nodes:
                    self._fix(one, f"{node.name} reads it")
            return
        if node.op == "get_attr" or not node.all_input_nodes:
            given = (
                node.op == "get_attr" and self.graph.states[str(node.target)].kind != "parameter"
            )
            labels = Labels(shape_of(found), name=node.name, given=given)
            labels.fresh = {axis for axis, size in enumerate(labels.shape) if size > 1}
            self.labels[node] = labels
            return
        if node.target is operator.getitem:
            source, index = node.args
            self.labels[node] = self.labels[source][index]  # type: ignore[index]
            return
        op = self.builder.view(node)
        made: Any = None
        if isinstance(op, MOVEMENT) or name_of(node) in _MOVEMENT_TOO:
            made = self._moved(node, op)
        elif op is not None and rule.dispatch(type(op)) is not rule.dispatch(object):
            made = rule(op, self)
        elif isinstance(op, POINTWISE) or _tagged(node):
            made = self.elementwise(shape_of(found), *self._operands(node))
        elif is_overload(node.target):
            made = self._named(node)
        if made is None:
            for one in node.all_input_nodes:
                self._fix(one, f"{getattr(node.target, '__name__', node.target)} is not understood")
            made = _blank(found)
        self.labels[node] = made

    def _operands(self, node: fx.Node) -> list[Labels]:
        found = [self.labels[one] for one in node.all_input_nodes]
        return [one for one in found if isinstance(one, Labels)]

    def _named(self, node: fx.Node) -> Any:
        found = NAMED.get(name_of(node))
        return None if found is None else found(ops.base.Call(node, self.builder), self)

    def _moved(self, node: fx.Node, op: ops.Op | None) -> Any:
        source: Any = node.args[0]
        labels = self.labels[source]
        if not isinstance(labels, Labels):
            return None
        found = node.meta["val"]
        several = isinstance(found, (list, tuple))
        shapes = [shape_of(one) for one in (found if several else [found])]
        laid_out = isinstance(op, (ops.Reshape, ops.Expand))  # another operand may give the shape
        for other in node.all_input_nodes:
            if other is not source and has_tensors(other.meta.get("val")) and not laid_out:
                return None

        def run(spread: Tensor) -> Any:
            if laid_out:
                return (spread.reshape if isinstance(op, ops.Reshape) else spread.expand)(shapes[0])
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda one: spread if one is source else hint(one.meta["val"]),
            )
            return node.target(*_plain(args), **_plain(kwargs))  # type: ignore[operator]

        results = self.coupling.moved(labels, run, shapes)
        return results if several else results[0]

    def _fix(self, node: fx.Node, reason: str) -> None:
        found = self.labels[node]
        for one in found if isinstance(found, list) else [found]:
            if one is not None:
                self.fix(one, range(len(one.shape)), reason)

    # -- for the rules --------------------------------------------------------------------------

    def fix(self, labels: Labels, axes: Any, reason: str) -> None:
        """Nothing of these axes may go away."""
        for axis in axes:
            axis %= len(labels.shape)
            self.coupling.fix(labels.layers(axis), reason)
            labels.fresh.discard(axis)
            labels.reasons.setdefault(axis, reason)

    def join(self, reason: str, *sides: tuple[Labels, int]) -> Layers:
        given = [(labels, axis % len(labels.shape)) for labels, axis in sides]
        return self.coupling.join(given, reason)

    def read(self, labels: Labels) -> Labels:
        """What a map reads: buffers are data there, and keep all entries."""
        self.coupling.materialize(labels)
        if labels.given:
            self.fix(labels, range(len(labels.shape)), "it is an axis of a buffer")
        return labels

    def meets(self, labels: Labels, axis: int, layers: Layers) -> None:
        """An axis of a parameter meets entries with these layers."""
        size = labels.shape[axis]
        self.join("it meets what is fixed", (labels, axis), (Labels((size,), {0: layers}), 0))

    def elementwise(self, shape: tuple[int, ...], *operands: Labels) -> Labels:
        """The labels of values that are combined entry by entry, with broadcasting."""
        out = Labels(shape, given=all(one.given for one in operands))
        for axis in range(len(shape)):
            sides = []
            for one in operands:
                at = axis - len(shape) + len(one.shape)
                if at < 0:
                    continue
                if one.shape[at] == shape[axis]:
                    sides.append((one, at))
                else:
                    self.fix(one, [at], "it is repeated for all entries of an axis")
            if sides and shape[axis] > 1:
                out.axes[axis] = self.join("it meets what is fixed", *sides)
        out.axes = {axis: layers for axis, layers in out.axes.items() if layers}
        return out

    def passed(self, labels: Labels, shape: tuple[int, ...], *without: int) -> Labels:
        """The labels of a value that keeps all axes but some, whose labels are fixed."""
        self.coupling.materialize(labels)
        without = tuple(axis % len(labels.shape) for axis in without)
        self.fix(labels, without, "entries along the axis are mixed with their neighbours")
        return Labels(
            shape, {axis: layers for axis, layers in labels.axes.items() if axis not in without}
        )


def has_tensors(found: Any) -> bool:
    if isinstance(found, (list, tuple)):
        return any(isinstance(one, Tensor) for one in found)
    return isinstance(found, Tensor)


def _blank(found: Any) -> Any:
    if isinstance(found, Tensor):
        return Labels(shape_of(found))
    if isinstance(found, (list, tuple)):
        return [_blank(one) for one in found]
    return None


def shape_of(found: Any) -> tuple[int, ...]:
    return tuple(hint(size) for size in found.shape)


def _plain(argument: Any) -> Any:
    """An argument with example sizes for symbolic ones."""
    if isinstance(argument, torch.SymInt):
        return hint(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(_plain, argument))
    if isinstance(argument, dict):
        return {key: _plain(value) for key, value in argument.items()}
    return argument


def _tagged(node: fx.Node) -> bool:
    return is_overload(node.target) and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]


def name_of(node: fx.Node) -> str:
    """The name of an op, without its overload."""
    return str(getattr(node.target, "__name__", "")).split(".")[0]


def leading(labels: Labels, without: int) -> Labels:
    """The labels of all axes but some of the last."""
    count = len(labels.shape) - without
    return Labels(
        labels.shape[:count], {axis: one for axis, one in labels.axes.items() if axis < count}
    )


@singledispatch
def rule(op: Any, t: Trace) -> Labels | None:
    """The labels of what an op makes; None if there is no rule."""
    return None


NAMED: dict[str, Callable[[ops.base.Call, Trace], Any]] = {}  # rules of ops without a view
