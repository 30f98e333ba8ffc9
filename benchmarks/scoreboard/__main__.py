"""The command line: `python -m benchmarks.scoreboard`; what is stored is not measured again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.scoreboard import table
from benchmarks.scoreboard.models import ROWS
from benchmarks.scoreboard.sides import SIDES

RESULTS = Path(__file__).parents[1] / "results"
CONDITIONS = ((1, 1), (8, 1), (1, 2), (8, 2))  # batch, threads


def main(
    row: Annotated[
        list[str] | None, typer.Option(help="only rows with this in the name; repeatable")
    ] = None,
    side: Annotated[
        list[str] | None, typer.Option(help="only these sides, eager always; repeatable")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="only this batch; repeatable")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="only this many; repeatable")] = None,
    seconds: Annotated[float, typer.Option(help="of timing for a row")] = 20.0,
    limit: Annotated[float, typer.Option(help="seconds a side may take to build")] = 400.0,
    again: Annotated[bool, typer.Option(help="measure what is stored too")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure every row that is not stored, each in a process of its own; store it; print the table."""
    if unknown := set(side or ()) - set(SIDES):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(SIDES)}")
    path = out / "scoreboard.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for size, count in CONDITIONS:
        for name in ROWS:
            key = table.key(name, size, count)
            if (
                (row and not any(one in name for one in row))
                or (batch and size not in batch)
                or (threads and count not in threads)
                or (key in rows and not again)
            ):
                continue
            found = measured(name, size, count, side, limit, seconds)
            print(key, json.dumps(found), flush=True)
            if found["sides"]:
                rows[key] = found
                table.keep(out, about(), rows)
    if rows:
        print(table.markdown(about(), rows))


def measured(
    name: str, batch: int, threads: int, only: list[str] | None, limit: float, seconds: float
) -> dict[str, Any]:
    """A row: what is true of all its sides, and of each."""
    command = [sys.executable, "-m", "benchmarks.scoreboard.measure", name, str(batch), str(threads),
               "--limit", str(limit), "--seconds", str(seconds)]  # fmt: skip
    for side in dict.fromkeys(["eager", *only]) if only else ():
        command += ["--side", side]
    found: dict[str, Any] = {"row": name, "batch": batch, "threads": threads, "sides": {}}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GRAPHOPT_CACHE_DIR": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        data = json.loads(line)
        side = data.pop("side", None)
        if side is None:
            found.update(data)
        else:
            found["sides"].setdefault(side, {}).update(data)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        found["ended"] = f"exit code {done.returncode}: {said[-1][:200] if said else ''}"
    return found


def about() -> dict[str, str]:
    """The machine and the versions."""
    packages = ("torch", "onnxruntime", "openvino", "timm", "torchvision", "transformers", "peft")
    return {
        "machine": table.processor() or platform.processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "Inductor": "CPU, " + torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    typer.run(main)
