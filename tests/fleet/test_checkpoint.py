"""The specification of `rewrite_checkpoint`: weights from files to files, tensor by tensor.

Every tensor of the result is bit for bit what `optimize` stores in memory with the same passes; modules keep
their own weights unless told otherwise; nothing is written unless everything is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app
from graphopt.fleet.mapped import CheckpointError, Files, bounded, resident
from graphopt.ir import ops

INPUT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


class Adapted(nn.Module):
    """A linear map and a low-rank one beside it."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.base = nn.Linear(wide, wide)
        self.down, self.up = nn.Linear(wide, 2, bias=False), nn.Linear(2, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


class Block(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(wide), Adapted(wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.map(self.norm(x)))


class Net(nn.Module):
    """Two blocks; `scale` is a buffer, tables of positions are computed by the code."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.first, self.second = Block(wide), Block(wide)
        self.register_buffer("scale", torch.full((wide,), 2.0))
        self.head = nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()
        return self.head(self.second(self.first(x)) * self.scale)


def real(make: Any = Net, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().eval()
    for one in model.state_dict().values():
        if one.is_floating_point():
            one.copy_(
                torch.randn(one.shape).abs() + 0.1 if one.ndim == 1 else torch.randn(one.shape)
            )
    return model.to(dtype)


def empty(make: Any = Net, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return make().eval().to(dtype)


def stored(model: nn.Module, folder: Path, files: int = 2) -> list[Path]:
    """The weights of a model, in some files."""
    names = list(model.state_dict())
    paths = [folder / f"part{number}.safetensors" for number in range(files)]
    for number, path in enumerate(paths):
        save_file({one: model.state_dict()[one].clone() for one in names[number::files]}, path)
    return paths


def read(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {one: value for file in set(index["weight_map"].values())
             for one, value in load_file(folder / file).items()}  # fmt: skip
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in found.values())
    return found


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_weight_is_that_of_the_model_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    source = real(dtype=dtype)
    done = graphopt.rewrite_checkpoint(
        empty(dtype=dtype), INPUT.to(dtype), stored(source, tmp_path), tmp_path / "out"
    )
    found = read(tmp_path / "out")
    for name in ("first.map", "second.map"):
        held: Any = source.get_submodule(name)
        low_rank = 0.5 * held.up.weight.double() @ held.down.weight.double()
        assert torch.equal(
            found[f"{name}.weight"], (held.base.weight.double() + low_rank).to(dtype)
        )
        assert torch.equal(found[f"{name}.bias"], held.base.bias)
    assert not done.rolled_back
    assert (done.computed, done.copied) == (4, len(found) - 4)


def test_the_result_fits_the_model_without_adapters(tmp_path: Path) -> None:
    """Norms keep their weights, buffers too; what the code computes is no weight."""
    source = real()
    graphopt.rewrite_checkpoint(empty(), INPUT, stored(source, tmp_path), tmp_path / "out")
    found = read(tmp_path / "out")

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.map = self.second.map = nn.Linear(8, 8)  # type: ignore[assignment]
            self.second.map = nn.Linear(8, 8)  # type: ignore[assignment]

    plain = Plain().eval()
    plain.load_state_dict(found)
    with torch.no_grad():
        a, b = source.double()(INPUT.double()), plain.double()(INPUT.double())
    assert float((a - b).norm() / a.norm()) < 1e-6  # the weights are rounded to float32


def test_across_modules_norms_go_into_what_reads_them(tmp_path: Path) -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)))

    source, image = real(Folded), torch.randn(2, 3, 6, 6)
    for across, names in ((True, {"conv.weight", "conv.bias"}),
                          (False, set(source.state_dict()))):  # fmt: skip
        graphopt.rewrite_checkpoint(
            empty(Folded), image, stored(source, tmp_path), tmp_path / "out",
            passes="canonicalize,fold-batch-norm", across=across,
        )  # fmt: skip
        assert read(tmp_path / "out").keys() == names
        if across:
            in_memory = graphopt.optimize(
                source, (image,), passes="canonicalize,fold-batch-norm,materialize"
            )
            for name, value in in_memory.state_dict().items():
                assert torch.equal(read(tmp_path / "out")[name], value)


def test_no_weight_takes_the_name_of_another(tmp_path: Path) -> None:
    """A weight that is used as it is and in a product; two maps that one module computes; a parameter and a
    counter that nothing reads."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
            self.norm, self.unused = nn.BatchNorm1d(5), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            linear = nn.functional.linear
            low = linear(linear(x, self.weight), self.other)
            return self.norm(
                linear(torch.relu(low), self.other @ self.weight) + low.sin() @ self.weight
            )

    source = real(Odd)
    graphopt.rewrite_checkpoint(empty(Odd), INPUT, stored(source, tmp_path), tmp_path / "out")
    found, own = read(tmp_path / "out"), source.state_dict()
    for name in ("weight", "unused", *(one for one in own if one.startswith("norm."))):
        assert torch.equal(found[name], own[name])
    product = (own["other"].double() @ own["weight"].double()).float()
    assert (
        sum(one.shape == product.shape and torch.equal(one, product) for one in found.values()) >= 1
    )
    assert len(found) >= 1 + 1 + 5 + 1


def test_shards_are_as_large_as_asked_for(tmp_path: Path) -> None:
    source = real()
    done = graphopt.rewrite_checkpoint(
        empty(), INPUT, stored(source, tmp_path, 3), tmp_path / "out", shard=200
    )
    assert len(done.shards) > 3
    for name in done.shards:
        held = load_file(tmp_path / "out" / name)
        assert len(held) == 1 or sum(one.nbytes for one in held.values()) <= 200
    whole = tmp_path / "whole"
    graphopt.rewrite_checkpoint(empty(), INPUT, stored(source, tmp_path), whole)
    parts = read(tmp_path / "out")
    assert all(torch.equal(value, parts[name]) for name, value in read(whole).items())


def test_names_are_mapped_both_ways(tmp_path: Path) -> None:
    source = real()
    save_file(
        {f"net.{name}": one.clone() for name, one in source.state_dict().items()},
        tmp_path / "a.safetensors",
    )
    graphopt.rewrite_checkpoint(
        empty(), INPUT, [tmp_path / "a.safetensors"], tmp_path / "out",
        read_as=[("^net[.]", "")], write_as=[("^", "model."), ("first", "block.0")],
    )  # fmt: skip
    assert "model.block.0.map.weight" in read(tmp_path / "out")
    with pytest.raises(CheckpointError, match="two tensors of the result are called x"):
        graphopt.rewrite_checkpoint(
            empty(), INPUT, [tmp_path / "a.safetensors"], tmp_path / "out2",
            read_as=[("^net[.]", "")], write_as=[("^.*$", "x")],
        )  # fmt: skip
    assert not (tmp_path / "out2").exists()


def test_wrong_rewrites_are_taken_back(tmp_path: Path) -> None:
    @graphopt.rewrite
    def halve(op: ops.Relu, rw: Any) -> Any:
        """relu(x) = x / 2, wrongly."""
        return op.input * 0.5

    source = real()
    done = graphopt.rewrite_checkpoint(
        empty(),
        INPUT,
        stored(source, tmp_path),
        tmp_path / "out",
        passes=graphopt.Pipeline([halve]),
    )
    assert {one.rewrite for one in done.rolled_back} == {"halve"}
    assert not done.applied


# -- what does not fit ------------------------------------------------------------------------------


def wrong(**changes: Tensor | None) -> Any:
    """A file with some tensors added, replaced, or (None) left out."""

    def build(folder: Path) -> list[Path]:
        tensors = {name: one.clone() for name, one in real().state_dict().items()} | changes
        held = {name: one for name, one in tensors.items() if one is not None}
        save_file(held, folder / "wrong.safetensors")
        return [folder / "wrong.safetensors"]

    return build


def truncated(folder: Path) -> list[Path]:
    paths = stored(real(), folder)
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    return paths


def twice(folder: Path) -> list[Path]:
    paths = stored(real(), folder, 1)
    (folder / "again.safetensors").write_bytes(paths[0].read_bytes())
    return [*paths, folder / "again.safetensors"]


def index(weight_map: Any) -> Any:
    def build(folder: Path) -> list[Path]:
        path = folder / "x.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return [path]

    return build


WRONG = {
    "is not known": (wrong(extra=torch.ones(2)), "extra: the model has no 'extra'"),
    "is nearly known": (wrong(**{"head.wieght": torch.ones(2)}), "did you mean 'head.weight'"),
    "is missing": (wrong(**{"head.weight": None}), "head.weight has no value: it is in no file"),
    "has another shape": (wrong(**{"head.bias": torch.ones(4)}),
                          r"head.bias has the shape \(4,\), expected \(3,\)"),
    "is cut off": (truncated, "part0.safetensors cannot be read"),
    "is there twice": (twice, "again.safetensors: .* is in another file too"),
    "is not there": (lambda folder: [folder / "none"], "none cannot be read"),
    "is in no folder": (lambda folder: [folder], "expected one index or one safetensors file"),
    "leads elsewhere": (index({"w": "../a.safetensors"}), "'../a.safetensors' is no file beside it"),
    "is no index": (index([1]), "is no index of a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_does_not_fit(what: str, tmp_path: Path) -> None:
    build, message = WRONG[what]
    with pytest.raises(CheckpointError, match=message):
        graphopt.rewrite_checkpoint(empty(), INPUT, build(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no sharded checkpoint; not overwriting it"):
        graphopt.rewrite_checkpoint(empty(), INPUT, stored(real(), tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


# -- memory -----------------------------------------------------------------------------------------


def held(path: Path) -> int:
    """Bytes of a file that this process holds in memory."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("the system does not tell what a process holds of a file")
    _, _, about = maps.read_text().partition(f" {path}\n")
    found = re.search(r"^Rss: +(\d+) kB", about, re.MULTILINE)
    assert found, f"{path} is not mapped"
    return int(found[1]) << 10


def test_what_was_read_is_given_back(tmp_path: Path) -> None:
    """A window on a file holds memory when it is used, none afterwards, and its values are still there."""
    size, path = 64 << 20, tmp_path / "a.safetensors"
    save_file({"w": torch.arange(size // 4, dtype=torch.float32)}, path)
    files = Files([path])
    total = float(files.tensors["w"].double().sum())
    assert held(path) >= size
    files.give_back()
    assert held(path) < size // 8
    assert float(files.tensors["w"].double().sum()) == total


def test_a_limit_is_kept_while_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, path = 96 << 20, tmp_path / "a.safetensors"
    save_file({f"w{one}": torch.ones(size // 12) for one in range(3)}, path)
    files = Files([path])
    monkeypatch.setattr("graphopt.fleet.mapped.resident", lambda: held(path))
    with bounded(files, 30 << 20):
        for one in files.tensors.values():
            for part in one.split(1 << 18):
                part.sum()
                torch.mm(
                    torch.ones(256, 256), torch.ones(256, 256)
                )  # what a model would do with it
    assert held(path) < size * 3 // 4


def test_the_memory_of_a_process_is_known() -> None:
    before = resident()
    if not before:
        pytest.skip("the system does not tell what a process holds")
    more = torch.ones(64 << 20)  # 256 MiB
    assert resident() - before > 128 << 20
    del more


# -- the command ------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(real(), tmp_path)
    here = "from tests.fleet.test_checkpoint import INPUT, empty"
    (tmp_path / "adapted_here.py").write_text(
        f"{here}\n\ndef net():\n    return empty(), (INPUT,)\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> Any:
        files = ("--weights", "part0.safetensors", "--weights", "part1.safetensors")
        return CliRunner().invoke(app, ["checkpoint", "adapted_here:net", *files, *more])

    done = run("-o", "out", "--write-as", "^=model.")
    assert done.exit_code == 0, done.output
    assert re.search(r"out: \d+ weights computed, \d+ copied", done.output)
    assert all(name.startswith("model.") for name in read(tmp_path / "out"))
    assert run("-o", "out", "--memory", "lots").exit_code == 2
    assert run("-o", "out", "--read-as", "nothing").exit_code == 2
    missing = run("-o", "other", "--weights", "none.safetensors")
    assert missing.exit_code == 2
    assert not (tmp_path / "other").exists()
