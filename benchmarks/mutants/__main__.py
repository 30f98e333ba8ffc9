"""The command line: `python -m benchmarks.mutants`."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import time
from pathlib import Path
from typing import Annotated

import hypothesis
import torch
import typer

from benchmarks.mutants.changes import sample
from benchmarks.mutants.executed import executed, rewrites
from benchmarks.mutants.judges import JUDGES, judged
from benchmarks.mutants.table import markdown, spelled, table

RESULTS = Path(__file__).parents[1] / "results"


def main(
    seed: Annotated[int, typer.Option(help="other seeds choose other mutants")] = 0,
    per_rewrite: Annotated[int, typer.Option(help="mutants of each rewrite")] = 5,
    rewrite: Annotated[list[str] | None, typer.Option(help="only these, by function name")] = None,
    workers: Annotated[int, typer.Option(help="processes, each with one thread")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Judge mutants of every shipped rewrite; exits with 1 if one survives without an argument.

    With `--rewrite`, the rows of the others stay as they are in `out`.
    """
    shipped = rewrites()
    names = [one.replace("-", "_") for one in rewrite or shipped]
    if unknown := set(names) - set(shipped):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(shipped)}")
    start = time.perf_counter()
    rows = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        jobs = [(name, seed, per_rewrite, number, lines)
                for name, lines in zip(names, pool.map(executed, names), strict=True)
                for number in range(len(sample(shipped[name], name, seed, per_rewrite, lines)))]  # fmt: skip
        for row in pool.map(judged, *zip(*jobs, strict=True)):
            rows.append(row)
            said = ", ".join(f"{one} {row[one]}" for one in JUDGES)
            print(f"{time.perf_counter() - start:5.0f} s  {row['rewrite']}: {said}  "
                  f"({spelled(row)})", flush=True)  # fmt: skip
    former = json.loads((out / "mutants.json").read_text())["mutants"] if rewrite else []
    rows += [row for row in former if row["rewrite"] not in names]
    rows.sort(key=lambda row: [*shipped, row["rewrite"]].index(row["rewrite"]))
    about = {"torch": torch.__version__, "hypothesis": hypothesis.__version__, "seed": seed,
             "mutants": len(rows)}  # fmt: skip
    text = markdown(rows, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "mutants.md").write_text(text)
    data = {"about": about, "table": table(rows), "mutants": rows}
    (out / "mutants.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text.partition("\n## One caught")[0])
    raise typer.Exit(any(row["together"] == "survived" and not row["argument"] for row in rows))


if __name__ == "__main__":
    typer.run(main)
