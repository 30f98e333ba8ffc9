"""The command line: `python -m benchmarks.fuzz`."""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated

import hypothesis
import torch
import typer

from benchmarks.fuzz.draw import KINDS, MODES, Failure, draw_models, signature, start_worker
from benchmarks.fuzz.report import summary, write_results
from benchmarks.fuzz.row import Row

RESULTS = Path(__file__).parents[1] / "results"
ROUND = ("programs", "networks", "programs", "convolutional", "programs", "residual", "programs",
         "transformers", "programs", "spiking")  # fmt: skip
CHUNK = 10  # models that one run of hypothesis draws, which are variations of each other


def main(
    models: Annotated[int, typer.Option(help="how many models")] = 1000,
    seed: Annotated[int, typer.Option(help="other seeds draw other models")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help=f"only {', '.join(KINDS)}")] = None,
    mode: Annotated[str, typer.Option(help="deploy, tune or both, in turns")] = "both",
    workers: Annotated[int, typer.Option(help="processes, each with one thread")] = 2,
    timeout: Annotated[float, typer.Option(help="seconds for one model")] = 60.0,
    minutes: Annotated[float, typer.Option(help="start nothing new after so long")] = 30.0,
    strict: Annotated[bool, typer.Option(help="shrink what was rolled back, too")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the results")] = None,
) -> None:
    """Fuzz the pipelines; exits with 1 if anything was wrong."""
    if mode not in (*MODES, "both") or set(kind or ()) - set(KINDS):
        raise typer.BadParameter(
            f"expected --mode deploy, tune, both; --kind of {', '.join(KINDS)}"
        )
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    turns = list(kind or ROUND)
    jobs = [
        (turns[i % len(turns)], mode if mode in MODES else MODES[(i + i // len(turns)) % 2],
         1_000_000 * seed + 1000 * i, min(CHUNK, models - i * CHUNK), timeout, strict)
        for i in range(-(-models // CHUNK))
    ]  # fmt: skip
    rows: list[Row] = []
    failures: dict[str, Failure] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        running = {pool.submit(draw_models, *job): job for job in jobs[: 2 * workers]}
        waiting = iter(jobs[2 * workers :])
        while running:
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                job = running.pop(future)
                drawn, wrong = future.result()
                rows += drawn
                for one in wrong:
                    best = failures.setdefault(signature(one.row), one)
                    if len(one.row.shown) < len(best.row.shown):
                        failures[signature(one.row)] = one
                spent = time.perf_counter() - start
                bad = sum(row.verdict == "wrong" for row in drawn)
                print(f"{spent:5.0f} s  {len(rows):5d} models  {job[0]}, {job[1]}: {bad} wrong of "
                      f"{len(drawn)}", flush=True)  # fmt: skip
                if spent < 60 * minutes and (job := next(waiting, None)) is not None:
                    running[pool.submit(draw_models, *job)] = job
    about = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "hypothesis": hypothesis.__version__, "cpus": os.cpu_count(), "workers": workers,
        "seed": seed, "mode": mode, "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    write_results(folder, rows, list(failures.values()), about)
    for one in failures.values():
        print(f"\nWRONG ({one.row.kind}, {one.row.mode}, seed {one.seed}): {one.row.reason}")
        print(one.row.shown)
    for entry in summary(rows):
        print(", ".join(f"{key} {value}" for key, value in entry.items()))
    raise typer.Exit(1 if any(row.verdict == "wrong" for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
