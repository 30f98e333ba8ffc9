"""Builds that are killed, that have no room, that may not write: the artifact before is still there."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from benchmarks import faults
from graphopt import files
from tests.builds.helpers import command, configured, contents, refused


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    assert command("build", configured(folder))[0] == 0
    return folder


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def unchanged(folder: Path, code: int, *args: Any) -> str:
    before = contents(folder)
    said = refused(code, *args)
    assert contents(folder) == before
    assert not faults.leftovers(folder)
    graphopt.load(folder / "build" / "model.gopt")
    return said


# -- killed -------------------------------------------------------------------------------------


def test_killed_at_any_moment(tmp_path):
    found = faults.run(tmp_path, 10, every=5)
    assert found["the old artifact"] + found["the new artifact"] == 10


def test_the_harness_sees_half_an_artifact(tmp_path, monkeypatch):
    """A build that writes in place is found out."""

    def in_place(work: Path, target: Path) -> None:
        for one in sorted(work.iterdir(), reverse=True):  # weights first
            (target / one.name).write_bytes(one.read_bytes())
            os.kill(os.getpid(), 9)

    (tmp_path / "ok").mkdir()
    monkeypatch.setattr(faults, "completed", once_whole(faults.completed, monkeypatch, in_place))
    with pytest.raises((faults.Broken, graphopt.ArtifactError), match=r"neither|altered"):
        faults.run(tmp_path / "ok", 6, every=100)


def once_whole(completed: Any, monkeypatch: Any, in_place: Any) -> Any:
    """The first builds are right, and the killed ones write in place."""
    seen = []

    def run(config: Path) -> tuple[float, float]:
        found = completed(config)
        seen.append(config)
        if len(seen) == 2:
            monkeypatch.setattr(graphopt.builds.building, "replace", in_place)
            monkeypatch.setattr(faults, "killed", lambda config, *_: ended(config))
        return found

    def ended(config: Path) -> bool:
        os.waitpid(faults.forked(lambda: graphopt.builds.building.build(config)), 0)
        return True

    return run


def test_what_dead_builds_left_is_removed(tmp_path):
    target = tmp_path / "model.gopt"
    dead = tmp_path / ".model.gopt.graphopt-abcd_123"
    (dead / "model.gopt").mkdir(parents=True)
    (dead / "model.gopt" / "graph.json").write_text("{")
    names = (".model.gopt2.graphopt-abcd_123", "model.gopt.graphopt-abcd_123", ".model.gopt.backup",
             ".model.gopt.graphopt-abcd_123.d", ".model.gopt.graphopt-notes")  # fmt: skip
    others = [tmp_path / name for name in names]
    for one in others:
        one.mkdir()
    file, link = (tmp_path / f".model.gopt.graphopt-abcd_{end}" for end in ("124", "125"))
    file.write_text("a file of the user")
    link.symlink_to(others[0])
    with files.beside(target) as work:
        assert work.is_dir() and not dead.exists()
        with files.beside(target) as other:  # of another process, which is alive
            assert work.is_dir() and other != work
        assert not other.exists()
    assert not work.exists()
    assert all(one.is_dir() for one in others)
    assert file.exists() and link.is_symlink()


def test_a_live_build_of_another_process_is_left_alone(tmp_path):
    target = tmp_path / "model.gopt"
    here, there = os.pipe(), os.pipe()

    def hold() -> None:
        with files.beside(target):
            os.write(here[1], b"x")
            os.read(there[0], 1)

    child = faults.forked(hold)
    os.read(here[0], 1)
    (other,) = tmp_path.iterdir()
    with files.beside(target):
        assert other.is_dir()
    os.write(there[1], b"x")
    os.waitpid(child, 0)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "graphopt.lock"
    files.write(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: os.kill(os.getpid(), 9))
    os.waitpid(faults.forked(lambda: files.write(path, "new" * 1000)), 0)
    assert path.read_text() == "old" and len(faults.leftovers(tmp_path)) == 1
    monkeypatch.undo()
    files.write(path, "new")
    assert path.read_text() == "new" and not faults.leftovers(tmp_path)


def test_systems_that_cannot_exchange_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    files.replace(tmp_path / "new", tmp_path / "old")
    assert contents(tmp_path) == {"old/x": b"new"} and not faults.leftovers(tmp_path)


# -- no room ------------------------------------------------------------------------------------


def limited(size: int, path: Path) -> tuple[int, str]:
    """The command in a process whose files may have so many bytes."""
    read, write = os.pipe()

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os.write(write, json.dumps(command("build", path)).encode())

    child = faults.forked(run)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    code, said = json.loads(text)
    return code, said


@pytest.mark.parametrize(
    ("size", "target"),
    [(100, ""), (16_000, ""), (34_500, 'export = ["pt2"]'), (34_500, 'export = ["onnx"]')],
    ids=["the graph", "the weights", "pt2", "onnx"],
)
def test_files_that_do_not_fit(tmp_path, built, size, target):
    path = configured(tmp_path, "large", target=target)
    shutil.copytree(built / "build", tmp_path / "build")
    before = contents(tmp_path)
    code, said = limited(size, path)
    assert code == 7 and "cannot be written: " in said and len(said.splitlines()) == 1, said
    assert "what was there before stays" in said
    assert contents(tmp_path) == before and not faults.leftovers(tmp_path)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up"),
     (errno.EROFS, "it is read-only"), (errno.EACCES, "Permission denied")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["mkdtemp", "write_text", "rename"])
def test_systems_that_refuse(copy, monkeypatch, call, number, message):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "/place")

    if call == "mkdtemp":
        monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    elif call == "write_text":
        monkeypatch.setattr(Path, "write_text", refuse)
    else:
        monkeypatch.setattr(files, "_exchanged", refuse)
    assert message in unchanged(copy, 7, copy / "graphopt.toml")


@pytest.mark.parametrize(
    "output", ["/proc/none/build", "graphopt.toml", "graphopt.toml/deeper", "cyclic"]
)
def test_places_that_cannot_be_made(copy, output):
    (copy / "cyclic").symlink_to("cyclic")
    path = configured(copy, more=f'[build]\noutput = "{output}"')
    assert "cannot be written: " in unchanged(copy, 7, path)


def test_a_lock_that_cannot_be_written(tmp_path):
    path = configured(tmp_path, more='[build]\nlock = "/proc/none/graphopt.lock"')
    assert "/proc/none/graphopt.lock cannot be written: " in refused(7, path)
    graphopt.load(tmp_path / "build" / "model.gopt")


def test_a_report_that_cannot_be_written(copy, monkeypatch):
    """The artifact is there already, and whole."""
    write = files.write

    def refuse(path: Path, text: str) -> None:
        if path.name == "model.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr("graphopt.builds.building.write", refuse)
    assert "the disk is full" in refused(7, copy / "graphopt.toml")
    model = graphopt.load(copy / "build" / "model.gopt")
    assert model(torch.zeros(2, 3, 8, 8), torch.ones(2, 1)).shape == (2, 4)
