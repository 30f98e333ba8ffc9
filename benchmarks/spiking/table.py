"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def markdown(data: dict[str, Any]) -> str:
    """All tables."""
    rows = data["rows"]
    lines = [
        "# Spiking networks", "",
        "Digits of scikit-learn, 16x16; by `python -m benchmarks.spiking`. "
        + ", ".join(f"{key} {value}" for key, value in data["about"].items()) + ".",
    ]  # fmt: skip
    for part, write in (("exact", _exact), ("library", _library), ("nets", _nets),
                        ("speed", _speed), ("streaming", _streaming), ("gpu", _speed)):  # fmt: skip
        if rows.get(part):
            lines += ["", *write(rows[part])]
    return "\n".join(lines) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _exact(rows: dict[str, Any]) -> list[str]:
    return [
        "## Spikes of every layer", "",
        "Of copies of the trained nets with scales of both signs and zeros, T = 4; accuracy in percent, "
        "in float32. First: the spikes that are the first to differ in their sample; as ties: those of "
        "them whose potential is no further from its threshold than rounding can move it "
        "(`benchmarks/spiking/exact.py`).",
        "",
        *_table(
            ["net", "samples", "spikes", "rates", "scales +/-/0", "norms", "scales left",
             "differ, float64", "differ, float32", "samples", "first", "as ties", "farthest",
             "of its bound", "accuracy, trained", "accuracy, these"],
            ([name, one["samples"], f"{one['spikes']:.2e}", one["rate"], one["signs"], one["norms"],
              one["scales"], one["differ64"], one["differ32"], one["samples32"], one["first32"],
              one["explained"], f"{one['margin']:.1e}", f"{one['ratio']:.2f}",
              _pair(one["accuracy"]), _pair(one["accuracy_mixed"])] for name, one in rows.items()),
        ),
    ]  # fmt: skip


def _library(rows: dict[str, Any]) -> list[str]:
    return [
        "## SpikingJelly's re-parameterization of MPBN, and ours", "",
        "Spikes that differ from those of the net itself, in percent, in float64; accuracy of the net "
        "itself and folded.", "",
        *_table(
            ["net", "scales", "way", "differ", "accuracy", "norms", "refused"],
            ([name, one["scales"], one["way"], f"{one['differ']:.3f}", _pair(one["accuracy"]),
              one["norms"], "; ".join(f"{why} (x{count})" for why, count in one["refused"].items())]
             for name, several in rows.items() for one in several),
        ),
    ]  # fmt: skip


def _nets(rows: dict[str, Any]) -> list[str]:
    return [
        "## All nets", "",
        "Accuracy of the source and optimized, in percent; spikes of 45 images in float64, with scales of "
        "both signs and zeros; the largest difference of their logits; seconds.", "",
        *_table(
            ["net", "accuracy", "captured", "any batch", "norms", "scales left", "spikes", "differ",
             "logits", "seconds", "notes"],
            ([name, _pair(one["accuracy"]), one["captured"], "yes" if one["dynamic"] else "no",
              one["norms"], one["scales"], one["spikes"], one["differ"], f"{one['largest']:.0e}",
              one["optimizing"], one["error"] or "; ".join(note[:80] for note in one["notes"])]
             for name, one in rows.items()),
        ),
    ]  # fmt: skip


def _speed(rows: dict[str, Any]) -> list[str]:
    ways = list(dict.fromkeys(way for one in rows.values() for way in one["ms"]))
    return [
        "## Time for a sample", "",
        "Milliseconds, in turn, medians; compiled: `torch.compile` of the source, frozen: with freezing. "
        "Kernels and calls of the framework's, for a step, of the compiled source and of ours.", "",
        *_table(
            ["net", *ways, "compiled / ours", "eager / ours", "kernels", "calls", "optimizing"],
            ([name, *(f"{one['ms'][way]:.3f}" if way in one["ms"] else "" for way in ways),
              _ratio(one, "compiled"), _ratio(one, "eager"), _counts(one["kernels"]),
              _counts(one["calls"]), one["optimizing"] + one["error"]] for name, one in rows.items()),
        ),
    ]  # fmt: skip


def _streaming(rows: dict[str, Any]) -> list[str]:
    keys = list(next(iter(rows.values())))
    return [
        "## One step at a time", "",
        *_table(["net", *keys], ([name, *one.values()] for name, one in rows.items())),
    ]  # fmt: skip


def _pair(values: list[float]) -> str:
    return " / ".join(f"{one:.2f}" for one in values)


def _ratio(row: dict[str, Any], slow: str) -> str:
    ours = min((row["ms"][way] for way in row["ms"] if way.startswith("ours")), default=None)
    return "" if ours is None or slow not in row["ms"] else f"{row['ms'][slow] / ours:.2f}"


def _counts(counts: dict[str, float]) -> str:
    return " / ".join(
        f"{counts[way]:.2f}" for way in ("compiled", "ours inductor") if way in counts
    )
