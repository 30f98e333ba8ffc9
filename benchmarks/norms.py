"""What the exact passes do to the norms of transformers: `python -m benchmarks.norms`.

Small random configurations with gains, shifts and layer scales of both signs and zeros. For each: the
norms that are computed, the gains and shifts they read, their FLOPs and bytes at batch 2, before (every
formula of a norm taken as one op) and after `deploy`; the error in float64; what keeps its mean or its gain,
and why.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer
from torch import fx, nn

import graphopt
from benchmarks.zoo import transformers_models
from benchmarks.zoo.inputs import Inputs

RESULTS = Path(__file__).parent / "results"
NORMS = {"layer_norm": 5, "rms_norm": 3}  # FLOPs for a value, without gain and shift
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 4},
    "deit_tiny_distilled_patch16_224": {"depth": 4},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2, 2, 2), "embed_dim": 48},
    "cait_xxs24_224": {"depth": 4},
}
TRANSFORMERS = ("gpt2", "bert", "llama", "gemma2", "t5", "whisper")
REWRITES = ("center-stream", "absorb-into-linear", "absorb-into-conv")


def models() -> dict[str, Callable[[], tuple[nn.Module, Inputs]]]:
    """What is optimized, by name."""
    from graphopt.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    import timm

    def vision(name: str) -> tuple[nn.Module, Inputs]:
        model = timm.create_model(name, **TIMM[name])
        return model, ((torch.randn(2, 3, 224, 224),), {})

    def text(name: str) -> tuple[nn.Module, Inputs]:
        model, make = transformers_models.build(name, None)
        return model, make(2)

    return {**{name: lambda name=name: vision(name) for name in TIMM},
            **{name: lambda name=name: text(name) for name in TRANSFORMERS}}  # type: ignore[misc]  # fmt: skip


@torch.no_grad()
def draw(model: nn.Module) -> nn.Module:
    """Vectors that are constant, or nearly, become gains and shifts of both signs with a zero."""
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.numel() > 1 and float(parameter.std()) < 0.2:
            nn.init.normal_(parameter, 0.3, 1.0)
            parameter[0] = 0.0
    return model.eval()


class _Count(fx.Interpreter):
    """The norms that run, with their FLOPs and bytes in float32."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {
            **dict.fromkeys(NORMS, 0),
            "vectors": 0,
            "flops": 0,
            "bytes": 0,
        }

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        name = str(target).removeprefix("aten.").partition(".")[0]
        if name in NORMS:
            vectors = [one for one in args[1:] if isinstance(one, torch.Tensor)]
            self.found[name] += 1
            self.found["vectors"] += len(vectors)
            self.found["flops"] += out.numel() * (NORMS[name] + len(vectors))
            self.found["bytes"] += 4 * (2 * out.numel() + sum(one.numel() for one in vectors))
        return out


def norms(fast: graphopt.OptimizedModule, inputs: Inputs) -> dict[str, Any]:
    """The norms that a graph computes."""
    assert fast.graph_module is not None
    counter = _Count(fast.graph_module)
    tensors = [one for one in pytree.tree_leaves(inputs) if isinstance(one, torch.Tensor)]
    with torch.no_grad():
        counter.run(*tensors, enable_io_processing=False)
    return counter.found


def measure(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    draw(model)
    args, kwargs = inputs
    before = graphopt.optimize(model, args, kwargs, passes="canonicalize,recognize-norms")
    fast = graphopt.optimize(model, args, kwargs)
    # Before `materialize` rounds the weights to float32: the error of the passes.
    unrounded = graphopt.optimize(model, args, kwargs, passes="tune,center-norms")
    error = graphopt.verify(model, unrounded, args, kwargs).float64_error
    kept = Counter(
        f"{one.rewrite}: {one.reason}" for one in fast.report.refused if one.rewrite in REWRITES
    )
    return {"before": norms(before, inputs), "after": norms(fast, inputs), "error": error, "kept": dict(kept),
            "rolled_back": len(fast.report.rolled_back)}  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    lines = [
        "# Norms of transformers", "",
        f"torch {data['torch']}, by `python -m benchmarks.norms`: small random configurations, "
        "batch 2, before and after `deploy`. Layer norms / RMS norms that are computed, gains and shifts "
        "they read, FLOPs and bytes of the norms, and the largest error in float64.", "",
        "| model | norms | | gains and shifts | | MFLOPs | | MB | | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, row in data["rows"].items():
        cells = []
        for key in ("norms", "vectors", "flops", "bytes"):
            for state in ("before", "after"):
                one = row[state]
                cells.append(
                    f"{one['layer_norm']} / {one['rms_norm']}" if key == "norms"
                    else str(one[key]) if key == "vectors" else f"{one[key] / 1e6:.2f}"
                )  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {row['error']:.0e} |")
    lines += ["", "## What stays, and why", ""]
    for name, row in data["rows"].items():
        lines += [f"- **{name}**" + ("" if row["kept"] else ": nothing")]
        lines += [f"  - {count} x {reason}" for reason, count in row["kept"].items()]
    return "\n".join(lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="models, all by default")] = None,
) -> None:
    """Measure and store the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = RESULTS / "norms.json"
    rows = json.loads(path.read_text())["rows"] if only and path.exists() else {}
    for name, make in models().items():
        if not only or name in only:
            rows[name] = measure(*make())
            print(name, rows[name], flush=True)
    data = {"torch": torch.__version__, "rows": rows}
    path.write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / "norms.md").write_text(markdown(data))


if __name__ == "__main__":
    typer.run(main)
