"""What the sections of the page show, ready to be written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from graphopt.ir.driver import Record
from graphopt.report.html.advice import advice
from graphopt.report.laws import Law, proved
from graphopt.report.report import Report

PROMISES = {
    "Exact": "bit-identical results",
    "Algebraic": "equal over the reals; floats differ by rounding only",
    "Masked": "equal to the source model with the named channels masked",
    "Calibrated": "lossy, within a budget measured on your data",
}
LOSSLESS = ("Exact", "Algebraic")


@dataclasses.dataclass(frozen=True)
class Group:
    """A rewrite and where it was applied. `proof` says how far it is known to be right."""

    name: str
    contract: str
    proof: str
    proved: bool
    law: Law
    records: list[Record]


@dataclasses.dataclass(frozen=True)
class Refusals:
    """Places where a rewrite was refused (or taken back) for one reason, and what would help."""

    name: str
    reason: str
    help: str
    records: list[Record]


@dataclasses.dataclass(frozen=True)
class Change:
    """A number before and after."""

    label: str
    before: str
    after: str
    percent: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A value with its share of the longest bar, in percent."""

    label: str
    value: str
    share: float
    note: str = ""
    chosen: bool = False


def groups(report: Report) -> list[Group]:
    """The applied rewrites, in the order of their first applications."""
    laws = {name: law for region in report.regions.values() for name, law in region.laws.items()}
    laws |= report.laws
    names: dict[str, list[Record]] = {}
    for one in report.applied:
        names.setdefault(one.rewrite, []).append(one)
    known = proved(names)
    found = []
    for name, records in names.items():
        law = laws.get(name, Law(""))
        contract = ", ".join(dict.fromkeys(one.contract for one in records))
        proof = "proved for all inputs, and checked at each site"
        if name not in known:
            proof = "no proof; checked at each site"
            if law.unproved:
                proof += f": {law.unproved}"
        found.append(Group(name, contract, proof, name in known, law, records))
    return found


def contracts(found: Iterable[Group]) -> list[dict[str, Any]]:
    """What was promised, how often, and how it was checked."""
    rows: dict[str, dict[str, Any]] = {}
    for group in found:
        for one in group.records:
            row = rows.setdefault(one.contract, {
                "contract": one.contract, "promise": PROMISES.get(one.contract.partition("(")[0], ""),
                "count": 0, "proved": 0, "measured": 0, "bitwise": 0, "unmeasured": 0,
            })  # fmt: skip
            row["count"] += 1
            row["proved"] += group.proved
            row[_checked(one)] += 1
    return list(rows.values())


def _checked(record: Record) -> str:
    if math.isnan(record.error):
        return "unmeasured"
    return "bitwise" if record.error == record.bound == 0 else "measured"


def site(record: Record) -> str:
    """How the check of one place came out."""
    return {"unmeasured": "not measured", "bitwise": "bit for bit the same"}.get(
        _checked(record), f"{record.error:.1e}"
    )


def share(record: Record) -> float:
    """The error in percent of the bound."""
    inside = _checked(record) == "measured" and record.bound > 0
    return min(100.0, 100 * record.error / record.bound) if inside else 0.0


def refusals(records: Sequence[Record], refused: bool) -> list[Refusals]:
    """By rewrite and reason, in order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for one in records:
        found.setdefault((one.rewrite, one.reason), []).append(one)
    return [
        Refusals(name, reason, advice(reason, name, refused), places)
        for (name, reason), places in found.items()
    ]


def verdict(report: Report) -> tuple[str, str]:
    """("good", "bad" or "open", a sentence): whether the result is what it was promised to be."""
    check = report.check
    if check is None and report.regions:
        return "open", "Captured by region: every region was checked on its own, see below."
    if check is None:
        return "open", "The whole model was not checked."
    if check.reason:
        what = (
            "The result is wrong, and was not validated"
            if report.applied
            else "Nothing was applied"
        )
        return "bad", f"{what}: {check.reason}."
    against = "the source model"
    if lossy := {one.contract for one in report.applied if not one.contract.startswith(LOSSLESS)}:
        against = f"what the source is under {', '.join(sorted(lossy))}"
    error = number(check.float64_error)
    return (
        "good",
        f"In float64 the result equals {against}: relative error {error}, limit {check.limit:.0e}.",
    )


def changes(report: Report) -> list[Change]:
    """Nodes, batch norms, parameters, FLOPs and bytes."""
    before, after = report.before, report.after
    if before is None or after is None:
        return []
    pairs = [
        ("nodes", before.nodes, after.nodes, ""), ("parameters", before.parameters, after.parameters, ""),
        ("FLOPs", before.flops, after.flops, ""), ("moved per run", before.bytes, after.bytes, "B"),
        ("batch norms", before.batch_norms, after.batch_norms, ""),
    ]  # fmt: skip
    return [
        Change(label, si(a) + unit, si(b) + unit, percent(a, b))
        for label, a, b, unit in pairs if a or b
    ]  # fmt: skip


def stages(report: Report) -> list[Bar]:
    """Where the time went, the stages that took 1% at least; the rest is one bar."""
    spent = [
        ("capture", report.capture.seconds),
        *report.passes,
        ("validation", report.validation_seconds),
    ]
    total = sum(seconds for _, seconds in spent)
    merged: dict[str, float] = {}
    for name, seconds in sorted(spent, key=lambda one: one[1] < 0.01 * total):
        key = name if seconds >= 0.01 * total else "everything else"
        merged[key] = merged.get(key, 0.0) + seconds
    longest = max(merged.values(), default=0.0)
    if not longest:
        return []
    return [Bar(name, f"{s:.2f} s", 100 * s / longest) for name, s in merged.items()]


def benchmarks(report: Report) -> list[Bar]:
    """Milliseconds a call of the backends that were tried."""
    rows = report.backend_table
    slowest = max((one["ms"] for one in rows if one.get("ms")), default=1.0)
    return [
        Bar(str(one.get("backend", "?")), f"{one['ms']:.3g} ms" if one.get("ms") else "not measured",
            100 * (one.get("ms") or 0.0) / slowest, _about(one), bool(one.get("chosen")))
        for one in rows
    ]  # fmt: skip


def _about(row: dict[str, Any]) -> str:
    known = {"speed-up": "{:.2f}x", "error": "error {:.1e}", "build s": "built in {:.2g} s",
             "spread": "spread {:.0%}"}  # fmt: skip
    told = [
        text.format(row[key])
        for key, text in known.items()
        if isinstance(row.get(key), (int, float))
    ]
    return ", ".join([*told, str(row["note"])] if row.get("note") else told)


def percent(before: float, after: float) -> str:
    """How much more or less; empty for no change."""
    if not before or before == after:
        return ""
    change = 100 * (after - before) / before
    return f"{change:+.{1 if abs(change) >= 0.1 else 2}f} %"


def number(value: float) -> str:
    """1.2e-15; "-" where nothing was measured."""
    return "-" if math.isnan(value) else f"{value:.1e}"


def si(value: float) -> str:
    """1.23 M, 48."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (size if unit != 'k' else 1e3):.4g} {unit}"
    return f"{value:,.0f} ".strip()
