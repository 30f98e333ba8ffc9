"""The example plugin, installed: what a stranger's package with one pass can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin"

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.shift + self.linear(x)


def make():
    return Net(), (torch.randn(2, 4),)
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which pip has installed the plugin."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "model.py").write_text(MODEL)
    path = [str(ROOT), str(PLUGIN), str(info.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def run(command: list[str], env: dict[str, str], where: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=where, env=env, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_pass_is_found_by_name(installed: dict[str, str], tmp_path: Path):
    said = run(["graphopt", "passes", "tidy-linear"], installed, tmp_path)
    assert "Added vectors become biases" in said
    assert "linear(x) + b = linear(x) with bias b." in said
    out = run(
        ["graphopt", "optimize", "model:make", "--passes", "tidy-linear,deploy", "--json"],
        installed, tmp_path,
    )  # fmt: skip
    report = json.loads(out)
    assert [one["rewrite"] for one in report["applied"]] == ["take-in-bias"]


def test_its_own_tests_pass(installed: dict[str, str]):
    assert "4 passed" in run(["pytest", "-q", "-p", "no:cacheprovider"], installed, PLUGIN)


def test_its_author_writes_less_than_forty_lines():
    lines = (PLUGIN / "tidy_linear.py").read_text().splitlines()
    assert len(lines) < 40
