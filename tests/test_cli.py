"""The command line: what it prints, what it saves, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    return net, (torch.randn(1, 3, 8, 8),)

def wrong_shapes():
    return nn.Linear(3, 4), (torch.randn(2, 5),)

def no_inputs():
    return nn.Linear(3, 4)

def not_a_model():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mymodels.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mymodels", raising=False)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_optimizes_and_prints_the_report(here):
    result = run("optimize", "mymodels:model")
    assert result.exit_code == 0, result.output
    assert "batch norms 1 -> 0" in result.output
    assert "fold-batch-norm x1" in result.output


def test_saves_an_artifact_that_is_a_source_again(here):
    assert run("optimize", "mymodels:model", "-o", "fast").exit_code == 0
    assert graphopt.load("fast")(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)
    result = run("optimize", "fast", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["before"]["batch_norms"] == 0


def test_modes_and_pipelines(here):
    tuned = run("optimize", "mymodels:model", "--mode", "tune", "--json")
    assert json.loads(tuned.stdout)["pipeline"] == "tune"
    short = run("optimize", "mymodels:model", "--passes", "canonicalize", "--json")
    assert json.loads(short.stdout)["after"]["batch_norms"] == 1


def test_torchvision_and_timm_by_name(here):
    result = run("optimize", "torchvision:resnet18", "--json")
    assert json.loads(result.stdout)["after"]["batch_norms"] == 0
    result = run("optimize", "timm:resnet10t", "--json")
    assert json.loads(result.stdout)["after"]["batch_norms"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["torchvision:resnet5O"], ["resnet5O", "resnet50"]),
        (["timm:resnet5O"], ["resnet5O", "resnet50"]),
        (["mymodels:nothing"], ["nothing"]),
        (["nomodule:nothing"], ["nomodule"]),
        (["mymodels:not_a_model"], ["not_a_model", "int"]),
        (["mymodels:no_inputs"], ["declares no example inputs"]),
        (["mymodels:wrong_shapes"], ["wrong_shapes", "cannot be multiplied (2x5 and 3x4)"]),
        (["nowhere"], ["nowhere"]),
        (["program.pt2"], ["--trust"]),
        (["mymodels:model", "--passes", "fold-batchnorm"], ["unknown pass", "fold-batch-norm"]),
        (["mymodels:model", "--passes", "materialize{limit=x}"], ["limit expects int"]),
        (["mymodels:model", "--mode", "fast"], ["fast"]),
        (["mymodels:model", "--backend", "indcutor"], ["unknown backend", "inductor"]),
        (["mymodels:model", "-o", "mymodels.py"], ["mymodels.py", "not overwriting"]),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else None,
)
def test_bad_input_is_one_clear_line(here, arguments, words):
    (here / "program.pt2").write_bytes(b"PK")
    result = run("optimize", *arguments)
    assert result.exit_code == 2
    lines = [one for one in result.stderr.splitlines() if one.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("graphopt: ")
    for word in words:
        assert word in lines[0]


def test_a_truncated_artifact_is_named(here):
    run("optimize", "mymodels:model", "-o", "fast")
    file = here / "fast" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    result = run("optimize", "fast")
    assert result.exit_code == 2
    assert "weights.safetensors is truncated or altered" in result.stderr


def test_a_pt2_loads_only_on_trust(here):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 8, 8),))
    torch.export.save(program, here / "program.pt2")
    assert run("optimize", "program.pt2").exit_code == 2
    result = run("optimize", "program.pt2", "--trust", "--json")
    assert json.loads(result.stdout)["after"]["batch_norms"] == 0


def test_passes_are_listed_and_explained():
    listing = run("passes").stdout
    for name in ("canonicalize", "fold-batch-norm", "materialize", "deploy", "tune"):
        assert name in listing
    one = run("passes", "fold-batch-norm").stdout
    assert "W' = " in one or "(s W) x + (s b + t)" in one
    assert "fold-batch-norm-into-conv" in one
    assert "Algebraic" in one
    assert "option limit" in run("passes", "materialize").stdout
    assert "Exact" in run("passes", "drop-dropout").stdout
    bad = run("passes", "fold-batchnorm")
    assert (bad.exit_code, "fold-batch-norm" in bad.stderr) == (2, True)
