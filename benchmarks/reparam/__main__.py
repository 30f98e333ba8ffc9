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

    A row is kept as soon as it is measured, and replaces the model's former one. Without latency, the
    former latencies are kept if the ops are still as many.
    """
    for name in model or ():
        if name not in MODELS:
            raise typer.BadParameter(f"unknown model {name!r}; expected {', '.join(MODELS)}")
    warnings.simplefilter("ignore")
    about = {"torch": torch.__version__, "backend": backend, "cores": os.cpu_count()}
    text = ""
    wrong = []
    for name in model or MODELS:
        row = rows.measure(name, forms(name))
        if latency:
            row.latency = timing.in_subprocess(name, backend, timeout)
        known = table.read(out)
        former = known.get(name)
        if not latency and former is not None and former.ops == row.ops:
            row.latency = former.latency
        known[name] = row
        text = table.write(out, about, [known[one] for one in MODELS if one in known])
        print(row, flush=True)
        if not row.right:
            wrong.append(name)
    print(text)
    if wrong:
        print(f"not as small or as exact as it should be: {', '.join(wrong)}")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
