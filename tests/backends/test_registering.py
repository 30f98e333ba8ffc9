"""Backends of other packages: installed under an entry point, or registered in the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import base
from graphopt.backends.base import Backend, BackendError

MODULE = """
from graphopt.backends.base import Backend

BACKEND = Backend("theirs", lambda module, trainable: module)
NOTHING = 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip has installed a package into."""
    info = tmp_path / "their_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-backends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[graphopt.backends]\ntheirs = their_backends:BACKEND\n"
        "absent = their_backends:ABSENT\nnothing = their_backends:NOTHING\n"
    )
    (tmp_path / "their_backends.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_backend_is_found_by_its_name(site: Path):
    fast = graphopt.optimize(nn.Linear(2, 2), (torch.randn(1, 2),), backend="theirs")
    assert fast.report.backend == "theirs"
    assert "theirs" in [one.name for one in base.candidates()]


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", r"absent \(their_backends:ABSENT\) cannot be loaded: AttributeError"),
     ("nothing", "expected a Backend, found their_backends:NOTHING: 3"),
     ("theirz", "did you mean theirs?")],
)  # fmt: skip
def test_what_is_wrong_with_it_is_told(site: Path, name: str, said: str):
    with pytest.raises(BackendError, match=said):
        base.find(name)
    assert name not in [one.name for one in base.candidates()]


def test_a_backend_is_registered_but_takes_no_name_of_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_REGISTERED", {})
    mine = Backend("mine", lambda module, trainable: module)
    base.register(mine)
    assert base.find("mine") is mine
    for name in ("eager", "auto"):
        with pytest.raises(BackendError, match=f"'{name}' is taken"):
            base.register(Backend(name, mine.lower))
