"""Given gradients go away: a `with_gradient` is what it has the value of.

For graphs that are run only. What just the backward reads, as a potential that was folded into a threshold,
is then free to go away too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Session, shared_memory
from graphopt.ir.ops.gradient import TARGET
from graphopt.passes.base import Pass


@dataclasses.dataclass(frozen=True)
class DropGradients(Pass):
    """Values lose the gradients that a Function of the source gives them, for graphs that do not train."""

    name = "drop-gradients"

    def run(self, session: Session) -> None:
        marks = [node for node in session.graph.calls if node.target is TARGET]
        for mark in marks:
            for piece in list(mark.users):
                result: fx.Node = mark.args[1][piece.args[1]]  # type: ignore[index, assignment]
                made = []
                if shared_memory(piece, result):  # an input, or another output
                    result = _copied(session, piece, result)
                    made = [result]
                session.replace("drop-gradient", Exact(), piece, result, made)
        session.erase_dead([node for mark in marks for node in [*mark.users, mark]])
        session.graph.eliminate_dead_code()


def _copied(session: Session, piece: fx.Node, result: fx.Node) -> fx.Node:
    with session.graph.fx.inserting_before(piece):
        copy = session.graph.fx.call_function(torch.ops.aten.clone.default, (result,))
    copy.meta = dict(piece.meta)
    return copy
