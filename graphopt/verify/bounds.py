"""A-priori rounding bounds for one site.

Running the site on absolute values gives A; then for any order of summation
|computed - exact| <= gamma_n(u) * A with gamma_k = k u / (1 - k u), where n counts the rounding
errors along the longest path. Two correct evaluations differ by at most the sum of their bounds.
Source: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.interpret import Interpreter, is_getitem, nbytes
from graphopt.ir.value import Value

UNIT_ROUNDOFF = 2.0**-53
# Roundings per op besides its sum: the product, the bias, and slack for libm's functions.
ROUNDINGS_PER_OP = 4
# Where values underflow, errors are absolute: this much more magnitude covers them.
UNDERFLOW = 2.0**-1000


def gamma(count: float) -> float:
    return count * UNIT_ROUNDOFF / (1 - count * UNIT_ROUNDOFF)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """What is known of a node of a site."""

    value: Any
    magnitude: Any
    count: int
    unknown: str = ""
    dear: bool = False  # sums over many products


# A node of the cut, or the number of a computation.
Source = fx.Node | int


class Memory:
    """What sites have computed, for the sites after them: rewrites in a row share most of theirs.

    Only sums of products are kept, up to `limit` bytes; the rest is cheap. A computation has a number that
    says what it is made of, so that it is known again when it was forgotten on the way.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._numbers: dict[fx.Node, tuple[list[Any], tuple[Source, ...], int]] = {}
        self._kept: OrderedDict[fx.Node, tuple[int, Evaluated]] = OrderedDict()
        self._bytes = 0
        self._next = itertools.count()

    def number(self, node: fx.Node, inputs: tuple[Source, ...]) -> int:
        """That of computing a node from these."""
        call: list[Any] = [node.target, node.args, node.kwargs]
        known, before, number = self._numbers.get(node, ([None] * 3, (), -1))
        if before != inputs or not all(map(operator.is_, known, call)):
            number = next(self._next)
            self._numbers[node] = call, inputs, number
        return number

    def find(self, node: fx.Node, number: int) -> Evaluated | None:
        kept, found = self._kept.get(node, (None, None))
        if kept != number:
            return None
        self._kept.move_to_end(node)
        return found

    def keep(self, node: fx.Node, number: int, found: Evaluated) -> None:
        self._drop(node)
        if found.dear:
            self._kept[node] = number, found
            self._bytes += _size(found)
        while self._bytes > self.limit:
            self._drop(next(iter(self._kept)))

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        """These are erased."""
        for node in nodes:
            self._drop(node)
            self._numbers.pop(node, None)

    def _drop(self, node: fx.Node) -> None:
        if node in self._kept:
            self._bytes -= _size(self._kept.pop(node)[1])


def _size(found: Evaluated) -> int:
    return nbytes(found.value) + nbytes(found.magnitude)


class Site:
    """The values, magnitudes and rounding counts of the nodes of a site, from its cut upwards."""

    def __init__(
        self, graph: Graph, known: Mapping[fx.Node, Any], memory: Memory | None = None
    ) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self.magnitudes: dict[fx.Node, Any] = {}
        self.counts: dict[fx.Node, int] = {}
        self.unknown: str = ""
        self._sources: dict[fx.Node, Source] = {}
        self._memory = Memory(0) if memory is None else memory
        self._interpreter = Interpreter(graph, lifted=True, writes=False)
        for node, value in known.items():
            self.know(node, value)

    def know(self, node: fx.Node, value: Any) -> None:
        """Take a value as exact."""
        self.values[node], self.magnitudes[node], self.counts[node] = value, _abs(value), 0
        self._sources[node] = node

    def drop(self, node: fx.Node) -> None:
        """What is known of a node is not needed any more."""
        for kept in (self.values, self.magnitudes, self.counts, self._sources):
            kept.pop(node, None)  # type: ignore[attr-defined]

    def add(self, node: fx.Node) -> None:
        """Evaluate one node whose inputs are known."""
        number = self._memory.number(
            node, tuple(self._sources[one] for one in node.all_input_nodes)
        )
        found = self._memory.find(node, number)
        if found is None:
            found = self._evaluated(node)
            self._memory.keep(node, number, found)
        self._sources[node] = number
        self.values[node], self.magnitudes[node] = found.value, found.magnitude
        self.counts[node] = found.count
        self.unknown = self.unknown or found.unknown

    def _evaluated(self, node: fx.Node) -> Evaluated:
        value = self._interpreter.call(node, self.values)
        below = max((self.counts[one] for one in node.all_input_nodes), default=0)
        if is_getitem(node):
            whole = self.magnitudes[node.args[0]]  # type: ignore[index]
            bound = None if whole is None else whole[node.args[1]]
            return Evaluated(value, bound, below)
        op = Builder(self.graph, node).view(node)
        reduction = op.reduction if op is not None else 1
        bound = None
        if not _is_floating(value):
            bound = _abs(value)  # integers and booleans carry no rounding
        elif op is not None and all(
            self.magnitudes[one] is not None for one in node.all_input_nodes
        ):
            self.values[node] = value
            bound = op.magnitude(
                lambda v: self.values[v.node],
                lambda v: self.magnitudes[v.node],
                lambda pick: self._rerun(node, pick),
            )
        unknown = str(node.target) if bound is None else ""
        return Evaluated(value, bound, below + ROUNDINGS_PER_OP + reduction, unknown, reduction > 1)

    def _rerun(self, node: fx.Node, pick: Any) -> Any:
        builder = Builder(self.graph, node)
        env = {one: pick(Value(one, builder)) for one in node.all_input_nodes}
        return self._interpreter.call(node, env)

    def tolerance(self, node: fx.Node) -> Any:
        magnitude, factor = self.magnitudes[node], gamma(self.counts[node])
        return None if magnitude is None else magnitude * factor + UNDERFLOW * factor


def _abs(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.abs() if value.dtype is not torch.bool else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_abs, value))
    return abs(value) if isinstance(value, (int, float)) else value


def _is_floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_is_floating, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
