"""The table, as rows and as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.mutants.judges import JUDGES


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per rewrite, and for all: caught / total by each judge; equivalent mutants do not count."""
    lines = []
    for name in [*dict.fromkeys(row["rewrite"] for row in rows), "all"]:
        own = [row for row in rows if name in (row["rewrite"], "all")]
        counted = [row for row in own if not row["argument"]]
        line = {"rewrite": name, "mutants": str(len(counted))}
        for judge in JUDGES:
            said = Counter(row[judge] for row in counted if row[judge] != "n/a")
            dead = f" + {said['dead']} dead" if said["dead"] else ""
            line[judge] = f"{said['caught']}{dead} / {said.total()}" if said else "-"
        line["equivalent"] = str(len(own) - len(counted))
        lines.append(line)
    return lines


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = table(rows)
    text = [
        "# Mutants of the shipped rewrites", "",
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "caught / total of the mutants that are not equivalent. dead: never applies any more.", "",
        "| " + " | ".join(lines[0]) + " |", "|" + " --- |" * len(lines[0]),
        *("| " + " | ".join(line.values()) + " |" for line in lines), "",
    ]  # fmt: skip
    quiet = [row for row in rows if row["together"] == "survived" or row["argument"]]
    text += ["## No judge objected, or none should", ""]
    for row in sorted(quiet, key=lambda one: bool(one["argument"])):
        why = f"equivalent: {row['argument']}" if row["argument"] else "SURVIVOR"
        odd = f" (but {row['together']})" if row["together"] != "survived" else ""
        text.append(f"- {spelled(row)}: {why}{odd}")
    text += ["", "## A judge crashed, or let a wrong network through", ""]
    text += [f"- {spelled(row)}: {one}: {_short(row[f'{one} says'])}"
             for row in rows for one in JUDGES if row[one] in ("MISSED", "CRASHED")]  # fmt: skip
    text += ["", "## One caught mutant per rewrite", ""]
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -sum(row[one] == "caught" for one in JUDGES)):
        best.setdefault(row["rewrite"], row)
    for row in best.values():
        text += [f"- {spelled(row)}", *(f"  - {one}: {row[one]}: {_short(row[f'{one} says'])}"
                                         for one in JUDGES[:3])]  # fmt: skip
    return "\n".join(text) + "\n"


def spelled(row: dict[str, Any]) -> str:
    change = row["change"] if len(row["change"]) < 200 else row["change"][:200] + " ..."
    return f"{row['rewrite']}, {row['kind']} in `{row['function']}`: `{change}`"


def _short(text: str) -> str:
    return " ".join(text.split())[:240]
