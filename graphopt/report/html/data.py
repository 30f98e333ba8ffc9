"""What the script of the page draws, as compact plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.report.html.layers import Layers, layers
from graphopt.report.html.tree import ENTRY, EXIT, Inner, edges, tree
from graphopt.report.report import Report
from graphopt.report.story import Listed

THROUGH, BORDER_IN, BORDER_OUT = -1, -2, -3  # places of a row that are no op and no module


def data(report: Report) -> dict[str, Any]:
    """`paths` are module paths, which the rest names by number. A side has its `ops`, as lists in the
    order of `_op`, and its `modules`, each with the `rows` of its drawing: numbers below the count of ops
    are ops, those from there on modules."""
    paths: dict[str, int] = {}
    records = {
        "applied": report.applied, "rolled back": report.rolled_back, "refused": report.refused,
    }  # fmt: skip
    return {
        "before": _side(report.ops_before, paths),
        "after": _side(report.ops_after, paths),
        "records": [
            [one.rewrite, state, one.node, _number(paths, one.where),
             [_number(paths, path) for path in one.origins]]
            for state, among in records.items() for one in among
        ],
        "paths": list(paths),
    }  # fmt: skip


def _number(paths: dict[str, int], path: str) -> int:
    return paths.setdefault(path, len(paths))


def _side(ops: Sequence[Listed], paths: dict[str, int]) -> dict[str, Any]:
    modules = tree(ops)
    number = {path: len(ops) + k for k, path in enumerate(modules)}
    reads: list[list[int]] = [[] for _ in ops]
    for source, target in edges(ops):
        if source is not None:
            reads[target].append(source)

    def place(one: Inner | None) -> int:
        if isinstance(one, int):
            return one
        borders = {None: THROUGH, ENTRY: BORDER_IN, EXIT: BORDER_OUT}
        return borders[one] if one in borders else number[str(one)]

    def module(path: str, label: str, drawn: Layers) -> dict[str, Any]:
        return {
            "path": _number(paths, path),
            "label": label,
            "rows": [[place(one) for one in row] for row in drawn.rows],
            "links": [[end for pair in row for end in pair] for row in drawn.links],
            "back": [[place(a), place(b)] for a, b in drawn.back],
        }

    return {
        "ops": [_op(one, reads[k], paths) for k, one in enumerate(ops)],
        "modules": [module(path, one.label, layers(one)) for path, one in modules.items()],
    }


def _op(one: Listed, reads: list[int], paths: dict[str, int]) -> list[Any]:
    """text, module, what it stands for, ops that it reads, FLOPs, bytes."""
    return [
        one.text, _number(paths, one.where), [_number(paths, path) for path in one.origins],
        reads, one.flops, one.bytes,
    ]  # fmt: skip
