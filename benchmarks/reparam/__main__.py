"""The command line: `python -m benchmarks.reparam`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.reparam import latency as timing, row as rows, table
from benchmarks.reparam.models import MODELS, forms

RESULTS = Path(__file__).parents[1] / "results"


def main(
    backend: Annotated[str, typer.Option(help="eager or inductor, for latency")] = "inductor",
    latency: Annotated[bool, typer.Option(help="measure latency")] = True,
    model: Annotated[list[str] | None, typer.Option(help="only this model; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    timeout: Annotated[float, typer.Option(help="seconds for the latencies of a model")] = 1800,
) -> None:
    """Measure every model and print the table; exits with 1 if one has more ops than published.

    A row is kept as soon as it is measured, and replaces the model's former one, whose latencies stay
    until they are measured again if the ops are still as many. Nothing else may use the cores.
    """
    for name in model or ():
        if name not in MODELS:
            raise typer.BadParameter(f"unknown model {name!r}; expected {', '.join(MODELS)}")
    if latency and (load := os.getloadavg()[0]) > 0.5:
        print(f"latencies will be wrong: the load is {load:.1f}, something else runs here")
    warnings.simplefilter("ignore")
    about = {"torch": torch.__version__, "backend": backend, "cores": os.cpu_count()}
    wrong = []
    for name in model or MODELS:
        row = rows.measure(name, forms(name))
        former = table.read(out).get(name)
        if former is not None and former.ops == row.ops:
            row.latency = former.latency
        text = table.keep(out, about, row)
        print(row, flush=True)
        if latency:
            row.latency = timing.in_subprocess(name, backend, timeout)
            text = table.keep(out, about, row)
            print(row.latency, flush=True)
        if not row.right:
            wrong.append(name)
    print(text)
    if wrong:
        print(f"not as small or as exact as it should be: {', '.join(wrong)}")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
