"""A progress bar says what is being done, counts the steps, and leaves nothing behind."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import graphopt
from graphopt import progress
from graphopt.progress import shown


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return written


def test_a_bar_has_the_steps_and_what_is_done(terminal: io.StringIO) -> None:
    with shown("loading") as bar:
        bar.expected = 3
        for step in ("one", "two", "three"):
            bar(f"step {step}")
            bar._progress.refresh()
    for said in ("step one", "0/3", "step three", "2/3"):
        assert said in terminal.getvalue()


def test_more_steps_than_expected_are_counted_too(terminal: io.StringIO) -> None:
    with shown() as bar:
        bar.expected = 1
        for number in range(4):
            bar(f"step {number} [of the model]")  # not markup
            bar._progress.refresh()
    assert "3/4" in terminal.getvalue()
    assert "step 3 [of the model]" in terminal.getvalue()


def test_optimize_shows_one_when_asked(terminal: io.StringIO) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    fast = graphopt.optimize(model, (torch.zeros(2, 3, 4, 4),), progress=True)
    assert "/" in terminal.getvalue() and fast.report.applied
    terminal.truncate(0)
    graphopt.optimize(model, (torch.zeros(2, 3, 4, 4),))
    assert not terminal.getvalue().strip("\0")


def test_the_first_call_shows_one_too(terminal: io.StringIO) -> None:
    fast = graphopt.optimize(nn.Linear(3, 4).eval(), progress=True)
    assert not terminal.getvalue()
    fast(torch.zeros(2, 3))
    assert terminal.getvalue()


def test_a_function_is_told_every_step() -> None:
    said: list[str] = []
    graphopt.optimize(nn.Linear(3, 4).eval(), (torch.zeros(2, 3),), progress=said.append)
    assert said[0] == "copying Linear" and "verifying the whole model in float64" in said
