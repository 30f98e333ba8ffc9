"""The rows as JSON, as a table, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.scoreboard.models import ROWS
from benchmarks.scoreboard.sides import OURS, PEERS

Row = dict[str, Any]
EQUAL = 0.97  # a ratio that is noise


def key(row: str, batch: int, threads: int) -> str:
    return f"{row}; batch {batch}; {threads} {'thread' if threads == 1 else 'threads'}"


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (one.partition(":")[2].strip() for one in lines if one.startswith("model name")), ""
    )


def keep(out: Path, about: dict[str, str], rows: dict[str, Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    (out / "scoreboard.json").write_text(text + "\n")
    (out / "scoreboard.md").write_text(markdown(about, rows))
    picture(out / "scoreboard.png", rows)


def best(row: Row, names: Iterable[str]) -> tuple[str, float] | None:
    """The fastest of some sides, with its milliseconds."""
    timed = [(row["sides"][one]["ms"], one) for one in names if "ms" in row["sides"].get(one, {})]
    return (min(timed)[1], min(timed)[0]) if timed else None


def ratio(row: Row) -> float | None:
    """The time of the best peer over that of ours under `auto` (or our fastest, without it)."""
    peer = best(row, PEERS)
    ours = best(row, ["ours, auto"]) or best(row, OURS)
    return peer[1] / ours[1] if peer and ours else None


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(one) for one in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def markdown(about: dict[str, str], rows: dict[str, Row]) -> str:
    lines = ["# Scoreboard", "", ", ".join(f"{name} {value}" for name, value in about.items()) + ".", "",
             "Speed-up over eager, medians of paired rounds, all sides of a row in turn in one process. "
             "*auto / best peer*: the time of the best peer over that of ours under `auto`, with what it "
             "chose; *peak*: the FLOPs of our graph over its time, as a part of what a large matrix product "
             "reaches in the same process.", ""]  # fmt: skip
    for threads in sorted({one["threads"] for one in rows.values()}):
        for batch in sorted({one["batch"] for one in rows.values() if one["threads"] == threads}):
            some = [
                one for one in rows.values() if (one["batch"], one["threads"]) == (batch, threads)
            ]
            some.sort(key=lambda one: list(ROWS).index(one["row"]))
            lines += [f"## Batch {batch}, {threads} {'thread' if threads == 1 else 'threads'}", ""]
            lines += [*speeds(some), "", *summary(some), ""]
            lines += ["<details><summary>Build time, memory, error</summary>", ""]
            lines += [*details(some), "", "</details>", ""]
    return "\n".join(lines)


def speeds(rows: list[Row]) -> list[str]:
    names = [one for one in (*PEERS, *OURS) if one != "eager"]
    lines = [f"| model | eager ms | {' | '.join(names)} | auto / best peer | peak |",
             "|" + " --- |" * (len(names) + 4)]  # fmt: skip
    for row in rows:
        sides = row["sides"]
        cells = [f"{sides[one]['speedup']:.2f}" if "ms" in sides.get(one, {})
                 else ("failed" if one in sides else "-") for one in names]  # fmt: skip
        found, auto = ratio(row), sides.get("ours, auto", {})
        said = "-" if found is None else f"{found:.2f} {auto.get('chosen', '')}"
        ours = best(row, OURS)
        rate = "-"
        if ours and row.get("peak"):
            done = row["sides"][ours[0]].get("gflop", row["gflop"]) / (1e-3 * ours[1])
            rate = f"{100 * done / row['peak']:.0f}%"
        eager = f"{sides['eager']['ms']:.1f}" if "ms" in sides.get("eager", {}) else "-"
        lines.append(f"| {row['row']} | {eager} | {' | '.join(cells)} | {said} | {rate} |")
    return lines


def summary(rows: list[Row]) -> list[str]:
    ratios = {row["row"]: found for row in rows if (found := ratio(row)) is not None}
    structural = [value for name, value in ratios.items() if ROWS[name].structural]
    behind = [f"{name} {value:.2f}" for name, value in ratios.items() if value < EQUAL]
    return [
        f"Against the best peer, geometric mean: {mean(ratios.values()):.2f} over all rows, "
        f"{mean(structural):.2f} over the structural ones. "
        + (f"Behind: {', '.join(behind)}." if behind else "Behind on none."),
    ]


def details(rows: list[Row]) -> list[str]:
    lines = ["| model | side | build s | MB at most | error | note |", "|" + " --- |" * 6]
    for row in rows:
        for name, one in row["sides"].items():
            if "failed" in one:
                note = one["failed"].replace("|", "/")
                lines.append(f"| {row['row']} | {name} | - | - | - | {note} |")
            else:
                lines.append(f"| {row['row']} | {name} | {one['build']:.1f} | {one['memory']:.0f} | "
                             f"{one['error']:.1e} | {one.get('chosen', '')} |")  # fmt: skip
    return lines


def picture(path: Path, rows: dict[str, Row]) -> None:
    """Speed-up over eager of the best peer and of ours, batch 1, one thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    some = [one for one in rows.values() if (one["batch"], one["threads"]) == (1, 1)]
    some = [one for one in some if best(one, PEERS) and best(one, OURS)]
    if not some:
        return
    some.sort(key=lambda one: list(ROWS).index(one["row"]), reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(some) + 1.2), layout="constrained")
    sides = {
        "torch.compile": ["torch.compile"],
        "compile, freezing": ["compile, freezing", "compile, freezing, max-autotune"],
        "ONNX Runtime": ["ONNX Runtime"],
        "OpenVINO": ["OpenVINO"],
        "graphopt": ["ours, auto"],
    }
    colors = ["#c8c8c8", "#a0a0a0", "#7aa6c2", "#5b8db8", "#d1495b"]
    height = 0.8 / len(sides)
    for at, ((name, members), color) in enumerate(zip(sides.items(), colors, strict=True)):
        places, widths = [], []
        for line, row in enumerate(some):
            fastest = best(row, members) or (best(row, OURS) if name == "graphopt" else None)
            if fastest:
                places.append(line + 0.4 - (at + 0.5) * height)
                widths.append(row["sides"]["eager"]["ms"] / fastest[1])
        axes.barh(places, widths, height, label=name, color=color)
    axes.set_yticks(range(len(some)), [one["row"] for one in some])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up over eager PyTorch, batch 1, one thread, float32")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(sides), frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
