"""`graphopt inspect`, `groups` and `bench`: what they show, and one clear line for what they cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphopt.cli import app

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    return net.eval(), (torch.randn(1, 3, 8, 8),)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

    def forward(self, x):
        y = self.stem(x)
        return y * 2 if float(y.sum()) > 0 else y

def branches():
    return Branches().eval(), (torch.randn(1, 3, 8, 8),)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "inspected.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("net.gopt", "net.gopt.zip"):
            result = run("optimize", "inspected:model", "-o", name)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def data(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def line(*arguments: str) -> str:
    """The one line that bad input ends with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (found,) = [one for one in result.stderr.splitlines() if one.strip()]
    assert found.startswith("graphopt: ")
    return found


# -- inspect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.gopt", "net.gopt.zip"])
def test_an_artifact_is_told_and_checked(here, name):
    found = data("inspect", name)
    assert found["intact"] and found["files"].keys() == {"graph.json", "weights.safetensors"}
    assert (found["model"], found["pipeline"]) == ("Sequential", "deploy")
    assert found["contracts"] == {"Algebraic": 3}  # the fold, and two weights made constant
    assert found["check"]["float64_error"] < 1e-12
    assert (found["before"]["batch_norms"], found["after"]["batch_norms"]) == (1, 0)
    assert found["provenance"]["modules"] == 6 and found["provenance"]["merged"] == 1
    text = run("inspect", name).stdout
    for words in (f"{name}: intact, 2 files", "sha256", "3 Algebraic", "float64", "548", "540"):
        assert words in text


def test_what_was_altered_is_named(here, tmp_path):
    whole = (here / "net.gopt.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(whole[:-200] + b"x" + whole[-199:])
    assert "bad.zip is truncated or altered" in line("inspect", str(tmp_path / "bad.zip"))
    folder = tmp_path / "bad.gopt"
    folder.mkdir()
    for one in (here / "net.gopt").iterdir():
        (folder / one.name).write_bytes(one.read_bytes().replace(b"conv", b"conw"))
    assert "bad.gopt" in line("inspect", str(folder))
    assert "no such file" in line("inspect", "nowhere.zip")


def test_a_source_is_captured_and_its_cost_told(here):
    found = data("inspect", "inspected:model")
    assert found["captured"] == "export" and found["left_out"] == {}
    assert found["inputs"] == ["float32[1, 3, 8, 8]"]
    assert found["parameters"]["elements"] == 548 and found["parameters"]["dtypes"] == {
        "float32": 8
    }
    assert {kind: one["ops"] for kind, one in found["ops"].items()} == {
        "Conv": 2, "BatchNorm": 1, "Linear": 1, "Relu": 1, "Reshape": 1,
    }  # fmt: skip
    assert list(found["modules"]) == ["0", "1", "2", "3", "4", "5"]
    assert found["modules"]["0"]["flops"] == 2 * 3 * 9 * 4 * 36
    total = found["cost"]["flops"]
    assert sum(one["flops"] for one in found["modules"].values()) == total
    assert data("inspect", "inspected:model", "--depth", "0")["modules"][""]["flops"] == total
    text = run("inspect", "inspected:model").stdout
    for words in ("captured by export", "548 in 8 tensors", "Conv ", "cost by module"):
        assert words in text


def test_a_source_that_is_no_graph_tells_its_regions(here):
    result = run("inspect", "inspected:branches")
    assert result.exit_code == 1
    for words in ("captured by regional", "regions      stem", "left eager   (the whole model)"):
        assert words in result.stdout
    assert json.loads(run("inspect", "inspected:branches", "--json").stdout)["regions"] == ["stem"]
    assert "no module" in line("inspect", "nowhere:model")


# -- groups -------------------------------------------------------------------------------------


def test_groups_of_channels_are_told_with_what_is_fixed(here):
    found = data("groups", "inspected:model")
    five, four = found["families"]
    assert (five["size"], five["parameters"]) == (5, 4 * 9 + 1 + 16 * 3)
    assert five["members"] == [
        {"name": "3.weight", "axis": 0, "entries": 1},
        {"name": "3.bias", "axis": 0, "entries": 1},
        {"name": "5.weight", "axis": 1, "entries": 16},
    ]
    assert (four["size"], four["flops"] > five["flops"]) == (4, True)
    fixed = {(one["name"], one["axis"]): one["reason"] for one in found["fixed"]}
    assert fixed["5.weight", 0] == "it is an output of the model"
    text = run("groups", "inspected:model").stdout
    for words in ("9 groups of channels in 2 families; 7 axes are fixed", "5.weight[1] x 16",
                  "fixed: a kernel runs along the axis"):  # fmt: skip
        assert words in text


def test_what_is_free_is_a_group_too(here):
    found = data("groups", "inspected:model", "--free", "outputs")
    assert ("5.weight", 0) in {
        (one["name"], one["axis"]) for family in found["families"] for one in family["members"]
    }
    assert "expected of inputs, outputs; found weights" in line(
        "groups", "inspected:model", "--free", "weights"
    )
    assert "cannot capture Branches as one graph" in line("groups", "inspected:branches")


# -- bench --------------------------------------------------------------------------------------


def test_backends_are_measured_beside_the_source(here):
    found = data("bench", "inspected:model", "--backend", "eager", "--backend", "prepacked",
                 "--seconds", "0.2", "--threads", "1")  # fmt: skip
    rows = {row["name"]: row for row in found["table"]}
    assert list(rows) == ["source", "eager", "prepacked"] and found["threads"] == 1
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"] and row["error"] < 1e-6
        assert row["rounds"] == rows["source"]["rounds"] >= 1
    assert rows["source"]["speed_up"] == 1
    text = run("bench", "inspected:model", "--backend", "eager", "--seconds", "0").stdout
    assert "speed-up" in text and text.splitlines()[3].split()[0] == "source"


def test_all_are_measured_to_the_end():
    """A race is over when it is decided; a benchmark is not."""
    from graphopt.backends.measure import MOST, measure

    now = 0.0

    def taking(seconds: float):
        def call() -> None:
            nonlocal now
            now += seconds

        return call

    def rounds(seconds: float, race: bool) -> dict[str, int]:
        calls = {"fast": taking(1.0), "slow": taking(5.0)}
        found = measure(calls, seconds, lambda: now, race=race)
        return {name: len(one.rounds) for name, one in found.items()}

    assert rounds(1e6, race=False) == {"fast": MOST, "slow": MOST}
    assert rounds(30, race=False) == {"fast": 4, "slow": 4}  # six seconds a round, and the warm-up
    assert rounds(1e6, race=True)["slow"] < 3


def test_a_saved_model_is_a_source(here):
    assert len(data("bench", "net.gopt.zip", "--backend", "eager", "--seconds", "0")["table"]) == 2


def test_a_backend_that_is_wrong_is_not_timed(here, monkeypatch):
    from graphopt.backends import prepacked
    from graphopt.backends.base import Backend

    def doubled(module, trainable):
        return lambda *args: 2 * module(*args)

    monkeypatch.setattr(prepacked, "BACKEND", Backend("prepacked", doubled))
    result = run("bench", "inspected:model", "--backend", "prepacked", "--seconds", "0")
    assert result.exit_code == 1
    assert "not used: its outputs differ by 1.0e+00 from float64" in result.stdout


def test_what_is_lossy_by_contract_is_timed_and_its_error_told(here):
    found = data("bench", "inspected:model", "--backend", "eager", "--seconds", "0",
                 "--passes", "prune{ratio=0.5},deploy")  # fmt: skip
    source, pruned = found["table"]
    assert found["lossy"] == ["Masked"]
    assert source["error"] < 1e-6 < 1e-2 < pruned["error"] and pruned["ms"] > 0


def test_what_cannot_be_measured_is_one_clear_line(here):
    assert "did you mean inductor?" in line("bench", "inspected:model", "--backend", "indcutor")
    assert "cannot capture Branches" in line("bench", "inspected:branches", "--backend", "eager")
    assert "unknown mode" in line("bench", "inspected:model", "--mode", "fast")


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Any:
    yield
    sys.modules.pop("inspected", None)
