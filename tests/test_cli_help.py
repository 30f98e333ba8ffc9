"""Help and completion: examples that parse, values that exist, and no torch for any of it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.commands import complete

GROUP = typer.main.get_command(app)
COMMANDS = dict(GROUP.commands)  # type: ignore[attr-defined]


def run(*arguments: str, **environment: str):
    return CliRunner().invoke(app, list(arguments), env=environment, prog_name="graphopt")


def completed(line: str) -> list[str]:
    """What bash offers behind `line`, which is completed where it ends."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    result = run(
        _GRAPHOPT_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(words),
        COMP_CWORD=str(len(words) - 1),
    )
    return result.output.split()


# -- help ---------------------------------------------------------------------------------------


def test_help_and_completion_do_not_load_torch():
    code = "import sys; from graphopt.cli import main; sys.argv = ['graphopt', '--help']\n"
    code += (
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch is loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


def test_the_first_public_name_loads_everything():
    code = "import graphopt.sources, graphopt.optimize, graphopt, pickle\n"
    code += "assert callable(graphopt.optimize) and callable(graphopt.bisect), graphopt.optimize\n"
    code += "assert graphopt.artifact.load is graphopt.load and 'optimize' in dir(graphopt)\n"
    code += "assert pickle.loads(pickle.dumps(graphopt.verify)) is graphopt.verify\n"
    code += "assert not hasattr(graphopt, 'nothing')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse_and_exit_codes(name):
    told = COMMANDS[name].epilog or ""
    assert "Exit codes" in told or name in ("checkpoint", "combine"), told
    examples = re.findall(rf"graphopt {name}\b([^;\n]*)", told)
    assert examples
    for one in examples:
        arguments = shlex.split(one.partition(". See")[0])
        COMMANDS[name].make_context(name, arguments, resilient_parsing=False)
    shown = run(name, "--help", COLUMNS="200")
    assert shown.exit_code == 0 and "Example" in shown.output


# -- completion ---------------------------------------------------------------------------------


def test_commands_and_options_are_completed():
    assert completed("graphopt in") == ["init", "inspect"]
    assert "--backend" in completed("graphopt bench --b")


def test_backends_are_completed():
    assert completed("graphopt optimize net --backend ") == [*complete.BACKENDS, "auto"]
    assert completed("graphopt optimize net --backend o") == ["openvino", "onnxruntime"]
    assert completed("graphopt bench net --backend a") == []


def test_passes_presets_modes_and_precisions_are_completed():
    assert completed("graphopt passes fold-batch") == ["fold-batch-norm"]
    assert completed("graphopt passes depl") == ["deploy"]
    assert completed("graphopt optimize net --passes canonicalize,fold-batch") == [
        "canonicalize,fold-batch-norm"
    ]
    assert completed("graphopt optimize net --mode ") == ["deploy", "tune"]
    assert completed("graphopt optimize net --precision i") == ["int8"]
    assert completed("graphopt groups net --free out") == ["outputs"]


def test_what_is_completed_is_what_there_is():
    from graphopt.backends.base import _HOMES
    from graphopt.optimize import MODES, PRECISIONS
    from graphopt.passes.base import available
    from graphopt.pipeline import PRESETS

    assert complete.pass_names() == tuple(available())
    assert complete.BACKENDS.keys() == _HOMES.keys()
    assert complete.PRECISIONS.keys() == PRECISIONS.keys()
    assert {*complete.MODES} == {*MODES} == {*PRESETS}


def test_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.gopt").mkdir()
    (tmp_path / "net.gopt" / "manifest.json").touch()
    (tmp_path / "build").mkdir()
    for name in ("build/cpu.gopt.zip", "notes.txt", ".hidden", "program.pt2"):
        (tmp_path / name).touch()
    assert completed("graphopt inspect ") == [
        "torchvision:", "timm:", "build/", "net.gopt", "program.pt2"
    ]  # fmt: skip
    assert completed("graphopt inspect build/") == ["build/cpu.gopt.zip"]
    assert completed(f"graphopt inspect {tmp_path}/n") == [f"{tmp_path}/net.gopt"]
    assert completed("graphopt inspect nowhere/") == []
    assert complete.artifacts("p") == [] and complete.artifacts("/nowhere/") == []
