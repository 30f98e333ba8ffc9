"""The command line: `python -m benchmarks.zoo`."""

from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.zoo.checks import run_one
from benchmarks.zoo.report import show, write_results
from benchmarks.zoo.row import Row, plain, read
from benchmarks.zoo.zoos import ZOOS
from graphopt.torchvision_ops import declare_missing_ops

IMAGE_SIZE = 96
RESULTS = Path(__file__).parents[1] / "results"


def _limit_memory() -> None:
    """Make what does not fit raise in the model at hand, rather than have the sweep killed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return
    available = next(int(one.split()[1]) for one in lines if one.startswith("MemAvailable"))
    limit = int(0.95 * 1024 * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(
    zoo: Annotated[str, typer.Argument(help="torchvision, timm or transformers")],
    limit: Annotated[int | None, typer.Option(help="only the first N models")] = None,
    only: Annotated[list[str] | None, typer.Option(help="only this model; repeatable")] = None,
    size: Annotated[int, typer.Option(help="side of images where a model allows it")] = IMAGE_SIZE,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
    resume: Annotated[bool, typer.Option(help="keep rows of an interrupted sweep")] = False,
    debug: Annotated[bool, typer.Option(help="print the tracebacks of failures")] = False,
) -> None:
    """Check a zoo; results of a complete sweep go to benchmarks/results, of a part to --out."""
    if zoo not in ZOOS:
        raise typer.BadParameter(f"unknown zoo {zoo!r}; expected one of {', '.join(ZOOS)}")
    torch.set_num_threads(1)
    _limit_memory()
    declare_missing_ops()
    names = list(only or ZOOS[zoo].names())[:limit]
    partial = only is not None or limit is not None
    folder = out or (None if partial else RESULTS)
    console = Console(width=160)
    rows: dict[str, Row] = {}
    log = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"zoo_{zoo}.jsonl"  # survives an interruption; merged at the end
        if resume and log.exists():
            rows = read(log.read_text().splitlines())
        log.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows.values()))
    shown = 0
    for name in names:
        if name in rows:
            continue
        rows[name] = row = run_one(zoo, name, size, debug)
        show(console, row, header=shown == 0)
        shown += 1
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(plain(row)) + "\n")
    done = [rows[name] for name in names]
    if folder is not None and log is not None:
        write_results(folder, zoo, done)
        if not partial:
            log.unlink()
    counts = Counter(row.verdict for row in done)
    console.print(
        f"{len(done)} models: {counts['right']} right, {counts['wrong']} wrong, "
        f"{counts['unexplained']} refused without a reason, {counts['failed']} failed"
    )
    raise typer.Exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    typer.run(main)
