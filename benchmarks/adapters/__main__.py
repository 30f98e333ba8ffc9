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
from benchmarks.adapters.methods import LAYERS, METHODS

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
        "Ours / PEFT's own merge, each against the unmerged model in float64: *ok* below 1e-12 (1e-6 for "
        "C3A and DEFT, which compute in float32), or the relative error. *kept*: left unmerged, and right. "
        "*no*: the merge raises. Empty: PEFT has no such adapter.", "",
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
    states = Counter("merged" if one.merged else "kept" for one in cells if one.ours64 is not None)
    wrong = sum(one.peft64 is not None and one.peft64 > 1e-6 for one in cells)
    ours_wrong = sum(not one.right for one in cells)
    raises = sum(one.ours64 is not None and one.peft64 is None for one in cells)
    lines += [
        "", f"Cells that PEFT supports: {states.total()}. Ours: {states['merged']} merged, "
        f"{states['kept']} kept, {ours_wrong} wrong. PEFT's merge: {wrong} wrong, {raises} raise.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _text(cell: Cell) -> str:
    if cell.ours64 is None:
        return ""
    limit = 1e-6 if cell.method in ("C3A", "DEFT") else 1e-12
    ours = "kept" if not cell.merged else "ok" if cell.ours64 < limit else f"{cell.ours64:.0e}"
    if not cell.merged and cell.ours64 > limit:
        ours = f"{cell.ours64:.0e}"
    if cell.peft64 is None:
        return f"{ours} / no"
    return f"{ours} / {'ok' if cell.peft64 < limit else f'{cell.peft64:.0e}'}"


if __name__ == "__main__":
    typer.run(main)
