"""The report of one optimization, as data and as text."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.files import write
from graphopt.ir.cost import Cost
from graphopt.ir.driver import Record
from graphopt.report.laws import Law
from graphopt.report.plain import plain
from graphopt.report.story import Listed, Story, tell
from graphopt.verify.model import ModelCheck

if TYPE_CHECKING:
    from rich.console import Group

    from graphopt.report.html import Framed

SHOWN = 12  # refusals listed in the text; all are in the data


@dataclasses.dataclass
class Capture:
    """How the model was captured: the rung of the ladder (or "regional"), time, and remarks."""

    method: str
    seconds: float
    notes: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # module path -> reason


@dataclasses.dataclass
class Report:
    """Everything that was done to a model and why, and everything that was not.

    `applied`, `refused` and `rolled_back` hold records with `rewrite`, `where` (module path in the
    source model), `contract`, `reason`, `error` and `bound` (absolute, in float64), `index` (of
    those applied, in order). `passes` lists (pass, seconds), validation apart. `modules` has the
    paths of the source model's modules, each with the first path of the same module; `ops_before`
    and `ops_after` are the ops of the captured and of the optimized graph; `laws` has what the rewrites
    named in the records say of themselves.
    """

    model: str
    mode: str
    pipeline: str
    backend: str
    capture: Capture
    applied: list[Record] = dataclasses.field(default_factory=list)
    refused: list[Record] = dataclasses.field(default_factory=list)
    rolled_back: list[Record] = dataclasses.field(default_factory=list)
    before: Cost | None = None
    after: Cost | None = None
    check: ModelCheck | None = None
    passes: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    validation_seconds: float = 0.0
    backend_notes: list[str] = dataclasses.field(default_factory=list)
    backend_table: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    regions: dict[str, Report] = dataclasses.field(default_factory=dict)
    bisect_limit: int | None = None  # rewrites that could be applied at most
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    ops_before: list[Listed] = dataclasses.field(default_factory=list)
    ops_after: list[Listed] = dataclasses.field(default_factory=list)
    laws: dict[str, Law] = dataclasses.field(default_factory=dict)

    def explain(self, module: str) -> Story:
        """What happened to the source module of this path, such as `layer1.0.conv1`, and to all that
        is inside it; `print` shows it.

        Raises:
            UnknownModule: naming the nearest paths, if the source model has no such module.
        """
        return tell(self, module)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes with `allow_nan=False`."""
        return plain(self)  # type: ignore[no-any-return]

    def untimed(self) -> Report:
        """The same without times, and without what a backend says of itself, which has some too."""
        return dataclasses.replace(
            self, capture=dataclasses.replace(self.capture, seconds=0.0),
            passes=[(name, 0.0) for name, _ in self.passes], validation_seconds=0.0,
            backend_notes=[], backend_table=[],
            regions={where: one.untimed() for where, one in self.regions.items()},
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`."""

        def number(value: Any) -> float:
            return math.nan if value is None else float(value)

        def records(key: str) -> list[Record]:
            return [
                Record(**{
                    **one, "error": number(one["error"]), "bound": number(one["bound"]),
                    "origins": tuple(one.get("origins", ())),
                })
                for one in data[key]
            ]  # fmt: skip

        def ops(key: str) -> list[Listed]:
            return [
                Listed(**{
                    **one, "origins": tuple(one["origins"]), "reads": tuple(one.get("reads", ())),
                })
                for one in data.get(key, ())
            ]  # fmt: skip

        check = data["check"]
        return cls(
            **{
                **data,
                "capture": Capture(**data["capture"]),
                "applied": records("applied"),
                "refused": records("refused"),
                "rolled_back": records("rolled_back"),
                "before": Cost(**data["before"]) if data["before"] else None,
                "after": Cost(**data["after"]) if data["after"] else None,
                "check": ModelCheck(
                    **{key: number(value) for key, value in check.items() if key != "reason"},
                    reason=check["reason"],
                )
                if check
                else None,
                "passes": [tuple(one) for one in data["passes"]],
                "regions": {k: cls.from_dict(v) for k, v in data["regions"].items()},
                "ops_before": ops("ops_before"),
                "ops_after": ops("ops_after"),
                "laws": {k: Law(**v) for k, v in data.get("laws", {}).items()},
            }
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def __rich__(self) -> Group:
        """What `rich.print(report)` shows, and `graphopt optimize` on a terminal."""
        from graphopt.report.terminal import rendered

        return rendered(self)

    def to_html(self) -> str:
        """One page that needs no network and no other file: summary, both graphs, every rewrite with its
        contract and proof, cost by module, benchmarks; see docs/report.md."""
        from graphopt.report.html import page

        return page(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html()` to a file, in one step."""
        write(Path(path), self.to_html())

    def _repr_html_(self) -> str:
        """A short summary for notebooks, without scripts; `in_notebook` shows all of it."""
        from graphopt.report.html import brief

        return brief(self)

    def in_notebook(self, height: int = 800) -> Framed:
        """The whole page in the output of a notebook's cell, `height` pixels high: as the last line of the
        cell, or with `IPython.display.display`."""
        from graphopt.report.html import Framed

        return Framed(self.to_html(), height)


def _lines(report: Report) -> list[str]:
    lines = [f"graphopt: {report.model}, mode {report.mode}, backend {report.backend}"]
    lines.append(f"  pipeline   {report.pipeline}")
    capture = report.capture
    lines.append(f"  captured   by {capture.method} in {capture.seconds:.2f} s")
    lines += [f"             note: {note}" for note in capture.notes]
    for path, reason in capture.left_out.items():
        lines.append(f"             left eager: {path or '(the whole model)'}: {reason:.160}")
    if report.before is not None and report.after is not None:
        before, after = report.before, report.after
        lines.append(
            f"  nodes      {before.nodes} -> {after.nodes}   batch norms "
            f"{before.batch_norms} -> {after.batch_norms}"
        )
        lines.append(f"  parameters {before.parameters:,} -> {after.parameters:,}")
        lines.append(f"  FLOPs      {_si(before.flops)} -> {_si(after.flops)}")
        lines.append(f"  bytes      {_si(before.bytes)}B -> {_si(after.bytes)}B moved per run")
    counts = Counter(record.rewrite for record in report.applied)
    done = ", ".join(f"{name} x{count}" for name, count in counts.most_common()) or "none"
    stopped = "" if report.bisect_limit is None else f" (at most {report.bisect_limit})"
    lines.append(f"  applied    {len(report.applied)}: {done}{stopped}")
    worst = max(
        (r for r in report.applied if r.bound > 0), key=lambda r: r.error / r.bound, default=None
    )
    if worst is not None:
        lines.append(
            f"  worst site {worst.rewrite} at {worst.where}: error {worst.error:.1e}, "
            f"bound {worst.bound:.1e} (float64)"
        )
    for title, records in (("refused", report.refused), ("rolled back", report.rolled_back)):
        lines.append(f"  {title:<12}{len(records)}")
        lines += [f"    {one.rewrite} at {one.where or one.node}: {one.reason}"
                  for one in records[:SHOWN]]  # fmt: skip
        if len(records) > SHOWN:
            lines.append(
                f"    ... and {len(records) - SHOWN} more in report.{title.replace(' ', '_')}"
            )
    if report.check is not None:
        check = report.check
        lines.append(
            f"  verified   float64 {check.float64_error:.1e}; own dtype against float64: source "
            f"{check.source_error:.1e}, optimized {check.error:.1e} (relative)"
        )
        if check.ties:
            lines.append(
                f"             {check.ties:.0f} comparisons of the source are ties; rows that differ "
                f"behind them: {check.excused:.0f}"
            )
        if check.reason:
            verdict = "WRONG, but not validated" if report.applied else "NOT APPLIED"
            lines.append(f"             {verdict}: {check.reason}")
    spent = sum(seconds for _, seconds in report.passes)
    lines.append(f"  seconds    passes {spent:.2f}, validation {report.validation_seconds:.2f}")
    lines += [f"  backend    {note}" for note in report.backend_notes]
    lines += [f"             {line}" for line in _table(report.backend_table)]
    for path, region in report.regions.items():
        lines.append(f"region {path}:")
        lines += [f"  {line}" for line in _lines(region)[2:]]
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as aligned columns, those that nobody has a value in left out, a star before what was chosen;
    what the notes of the report say too is not repeated."""
    columns = [key for key in (rows[0] if rows else ()) if key not in ("chosen", "note")]
    columns = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    stars = ["", *("*" if row.get("chosen") else "" for row in rows)]
    return [
        f"{star:<2}{line[0]:<{widths[0]}}" + "".join(
            f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for star, line in zip(stars, cells, strict=True)
    ] if rows else []  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _si(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} "
