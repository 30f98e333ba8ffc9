"""The results: rows in `reparam.json`, kept as soon as each is measured, and a table made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reparam.models import MODELS
from benchmarks.reparam.row import Row


def read(folder: Path) -> dict[str, Row]:
    path = folder / "reparam.json"
    if not path.exists():
        return {}
    return {data["model"]: Row.from_dict(data) for data in json.loads(path.read_text())["rows"]}


def keep(folder: Path, about: dict[str, Any], row: Row) -> str:
    """Put a row into both files, in place of the model's former one; returns the table."""
    known = read(folder) | {row.model: row}
    rows = [known[name] for name in MODELS if name in known]
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": about, "rows": [dataclasses.asdict(one) for one in rows]}
    (folder / "reparam.json").write_text(json.dumps(data, indent=1) + "\n")
    text = markdown(about, rows)
    (folder / "reparam.md").write_text(text)
    return text


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    conditions = list(dict.fromkeys(key for row in rows for key in row.latency))
    head = ["model", "ops before", "after", "published", "float64 error", *conditions]
    lines = ["# Models that train with branches", "",
             ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
             "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]  # fmt: skip
    for row in rows:
        cells = [row.model, row.before, row.after, row.published, f"{row.error:.1e}"]
        cells += [_ratios(row, one) for one in conditions]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if conditions:
        lines += ["", "Latency of ours over that of the training form / of the published deploy form, "
                  "medians of runs in turn; below 1, ours is faster. Geometric mean of all: "
                  f"{_mean(rows, 'to_training'):.3f} / {_mean(rows, 'to_deploy'):.3f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ratios(row: Row, condition: str) -> str:
    found = row.latency.get(condition)
    return f"{found.to_training:.2f} / {found.to_deploy:.2f}" if found else "-"


def _mean(rows: Sequence[Row], of: str) -> float:
    ratios = [getattr(one, of) for row in rows for one in row.latency.values()]
    return math.exp(statistics.mean(map(math.log, ratios)))
