"""The report on a terminal: what the page says, in any width, and nothing that a name could do to it."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app
from graphopt.report import Report
from tests.report.test_html import HOSTILE, Page, model

EVIL = "[red]x[/red]\x1b]0;title\x07\x1b[2J\r\x9b31m"


@pytest.fixture(scope="module")
def report() -> Report:
    found = graphopt.optimize(model(), (torch.randn(1, 3, 8, 8),)).report
    refused = [
        dataclasses.replace(found.applied[0], where=f"layer{k}", reason=f"reason {k}", index=-1)
        for k in range(30)
    ]
    table = [
        {"backend": "eager", "ms": 2.0, "speed-up": 1.0, "chosen": False, "note": ""},
        {"backend": "prepacked", "ms": 1.0, "speed-up": 2.0, "chosen": True, "note": ""},
        {"backend": "inductor", "ms": None, "speed-up": None, "chosen": False, "note": "not tried"},
    ]
    return dataclasses.replace(found, refused=refused, rolled_back=refused[:2], backend_table=table)


def shown(report: Report, width: int = 120, colours: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours, legacy_windows=False).print(report)
    return out.getvalue()


def test_it_says_what_the_text_and_the_page_say(report):
    text = shown(report)
    for words in ("Sequential", "mode deploy, backend eager", "✓ In float64 the result equals", "batch norms",
                  "fold-batch-norm", "materialize", "Algebraic", "30 refused", "2 rolled back",
                  "and 18 reasons more", "* prepacked", "not tried", "capture", "━━"):  # fmt: skip
        assert words in text, words
    for number in (report.before.nodes, report.after.nodes):
        assert f" {number} " in text


def test_what_is_wrong_is_marked(report):
    wrong = dataclasses.replace(report.check, reason="outputs differ")
    assert "✗ The result is wrong" in shown(dataclasses.replace(report, check=wrong))
    assert "· The whole model was not checked" in shown(dataclasses.replace(report, check=None))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_any_width(report, width):
    assert max(map(len, shown(report, width).splitlines())) <= width


def test_colours_are_for_terminals(report):
    assert "\x1b" in shown(report, colours=True) and "\x1b" not in shown(report)


def test_names_are_text(report):
    """No markup is read in them, and no control character is sent."""
    bad = dataclasses.replace(
        report, model=EVIL, backend_notes=[EVIL],
        applied=[dataclasses.replace(report.applied[0], rewrite=EVIL, contract=EVIL)],
        refused=[dataclasses.replace(report.refused[0], rewrite=EVIL, where=EVIL, reason=EVIL)],
        rolled_back=[], backend_table=[{"backend": EVIL, "ms": 1.0, "note": EVIL}],
        passes=[(EVIL, 9.0)], pipeline=EVIL,
        capture=dataclasses.replace(report.capture, method=EVIL, notes=[EVIL], left_out={EVIL: EVIL}),
    )  # fmt: skip
    text = shown(bad, width=400)
    assert text.count("[red]x[/red]") >= 12
    assert not {*text} & {"\x1b", "\x07", "\r", "\x9b"}
    assert "\x1b]0" not in shown(bad, colours=True) and "\x1b[2J" not in shown(bad, colours=True)


def test_a_report_of_regions_and_an_empty_one_are_shown(report):
    empty = Report("Net", "deploy", "deploy", "eager", report.capture)
    assert "0 rewrites applied" in shown(empty)
    whole = dataclasses.replace(empty, regions={"stem": report})
    assert "· Captured by region" in shown(whole) and "stem" in shown(whole)


def test_the_command_prints_it_on_a_terminal_alone(tmp_path, monkeypatch):
    (tmp_path / "printed.py").write_text(
        "import torch\ndef net():\n    return torch.nn.ReLU().eval(), (torch.ones(2, 3),)\n"
    )
    monkeypatch.chdir(tmp_path)
    plain = CliRunner().invoke(app, ["optimize", "printed:net"]).output
    assert plain.startswith("graphopt: ReLU") and "\x1b" not in plain
    monkeypatch.setattr("graphopt.commands.optimize.sys", _Terminal())
    assert "✓ In float64" in CliRunner().invoke(app, ["optimize", "printed:net"]).output
    sys.modules.pop("printed", None)


class _Terminal:
    """`sys`, whose output is a terminal."""

    @property
    def stdout(self):
        return self

    def isatty(self):
        return True


# -- notebooks ----------------------------------------------------------------------------------


def test_the_whole_page_is_shown_in_a_frame_without_rights(report):
    hostile = dataclasses.replace(report, model=HOSTILE)
    found = Page(hostile.in_notebook(600)._repr_html_())
    ((tag, attributes),) = found.elements
    assert (tag, attributes["sandbox"], found.text) == ("iframe", "allow-scripts", "")
    assert attributes["srcdoc"] == hostile.to_html() and "height: 600px" in str(attributes["style"])
    assert isinstance(graphopt.Report.in_notebook(report)._repr_html_(), str)
