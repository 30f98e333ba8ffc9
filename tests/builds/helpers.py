"""Configurations, the command, and artifacts whose hashes fit what was changed in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from graphopt.artifact import sealed
from graphopt.cli import app

CONFIG = """\
[model]
source = "tests.builds.nets:{source}"
{model}
[inputs.image]
shape = ["batch", 3, 8, 8]
[inputs.scale]
shape = ["batch", 1]
{inputs}
[dimensions.batch]
{more}
[[targets]]
{target}
"""


def configured(folder: Path, source: str = "net", **parts: str) -> Path:
    """A configuration in `folder`; parts are text for [model], after the inputs, between, and [[targets]]."""
    empty = dict.fromkeys(("model", "inputs", "more", "target"), "")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "graphopt.toml"
    path.write_text(CONFIG.format(source=source, **{**empty, **parts}))
    return path


def command(*args: Any) -> tuple[int, str]:
    """The exit code and all that is printed; an exception that is not an exit fails the test."""
    result = CliRunner().invoke(app, list(map(str, args)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.strip()


def refused(code: int, *args: Any) -> str:
    """The one line that a build ends with."""
    found, text = command("build", *args)
    assert found == code, text
    assert "Traceback" not in text and len(text.splitlines()) == 1 and text.startswith("graphopt: ")
    return text


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, hidden ones too."""
    return {
        one.relative_to(folder).as_posix(): one.read_bytes()
        for one in folder.rglob("*")
        if one.is_file() and "__pycache__" not in one.parts
    }


def rehash(artifact: Path, **change: Any) -> None:
    """Make sizes, hashes and the seal fit the files again, with changes of the manifest; `None` drops."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["sha256"]:
        if (artifact / name).is_file():
            manifest["bytes"][name] = (artifact / name).stat().st_size
            manifest["sha256"][name] = hashlib.sha256((artifact / name).read_bytes()).hexdigest()
    manifest = {**manifest, **change}
    path.write_text(sealed({key: value for key, value in manifest.items() if value is not None}))
