"""Where the time of a model goes, and how far that is from what the machine allows.

    python -m benchmarks.gaps --row ResNet-50 --row ViT-S

The program of the `prepacked` backend is run call by call; time, FLOPs and bytes are summed by kind of call.
Beside it are two floors that no program passes: the FLOPs at the rate of a large matrix product, and the
parameters, inputs and outputs at the bandwidth of memory, each moved once.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer
from torch import Tensor, fx

import graphopt
from benchmarks.scoreboard import models
from benchmarks.scoreboard.measure import peak_rate
from benchmarks.scoreboard.table import processor

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15
PRODUCTS = {"linear", "_linear_pointwise", "mm", "bmm", "matmul", "addmm", "baddbmm", "einsum"}
VIEWS = {"view", "reshape", "permute", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze",
         "split", "split_with_sizes", "chunk", "detach", "alias", "getitem", "unbind"}  # fmt: skip
MOVEMENT = {"cat", "stack", "clone", "contiguous", "index", "embedding", "roll", "pad", "copy"}
ATTENTION = {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}
NORMS = {"layer_norm", "group_norm", "batch_norm", "rms_norm", "native_layer_norm"}


class Timed(fx.Interpreter):
    """One run after another, with the seconds of every call and the sizes of what it reads and writes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)
        self.bytes: dict[fx.Node, int] = {}
        self.flops: dict[
            fx.Node, float
        ] = {}  # right of ATen's operators, whose weights are not packed

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        start = time.perf_counter()
        found = self.call_function(n.target, args, kwargs)  # type: ignore[arg-type]
        self.seconds[n].append(time.perf_counter() - start)
        if n not in self.bytes:
            self.bytes[n] = sum(map(nbytes, pytree.tree_leaves((args, kwargs, found))))
            self.flops[n] = flops(name_of(n), args, found)
        return found


def nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def name_of(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "overloadpacket", target)).rpartition(".")[2] or str(target)


def flops(name: str, args: Any, found: Any) -> float:
    """Multiply-adds count two; of convolutions, products and attention."""
    if "convolution" in name or name.startswith("conv") or "linear" in name:
        return 2.0 * found.numel() * math.prod(args[1].shape[1:])
    if name in ("mm", "bmm", "matmul"):
        return 2.0 * found.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * found.numel() * args[1].shape[-1]
    if name in ATTENTION:
        out = found[0] if isinstance(found, tuple) else found
        return 2.0 * out.numel() * args[1].shape[-2] * 2
    return 0.0


def kind_of(node: fx.Node) -> str:
    name = name_of(node)
    if "convolution" in name or name.startswith("conv"):
        groups = node.args[6] if len(node.args) > 6 else 1
        return "depthwise convolution" if isinstance(groups, int) and groups > 1 else "convolution"
    if name in PRODUCTS:
        return "matrix product"
    if name in ATTENTION:
        return "attention"
    if name in NORMS:
        return "norm"
    if "pool" in name or name in ("mean", "sum"):
        return "pooling, means"
    if name in MOVEMENT:
        return "movement"
    return "views" if name in VIEWS else "pointwise"


def bandwidth() -> float:
    """GB/s of copying memory, read and written."""
    a = torch.randn(1 << 26)
    b, times = torch.empty_like(a), []
    for _ in range(7):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2e-9 * a.numel() * a.element_size() / min(times)


@torch.no_grad()
def measure(name: str, batch: int, peak: float, speed: float) -> dict[str, Any]:
    """Of one row: milliseconds, floors, and the parts by kind of call."""
    model, make = models.build(name)
    args, kwargs = make(batch)
    fast = graphopt.optimize(model, args, kwargs, backend="prepacked")
    fast(*args, **kwargs)
    whole = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        fast(*args, **kwargs)
        whole.append(1e3 * (time.perf_counter() - start))
    leaves = pytree.tree_leaves((args, kwargs))
    plain, seen = Timed(fast.graph_module), Timed(fast._lowered().packed)  # type: ignore[arg-type, attr-defined]
    plain.run(*leaves)
    for _ in range(ROUNDS):
        out = seen.run(*leaves)
    parts: dict[str, dict[str, float]] = defaultdict(
        lambda: {"ms": 0.0, "flops": 0.0, "bytes": 0.0}
    )
    for node, done in plain.flops.items():
        parts[kind_of(node)]["flops"] += done
    for node, seconds in seen.seconds.items():
        part = parts[kind_of(node)]
        part["ms"] += 1e3 * statistics.median(seconds)
        part["bytes"] += 0 if name_of(node) in VIEWS else seen.bytes[node]
    tensors = pytree.tree_leaves((list(fast.state_dict().values()), args, kwargs, out))
    least = sum(nbytes(one) for one in tensors)
    total = sum(one["flops"] for one in parts.values())
    return {
        "row": name, "batch": batch, "ms": statistics.median(whole), "gflop": 1e-9 * total,
        "floor: FLOPs": 1e-6 * total / peak, "floor: bytes": 1e-6 * least / speed,
        "parts": dict(sorted(parts.items(), key=lambda one: -one[1]["ms"])),
    }  # fmt: skip


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    said = (f"{name} {one:.0f}" if isinstance(one, float) else f"{name} {one}"
            for name, one in about.items())  # fmt: skip
    lines = ["# Where the time goes", "", ", ".join(said) + ".", "",
             "Milliseconds; parts in percent of the time of all calls, in brackets the part of the rate of a "
             "large matrix product (or, without FLOPs, of the bandwidth of memory) that they reach.", "",
             "| model | time | floor: FLOPs | floor: bytes | larger floor / time | largest parts |",
             "|" + " --- |" * 6]  # fmt: skip
    for row in rows:
        floors = row["floor: FLOPs"], row["floor: bytes"]
        calls = sum(one["ms"] for one in row["parts"].values())
        parts = [
            f"{kind} {100 * one['ms'] / calls:.0f} ({_reached(one, about):.0f})"
            for kind, one in row["parts"].items() if one["ms"] > 0.02 * calls
        ]  # fmt: skip
        lines.append(f"| {row['row']} | {row['ms']:.2f} | {floors[0]:.2f} | {floors[1]:.2f} | "
                     f"{100 * max(floors) / row['ms']:.0f}% | {', '.join(parts)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _reached(part: dict[str, float], about: dict[str, Any]) -> float:
    """Percent of the machine's rate, or of its bandwidth."""
    best = part["flops"] / about["GFLOP/s"] if part["flops"] else part["bytes"] / about["GB/s"]
    return 100e-6 * best / part["ms"]


def main(
    row: Annotated[list[str] | None, typer.Option(help="only rows with this in the name; repeatable")] = None,
    batch: int = 1, threads: int = 1,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:  # fmt: skip
    """Measure rows, keep them, and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    peak, speed = peak_rate(), bandwidth()
    about = {"torch": torch.__version__, "machine": processor(), "threads": threads, "batch": batch,
             "GFLOP/s": peak, "GB/s": speed}  # fmt: skip
    path = out / "gaps.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {one["row"]: one for one in known}
    for name in models.ROWS:
        if row and not any(part in name for part in row):
            continue
        rows[name] = measure(name, batch, peak, speed)
        ordered = [rows[one] for one in models.ROWS if one in rows]
        path.write_text(json.dumps({"about": about, "rows": ordered}, indent=1) + "\n")
        (out / "gaps.md").write_text(markdown(about, ordered))
        print(f"{name}: {rows[name]['ms']:.2f} ms", flush=True)
    print((out / "gaps.md").read_text())


if __name__ == "__main__":
    typer.run(main)
