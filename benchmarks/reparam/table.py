"""The results: rows in `reparam.json`, kept as soon as each is measured, and a table made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reparam.row import Row


def read(folder: Path) -> dict[str, Row]:
    path = folder / "reparam.json"
    if not path.exists():
        return {}
    return {data["model"]: Row.from_dict(data) for data in json.loads(path.read_text())["rows"]}


def write(folder: Path, about: dict[str, Any], rows: Sequence[Row]) -> str:
    """Replace both files; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    (folder / "reparam.json").write_text(json.dumps(data, indent=1) + "\n")
    text = markdown(about, rows)
    (folder / "reparam.md").write_text(text)
    return text


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    conditions = list(dict.fromkeys(key for row in rows for key in row.latency))
    head = ["model", "ops before", "after", "published", "float64 error",
            *(f"{one}: to training, to published" for one in conditions)]  # fmt: skip
    lines = ["# Models that train with branches", "",
             ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
             "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]  # fmt: skip
    for row in rows:
        cells = [row.model, row.before, row.after, row.published, f"{row.error:.1e}"]
        cells += [_ratios(row, one) for one in conditions]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if conditions:
        lines += ["", "Latency of ours over another's, medians of runs in turn; below 1, ours is "
                  "faster. Geometric mean of all models and conditions: "
                  f"{_mean(rows, 'to_training'):.3f} of the training form, "
                  f"{_mean(rows, 'to_deploy'):.3f} of the published deploy form."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ratios(row: Row, condition: str) -> str:
    found = row.latency.get(condition)
    return f"{found.to_training:.2f}, {found.to_deploy:.2f}" if found else "-"


def _mean(rows: Sequence[Row], of: str) -> float:
    ratios = [getattr(one, of) for row in rows for one in row.latency.values()]
    return math.exp(statistics.mean(map(math.log, ratios)))
