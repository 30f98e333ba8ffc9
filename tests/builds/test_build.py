"""The build: what is in its place afterwards, and every way in which nothing is changed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import graphopt
from graphopt.backends.base import find
from graphopt.builds import building, lock as locking
from tests.builds import nets
from tests.builds.helpers import command, configured, contents, refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a configuration and what `graphopt build` made of it."""
    folder = tmp_path_factory.mktemp("built")
    code, text = command("build", configured(folder))
    assert code == 0, text
    return folder


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "image": torch.randn(batch, 3, 8, 8, generator=generator).to(dtype),
        "scale": torch.randn(batch, 1, generator=generator).to(dtype),
    }


def equal(found: Any, expected: Any, given: dict[str, torch.Tensor], limit: float = 1e-6) -> None:
    """In float64, up to the rounding of folded weights."""
    given = {name: one.double() for name, one in given.items()}
    a, b = found.double()(**given), expected.double()(**given)
    assert a.shape == b.shape and float((a - b).norm() / b.norm()) < limit


def metadata(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


# -- what is built ------------------------------------------------------------------------------


def test_the_artifact_is_the_source(built):
    artifact = built / "build" / "model.gopt"
    for batch in (1, 2, 5):
        fast = graphopt.load(artifact)
        torch.testing.assert_close(
            fast(**inputs(batch)), nets.net()(**inputs(batch)), rtol=1e-4, atol=1e-5
        )
        equal(fast, nets.net(), inputs(batch))
    assert "bn.weight" not in fast.state_dict() and not fast.training


def test_what_a_build_leaves(built):
    names = {name for name in contents(built) if not name.endswith(".html")}
    assert names == {
        "graphopt.toml", "graphopt.lock", "build/model.json", "build/model.gopt/graph.json",
        "build/model.gopt/weights.safetensors", "build/model.gopt/manifest.json",
    }  # fmt: skip
    about = metadata(built / "build" / "model.gopt")["build"]
    lock = json.loads((built / "graphopt.lock").read_text())
    assert about["proofs"]["fold-batch-norm"] == "proved"
    assert about["versions"] == lock["versions"] and about["sources"] == lock["sources"]
    assert lock["artifacts"] == {"model": locking.hash_of(built / "build" / "model.gopt")}
    report = json.loads((built / "build" / "model.json").read_text())
    assert report["sha256"] == lock["artifacts"]["model"] and report["seconds"] > 0
    assert 0 <= report["float64_error"] < 1e-6


def test_an_artifact_says_nothing_of_times_and_places(built):
    text = b"".join(contents(built / "build" / "model.gopt").values()).decode(errors="replace")
    assert str(built) not in text and str(ROOT) not in text
    report = metadata(built / "build" / "model.gopt")["report"]
    assert report["capture"]["seconds"] == report["validation_seconds"] == 0


def test_several_targets(tmp_path):
    path = configured(
        tmp_path,
        target='name = "cpu"\nexport = ["onnx", "pt2"]\n[[targets]]\nname = "trainable"\nmode = "tune"',
    )
    code, text = command("build", path, "--json")
    data = json.loads(next(one for one in text.splitlines() if one.startswith("{")))
    assert code == 0 and [one["name"] for one in data["built"]] == ["cpu", "trainable"]
    assert data["built"][0]["exports"] == ["model.onnx", "model.pt2"]

    cpu, trainable = (tmp_path / "build" / f"{name}.gopt" for name in ("cpu", "trainable"))
    assert {"model.onnx", "model.pt2"} <= metadata(cpu)["sha256"].keys()
    expected = nets.net()(**inputs(3))
    if not find_missing("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(cpu / "model.onnx")
        (found,) = session.run(None, {name: one.numpy() for name, one in inputs(3).items()})
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.load(cpu / "model.pt2").module()
    torch.testing.assert_close(program(**inputs(3)), expected, rtol=1e-4, atol=1e-5)
    for name in ("model.onnx", "model.pt2"):
        text = (cpu / name).read_bytes()
        assert str(ROOT).encode() not in text and str(tmp_path).encode() not in text
    model = graphopt.load(trainable)
    model(**inputs(3)).sum().backward()
    assert model.conv.weight.grad is not None and "bn.weight" in model.state_dict()

    before = contents(cpu)
    path.write_text(path.read_text().replace('mode = "tune"', 'mode = "deploy"'))
    assert command("build", path, "--target", "trainable")[0] == 0
    assert "bn.weight" not in graphopt.load(trainable).state_dict() and contents(cpu) == before
    lock = json.loads((tmp_path / "graphopt.lock").read_text())
    assert lock["artifacts"] == {one.stem: locking.hash_of(one) for one in (cpu, trainable)}


def find_missing(backend: str) -> str:
    try:
        find(backend)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_of_a_file(tmp_path, name):
    state = nets.other().state_dict()
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    assert command("build", configured(tmp_path, model=f'weights = "{name}"'))[0] == 0
    equal(graphopt.load(tmp_path / "build" / "model.gopt"), nets.other(), inputs(3))


def test_masks_may_be_infinite(tmp_path):
    state = nets.net().state_dict()
    state["bn.running_var"] = torch.full((8,), float("inf"))
    torch.save(state, tmp_path / "w.pt")
    _, text = command("build", configured(tmp_path, model='weights = "w.pt"'))
    assert "not finite" not in text


@pytest.mark.parametrize("kind", ["npz", "safetensors", "callable"])
def test_calibration(tmp_path, kind):
    samples = {
        name: torch.cat([one[0][name] for one in nets.data()]) for name in ("image", "scale")
    }
    if kind == "npz":
        np.savez(tmp_path / "d.npz", **{name: one.numpy() for name, one in samples.items()})
        given = 'file = "d.npz"\nbatch = 4'
    elif kind == "safetensors":
        safetensors.torch.save_file(samples, tmp_path / "d.safetensors")
        given = 'file = "d.safetensors"\nbatch = 4'
    else:
        given = 'callable = "tests.builds.nets:data"'
    path = configured(tmp_path, more=f"[calibration]\n{given}", target='precision = "bf16"')
    file = building.read(path)
    found = building.load(file).data
    assert len(found) == 2
    for (one, _), (expected, _) in zip(found, nets.data(), strict=True):
        assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert command("build", path)[0] == 0
    fast = graphopt.load(tmp_path / "build" / "model.gopt")
    torch.testing.assert_close(fast(**inputs(3)), nets.net()(**inputs(3)), rtol=0.05, atol=0.05)
    assert any(one.stage == "lower-precision" for one in fast.report.applied)


def test_integers_are_fitted_to_the_data(tmp_path, monkeypatch):
    seen = []
    from graphopt.passes.quantize import Quantize

    run = Quantize.run

    def seeing(self: Quantize, session: Any) -> None:
        seen.append(self.data)
        run(self, session)

    monkeypatch.setattr(Quantize, "run", seeing)
    path = configured(
        tmp_path, more='[calibration]\ncallable = "tests.builds.nets:data"',
        target='passes = "deploy,quantize{force=true}"',
    )  # fmt: skip
    code, text = command("build", path)
    assert code == 0, text
    assert len(seen[0]) == 2
    fast = graphopt.load(tmp_path / "build" / "model.gopt")
    assert "quantize" in {one.rewrite for one in fast.report.applied}
    torch.testing.assert_close(fast(**inputs(3)), nets.net()(**inputs(3)), rtol=0.1, atol=0.2)


def test_a_precision_that_is_not_reached(tmp_path, monkeypatch):
    from graphopt.passes import quantize

    monkeypatch.setattr(
        quantize, "unsupported", lambda _: "this processor has no such instructions"
    )
    said = refused(4, configured(tmp_path, target='precision = "int8"'))
    assert "nothing is computed in int8: " in said and "no such instructions" in said


def test_bad_calibration(tmp_path):
    for name, message in (
        ("bad_data", "entry 0 is Tensor, expected (inputs, target)"),
        ("fails", "raised RuntimeError: no weights here"),
        ("nothing", "has no 'nothing'"),
    ):
        text = f'[calibration]\ncallable = "tests.builds.nets:{name}"'
        said = refused(2, configured(tmp_path, more=text))
        assert ": calibration.callable: " in said and message in said


def test_a_source_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    text = "from torch import nn\ndef make():\n    return nn.Linear(4, 3)\n"
    (tmp_path / "here" / "my_own_network.py").write_text(text)
    path = tmp_path / "here" / "graphopt.toml"
    path.write_text('[model]\nsource = "my_own_network:make"\n[inputs.input]\nshape = ["n", 4]\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = list(sys.path)
    assert command("build", path)[0] == 0
    assert sys.path == before or sys.path[1:] == before  # `.` is importable
    assert graphopt.load(tmp_path / "here" / "build" / "model.gopt")(torch.zeros(5, 4)).shape == (
        5,
        3,
    )
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_artifact_is_a_source_again(built, tmp_path):
    path = tmp_path / "graphopt.toml"
    configured(tmp_path)
    text = path.read_text().replace("tests.builds.nets:net", str(built / "build" / "model.gopt"))
    path.write_text(text)
    assert command("build", path)[0] == 0
    equal(graphopt.load(tmp_path / "build" / "model.gopt"), nets.net(), inputs(3))


def test_a_trusted_pt2(tmp_path):
    model, given = nets.both()
    torch.export.save(torch.export.export(model, given), tmp_path / "net.pt2")
    (tmp_path / "graphopt.toml").write_text('[model]\nsource = "net.pt2"\ntrust = true\n')
    code, text = command("build", tmp_path / "graphopt.toml")
    assert code == 0, text
    equal(graphopt.load(tmp_path / "build" / "model.gopt"), nets.net(), inputs(2))


def test_init_gives_a_file_that_builds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = command("init", "tests.builds.nets:small")
    assert code == 0 and text.splitlines()[-1] == "wrote graphopt.toml; now: graphopt build"
    code, text = command("build", "--dry-run")
    assert code == 0 and "dimension  batch: 1 to any, captured with 2" in text
    assert command("build")[0] == 0
    assert graphopt.load("build/model.gopt")(torch.zeros(7, 4)).shape == (7, 3)


# -- what is refused, and changes nothing -------------------------------------------------------


def unchanged(folder: Path, code: int, *args: Any) -> str:
    """The message of a build that ends with a code; everything in the folder stays as it is."""
    before = contents(folder)
    said = refused(code, *args)
    assert contents(folder) == before
    assert not [one for one in folder.rglob(".*")]
    return said


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("error = 1e-12", "budget.error is 1e-12, found"),
        ("parameters = 259", "budget.parameters is 259, found 260"),
        ("bytes = 100", "budget.bytes is 100, found"),
        ("seconds = 1e-9", "budget.seconds is 1e-09, found"),
    ],
)
def test_budgets(copy, budget, message):
    said = unchanged(copy, 5, configured(copy, target=f"budget = {{ {budget} }}"))
    assert message in said


def test_a_budget_that_is_kept(copy):
    budget = "budget = { error = 1e-5, parameters = 260, bytes = 100_000, seconds = 600 }"
    assert command("build", configured(copy, target=budget))[0] == 0


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("branches", 3, "the model is not captured as one graph"),
        ("fails", 2, "raised RuntimeError: no weights here"),
        ("bad_data", 2, "returned list, expected an nn.Module"),
        ("nowhere", 2, "has no 'nowhere'"),
        ("small", 2, "forward of Sequential has no parameter of this name"),
        ("keywords", 2, "forward takes it by **more, of which no size may be dynamic"),
    ],
)
def test_sources_that_are_not_built(copy, source, code, message):
    assert message in unchanged(copy, code, configured(copy, source))


def test_inputs_that_the_model_does_not_take(copy):
    path = configured(copy)
    path.write_text(path.read_text().replace("3, 8, 8", "5, 8, 8"))
    assert "the model does not run on its inputs" in unchanged(copy, 3, path)
    path.write_text(path.read_text().replace('[inputs.scale]\nshape = ["batch", 1]', ""))
    assert ": inputs: forward of Net needs 'scale' too" in unchanged(copy, 2, path)


def test_a_wrong_rewrite(copy):
    target = 'passes = "tests.builds.wrong:ForgetRelu,deploy"'
    said = unchanged(copy, 4, configured(copy, target=target))
    assert "forget-relu at" in said and "broke its contract and was taken back" in said
    allowed = configured(copy, target=target, more='[verify]\nrolled_back = "allow"')
    assert command("build", allowed)[0] == 0
    fast = graphopt.load(copy / "build" / "model.gopt")
    equal(fast, nets.net(), inputs(3))
    assert [one.rewrite for one in fast.report.rolled_back] == ["forget-relu"]


def test_what_is_stored_is_compared(copy, monkeypatch):
    """Not what is in memory."""
    save = building.artifact.save

    def wrong(fast: Any, path: Path, **more: Any) -> None:
        with torch.no_grad():
            fast.graph_module.get_parameter("head.bias")[0] += 1e-3
        save(fast, path, **more)

    monkeypatch.setattr(building.artifact, "save", wrong)
    said = unchanged(copy, 4, configured(copy, target='name = "model"'))
    assert "model: " in said and "float64" in said


def test_a_target_that_fails_keeps_the_ones_before_it(copy):
    two = 'name = "model"\n[[targets]]\nname = "second"\nbudget = { bytes = 1 }'
    before = contents(copy / "build" / "model.gopt"), (copy / "graphopt.lock").read_bytes()
    refused(5, configured(copy, target=two))
    now = contents(copy / "build" / "model.gopt"), (copy / "graphopt.lock").read_bytes()
    assert now[1] == before[1]  # not all is built
    assert now[0].keys() == before[0].keys() and not (copy / "build" / "second.gopt").exists()


def test_what_is_not_an_artifact_is_not_overwritten(tmp_path):
    path = configured(tmp_path)
    place = tmp_path / "build" / "model.gopt"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("x")
    assert "is not a graphopt artifact; not overwriting it" in unchanged(tmp_path, 7, path)
    (place / "thesis.txt").unlink()
    place.rmdir()
    place.write_text("x")
    assert "not overwriting it" in unchanged(tmp_path, 7, path)
    place.unlink()
    (tmp_path / "mine").mkdir()
    place.symlink_to(tmp_path / "mine")
    assert "not overwriting it" in unchanged(tmp_path, 7, path)


# -- the lock -----------------------------------------------------------------------------------


def test_a_locked_build_is_the_same_again(copy):
    before = contents(copy / "build" / "model.gopt"), (copy / "graphopt.lock").read_bytes()
    assert command("build", copy / "graphopt.toml", "--locked")[0] == 0
    assert (
        contents(copy / "build" / "model.gopt"),
        (copy / "graphopt.lock").read_bytes(),
    ) == before


def test_other_versions(copy, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9" if name == "numpy" else real(name)
    )
    said = unchanged(copy, 6, copy / "graphopt.toml", "--locked")
    assert said.endswith(f"graphopt.lock, versions: numpy is 9.9, expected {real('numpy')}")


def test_other_sources(copy):
    path = copy / "graphopt.toml"
    text = path.read_text()
    path.write_text("# only another comment\n" + text)
    file = building.read(path)
    with_comment = locking.sources(file.data, {})
    path.write_text(text)
    file = building.read(path)
    assert with_comment == locking.sources(file.data, {})

    path.write_text(text + "[verify]\ninputs = 3\n")
    said = unchanged(copy, 6, path, "--locked")
    assert "graphopt.lock, sources: configuration is" in said and "weights" not in said
    path.write_text(text.replace("nets:net", "nets:other"))
    said = unchanged(copy, 6, path, "--locked")
    assert "configuration is" in said and "weights is" in said


def test_other_data(tmp_path):
    data = '[calibration]\nfile = "d.safetensors"'
    path = configured(tmp_path, more=data, target='precision = "bf16"')
    given = nets.data(1)[0][0]
    safetensors.torch.save_file(given, tmp_path / "d.safetensors")
    assert command("build", path)[0] == 0
    safetensors.torch.save_file({**given, "image": given["image"] * 2}, tmp_path / "d.safetensors")
    before = contents(tmp_path)
    said = refused(6, path, "--locked")
    assert "graphopt.lock, sources: calibration is" in said and "weights" not in said
    assert contents(tmp_path) == before


def test_other_artifacts(copy):
    path = copy / "graphopt.lock"
    lock = json.loads(path.read_text())
    path.write_text(json.dumps({**lock, "artifacts": {"model": "0" * 64}}))
    said = unchanged(copy, 6, copy / "graphopt.toml", "--locked")
    assert "graphopt.lock, artifacts: model is" in said and "expected 00000" in said
    path.write_text(json.dumps({**lock, "artifacts": {}}))
    assert "expected none" in unchanged(copy, 6, copy / "graphopt.toml", "--locked")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory; build once without --locked"),
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("\ud800", "is damaged"),
        ("[]", "is no lock file of graphopt"),
        ("{}", "is no lock file of graphopt"),
        (
            '{"format": 2, "versions": {}, "sources": {}, "artifacts": {}}',
            "has the format 2, expected 1",
        ),
        (
            '{"format": 1, "versions": {"torch": 3}, "sources": {}, "artifacts": {}}',
            "is no lock file",
        ),
        ('{"format": 1, "versions": [], "sources": {}, "artifacts": {}}', "is no lock file"),
        ('{"format": 1, "versions": {}, "sources": {}, "artifacts": {}}', "versions: graphopt is"),
    ],
)
def test_damaged_locks(copy, text, message):
    path = copy / "graphopt.lock"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogatepass"))
    assert message in unchanged(copy, 6, copy / "graphopt.toml", "--locked")


def test_a_damaged_lock_is_written_anew(copy):
    (copy / "graphopt.lock").write_text("{")
    assert command("build", copy / "graphopt.toml", "--target", "model")[0] == 0
    assert locking.read(copy / "graphopt.lock")["artifacts"].keys() == {"model"}


# -- the same again -----------------------------------------------------------------------------


def test_other_paths_and_days_give_the_same_bytes(tmp_path, monkeypatch):
    """Also in another process, with other hashes of texts; exports included."""
    target = 'export = ["onnx", "pt2"]'
    one, other = tmp_path / "one", tmp_path / "two" / "deeper"
    real = time.time
    with monkeypatch.context() as patch:
        path = configured(one, target=target)
        patch.chdir(one)
        patch.setattr(time, "time", lambda: real() - 100_000)
        assert command("build", path)[0] == 0
    path = configured(other, target=target)
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT),
        "TZ": "Asia/Tokyo",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "build", str(path)], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (contents(folder / "build" / "model.gopt") for folder in (one, other))
    assert {"model.onnx", "model.pt2"} <= first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]
    assert (one / "graphopt.lock").read_bytes() == (other / "graphopt.lock").read_bytes()
