"""The command line: `python -m benchmarks.reparam`."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import graphopt
from benchmarks.reparam.blocks import BLOCKS, DEPLOYED, stacked
from benchmarks.zoo.inputs import images
from benchmarks.zoo.prepare import finish
from graphopt.torchvision_ops import declare_missing_ops
from graphopt.verify.model import relative_error

RESULTS = Path(__file__).parents[1] / "results"
TIMM = {
    "repvgg_a0": 224, "mobileone_s0": 224, "fastvit_t8": 256, "repvit_m0_9": 224,
    "repghostnet_050": 224, "nf_resnet26": 224, "convnext_atto": 224,
}  # fmt: skip
ROUNDS = 15


@dataclasses.dataclass
class Row:
    """What became of one model. `latency` has ratios by threads and batch: (ours over training
    form, ours over published deploy form)."""

    model: str
    before: int
    after: int
    published: int
    error: float
    latency: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def forms(name: str) -> tuple[nn.Module, nn.Module | None, Any]:
    """The training form, the published deploy form where the library has one, and the inputs."""
    torch.manual_seed(0)
    if name in BLOCKS:
        model, make = finish(stacked(BLOCKS[name]), images(3, 64, 64))
        return model, None, make
    declare_missing_ops()
    import timm
    from timm.utils.model import reparameterize_model

    model, make = finish(timm.create_model(name), images(3, TIMM[name], TIMM[name]))
    return model, reparameterize_model(copy.deepcopy(model)), make


def calls(model: nn.Module, inputs: tuple[Any, ...], passes: str) -> int:
    report = graphopt.optimize(model, inputs, passes=passes).report
    assert report.after is not None
    return report.after.nodes


def measure(name: str, backend: str) -> Row:
    model, deploy, make = forms(name)
    (x,), _ = make(2)
    fast = graphopt.optimize(model, (x,))
    before = calls(model, (x,), "canonicalize")
    published = DEPLOYED if deploy is None else calls(deploy, (x,), "canonicalize")
    assert fast.report.after is not None
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = graphopt.optimize(double, (x.double(),))
        error = relative_error(exact(x.double()), double(x.double()))
    row = Row(name, before, fast.report.after.nodes, published, error)
    if backend:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in (1, 8):
                (x,), _ = make(batch)
                ours = graphopt.optimize(model, (x,), backend=backend)
                sides = [ours, compiled(model, backend)]
                sides += [compiled(deploy, backend)] if deploy is not None else []
                times = latencies(sides, x)
                own = times[2] if deploy is not None else math.nan
                row.latency[f"{threads} threads, batch {batch}"] = (
                    times[0] / times[1], times[0] / own,
                )  # fmt: skip
    return row


def compiled(model: nn.Module, backend: str) -> Callable[[Any], Any]:
    if backend == "eager":
        return model
    return torch.compile(model, options={"freezing": True})  # type: ignore[no-any-return]


@torch.no_grad()
def latencies(sides: list[Callable[[Any], Any]], x: Any) -> list[float]:
    """Median seconds of each side, run in turns."""
    samples: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side(x)
    for _ in range(ROUNDS):
        for side, found in zip(sides, samples, strict=True):
            start = time.perf_counter()
            side(x)
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in samples]


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    conditions = list(dict.fromkeys(key for row in rows for key in row.latency))
    head = ["model", "ops", "ours", "published", "float64 error",
            *(f"{one}: to training, to deploy" for one in conditions)]  # fmt: skip
    lines = ["# Models that train with branches", "",
             ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
             "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]  # fmt: skip
    for row in rows:
        ratios = [f"{a:.2f}, {b:.2f}" for a, b in map(row.latency.__getitem__, conditions)]
        cells = [row.model, row.before, row.after, row.published, f"{row.error:.1e}", *ratios]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if conditions:
        ratios = [ratio for row in rows for ratio, _ in row.latency.values()]
        mean = math.exp(statistics.mean(map(math.log, ratios)))
        lines += ["", f"Latency over that of the training form, geometric mean: {mean:.2f}."]
    return "\n".join(lines) + "\n"


def main(
    backend: Annotated[str, typer.Option(help="eager or inductor, for latency")] = "inductor",
    latency: Annotated[bool, typer.Option(help="measure latency")] = True,
    model: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Optimize every model and print the table; exits with 1 if one has more ops than published."""
    warnings.simplefilter("ignore")
    rows = []
    for name in model or [*TIMM, *BLOCKS]:
        rows.append(measure(name, backend if latency else ""))
        print(rows[-1], flush=True)
    about = {"torch": torch.__version__, "backend": backend if latency else "none"}
    text = markdown(rows, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "reparam.md").write_text(text)
    data = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "reparam.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)
    wrong = [row.model for row in rows if row.after > row.published or row.error > 1e-10]
    if wrong:
        print(f"not as small or as exact as it should be: {', '.join(wrong)}")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
