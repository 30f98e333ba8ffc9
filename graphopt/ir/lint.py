"""The invariants of normal form, checked after every pass."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Graph, GraphError, is_overload, written


def lint(graph: Graph, after: str = "") -> None:
    """Raise if the graph is not in normal form.

    Raises:
        GraphError: naming the node, what is wrong with it, and the pass that ran last.
    """
    seen = set()
    suffix = f" (after {after})" if after else ""
    outputs = 0
    for node in graph.fx.nodes:
        problem = ""
        for used in node.all_input_nodes:
            if used not in seen:
                problem = f"reads {used.name}, which is not computed before it"
        if outputs:
            problem = "comes after the output"
        if node.op == "get_attr":
            if str(node.target) not in graph.states:
                problem = f"reads the unknown state {node.target}"
        elif node.op == "call_function":
            if is_overload(node.target):
                targets = written(node)
                if any(one.op == "call_function" for one in targets):
                    problem = "writes to an activation"
                names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
                unknown = set(node.kwargs) - set(names)
                if unknown:
                    problem = f"has unknown arguments {sorted(unknown)}"
                if "val" not in node.meta:
                    problem = "has no type"
        elif node.op == "output":
            outputs += 1
        elif node.op != "placeholder":
            problem = f"is a {node.op}, not a call, state or input"
        if problem:
            raise GraphError(f"{node.name} = {node.target} {problem}{suffix}")
        seen.add(node)
    if outputs != 1:
        raise GraphError(f"the graph has {outputs} outputs{suffix}")
    for name, state in graph.states.items():
        if not isinstance(state.tensor, torch.Tensor):
            raise GraphError(f"the state {name} is a {type(state.tensor).__name__}{suffix}")
