"""`graphopt kernels SOURCE`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from graphopt.cli import app

SOURCE = "benchmarks.triton_zoo:spiking_dense"


def test_kernels_are_printed():
    done = CliRunner().invoke(app, ["kernels", SOURCE])
    assert done.exit_code == 0, done.output
    assert "@triton.jit" in done.stdout
    assert "ops of" in done.stdout and "FLOPs" in done.stdout
    data = json.loads(CliRunner().invoke(app, ["kernels", SOURCE, "--json"]).stdout)
    assert {"name", "kind", "origins", "nodes", "bytes", "flops", "source"} == set(data[0])


def test_without_a_device_the_command_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, ["kernels", SOURCE])
    assert done.exit_code == 2
    assert "there is no GPU, and TRITON_INTERPRET is not 1" in done.stderr
