"""Where the elements of a view lie in what it is a view of."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.triton.index import ZERO, Index, Ranges, shape_of
from graphopt.backends.triton.kinds import RESHAPES, bind
from graphopt.backends.triton.region import Outside, size_of

aten = torch.ops.aten


def shape(node: fx.Node) -> Index:
    """The sizes of a node's tensor."""
    return shape_of(node.meta["val"])


def whole(argument: Any) -> sympy.Expr:
    """A size argument as an expression."""
    return size_of(argument) if isinstance(argument, fx.Node) else sympy.Integer(argument)


def origin(node: fx.Node) -> fx.Node:
    """The node that a chain of views looks at."""
    while node.meta["kind"] == "view":
        (node,) = (one for one in node.all_input_nodes if one.meta["kind"] != "size")
    return node


def source_index(node: fx.Node, index: Index, ranges: Ranges) -> Index:
    """The index in a view's operand of the element that is at `index` in the view."""
    given = bind(node)
    source = given["self"]
    theirs = shape(source)
    if node.target in RESHAPES:
        return ranges.reshaped(index, shape(node), theirs)
    if node.target is aten.expand.default:
        return broadcast(index, theirs)
    rank = len(theirs)
    if node.target is aten.permute.default:
        found = [ZERO] * rank
        for position, dim in enumerate(given["dims"]):
            found[dim % rank] = index[position]
        return tuple(found)
    found = list(index)
    if node.target is aten.t.default:
        return index[::-1]
    if node.target is aten.transpose.int:
        a, b = given["dim0"] % max(rank, 1), given["dim1"] % max(rank, 1)
        found[a], found[b] = found[b], found[a]
    elif node.target is aten.flip.default:
        for dim in given["dims"]:
            found[dim % rank] = theirs[dim % rank] - 1 - found[dim % rank]
    elif node.target is aten.select.int:
        dim = given["dim"] % rank
        found.insert(dim, _counted(given["index"], theirs[dim]))
    elif node.target is aten.slice.Tensor:
        dim = given["dim"] % rank
        start = _counted(given["start"] or 0, theirs[dim])
        if start.is_Integer and theirs[dim].is_Integer:
            start = min(max(start, ZERO), theirs[dim])
        found[dim] = start + whole(given["step"]) * found[dim]
    else:
        raise Outside(f"no index of the view {node.target}")
    return tuple(found)


def _counted(position: Any, size: sympy.Expr) -> sympy.Expr:
    """A position that counts from the end if it is negative."""
    found = whole(position)
    return found + size if found.is_Integer and found < 0 else found


def broadcast(index: Index, source: Index) -> Index:
    """The index in an operand of the shape `source`, broadcast to where `index` points."""
    last = index[len(index) - len(source) :]
    return tuple(ZERO if size == 1 else one for one, size in zip(last, source, strict=True))
