"""The command line: `python -m benchmarks.adapters`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.adapters.cells import Cell, measure
from benchmarks.adapters.methods import FLOAT32_INSIDE, LAYERS, METHODS

RESULTS = Path(__file__).parents[1] / "results"


def main(
    method: Annotated[list[str] | None, typer.Option(help="only this method; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Measure every cell, keep it, and print the table; exits with 1 if one of ours is wrong."""
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"unknown {sorted(unknown)}; expected of {', '.join(METHODS)}")
    warnings.simplefilter("ignore")
    path = out / "adapters.json"
    known = [Cell(**one) for one in json.loads(path.read_text())["cells"]] if path.exists() else []
    cells = {(one.method, one.layer): one for one in known}
    for name in method or METHODS:
        for layer in LAYERS:
            cells[name, layer] = cell = measure(name, layer)
            print(cell, flush=True)
        found = [cells[key] for key in ((a, b) for a in METHODS for b in LAYERS) if key in cells]
        about = {"torch": torch.__version__, "peft": importlib.metadata.version("peft")}
        data = {"about": about, "cells": [dataclasses.asdict(one) for one in found]}
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
        (out / "adapters.md").write_text(markdown(about, found))
    print((out / "adapters.md").read_text())
    raise typer.Exit(not all(one.right for one in cells.values()))


def markdown(about: dict[str, str], cells: list[Cell]) -> str:
    layers = [one for one in LAYERS if any(cell.layer == one for cell in cells)]
    lines = [
        "# Adapters", "", ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "Ours / PEFT's own merge, each against the unmerged model in float64: *ok* below 1e-12, or the "
        f"relative error. {', '.join(FLOAT32_INSIDE)} compute in float32 inside, and a float64 model keeps "
        "them, as casting rounds: theirs are the float32 model and its error, *ok* below "
        f"{max(FLOAT32_INSIDE.values()):.0e}. *kept*: left unmerged, and right. *no*: the merge raises. "
        "Empty: PEFT has no such adapter.", "",
        "| method | " + " | ".join(layers) + " | bf16 ours / PEFT |", "|" + " --- |" * (len(layers) + 2),
    ]  # fmt: skip
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.layer: cell for cell in cells if cell.method == method}
        texts = [_text(row[one]) if one in row else "" for one in layers]
        ratios = [(one.ours_bf16, one.peft_bf16) for one in row.values() if one.ours_bf16]
        worst = ""
        if ratios:
            peft_worst = [theirs for _, theirs in ratios if theirs is not None]
            worst = f"{max(ours for ours, _ in ratios if ours):.2f} / "
            worst += f"{max(peft_worst):.2f}" if peft_worst else "-"
        lines.append(f"| {method} | " + " | ".join(texts) + f" | {worst} |")
    states = Counter("merged" if one.merged else "kept" for one in cells if one.ours is not None)
    wrong = sum(one.peft is not None and not one.peft < max(one.limit, 1e-6) for one in cells)
    ours_wrong = sum(not one.right for one in cells)
    raises = sum(one.ours is not None and one.peft is None for one in cells)
    lines += [
        "", f"Cells that PEFT supports: {states.total()}. Ours: {states['merged']} merged, "
        f"{states['kept']} kept, {ours_wrong} wrong. PEFT's merge: {wrong} wrong, {raises} raise.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _text(cell: Cell) -> str:
    if cell.ours is None:
        return ""
    ours = "ok" if cell.merged else "kept"
    if not cell.ours < cell.limit:
        ours = f"{cell.ours:.0e}"
    if cell.peft is None:
        return f"{ours} / no"
    return f"{ours} / {'ok' if cell.peft < cell.limit else f'{cell.peft:.0e}'}"


if __name__ == "__main__":
    typer.run(main)
