"""The specification of `combine`: base + sum of weights times (term - base), rounded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.fleet import arithmetic
from graphopt.fleet.arithmetic import combine, combined
from graphopt.fleet.mapped import CheckpointError
from tests.fleet.test_checkpoint import read

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=draw).to(dtype),
        "a.bias": torch.randn(5, generator=draw).to(dtype),
        "scale": torch.randn((), generator=draw).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "count": torch.tensor([seed]),
    }


def stored(folder: Path, name: str, tensors: dict[str, Tensor], files: int = 2) -> Path:
    """A sharded checkpoint in a folder of its own."""
    place, names = folder / name, list(tensors)
    place.mkdir()
    where = {}
    for number in range(files):
        part = {one: tensors[one].clone() for one in names[number::files]}
        save_file(part, place / f"{number}.safetensors")
        where |= dict.fromkeys(part, f"{number}.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return place


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_the_formula_in_float64_rounded_once(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base, one, two = drawn(0, dtype), drawn(1, dtype), drawn(2)  # the third in another dtype
    places = [stored(tmp_path, str(number), each) for number, each in enumerate((base, one, two))]
    combine(places[0], [(places[1], 0.4), (places[2], -0.3)], tmp_path / "out", shard=50)
    found = read(tmp_path / "out")
    assert len(set((tmp_path / "out").glob("*.safetensors"))) > 1
    assert found.keys() == base.keys()
    for name, value in base.items():
        assert found[name].dtype == value.dtype
        if name == "count":
            assert torch.equal(found[name], value)
            continue
        b, t1, t2 = (each[name].double() for each in (base, one, two))
        assert torch.equal(found[name], (b + 0.4 * (t1 - b) + -0.3 * (t2 - b)).to(dtype))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DTYPES), st.floats(-2, 2), st.integers(0, 9), st.integers(1, 40))
def test_laws(dtype: torch.dtype, weight: float, seed: int, piece: int) -> None:
    """Nothing added changes no bit; all of a term is the term; pieces make no difference."""
    base, term = (drawn(one, dtype)["a.weight"] for one in (seed, seed + 1))
    assert torch.equal(combined(base, [(base, weight), (term, 0.0)]), base)
    if dtype != torch.float64:  # where base + (term - base) need not be term
        assert torch.equal(combined(base, [(term, 1.0)]), term)
    whole = combined(base, [(term, weight)])
    before, arithmetic.PIECE = arithmetic.PIECE, piece
    try:
        assert torch.equal(combined(base, [(term, weight)]), whole)
    finally:
        arithmetic.PIECE = before


def test_weights_by_name_and_what_a_model_has_over_another(tmp_path: Path) -> None:
    places = [stored(tmp_path, str(number), drawn(number)) for number in range(3)]
    combine(places[0], [(places[1], lambda name: float(name.startswith("a.")))], tmp_path / "some")
    some = read(tmp_path / "some")
    assert torch.equal(some["a.bias"], drawn(1)["a.bias"])
    assert torch.equal(some["scale"], drawn(0)["scale"])
    combine(places[0], [(places[1], 1), (places[2], -1)], tmp_path / "moved")
    base, tuned, source = (drawn(one)["a.weight"].double() for one in range(3))
    moved = read(tmp_path / "moved")["a.weight"].double()
    assert float((moved - (base + tuned - source)).abs().max()) < 1e-6


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    return {name: one for name, one in (drawn(1) | changes).items() if one is not None}


WRONG: dict[str, tuple[Any, Any, str]] = {
    "lacks a tensor": (changed(scale=None), 1.0, "term lacks scale"),
    "has one more": (changed(more=torch.ones(1)), 1.0, "term has, and the base lacks, more"),
    "has another shape": (changed(scale=torch.ones(1)), 1.0,
                          r"scale has the shape \(1,\), expected that of the base, \(\)"),
    "has integers": (changed(scale=torch.tensor(1)), 1.0, "scale is torch.int64, in the base torch.float32"),
    "is infinite": (changed(scale=torch.tensor(torch.inf)), 1.0, "scale is not finite in torch.float32"),
    "is too large": (drawn(1), 1e39, "is not finite in torch.float32"),
    "has no weight": (drawn(1), float("nan"), "the weight of .* is nan"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_term_that_does_not_fit(what: str, tmp_path: Path) -> None:
    tensors, weight, message = WRONG[what]
    places = stored(tmp_path, "base", drawn(0)), stored(tmp_path, "term", tensors)
    with pytest.raises(CheckpointError, match=message):
        combine(places[0], [(places[1], weight)], tmp_path / "out")
    assert {one.name for one in tmp_path.iterdir()} == {"base", "term"}


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    places = stored(tmp_path, "base", drawn(0)), stored(tmp_path, "term", drawn(1))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="is no sharded checkpoint; not overwriting it"):
        combine(places[0], [(places[1], 1)], tmp_path / "out")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        stored(tmp_path, f"m{number}", drawn(number))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["combine", "m0", *args])

    done = run("--add", "m1=0.5", "--add", "m2=-1", "-o", "out")
    assert done.exit_code == 0, done.output
    b, t1, t2 = (drawn(one)["a.weight"].double() for one in range(3))
    assert torch.equal(read(tmp_path / "out")["a.weight"], (b + 0.5 * (t1 - b) - (t2 - b)).float())
    for wrong in ("m1", "m1=much", "=1", "none=1"):
        assert run("--add", wrong, "-o", "other").exit_code == 2
    assert not (tmp_path / "other").exists()
