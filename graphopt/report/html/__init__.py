"""The report as one page: no network, no other file, no eval. See docs/report.md.

Module names, reasons and op texts are whatever the source model has in it: the template escapes all of
them, the data of the script has no `<`, the script writes text only, and the page's content security
policy allows this script and this style alone, by their hashes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from graphopt.report.html import sections
from graphopt.report.html.data import data
from graphopt.report.report import Report

HOME = Path(__file__).parent
SCRIPTS = ("base.js", "graph.js", "pane.js", "details.js", "icicle.js", "page.js")


def page(report: Report) -> str:
    """The whole report."""
    groups = sections.groups(report)
    style = (HOME / "page.css").read_text(encoding="utf-8")
    body = "".join((HOME / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{body}}})();\n'
    return _environment().get_template("page.html.jinja").render(
        report=report, groups=groups, contracts=sections.contracts(groups),
        data=htmlsafe_json_dumps(data(report), separators=(",", ":"), allow_nan=False),
        style=Markup(style), style_hash=_hash(style), script=Markup(script), script_hash=_hash(script),
        **_summary(report),
    )  # fmt: skip


def brief(report: Report) -> str:
    """The first lines of it, for a notebook."""
    return _environment().get_template("brief.html.jinja").render(
        report=report, groups=sections.groups(report), **_summary(report)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Framed:
    """A page in a frame of another one. It has no access to that one, nor to what a browser keeps for it."""

    page: str
    height: int

    def _repr_html_(self) -> str:
        framed = Markup(
            '<iframe sandbox="allow-scripts" srcdoc="{}" title="graphopt report" '
            'style="width: 100%; height: {}px; border: 1px solid #8888"></iframe>'
        ).format(self.page, int(self.height))
        return str(framed)


def _summary(report: Report) -> dict[str, Any]:
    state, verdict = sections.verdict(report)
    return {
        "state": state, "verdict": verdict, "changes": sections.changes(report),
        "stages": sections.stages(report), "benchmarks": sections.benchmarks(report),
        "refused": sections.refusals(report.refused, True),
        "rolled_back": sections.refusals(report.rolled_back, False),
    }  # fmt: skip


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HOME), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"site": sections.site, "share": sections.share, "number": sections.number}
    return made


def _hash(text: str) -> Markup:
    """As a content security policy names an inline script or style."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup("'sha256-{}'").format(digest)
