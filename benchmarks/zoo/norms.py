"""Batch norms: how many run, and why those that are left were not folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from benchmarks.zoo.inputs import Inputs, run
from benchmarks.zoo.row import Row


class _CountNorms(TorchDispatchMode):
    """Counts the batch norm kernels that run, wherever they are called from."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "batch_norm" in func._schema.name
        return func(*args, **(kwargs or {}))


def norms_run(model: nn.Module, inputs: Inputs) -> int:
    with _CountNorms() as counter:
        run(model, inputs)
    return counter.count


def _norm_nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if "batch_norm" in str(node.target)
            and node.op == "call_function"]  # fmt: skip


def read_norms(row: Row, fast: graphopt.OptimizedModule, inputs: Inputs) -> None:
    """Fill in how many are left, and the reason of each or that there is none."""
    seen = 0
    for part in fast.modules():
        if not isinstance(part, graphopt.OptimizedModule) or part.graph_module is None:
            continue
        records = [one for one in (*part.report.refused, *part.report.rolled_back) if one.reason]
        reasons = {key: one.reason for one in records for key in (one.where, one.node) if key}
        for node in _norm_nodes(part.graph_module):
            seen += 1
            where = node.meta.get("where", "?")
            reason = reasons.get(node.name) or reasons.get(where)
            if reason is None:
                row.norms_unexplained.append(where)
            else:
                row.norms_reasons[where] = reason
    row.norms_after = seen if fast.graph_module is not None else norms_run(fast, inputs)
    if row.norms_after > seen and not fast.report.capture.left_out:
        row.norms_unexplained.append(f"{row.norms_after - seen} left eager")
