"""How fast each kind of op runs: the table that the cost model reads.

    python -m benchmarks.efficiency              # all backends that run here, on the CPU
    python -m benchmarks.efficiency --device cuda --backend eager

Every kind is measured on a few typical shapes in one thread; the rate is the geometric mean. What is
measured replaces the entries of the same backend and device in `graphopt/ir/efficiency.json`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import nn

import graphopt
from benchmarks.frozen import frozen
from graphopt.ir.cost import TABLE

# kind -> (module, input shape)
CONV = {
    "dense": [(64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (48, 48, 3, 1, 56)],
    "pointwise": [(64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (512, 512, 1, 1, 14)],
    "grouped": [(128, 128, 3, 32, 28), (256, 256, 3, 32, 14)],
    "depthwise": [(96, 96, 3, 96, 56), (192, 192, 7, 192, 28), (384, 384, 3, 384, 14)],
}
NORMS = {"layer norm": nn.LayerNorm, "rms norm": nn.RMSNorm}
FLOPS_PER_FEATURE = {"layer norm": 5, "rms norm": 3}  # as graphopt.ir.ops.norm counts them
TOKENS = [(197, 384), (512, 768), (1576, 384), (3136, 192)]
MATMUL = [(197, 384, 1536), (197, 768, 768), (49, 1024, 1024)]


def seconds(run: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """The median time of a call."""
    run()
    times = []
    for _ in range(9):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(backend: str, device: str) -> dict[str, Any]:
    """The entry of one backend on one device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(module: nn.Module, *shape: int) -> float:
        module, x = module.to(device).eval(), torch.randn(*shape, device=device)
        run: Callable[..., Any] = module
        if backend == "inductor":
            torch._dynamo.reset()
            run = frozen(module)
        elif backend != "eager":
            run = graphopt.optimize(module, (x,), passes="canonicalize", backend=backend)
        with torch.no_grad():
            return seconds(lambda: run(x), synchronize)

    many = 32
    # A compiler fuses a chain of pointwise ops: what it launches are calls of kernels.
    step = (lambda: nn.Threshold(0.1, 0.0)) if backend == "eager" else lambda: nn.Linear(8, 8)
    launch = timed(nn.Sequential(*[step() for _ in range(many)]), 8, 8) / many
    call = timed(nn.ReLU(), 8)  # of a compiled graph as a whole
    large = 1 << 23
    bandwidth = 8 * large / (timed(nn.ReLU(), large) - call)
    rates = {}
    for kind, shapes in CONV.items():
        found = []
        for inside, out, kernel, groups, size in shapes:
            print(f"{backend} {device}: {kind} {inside} to {out}, {kernel}x{kernel}", flush=True)
            conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, groups=groups)
            flops = 2.0 * out * inside // groups * kernel**2 * size**2
            found.append(flops / (timed(conv, 1, inside, size, size) - call))
        rates[kind] = _mean(found)
    rates["matmul"] = _mean([
        2.0 * rows * inside * out / (timed(nn.Linear(inside, out), rows, inside) - call)
        for rows, inside, out in MATMUL
    ])  # fmt: skip
    for kind, norm in NORMS.items():
        print(f"{backend} {device}: {kind}", flush=True)
        plain = {"eps": 1e-5, "elementwise_affine": False}
        rates[kind] = _mean([
            FLOPS_PER_FEATURE[kind] * rows * width / (timed(norm(width, **plain), rows, width) - call)
            for rows, width in TOKENS
        ])  # fmt: skip
    return {"launch": launch, "bandwidth": bandwidth, "rates": rates}


def _mean(values: list[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def _rounded(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: _rounded(value) for key, value in entry.items()}
    return float(f"{entry:.2e}")


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    backend: Annotated[list[str] | None, typer.Option(help="eager, inductor, auto")] = None,
) -> None:
    """Measure backends on one device and store the table."""
    torch.set_num_threads(1)
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"targets": {}}
    for name in backend or ("eager", "inductor", "auto"):
        entry = stored["targets"][f"{name} {device}"] = _rounded(measure(name, device))
        print(name, device, entry)
    stored["about"] = {"torch": torch.__version__, "threads": 1, "dtype": "float32",
                       "units": "seconds, bytes per second, FLOPs per second"}  # fmt: skip
    TABLE.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
