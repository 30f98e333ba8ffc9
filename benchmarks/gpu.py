"""The Triton backend on a GPU: right, and how fast.

    python -m benchmarks.gpu [--models resnet vit ...] [--rows 32] [--dtype float32]

For every model: the largest error against float64, and the median time per call in rounds that
take turns, of eager, torch.compile (default, and max-autotune with CUDA graphs), and our Inductor and
Triton backends. For every kernel, alone and in a CUDA graph: its time, the bytes it must move over
that time against the bandwidth of a copy, and torch's ops for the same region. TF32 is off, for what
is compared is float32. Results go to benchmarks/results/gpu.json after every model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy
import torch
import triton
from triton.testing import do_bench

import graphopt
from benchmarks import triton_zoo as zoo
from graphopt.backends.triton.compiled import Compiled
from graphopt.backends.triton.graphs import captured
from graphopt.backends.triton.region import Region, size_of
from tests.helpers import relative_error

RESULTS = Path(__file__).parent / "results" / "gpu.json"
ROUNDS = 5


def time_of(function: Callable[[], Any], milliseconds: int = 100) -> float:
    """The median time of a call in milliseconds, the cache cold."""
    found: float = do_bench(function, warmup=25, rep=milliseconds, return_mode="median")
    return found


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one launch, so that its time is the GPU's; as it is if it cannot be captured."""
    try:
        return captured(function, [])[0]
    except RuntimeError:
        torch.cuda.synchronize()
        return function


def bandwidth() -> float:
    """Bytes per second of a large copy, reading and writing counted."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (time_of(lambda: y.copy_(x)) * 1e-3)


def model_row(name: str, rows: int, dtype: torch.dtype, peak: float) -> dict[str, Any]:
    torch._dynamo.reset()
    model, inputs = zoo.made(name)
    inputs = tuple(torch.cat([one] * -(-rows // len(one)))[:rows].cuda() for one in inputs)
    inputs = tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs)
    wide = copy.deepcopy(model).double().cuda()
    model = model.cuda().to(dtype)
    with torch.no_grad():
        truth = wide(*(one.double() if one.is_floating_point() else one for one in inputs))
        runs: dict[str, Any] = {
            "eager": model,
            "compile": torch.compile(copy.deepcopy(model)),
            "compile max": torch.compile(copy.deepcopy(model), mode="max-autotune"),
        }
        for backend in ("inductor", "triton"):
            runs[backend] = graphopt.optimize(model, inputs, backend=backend, validate=False)
        fast = runs["triton"]
        row: dict[str, Any] = {"model": name, "rows": rows, "dtype": str(dtype),
                               "notes": fast.report.backend_notes}  # fmt: skip
        if isinstance(fast._run, Compiled):
            program = fast._run.program(list(inputs))
            runs["triton without graphs"] = lambda *given: program.module(*given)[0]
        for label, run in runs.items():
            row[f"{label} error"] = relative_error(run(*inputs).double(), truth)
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(ROUNDS):
            for label, run in runs.items():
                times[label].append(time_of(lambda run=run: run(*inputs), 40))  # type: ignore[misc]
        row |= {f"{label} ms": statistics.median(found) for label, found in times.items()}
        if isinstance(fast._run, Compiled):
            row["graph notes"] = program.graphs.notes
            row["kernels"] = kernel_rows(program, inputs, peak)
            row["notes"] += [*fast._run.notes]
    return row


class Recorder(torch.fx.Interpreter):
    """Runs a program and keeps what every kernel gets."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[Region, Callable[..., Any], Any]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        if "region" in n.meta:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.found.append((n.meta["region"], n.target, args))  # type: ignore[arg-type]
        return super().run_node(n)


def kernel_rows(
    program: Any, inputs: tuple[torch.Tensor, ...], peak: float
) -> list[dict[str, Any]]:
    """Each kernel alone, on the tensors that it gets in the model; `peak` in bytes per second."""
    recorder, rows = Recorder(program.module), []
    recorder.run(*inputs)
    for region, launch, args in recorder.found:
        moved = bytes_of(region, args)
        ours = time_of(graphed(lambda launch=launch, args=args: launch(*args)))  # type: ignore[misc]
        theirs = time_of(
            graphed(lambda region=region, args=args: region.reference(*args))  # type: ignore[misc]
        )
        rows.append({
            "kernel": region.name, "kind": region.kind, "ops": len(region.nodes), "bytes": moved,
            "ms": ours, "torch ms": theirs, "of the bandwidth": moved / (ours * 1e-3) / peak,
        })  # fmt: skip
    return rows


def bytes_of(region: Region, args: Any) -> int:
    """The bytes that a launch with these arguments must move."""
    sizes = dict(zip(map(size_of, region.sizes), args[len(region.inputs) :], strict=True))
    return int(sympy.sympify(region.work()[0]).subs(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[*zoo.MODELS])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    peak = bandwidth()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        try:
            rows.append(model_row(name, options.rows, getattr(torch, options.dtype), peak))
        except Exception as error:  # one model that fails must not hide the others
            rows.append({"model": name, "error": f"{type(error).__name__}: {error}"[:500]})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "kernels"}), flush=True)
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "triton": triton.__version__, "copy bytes per second": peak, "rows": rows}  # fmt: skip
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
