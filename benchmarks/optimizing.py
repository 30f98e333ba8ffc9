"""What optimizing costs: its time beside that of `torch.export` alone, and the memory that it takes.

    python -m benchmarks.optimizing --row ResNet-50

Seconds of processor time with one thread, each figure in a process of its own, as somebody who calls it once
has it. *export* is `torch.export` with the dynamic batch that graphopt asks for; *float64* is one run of the
model in float64 on the two rows that are checked. *memory* is the peak of resident memory over what the
process held before, as a multiple of the parameters' bytes.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import graphopt
from benchmarks.scoreboard import models
from benchmarks.scoreboard.measure import peak_memory
from benchmarks.scoreboard.table import processor
from graphopt.ir.capture import with_dynamic_batch

RESULTS = Path(__file__).parent / "results"


def exporting(row: str) -> dict[str, float]:
    """What the reference costs."""
    model, make = models.build(row)
    args, _ = make(2)
    model(*args)
    given, _, shapes = with_dynamic_batch(args, {})
    start = time.process_time()
    torch.export.export(model, given, dynamic_shapes=shapes)
    export = time.process_time() - start
    lifted = model.double()
    given = [one.double() if one.is_floating_point() else one for one in args]
    start = time.process_time()
    lifted(*given)
    return {"export": export, "float64": time.process_time() - start}


def optimizing(row: str) -> dict[str, float]:
    """What ours costs."""
    model, make = models.build(row)
    args, _ = make(2)
    states = sum(one.nbytes for one in model.state_dict().values())
    model(*args)
    gc.collect()
    held = resident()
    peak_memory(reset=True)
    start, clock = time.process_time(), time.perf_counter()
    result = graphopt.optimize(model, args)
    seconds, clock = time.process_time() - start, time.perf_counter() - clock
    return {
        "seconds": seconds, "checks": result.report.validation_seconds / clock * seconds,
        "sites": len(result.report.applied), "megabytes": states / 2**20,
        "memory": (peak_memory() - held) * 2**20 / states,
    }  # fmt: skip


PARTS = {"export": exporting, "optimize": optimizing}


def resident() -> float:
    """Resident memory now, in MB; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(one.split()[1]) / 1024 for one in lines if one.startswith("VmRSS")), 0.0)


def main(
    row: Annotated[list[str] | None, typer.Option(help="only rows with this in the name")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure rows of the scoreboard; store and print the table."""
    if part is not None:
        torch.set_num_threads(1)
        with torch.no_grad():
            print(json.dumps(PARTS[part]((row or [""])[0])))
        return
    path = out / "optimizing.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in models.ROWS:
        if row and not any(text in name for text in row):
            continue
        found: dict[str, float] = {}
        for each in PARTS:
            command = [sys.executable, "-m", "benchmarks.optimizing", "--part", each, "--row", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
        rows[name] = found | {"ratio": found["seconds"] / (2 * found["export"] + found["float64"])}
        print(name, rows[name], flush=True)
        about = {"machine": processor(), "torch": torch.__version__}
        path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (out / "optimizing.md").write_text(table(about, rows))
    print(table(json.loads(path.read_text())["about"], rows))


def table(about: dict[str, str], rows: dict[str, Any]) -> str:
    lines = [f"# What optimizing costs\n\n{about['machine']}, torch {about['torch']}, one thread.\n",
             "| model | export s | float64 s | ours s | of it checks | sites | over 2 export + float64 | "
             "parameters MB | peak memory |", "|" + " --- |" * 9]  # fmt: skip
    for name in (one for one in models.ROWS if one in rows):
        row = rows[name]
        lines.append(
            f"| {name} | {row['export']:.2f} | {row['float64']:.2f} | {row['seconds']:.1f} | "
            f"{row['checks']:.1f} | {row['sites']:.0f} | {row['ratio']:.1f} | "
            f"{row['megabytes']:.0f} | {row['memory']:.1f}x |"
        )
    mean = statistics.geometric_mean(row["ratio"] for row in rows.values())
    return "\n".join([*lines, "", f"Geometric mean of the ratio: {mean:.2f}.", ""])


if __name__ == "__main__":
    typer.run(main)
