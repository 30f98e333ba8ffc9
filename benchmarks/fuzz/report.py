"""fuzz.json and fuzz.md: counts by kind, and the models that were wrong or rolled back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fuzz.draw import KINDS, Failure
from benchmarks.fuzz.row import Row


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """One record per kind, and one for all."""
    table = []
    for kind in [*KINDS, "all"]:
        own = [row for row in rows if kind in (row.kind, "all")]
        if not own:
            continue
        verdicts = Counter(row.verdict for row in own)
        table.append({
            "kind": kind, "models": len(own), "right": verdicts["right"],
            "wrong": verdicts["wrong"], "timeout": verdicts["timeout"],
            "invalid": verdicts["invalid"],
            "refused capture": sum(bool(row.refused) for row in own),
            "other batch": sum(row.batch == "right" for row in own),
            "gradients": sum(row.gradients == "right" for row in own),
            "noisy": sum(row.noise > 0 for row in own),
            "applied": sum(len(row.applied) for row in own),
            "rolled back": sum(len(row.rolled_back) for row in own),
            "ops": len({op for row in own for op in row.ops}),
            "s per model": round(sum(row.seconds for row in own) / len(own), 2),
        })  # fmt: skip
    return table


def write_results(folder: Path, rows: list[Row], failures: list[Failure], about: Any) -> None:
    """fuzz.json and fuzz.md."""
    table = summary(rows)
    rewrites = Counter(name for row in rows for name in row.applied)
    back = _rolled_back(rows)
    refusals = Counter(re.sub(r"\d+", "#", row.refused)[:120] for row in rows if row.refused)
    ops = sorted({op for row in rows for op in row.ops})
    data = {
        "about": about, "summary": table, "rewrites": dict(rewrites.most_common()),
        "wrong": [dataclasses.asdict(one) for one in failures],
        "rolled back": back, "refused": dict(refusals.most_common()), "ops": ops,
        "worst error": max((row.error for row in rows), default=0.0),
    }  # fmt: skip
    (folder / "fuzz.json").write_text(json.dumps(data, indent=1) + "\n")
    total = table[-1]
    lines = [
        f"# fuzz: {total['wrong']} wrong of {total['models']}", "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "right: outputs, side effects, other batch sizes and (tune) gradients are the source's in",
        "float64. refused capture: optimized by region or left eager, and right. noisy: beyond",
        "1e-9, but within what the source makes of a last-bit change. Worst error of the right ones: "
        f"{data['worst error']:.1e}.", "",
        "| " + " | ".join(total) + " |", "|" + " --- |" * len(total),
        *("| " + " | ".join(str(value) for value in one.values()) + " |" for one in table), "",
        "Rewrites applied: " + ", ".join(f"{k} {v}" for k, v in rewrites.most_common()) + ".", "",
        f"{len(ops)} distinct ATen ops in captured graphs: " + ", ".join(ops) + ".",
    ]  # fmt: skip
    lines += ["", "## Refused by capture", ""] if refusals else []
    lines += [f"- {count} x {reason}" for reason, count in refusals.most_common()]
    lines += ["", "## Rolled back", ""] if back else []
    for one in back:
        lines += [f"- {one['count']} x {one['rewrite']}: {one['reason']}", "", *_code(one["shown"])]
    lines += ["", "## Wrong", ""] if failures else []
    for failure in failures:
        row = failure.row
        lines += [f"- {row.kind}, {row.mode}, seed {failure.seed}: {row.reason}", "",
                  *_code(row.shown)]  # fmt: skip
    (folder / "fuzz.md").write_text("\n".join(lines) + "\n")


def _rolled_back(rows: list[Row]) -> list[dict[str, Any]]:
    """Every way of being rolled back: how often, and the smallest model it happened in."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for rewrite, reason in row.rolled_back:
            key = rewrite, re.sub(r"[\d.]+(e[-+]?\d+)?", "#", reason)[:100]
            new = {"rewrite": rewrite, "reason": reason, "count": 0, "shown": row.shown}
            one = found.setdefault(key, new)
            one["count"] += 1
            if len(row.shown) < len(one["shown"]):
                one["shown"], one["reason"] = row.shown, reason
    return sorted(found.values(), key=lambda one: -one["count"])


def _code(text: str) -> list[str]:
    return [*(f"      {line}" for line in text.splitlines()), ""]
