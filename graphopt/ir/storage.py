"""What a model stores: whether new parameters would be kept beside those that they are made of.

A parameter that others read stays when one reader's map is merged with something of its own: the
model then stores it twice. One that is stored in a byte or less per element, and expanded on every
call, would be stored in full. Both are for the user to ask for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from graphopt.ir.graph import Graph


def states_of(node: fx.Node) -> list[fx.Node]:
    """The states that a parameter-only value is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for one in stack.pop().all_input_nodes:
            if one not in seen:
                seen.add(one)
                stack.append(one)
    return [one for one in seen if one.op == "get_attr"]


def readers_of(graph: Graph, state: fx.Node, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The ops, constant ones not counted, that depend on a state directly."""
    found, seen, stack = set(), {state}, [state]
    while stack:
        for user in stack.pop().users:
            if user in seen or user in without:
                continue
            seen.add(user)
            if graph.is_constant(user):
                stack.append(user)
            else:
                found.add(user)
    return found


def kept_twice(
    graph: Graph, operand: fx.Node, gone: Collection[fx.Node], made: Collection[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """A state that stays for another reader while a new matrix is made of it, and that reader; None if
    about as much goes away as the matrix takes.

    Readers that read all that the matrix is made of, each in the same way, will share it; those of the
    same input may merge yet.
    """
    size = operand.meta["val"].numel()
    if operand.meta["val"].ndim < 2:
        return None
    inputs = {one for op in gone for one in op.all_input_nodes if not graph.is_constant(one)}
    readers = {state: readers_of(graph, state, made) for state in states_of(operand)}
    fewest = min(map(len, readers.values()), default=0)
    saved, kept = 0, None
    for state, found in readers.items():
        others = {one for one in found - set(gone) if inputs.isdisjoint(one.all_input_nodes)}
        count = state.meta["val"].numel()
        if not others or (len(readers) > 1 and len(found) == fewest):
            saved += count
        elif 2 * count >= size:
            kept = state, min(others)
    return kept if 2 * saved < size else None


def parameters_read(graph: Graph, nodes: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The parameters that some ops read: what is stored in Deploy mode."""
    for node in nodes:
        if not graph.is_constant(node):
            for one in node.all_input_nodes:
                if graph.is_constant(one) and isinstance(one.meta.get("val"), torch.Tensor):
                    yield one
