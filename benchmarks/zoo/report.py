"""The table: printed row by row, and stored as zoo_<zoo>.json and zoo_<zoo>.md."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import graphopt
from benchmarks.zoo.row import Row, plain

_STYLES = {"right": "green", "wrong": "bold red", "unexplained": "yellow", "failed": "red"}
_COLUMNS = (
    ("model", 34), ("verdict", 11), ("float64", 8), ("source", 8), ("fast", 8), ("ratio", 6),
    ("batch 3", 8), ("norms", 9), ("nodes", 13), ("capture", 14), ("seconds", 8),
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table; errors are those at batch size 1, the ratio the larger of both."""
    if row.verdict == "failed":
        return (row.name, row.verdict, *("-",) * (len(_COLUMNS) - 2))
    ratio = max(row.ratio, row.ratio_batch if row.batch == "yes" else 0.0)
    return (
        row.name, row.verdict, f"{row.float64_error:.0e}", f"{row.source_error:.1e}",
        f"{row.error:.1e}", f"{ratio:.2f}", "yes" if row.batch == "yes" else "no",
        f"{row.norms_before} > {row.norms_after}", f"{row.nodes_before} > {row.nodes_after}",
        row.capture, f"{row.seconds:.1f}",
    )  # fmt: skip


def show(console: Console, row: Row, header: bool) -> None:
    table = Table(box=None, show_header=header, padding=(0, 1, 0, 0))
    for title, width in _COLUMNS:
        table.add_column(title, width=width, no_wrap=True)
    table.add_row(*map(escape, cells(row)), style=_STYLES[row.verdict])
    console.print(table)
    lines = [row.reason] if row.reason else []
    lines += [f"batch 3: {row.batch}"] if row.batch not in ("yes", "") else []
    lines += [f"rolled back: {one}" for one in row.rolled_back[:1]]
    for line in lines:
        console.print(f"  {escape(line)}", style="dim", soft_wrap=True)
    console.file.flush()


def write_results(folder: Path, zoo: str, rows: list[Row]) -> None:
    """`zoo_<zoo>.json` with everything and `zoo_<zoo>.md` with the table."""
    environment = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "graphopt": graphopt.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    summary = Counter(row.verdict for row in rows)
    data = {
        "zoo": zoo, "environment": environment, "summary": dict(summary),
        "models": [plain(row) for row in rows],
    }  # fmt: skip
    (folder / f"zoo_{zoo}.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    lines = [
        f"# {zoo}: {summary['right']} of {len(rows)} right",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
        "",
        "float64: relative error of the optimized model in float64. source, fast: float32 error",
        "of the source and of the optimized model against the float64 truth; ratio: fast / source,",
        "the larger of batch sizes 1 and 3. norms: batch norms before > after. seconds: optimize()",
        "",
        "| " + " | ".join(title for title, _ in _COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    remarks = [(row, row.reason) for row in rows if row.reason]
    remarks += [(row, f"batch size 3: {row.batch}") for row in rows if row.batch not in ("yes", "")]
    if remarks:
        lines += ["", *(f"- {row.name}: {remark}" for row, remark in remarks)]
    (folder / f"zoo_{zoo}.md").write_text("\n".join(lines) + "\n")
