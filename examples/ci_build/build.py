"""What a continuous build runs: build, build again from the lock, and look at what would ship.

The exit codes of `graphopt build` say what went wrong: 4 a broken contract, 5 over a budget, 6 not what the
lock says. `workflow.yml` runs the same on GitHub.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import graphopt
from graphopt.cli import app

HERE = Path(__file__).parent


def command(*arguments: str) -> None:
    """A `graphopt` command; ends the build with its exit code where it fails."""
    print("$ graphopt", *arguments)
    sys.stdout.flush()
    try:
        app(list(arguments))
    except SystemExit as done:
        if done.code:
            raise


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in ("graphopt.toml", "model.py"):  # as in a fresh checkout
            shutil.copy(HERE / name, name)
        command("build", "--dry-run")
        command("build")
        before = json.loads(Path("graphopt.lock").read_text())
        command("build", "--locked")  # the same bytes, or exit code 6
        assert json.loads(Path("graphopt.lock").read_text()) == before

        for name in ("server", "portable"):
            report = json.loads(Path(f"build/{name}.json").read_text())
            rewrites = [one["rewrite"] for one in report["report"]["applied"]]
            print(f"{name}: {report['bytes']} bytes, {len(rewrites)} rewrites,",
                  f"float64 error {report['float64_error']:.1e}, sha256 {report['sha256'][:16]}")  # fmt: skip
        model = graphopt.load("build/server.gopt")
        print("loaded:", tuple(model(torch.randn(3, 3, 32, 32)).shape))


if __name__ == "__main__":
    main()
