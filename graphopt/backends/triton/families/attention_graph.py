"""Products of three matrices in a graph, with pointwise maps before and a normalizer after them.

q (k^T v)  or  (q k^T) v,     then or in between a division by what is made of  q sum_n k_n
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.triton import kinds, scalars
from graphopt.backends.triton.families.common import is_pointwise, tensor
from graphopt.backends.triton.families.looking import PRODUCTS, idle, turned
from graphopt.backends.triton.region import Outside
from graphopt.ir.affine import same, same_shape

aten = torch.ops.aten
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclasses.dataclass
class Operand:
    """A matrix `node` `[*batch, rows, channels]` as views and pointwise ops of `raw`.

    `path` leads from `raw` to the node; `turns` says that `node` itself is read transposed. `map` is the
    pointwise part, a graph of one operand.
    """

    node: fx.Node
    raw: fx.Node
    path: list[fx.Node]
    map: fx.Graph

    @property
    def raw_dtype(self) -> torch.dtype:
        return tensor(self.raw).dtype

    def view(self, inputs: Sequence[fx.Node], sizes: Sequence[fx.Node]) -> Callable[..., Tensor]:
        """From a launcher's arguments to the matrix before its map."""
        graph = fx.Graph()
        twins = {node: graph.placeholder(node.name) for node in (*inputs, *sizes)}

        def copy(node: fx.Node) -> fx.Node:
            if node not in twins:
                for one in node.all_input_nodes:
                    copy(one)
                if node in self.path and is_pointwise(node):
                    twins[node] = twins[node.all_input_nodes[0]]
                else:
                    twins[node] = graph.node_copy(node, twins.__getitem__)
            return twins[node]

        graph.output(copy(self.node))
        return fx.GraphModule(torch.nn.Module(), graph)


@dataclasses.dataclass
class Attention:
    """What was matched. `factors`: numbers that the product is multiplied by; `mean`: whether the keys'
    sum is divided by their count; `normalizer`: a graph of num and den; `last`: the node it makes."""

    q: Operand
    k: Operand
    v: Operand
    factors: list[float]
    mean: bool
    normalizer: fx.Graph
    last: fx.Node
    nodes: set[fx.Node]


def attentions(
    graph: fx.Graph, reasons: list[tuple[fx.Node, str]]
) -> Iterator[tuple[fx.Node, Attention]]:
    """Every candidate, by its second product; adds to `reasons` where one is close."""
    for node in graph.nodes:
        if node.target in PRODUCTS and tensor(node).ndim >= 3:
            try:
                found = _Match(node).attention()
            except Outside as reason:
                reasons.append((node, str(reason)))
                continue
            if found is not None:
                yield node, found


def _plain(node: Any) -> Any:
    """A node without views that change nothing."""
    while isinstance(node, fx.Node) and idle(node):
        node = node.args[0]
    return node


def _matrix(node: fx.Node) -> tuple[fx.Node, bool]:
    """(matrix, whether it is read transposed)."""
    flipped = False
    node = _plain(node)
    while turned(node):
        node, flipped = _plain(node.args[0]), not flipped
    return node, flipped


class _Match:
    def __init__(self, second: fx.Node) -> None:
        self.second = second
        self.nodes: set[fx.Node] = set()
        self.factors: list[float] = []
        self.mean = False
        self.denominators: dict[fx.Node, bool] = {}

    def attention(self) -> Attention | None:
        left, right = self.second.args[:2]
        first, scaled = self._first(right)
        if first is not None:  # q (k^T v)
            keys, values, queries = first.args[0], first.args[1], left
            k, flipped = _matrix(keys)  # type: ignore[arg-type]
            if not flipped:
                return None
        else:
            first, scaled = self._first(left)
            if first is None:
                return None
            queries, keys, values = first.args[0], first.args[1], right
            k, flipped = _matrix(keys)  # type: ignore[arg-type]
            if not flipped:
                return None
        self.q, self.k, self.v = _plain(queries), k, _plain(values)
        self.first = first
        self._same_batches()
        self.nodes |= {first, self.second, *scaled}
        graph, last = self._normalizer(scaled)
        nodes = set(self.nodes)
        q, k, v = (self._operand(one, nodes) for one in (self.q, self.k, self.v))  # type: ignore
        self._private(nodes, last)
        return Attention(q, k, v, self.factors, self.mean, graph, last, nodes)  # type: ignore

    def _first(self, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
        """The product that a node is, but for factors and normalizers in between."""
        passed = []
        node = _plain(node)
        while isinstance(node, fx.Node) and node.target in _SCALINGS:
            passed.append(node)
            node = _plain(node.args[0])
        if isinstance(node, fx.Node) and node.target in PRODUCTS and tensor(node).ndim >= 3:
            return node, passed
        return None, []

    def _same_batches(self) -> None:
        shapes = [tensor(one).shape for one in (self.q, self.k, self.v)]
        if not all(same_shape(one[:-2], shapes[0][:-2]) for one in shapes):
            raise Outside(f"{self.second.name}: expected the same batch axes of all three matrices")
        if not same(shapes[1][-2], shapes[2][-2]):
            raise Outside(f"{self.second.name}: expected as many keys as values")

    # -- the normalizer -----------------------------------------------------------------------

    def _normalizer(self, scaled: list[fx.Node]) -> tuple[fx.Graph, fx.Node]:
        """The graph from num and den to the result, and the last node of it."""
        graph = fx.Graph()
        num, den = graph.placeholder("num"), graph.placeholder("den")
        num.meta, den.meta = dict(self.second.meta), dict(self.second.meta)
        twins: dict[fx.Node, fx.Node] = {self.second: num}
        current = num

        def copied(node: fx.Node) -> fx.Node:
            """A value that is made of the denominator alone."""
            if node in twins:
                return twins[node]
            if self._denominator(node):
                den.meta = dict(node.meta)
                twins[node] = den
            elif idle(node) or node.target in kinds.RESHAPES:
                twins[node] = copied(node.args[0])  # type: ignore
                self.nodes.add(node)
            elif is_pointwise(node) and len(node.all_input_nodes) == 1:
                inner = copied(node.all_input_nodes[0])
                twins[node] = graph.node_copy(node, lambda _: inner)
                twins[node].meta = dict(node.meta)
                self.nodes.add(node)
            else:
                raise Outside(
                    f"{node.name} ({node.target}) is not made of the queries and keys' sum"
                )
            return twins[node]

        for node in reversed(scaled):
            other = node.args[1]
            if isinstance(other, fx.Node):
                value = copied(other)
                current = graph.call_function(node.target, (current, value))  # type: ignore
                current.meta = dict(self.second.meta)
            else:
                factor = float(other)  # type: ignore
                self.factors.append(factor if node.target in (aten.mul.Tensor, aten.mul.Scalar)
                                    else 1 / factor)  # fmt: skip
        last = self.second
        user, passed = _reader(last)
        if user is not None and user.target in (aten.mul.Tensor, aten.div.Tensor):
            mine = passed[-1] if passed else last
            others = [one for one in user.args if one is not mine]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                before = set(self.nodes)
                try:
                    value = copied(others[0])
                    if user.args[0] is not mine and user.target is aten.div.Tensor:
                        raise Outside(f"{user.name} divides by the product")
                    current = graph.call_function(user.target, (current, value))  # type: ignore
                    current.meta = dict(user.meta)
                    last = user
                    self.nodes |= {user, *passed}
                except Outside:
                    self.nodes = before
        graph.output((current,))
        graph.eliminate_dead_code()
        return graph, last

    def _denominator(self, node: fx.Node) -> bool:
        """Whether a node is q sum_n k_n, one number a row; its nodes become part of this."""
        found: set[fx.Node] = {node}
        if node.target is aten.sum.dim_IntList and _axes(node) == [tensor(node.args[0]).ndim - 1]:  # type: ignore
            inner = _plain(node.args[0])
            if inner is self.first and self.first.args[0] is not None and self._is_weights():
                self.nodes |= found
                return True
            if inner.target is aten.mul.Tensor:
                sides = [inner.args, inner.args[::-1]]
                for q, total in sides:
                    if _plain(q) is self.q and self._total(total, found):
                        self.nodes |= {*found, inner}
                        return True
        if node.target in PRODUCTS and _plain(node.args[0]) is self.q:
            if same(tensor(node).shape[-1], 1) and self._total(node.args[1], found):
                self.nodes |= found
                return True
        return False

    def _is_weights(self) -> bool:
        """Whether the first product is q k^T."""
        return _plain(self.first.args[0]) is self.q

    def _total(self, node: Any, found: set[fx.Node]) -> bool:
        """Whether a node is the sum of the keys, of whatever shape."""
        while isinstance(node, fx.Node) and (turned(node) or node.target in kinds.RESHAPES):
            found.add(node)
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target not in (
            aten.sum.dim_IntList,
            aten.mean.dim,
        ):
            return False
        keys, axes = node.args[0], _axes(node)
        matrix, flipped = _matrix(keys)  # type: ignore[arg-type]
        wanted = tensor(keys).ndim - (1 if flipped else 2)  # type: ignore[arg-type]
        if matrix is not self.k or axes != [wanted]:
            return False
        self.mean = node.target is aten.mean.dim
        found.add(node)
        return True

    # -- maps ---------------------------------------------------------------------------------

    def _operand(self, node: fx.Node, nodes: set[fx.Node]) -> Operand:
        """A matrix with what pointwise ops of one operand come before it and serve nothing else."""
        path: list[fx.Node] = []
        views: set[fx.Node] = set()
        raw, current = node, node
        end = 0
        while current.op == "call_function":
            if not all(self._inside(user, nodes | set(path)) for user in current.users):
                break
            if current.target in kinds.VIEWS:
                views.add(current)
            elif not (current.target in scalars.TABLE and len(current.all_input_nodes) == 1):
                break
            path.append(current)
            following = (
                current.all_input_nodes[0] if current.target not in kinds.VIEWS else current.args[0]
            )
            if current not in views:
                end, raw = len(path), following  # type: ignore
            current = following  # type: ignore
        path = path[:end]
        graph = fx.Graph()
        value = graph.placeholder("x")
        value.meta = dict(raw.meta)
        for one in reversed(path):
            if one not in views:
                value = graph.node_copy(one, {one.all_input_nodes[0]: value}.__getitem__)
                value.meta = dict(one.meta)
        graph.output((value,))
        nodes |= set(path)
        return Operand(node, raw, path[::-1], graph)

    def _inside(self, user: fx.Node, nodes: set[fx.Node]) -> bool:
        """Whether a reader belongs to this, if need be through views."""
        if user in nodes:
            return True
        return user.target in kinds.VIEWS and bool(user.users) and all(
            self._inside(one, nodes) for one in user.users
        )  # fmt: skip

    def _private(self, nodes: set[fx.Node], last: fx.Node) -> None:
        for node in nodes:
            if node is not last and not all(self._inside(user, nodes) for user in node.users):
                raise Outside(f"{node.name} is used elsewhere")


def _axes(node: fx.Node) -> list[int]:
    axes = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return [int(axis) % tensor(node.args[0]).ndim for axis in axes]  # type: ignore


def _reader(node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The one reader of a node, and the views without effect that lead to it."""
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_function" or not idle(user):
            return user, passed
        passed.append(user)
        node = user
    return None, passed
