"""Give every reader of a shared parameter its own.

Tied embeddings, replicated layers and modules that are called twice read one parameter. Where only one
reader's map can merge with something, `merge-branches` refuses to store the parameter twice; after
this pass it does. In Tune mode the copies are trained apart.
"""

from __future__ import annotations

import dataclasses

from torch import fx, nn

from graphopt.ir.contracts import Exact
from graphopt.ir.driver import Session
from graphopt.ir.graph import Graph, State
from graphopt.passes.base import Pass


@dataclasses.dataclass(frozen=True)
class Untie(Pass):
    """Parameters with several readers become several parameters."""

    name = "untie"

    def run(self, session: Session) -> None:
        graph = session.graph
        for node in [one for one in graph.fx.nodes if one.op == "get_attr"]:
            state = graph.states[str(node.target)]
            readers = sorted(one for one in node.users if one.op == "call_function")
            if state.kind != "parameter" or graph.mutated & {str(node.target)} or len(readers) < 2:
                continue
            for reader in readers[1:]:
                own = nn.Parameter(
                    state.tensor.detach().clone(), requires_grad=state.tensor.requires_grad
                )
                read = graph.add_state(
                    _name(graph, node, reader), State(own, "parameter"), like=node
                )
                _reread(session, node, reader, read)


def _name(graph: Graph, node: fx.Node, reader: fx.Node) -> str:
    """The name under which a reader knows a tied parameter, or one in its module."""
    name, where = str(node.target), graph.where(reader)
    tied = [one for one, twin in graph.aliases.items() if twin == name]
    for one in tied:
        if one.rpartition(".")[0] == where:
            del graph.aliases[one]
            return one
    return f"{where}.{name.rpartition('.')[2]}".lstrip(".")


def _reread(session: Session, node: fx.Node, reader: fx.Node, read: fx.Node) -> None:
    """Let one reader of `node` read `read` instead: the same op, on the copy."""
    graph = session.graph
    with graph.fx.inserting_before(reader):
        twin = graph.fx.node_copy(reader, lambda one: read if one is node else one)
    twin.meta = dict(reader.meta)
    if session.replace("untie", Exact(), reader, twin, [twin]):
        session.erase_dead([reader])
    else:
        graph.fx.erase_node(twin)
