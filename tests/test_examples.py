"""Every example has a main(), runs, and prints something."""

from __future__ import annotations

import ast
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import working_in

ROOT = Path(__file__).parent.parent / "examples"
EXAMPLES = [*sorted(ROOT.glob("*.py")), ROOT / "plugin" / "demo.py", ROOT / "ci_build" / "build.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "expected a docstring that says what it shows"
    assert "main" in [one.name for one in tree.body if isinstance(one, ast.FunctionDef)]
    monkeypatch.syspath_prepend(path.parent)
    with working_in(tmp_path):
        runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 1
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


def test_the_workflow_of_the_ci_build_runs_what_the_script_does():
    steps = yaml.safe_load((ROOT / "ci_build" / "workflow.yml").read_text())["jobs"]["build"][
        "steps"
    ]
    commands = [one["run"] for one in steps if one.get("run", "").startswith("graphopt")]
    assert commands == ["graphopt build --dry-run", "graphopt build --locked"]
    config = tomllib.loads((ROOT / "ci_build" / "graphopt.toml").read_text())
    assert config["build"]["output"] == steps[-1]["with"]["path"]
