"""Twelve models: how many ops each has, and how many kernels they become, here and in Inductor.

    TRITON_INTERPRET=1 python -m benchmarks.triton_models [names]

Ops are the primitive ones, views not counted; Inductor's count is of the kernels in the code that it
generates for the CPU (its fusion, without a GPU) and of its calls of the framework's. Results go to
benchmarks/results/triton_models.json, where the rows of models that are not named stay.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import graphopt
from benchmarks import triton_zoo as zoo
from tests.helpers import relative_error

RESULTS = Path(__file__).parent / "results" / "triton_models.json"
OUTER = re.compile(
    r"= (?:extern_kernels|torch\.ops\.aten|aten)\.|^\s+extern_kernels\.", re.MULTILINE
)


def measured(name: str) -> dict[str, Any]:
    """One row."""
    more: dict[str, Any] = {}
    if name == "adapters":
        base, adapted, inputs = zoo.adapters()
        more = {"adapter_ids": torch.tensor([0, 1, -1, 0, 1])}
        model = graphopt.multi(base, adapted, inputs)
        fast = graphopt.multi(base, adapted, inputs, backend="triton")
    else:
        model, inputs = zoo.made(name)
        fast = graphopt.optimize(model, inputs, backend="triton")
    with torch.no_grad():
        errors = [_error(fast, model, inputs, more, rows) for rows in (1, 2, 3)]
    (program,) = fast._run.programs.values()
    calls = [node for node in program.module.graph.nodes if node.op == "call_function"]
    outer = [n for n in calls if n.name.split("_")[0] not in ("getitem", "sym") and _is_outer(n)]
    fusible, inside = program.coverage
    kernels, extern = inductor(fast, inputs, more)
    return {
        "model": name, "pointwise and reduction ops": fusible, "in kernels": inside,
        "products in kernels": sum(one.kind == "product" for one in program.regions),
        "kernels": len(program.regions), "framework's": len(outer),
        "inductor kernels": kernels, "inductor framework's": extern,
        "largest error": max(errors), "outside": sorted(set(program.outside.values())),
    }  # fmt: skip


def _error(fast: Any, model: Any, inputs: Any, more: dict[str, Any], rows: int) -> float:
    some = [torch.cat([one] * 3)[:rows] for one in inputs]
    named = {key: one[:rows] for key, one in more.items()}
    return relative_error(fast(*some, **named), model(*some, **named))


def _is_outer(node: torch.fx.Node) -> bool:
    """A call of the framework's that computes something."""
    from graphopt.backends.triton.kinds import CREATION, VIEWS

    return hasattr(node.target, "_schema") and node.target not in VIEWS | CREATION


def inductor(fast: Any, inputs: Any, more: dict[str, Any]) -> tuple[int, int]:
    """(kernels, calls of the framework's) of the lowered module in Inductor's generated code."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(fast.graph_module, dynamic=False)
    with torch.no_grad():
        _, codes = run_and_get_code(lambda: compiled(*inputs, **more))
    body = codes[-1].partition("def call(")[2]
    kernels = len(re.findall(r"^\s+cpp_fused_\w*\(", body, re.MULTILINE))
    return kernels, len(OUTER.findall(body))


def main() -> None:
    names = [*zoo.MODELS, "adapters"]
    if unknown := set(sys.argv[1:]) - set(names):
        sys.exit(f"unknown models {sorted(unknown)}; expected of {', '.join(names)}")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = {row["model"]: row for row in known}
    for name in sys.argv[1:] or names:
        rows[name] = measured(name)
        print(json.dumps(rows[name]), flush=True)
        kept = [rows[one] for one in names if one in rows]
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
