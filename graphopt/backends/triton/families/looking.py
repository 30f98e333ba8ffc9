"""Looking through views in a graph: changes of shape, transposed matrices, tables that are looked up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.backends.triton.families.common import tensor
from graphopt.ir.affine import same_shape

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default,
             aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default)  # fmt: skip


def reshapes(node: fx.Node) -> bool:
    """Whether a node has the elements of its operand in the same order."""
    if node.target in (aten.expand.default, aten.slice.Tensor):
        return same_shape(tensor(node).shape, tensor(node.args[0]).shape)  # type: ignore
    return node.target in RESHAPES


def bare(node: Any) -> fx.Node:
    """What a node is but for its shape."""
    while reshapes(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def between(node: fx.Node, operand: Any) -> Iterator[fx.Node]:
    """The nodes from a looked-up operand to its table."""
    while turned(operand) or idle(operand) or by_ids(operand) is not None:
        yield operand
        if by_ids(operand) is not None:
            return
        operand = operand.args[0]


def turned(node: fx.Node) -> bool:
    """Whether a node is a batch of matrices, transposed."""
    if node.target is aten.mT.default:
        return True
    if node.target not in (aten.transpose.int, aten.permute.default):
        return False
    n = tensor(node).ndim
    if node.target is aten.transpose.int:
        return {int(axis) % n for axis in node.args[1:3]} == {n - 2, n - 1}  # type: ignore
    if node.target is aten.permute.default:
        axes = [int(axis) % n for axis in node.args[1]]  # type: ignore
        return axes == [*range(n - 2), n - 1, n - 2]
    return False


def idle(node: fx.Node) -> bool:
    """Whether a node is a view that changes nothing."""
    return reshapes(node) and same_shape(tensor(node).shape, tensor(node.args[0]).shape)  # type: ignore


def by_ids(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(table, ids) of `table[ids]`."""
    if getattr(node, "target", None) is aten.index_select.default and node.args[1] == 0:
        return node.args[0], node.args[2]
    if getattr(node, "target", None) is aten.index.Tensor and len(node.args[1]) == 1:
        table, (ids,) = node.args
        return (table, ids) if tensor(ids).ndim == 1 and tensor(ids).dtype != torch.bool else None
    return None


def lookup(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """(table, ids, whether transposed) of a batch of looked-up matrices."""
    flipped = False
    while turned(node) or idle(node):
        node, flipped = node.args[0], flipped != turned(node)
    if (found := by_ids(node)) is None or tensor(found[0]).ndim != 3:
        return None
    table, ids = found
    while turned(table):
        table, flipped = table.args[0], not flipped  # type: ignore
    return table, ids, flipped


def follow(node: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
    """The one reader of a node, through changes of shape, which are added to `nodes`."""
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        (node,) = node.users
        if not reshapes(node):
            nodes += passed
            return node
        passed.append(node)
    return None


def chained(node: fx.Node, stop: fx.Node | None = None) -> Iterator[fx.Node]:
    while reshapes(node) and node is not stop:
        yield node
        node = node.args[0]  # type: ignore
