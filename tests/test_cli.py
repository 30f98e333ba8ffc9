"""The command line: what it prints, what it saves, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphopt
import graphopt.testing
from graphopt.cli import app
from graphopt.commands import shared

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    return net, (torch.randn(1, 3, 8, 8),)

def wrong_shapes():
    return nn.Linear(3, 4), (torch.randn(2, 5),)

def unknown_word():
    return nn.Embedding(4, 8), (torch.tensor([[5, 1]]),)

class Picky(nn.Module):
    def forward(self, x):
        assert len(x) == 3, "three rows please"
        return x

def picky():
    return Picky(), (torch.randn(2, 5),)

class Wave(nn.Module):
    def forward(self, x):
        return x * 2

def wave():
    return Wave(), (torch.randn(2, 8, dtype=torch.complex64),)

def no_inputs():
    return nn.Linear(3, 4)

def not_a_model():
    return 3

def other():
    net, inputs = model()
    net[0].weight.data[0] += 1
    return net, inputs

def three():
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers += [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval(), (torch.randn(1, 3, 8, 8),)
"""
PASSES = """
import dataclasses
import graphopt
from graphopt.ir import ops

@graphopt.rewrite
def forget(r: ops.Relu, rw):
    \"\"\"Wrong: relu(x) = x.\"\"\"
    rw.match(r.out.where == "5")
    return r.input

@dataclasses.dataclass(frozen=True)
class Forget(graphopt.RewritePass):
    name = "forget"
    rewrites = (forget,)
    amount: int = 1

instance = Forget(amount=2)
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mymodels.py").write_text(SOURCE)
    (tmp_path / "mypasses.py").write_text(PASSES)
    monkeypatch.chdir(tmp_path)
    for name in ("mymodels", "mypasses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
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


def test_explains_modules(here):
    arguments = ("optimize", "mymodels:model", "--explain", "1", "--explain", "0")
    report, norm, conv = run(*arguments).stdout.split("\n\n")
    assert report.startswith("graphopt: Sequential")
    assert norm.startswith("1\n  before\n    batch_norm: ")
    assert "absorbed by\n    conv2d" in norm
    assert conv.startswith("0\n") and "fold-batch-norm replaced batch_norm (1): error" in conv
    stories = json.loads(run(*arguments, "--json").stdout)["stories"]
    assert list(stories) == ["1", "0"]
    assert stories["1"]["absorbed_by"][0]["where"] == "0"


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
        (["mymodels:model", "--precision", "bf15"], ["unknown precision", "bf16"]),
        (["mymodels:model", "-o", "mymodels.py"], ["mymodels.py", "not overwriting"]),
        (["mymodels:unknown_word"], ["mymodels:unknown_word: IndexError: index out of range"]),
        (["mymodels:picky"], ["mymodels:picky: AssertionError: three rows please"]),
        (["mymodels:three", "--explain", "9"], ["no module '9'", "it has 0, 1, 2"]),
        (["mymodels:model", "--explain", "1", "--explain", "1.norm"], ["'1.norm'; 1 has none"]),
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


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(AttributeError, match="has no attribute"), shared.one_line("a model"):
        _ = graphopt.testing.nothing


def test_a_configuration_of_a_model_with_complex_inputs(here):
    assert run("init", "mymodels:wave", "-o", "wave.toml").exit_code == 0
    assert 'dtype = "complex64"' in (here / "wave.toml").read_text()
    assert run("build", "wave.toml").exit_code == 0


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
    assert "fold-batch-norm: proved (" in one and "given var + eps > 0" in one
    assert "NOT PROVED" not in listing and "4 proved" in listing
    assert "option limit" in run("passes", "materialize").stdout
    assert "Exact" in run("passes", "drop-dropout").stdout
    assert "not proved: it changes the spelling" in run("passes", "spell-out-shape").stdout
    bad = run("passes", "fold-batchnorm")
    assert (bad.exit_code, "fold-batch-norm" in bad.stderr) == (2, True)


# -- passes of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("item", ["mypasses:forget", "mypasses:Forget", "mypasses:instance",
                                  "mypasses:Forget{amount=3}", "mypasses:instance{amount=3}"])  # fmt: skip
def test_a_pass_by_its_place_is_checked_as_any_other(here, item):
    assert str(graphopt.Pipeline(f"canonicalize,{item},deploy")) == f"canonicalize,{item},deploy"
    result = run("optimize", "mymodels:three", "--passes", f"{item},deploy", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (wrong,) = report["rolled_back"]
    assert (wrong["rewrite"], wrong["where"], wrong["index"]) == ("forget", "5", -1)
    assert report["after"]["batch_norms"] == 0
    assert report["check"]["float64_error"] < 1e-10


def test_options_reach_passes_by_place(here):
    stages = graphopt.Pipeline("mypasses:Forget{amount=3},mypasses:instance,mypasses:forget").stages
    assert [getattr(one.run, "amount", None) for one in stages] == [3, 2, None]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("mypasses:nothing", ["unknown pass mypasses:nothing: mypasses has no 'nothing'"]),
        ("mypasses:forgot", ["nearest: forget"]),
        ("nowhere:Pass", ["no module 'nowhere'", "package.module:Name"]),
        ("mypasses:number", ["mypasses:number is of type int, expected a Pass or a Rewrite"]),
        ("mypasses:Forget{much=3}", ["no option 'much'", "amount"]),
        ("mypasses:forget{amount=3}", ["no option 'amount' (options: none)"]),
        ("mypasses:", ["cannot read the pipeline at 'mypasses:'"]),
    ],
)
def test_a_pass_that_is_not_there_is_one_clear_line(here, item, words):
    result = run("optimize", "mymodels:three", "--passes", item)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


# -- verify and bisect --------------------------------------------------------------------------


def test_the_limit_of_applications(here):
    arguments = ("optimize", "mymodels:three", "--passes", "mypasses:Forget,deploy", "--json")
    report = json.loads(run(*arguments, "--bisect-limit", "2").stdout)
    assert [one["index"] for one in report["applied"]] == [0, 1]
    wrong = json.loads(run(*arguments, "--bisect-limit", "1", "--no-validate").stdout)
    assert [one["rewrite"] for one in wrong["applied"]] == ["forget"]
    assert wrong["check"]["reason"]
    assert run(*arguments, "--bisect-limit", "-1").exit_code == 2


def test_verify_compares_a_source_with_what_was_saved(here):
    assert run("optimize", "torchvision:resnet18", "-o", "fast").exit_code == 0
    result = run("verify", "torchvision:resnet18", "fast", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] and found["float64_error"] < found["limit"] < 1e-5
    assert run("verify", "fast", "torchvision:resnet18").stdout.startswith("equal: ")


def test_verify_tells_models_apart(here):
    result = run("verify", "mymodels:model", "mymodels:other")
    assert result.exit_code == 1
    for word in ("NOT EQUAL", "float64", "own dtype", "worst", "parts at   convolution (0)"):
        assert word in result.stdout
    data = json.loads(run("verify", "mymodels:model", "mymodels:other", "--json").stdout)
    assert data["divergence"]["where"] == "0"
    assert run("verify", "mymodels:no_inputs", "mymodels:no_inputs").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mymodels:model", "nowhere"], ["nowhere"]),
        (["mymodels:modle", "mymodels:model"], ["nearest: model"]),
        (["mymodels:model", "mymodels:no_inputs"], ["Sequential", "Linear", "multiplied"]),
        (["mymodels:no_inputs", "mymodels:no_inputs"], ["no example inputs are declared"]),
    ],
    ids=" ".join,
)
def test_what_verify_cannot_compare_is_one_clear_line(here, arguments, words):
    result = run("verify", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_bisect_prints_the_culprit_and_writes_a_reproducer(here):
    arguments = ("bisect", "mymodels:three", "--passes", "mypasses:Forget,deploy")
    result = run(*arguments, "-o", "why.py")
    assert result.exit_code == 1, result.output
    for word in ("application 0 of ", "forget (Algebraic), pass forget", "where      5", "Relu(",
                 "why.py"):  # fmt: skip
        assert word in result.stdout
    alone = subprocess.run(
        [sys.executable, here / "why.py"], cwd="/", capture_output=True, text=True
    )
    assert (alone.returncode, "float64 error" in alone.stdout) == (1, True), alone.stderr


def test_bisect_with_nothing_to_find(here):
    result = run("bisect", "mymodels:three")
    assert result.exit_code == 0
    assert "good: all " in result.stdout
    assert not (here / "reproducer.py").exists()
    result = run("bisect", "mymodels:three", "--predicate", "echo looked at {}; false", "--verbose")
    assert result.exit_code == 2
    assert "looked at " in result.stderr
    assert "bad with no rewrite applied" in result.stderr


def test_bisect_with_a_command(here):
    code = "import json, sys; data = json.load(open(sys.argv[1] + '/manifest.json')); "
    code += "sys.exit(any(one['where'] == '4' for one in data['report']['applied']))"
    command = f'{sys.executable} -c "{code}"'
    result = run("bisect", "mymodels:three", "--predicate", command)
    assert result.exit_code == 1, result.output
    assert "fold-batch-norm" in result.stdout and "where      4" in result.stdout
    assert (here / "reproducer.py").is_file()
