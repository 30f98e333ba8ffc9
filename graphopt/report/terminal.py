"""The report for a terminal: the same sections as on the page (graphopt.report.html), the graphs apart.

What comes from the source model, as names and reasons do, is text and never markup: `rich.text.Text` has no
syntax, and control characters in it are shown, not sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.report.html import sections
from graphopt.report.report import SHOWN, Report

STYLES = {"good": "bold green", "bad": "bold red", "open": "bold yellow"}
WIDTH = 24  # of bars, in characters
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def rendered(report: Report) -> Group:
    """All of it, to be printed by a `rich.console.Console`."""
    return Group(*_parts(report))


def _text(value: object, style: str = "") -> Text:
    return Text(_CONTROL.sub(lambda one: f"\\x{ord(one[0]):02x}", str(value)), style=style)


def _title(value: str) -> Text:
    return _text(f"\n{value}", "bold")


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in {*right} else "left", overflow="fold")
    return table


def _parts(report: Report) -> Iterator[RenderableType]:
    state, verdict = sections.verdict(report)
    yield Text.assemble(
        ("graphopt ", "bold"), _text(report.model, "bold cyan"),
        _text(f"  mode {report.mode}, backend {report.backend}", "dim"),
    )  # fmt: skip
    mark = {"good": "✓", "bad": "✗", "open": "·"}[state]
    yield Text.assemble((f"{mark} ", STYLES[state]), _text(verdict))
    yield from _capture(report)
    if changes := sections.changes(report):
        table = _table("", "before", "after", "change", right=(1, 2, 3))
        for one in changes:
            less = "green" if one.percent.startswith("-") else "yellow"
            table.add_row(one.label, one.before, one.after, _text(one.percent, less))
        yield Text()
        yield table
    yield from _applied(report)
    for title, records in (("rolled back", report.rolled_back), ("refused", report.refused)):
        yield from _refusals(title, sections.refusals(records, title == "refused"), len(records))
    for title, bars in (
        ("benchmarks", sections.benchmarks(report)),
        ("seconds", sections.stages(report)),
    ):
        yield from _bars(title, bars)
    for note in report.backend_notes:
        yield _text(f"  {note}", "dim")
    if report.regions:
        yield _title(f"{len(report.regions)} regions")
        for path, region in report.regions.items():
            yield _text(f"  {path}: {len(region.applied)} applied; {sections.verdict(region)[1]}")


def _capture(report: Report) -> Iterator[RenderableType]:
    capture = report.capture
    yield _text(
        f"  captured by {capture.method} in {capture.seconds:.2f} s; {report.pipeline}", "dim"
    )
    if report.check is not None:
        check = report.check
        yield _text(
            "  own dtype against float64: source "
            f"{sections.number(check.source_error)}, optimized {sections.number(check.error)}", "dim",
        )  # fmt: skip
    for note in capture.notes:
        yield _text(f"  note: {note}", "yellow")
    for path, why in capture.left_out.items():
        yield _text(f"  left eager: {path or '(the whole model)'}: {why:.160}", "yellow")


def _applied(report: Report) -> Iterator[RenderableType]:
    groups = sections.groups(report)
    stopped = "" if report.bisect_limit is None else f" (at most {report.bisect_limit})"
    yield _title(f"{len(report.applied)} rewrites applied{stopped}")
    if not groups:
        return
    table = _table("rewrite", "sites", "contract", "error", "of bound", "proof", right=(1, 3, 4))
    for one in groups:
        worst = max(one.records, key=sections.share)
        share = sections.share(worst)
        table.add_row(
            _text(one.name, "cyan"), str(len(one.records)), _text(one.contract), sections.site(worst),
            f"{share:.0f} %" if share >= 0.5 else "",
            Text("proved", "green") if one.proved else Text("per site", "dim"),
        )  # fmt: skip
    yield table


def _refusals(
    title: str, found: Sequence[sections.Refusals], count: int
) -> Iterator[RenderableType]:
    yield _title(f"{count} {title}")
    for one in found[:SHOWN]:
        places = [record.where or record.node for record in one.records]
        shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        yield Text.assemble(
            "  ", _text(one.name, "cyan"), " ", _text(shown), ": ", _text(one.reason)
        )
        if one.help:
            yield _text(f"    {one.help}", "dim")
    if len(found) > SHOWN:
        yield _text(f"  and {len(found) - SHOWN} reasons more in the report", "dim")


def _bars(title: str, bars: Sequence[sections.Bar]) -> Iterator[RenderableType]:
    if not bars:
        return
    yield _title(title)
    table = _table("", "", "", "", right=(1,))
    table.show_header = False
    for one in bars:
        style = "green" if one.chosen else "blue"
        table.add_row(
            _text(("* " if one.chosen else "  ") + one.label), _text(one.value),
            Text("━" * max(1, round(one.share * WIDTH / 100)) if one.share else "", style),
            _text(one.note, "dim"),
        )  # fmt: skip
    yield table
