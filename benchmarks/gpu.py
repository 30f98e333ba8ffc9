"""The Triton backend on a GPU: right, and how fast.

    python -m benchmarks.gpu [--models resnet vit ...] [--rows 32] [--dtype float32]

For every model: the largest error against float64 of eager, Inductor and Triton, and their times per
call, interleaved, with and without CUDA graphs. For every kernel: its time, the bytes it moves over
that time against the bandwidth of a copy, and torch's ops for the same region. Results go to
benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

import graphopt
from benchmarks import triton_zoo as zoo
from graphopt.backends.triton.compiled import Compiled
from tests.helpers import relative_error

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def time_of(function: Any) -> float:
    """The median time of a call in milliseconds."""
    found: float = do_bench(function, warmup=25, rep=100, return_mode="median")
    return found


def bandwidth() -> float:
    """Bytes per second of a large copy, reading and writing counted."""
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (time_of(lambda: y.copy_(x)) * 1e-3)


def model_row(name: str, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    model, inputs = zoo.made(name)
    inputs = tuple(torch.cat([one] * -(-rows // len(one)))[:rows].cuda() for one in inputs)
    inputs = tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs)
    wide = copy.deepcopy(model).double().cuda()
    model = model.cuda().to(dtype)
    with torch.no_grad():
        truth = wide(*(one.double() if one.is_floating_point() else one for one in inputs))
        runs: dict[str, Any] = {"eager": model}
        for backend in ("inductor", "triton"):
            runs[backend] = graphopt.optimize(model, inputs, backend=backend, validate=False)
        fast = runs["triton"]
        runs["inductor graphs"] = torch.compile(model, mode="max-autotune-no-cudagraphs")
        row: dict[str, Any] = {"model": name, "rows": rows, "dtype": str(dtype),
                               "notes": fast.report.backend_notes}  # fmt: skip
        for label, run in runs.items():
            found = run(*inputs)
            row[f"{label} error"] = relative_error(found.double(), truth)
            row[f"{label} ms"] = time_of(lambda run=run: run(*inputs))
        if isinstance(fast._run, Compiled):
            program = fast._run.program(list(inputs))
            row["graph notes"] = program.graphs.notes
            row["triton without graphs ms"] = time_of(lambda: program.module(*inputs))
            row["kernels"] = kernel_rows(program, inputs)
    return row


def kernel_rows(program: Any, inputs: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """Each kernel alone, on the tensors that it gets in the model."""
    recorded: dict[str, tuple[Any, ...]] = {}

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if hasattr(target, "region"):
                recorded[target.region.name] = args
            return super().call_function(target, args, kwargs)

    Recorder(program.module).run(*inputs)
    peak, rows = bandwidth(), []
    for region in program.regions:
        if region.name not in recorded:
            continue
        args, launch = recorded[region.name], region.launcher()
        outputs = launch(*args)
        moved = sum(
            one.numel() * one.itemsize for one in (*args, *outputs) if isinstance(one, torch.Tensor)
        )
        ours = time_of(lambda launch=launch, args=args: launch(*args))
        theirs = time_of(lambda region=region, args=args: region.reference(*args))
        rows.append({
            "kernel": region.name, "kind": region.kind, "ops": len(region.nodes), "bytes": moved,
            "ms": ours, "torch ms": theirs, "of the bandwidth": moved / (ours * 1e-3) / peak,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=[*zoo.MODELS])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        try:
            rows.append(model_row(name, options.rows, getattr(torch, options.dtype)))
        except Exception as error:  # one model that fails must not hide the others
            rows.append({"model": name, "error": f"{type(error).__name__}: {error}"[:500]})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "kernels"}), flush=True)
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
