"""Artifacts as one file: the same bytes for the same contents, readable by others, and nothing that the
archive says of itself is believed; what is in it is checked as in a folder (test_hostile.py)."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import graphopt
from graphopt.artifact import ArtifactError, manifest_of, sealed
from graphopt.artifact_zip import CHUNK, MOST, Archive, pack
from tests.builds import nets
from tests.builds.helpers import command, configured, contents, rehash


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the same model as a folder and as a file."""
    home = tmp_path_factory.mktemp("saved")
    model, inputs = nets.both()
    fast = graphopt.optimize(model, inputs)
    fast.save(home / "net.gopt")
    fast.save(home / "net.gopt.zip")
    return home


@pytest.fixture
def archive(saved, tmp_path) -> Path:
    return Path(shutil.copy(saved / "net.gopt.zip", tmp_path / "net.gopt.zip"))


def refused(path: Path, words: str = "") -> None:
    """Loading is refused in one line that names the file."""
    with pytest.raises(ArtifactError) as caught:
        graphopt.load(path)
    said = str(caught.value)
    assert str(path) in said and words in said and "\n" not in said, said


def refused_or_same(path: Path, files: dict[str, bytes]) -> bool:
    """A damaged archive is refused in one line, or it was damaged where nothing depends on it: what is read
    has the same contents. Returns whether it was refused."""
    said = ""
    try:
        manifest_of(path)
    except ArtifactError as error:
        said = str(error)
    if said:
        assert str(path) in said and "\n" not in said
        return True
    opened = Archive(path)
    assert {
        name: opened.text(name, 1 << 28).encode() for name in ("graph.json", "manifest.json")
    } == {name: files[name] for name in ("graph.json", "manifest.json")}
    assert opened.names() == files.keys()
    opened.close()
    return False


def packed(path: Path, files: dict[str, bytes]) -> None:
    """An archive as graphopt writes it, of any files."""
    folder = path.parent / "packed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pack(folder, path)


# -- what is written ----------------------------------------------------------------------------


def test_a_file_is_the_model(archive):
    model, inputs = nets.both()
    again = graphopt.load(archive)
    assert torch.allclose(again(*inputs), model(*inputs), atol=1e-5)
    again.save(archive)  # over what it came from
    assert torch.equal(graphopt.load(archive)(*inputs), again(*inputs))


def test_it_holds_the_files_of_the_folder(saved):
    with zipfile.ZipFile(saved / "net.gopt.zip") as found:
        assert found.testzip() is None
        files = {one.filename: found.read(one) for one in found.infolist()}
        for one in found.infolist():
            assert one.compress_type == zipfile.ZIP_STORED and one.date_time[0] == 1980
            assert one.external_attr >> 16 == stat.S_IFREG | 0o644
    assert files == contents(saved / "net.gopt")


def test_other_tools_read_it(archive, tmp_path):
    subprocess.run([sys.executable, "-m", "zipfile", "-e", archive, tmp_path / "out"], check=True)
    assert graphopt.load(tmp_path / "out").report.model == "Net"


def test_the_same_contents_are_the_same_bytes(saved, tmp_path):
    shutil.copytree(saved / "net.gopt", tmp_path / "later")
    for one in (tmp_path / "later").iterdir():
        os.utime(one, (1, 1))
        one.chmod(0o600)
    pack(tmp_path / "later", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (saved / "net.gopt.zip").read_bytes()


def test_sizes_of_more_than_32_bits(saved, archive, monkeypatch):
    """Simulated: what counts as large is small."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    pack(saved / "net.gopt", archive)
    assert b"PK\6\6" in archive.read_bytes()
    assert graphopt.load(archive).report.model == "Net"


def test_nothing_but_an_archive_of_ours_is_overwritten(archive, tmp_path):
    fast = graphopt.load(archive)
    (tmp_path / "theirs.zip").write_bytes(b"PK\3\4 mine")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as other:
        other.writestr("graph.json", "{}")
    (tmp_path / "empty.zip").touch()
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "link.zip").symlink_to(archive)
    before = contents(tmp_path)
    for name in ("theirs.zip", "more.zip", "empty.zip", "folder.zip", "link.zip"):
        with pytest.raises(ArtifactError, match=f"{name} exists and is not a graphopt artifact"):
            fast.save(tmp_path / name)
    assert contents(tmp_path) == before
    archive.write_bytes(archive.read_bytes()[:-5])  # damaged, and ours
    fast.save(archive)
    assert graphopt.load(archive).report.model == "Net"


def test_a_write_that_fails_leaves_the_old_file(archive, monkeypatch):
    fast, before = graphopt.load(archive), archive.read_bytes()

    def full(folder, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphopt.artifact.pack", full)
    with pytest.raises(OSError, match="No space"):
        fast.save(archive)
    assert archive.read_bytes() == before and [*archive.parent.iterdir()] == [archive]


# -- what is believed ---------------------------------------------------------------------------


def test_flipped_bits(archive, saved):
    """In headers, in contents, in the directory."""
    whole, files = archive.read_bytes(), contents(saved / "net.gopt")
    places = {*range(0, len(whole), max(1, len(whole) // 150)), *range(len(whole) - 98, len(whole))}
    inside = {place for data in files.values() for at in [whole.index(data)]
              for place in range(at, at + len(data))}  # fmt: skip
    assert len(inside & places) > 50
    for place in places | {*range(0, 128)}:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        archive.write_bytes(data)
        found = refused_or_same(archive, files)
        assert found or place not in inside  # the rest are dates, versions and the like


def test_every_truncation_and_addition_is_found(archive):
    whole = archive.read_bytes()
    for size in (0, 1, 21, 22, 97, 98, 99, len(whole) // 2, len(whole) - 22, len(whole) - 1):
        archive.write_bytes(whole[:size])
        refused(archive, "truncated or altered")
    for other in (whole + b" ", b" " + whole, b"MZ" + bytes(62) + whole):
        archive.write_bytes(other)
        refused(archive)


def rezipped(archive: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> None:
    """The same contents in an archive of somebody else."""
    with zipfile.ZipFile(archive) as found:
        files = {one.filename: found.read(one) for one in found.infolist()}
    with zipfile.ZipFile(archive, "w") as out:
        change(out, files)


def plain(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        member = zipfile.ZipInfo(name)
        member.external_attr = (stat.S_IFREG | 0o644) << 16
        out.writestr(member, data)


def deflated(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        out.writestr(name, data, zipfile.ZIP_DEFLATED)


def bomb(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    plain(out, files)
    out.writestr("zeros", bytes(1 << 24), zipfile.ZIP_DEFLATED)


def twice(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    plain(out, files)
    with pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("graph.json", b"{}")


def link(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    plain(out, files)
    info = zipfile.ZipInfo("linked")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    out.writestr(info, "/etc/passwd")


def elsewhere(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    plain(out, files)
    out.writestr("../outside", b"x")


def commented(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    plain(out, files)
    out.comment = b"more"


@pytest.mark.parametrize(
    "change", [deflated, bomb, twice, link, elsewhere, commented], ids=lambda one: one.__name__
)
def test_archives_of_others_are_refused(archive, change, tmp_path):
    before = {*os.listdir(tmp_path.parent)}
    rezipped(archive, change)
    refused(archive, "no archive of graphopt")
    assert {*os.listdir(tmp_path.parent)} == before


def test_the_same_files_may_be_packed_by_others(archive):
    rezipped(archive, plain)
    assert graphopt.load(archive).report.model == "Net"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/graph.json", "..", "a\nb", ".hidden",
                                  "sub\\outside", "C:outside", "a" * 101, "x\0y"])  # fmt: skip
def test_names_that_lead_elsewhere(archive, name):
    def named(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        plain(out, files)
        member = zipfile.ZipInfo("placeholder")
        member.external_attr = (stat.S_IFREG | 0o644) << 16
        member.filename = name
        out.writestr(member, b"x")

    rezipped(archive, named)
    refused(archive, "is no name of a file")


def test_members_are_those_of_the_manifest(archive):
    with zipfile.ZipFile(archive) as found:
        files = {one.filename: found.read(one) for one in found.infolist()}
    packed(archive, files)
    assert graphopt.load(archive).report.model == "Net"
    packed(archive, files | {"more.bin": b"x"})
    refused(archive, "more.bin is not named in manifest.json")
    for name in files:
        packed(archive, {key: one for key, one in files.items() if key != name})
        refused(archive, f"{name}")
    packed(archive, files | {"graph.json": b"{}"})
    refused(archive, "graph.json is truncated or altered")


@pytest.mark.timeout(20)
def test_sizes_are_looked_at_before_anything_is_read(archive):
    """Directories and members that promise more than the file has, and files that are as large as can be."""
    whole = archive.read_bytes()
    entry = whole.index(b"PK\1\2")
    for place in (
        entry + 20,
        entry + 24,
        len(whole) - 22 + 12,
    ):  # sizes of a member, of the directory
        for value in (1 << 31, (1 << 32) - 2):
            data = bytearray(whole)
            data[place : place + 4] = struct.pack("<I", value)
            archive.write_bytes(data)
            refused(archive)
    archive.write_bytes(whole)
    os.truncate(archive, 1 << 40)
    refused(archive)
    with open(archive, "r+b") as file:  # 1 TiB of directory, of which nothing is on the disk
        file.seek((1 << 40) - 22)
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, (1 << 32) - 2, 4, 0))
    refused(archive, f"at most {CHUNK} are expected")
    archive.unlink()


def test_more_members_than_an_artifact_has(archive, saved):
    def many(out: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        plain(out, files | {f"more{number}": b"" for number in range(MOST)})

    rezipped(archive, many)
    refused(archive, "members, expected at most")


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])  # fmt: skip
def test_other_bytes_are_refused_or_change_nothing(archive, saved, data):
    whole = (saved / "net.gopt.zip").read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    put = data.draw(st.binary(max_size=12))
    cut = data.draw(st.integers(0, 12))
    other = whole[:at] + put + whole[at + cut :]
    archive.write_bytes(other)
    refused_or_same(archive, contents(saved / "net.gopt"))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("pipe.zip", "nowhere.zip"):
        refused(tmp_path / name, "not a graphopt artifact")


# -- what is in the manifest --------------------------------------------------------------------


def test_every_node_is_traced_to_its_modules(saved):
    manifest = manifest_of(saved / "net.gopt.zip")
    graph = json.loads((saved / "net.gopt" / "graph.json").read_text())
    traced = {one["name"] for one in graph["nodes"] if one["op"] in ("call_function", "get_attr")}
    assert manifest.provenance.keys() == traced
    assert ["conv", "bn"] in manifest.provenance.values()  # the convolution that the norm went into
    assert manifest == manifest_of(saved / "net.gopt")


@pytest.mark.parametrize(
    "value", [{"nowhere": ["conv"]}, {"": []}, {"relu": "conv"}, {"relu": [3]}, []]
)
def test_provenance_of_other_nodes_is_refused(saved, tmp_path, value: Any):
    shutil.copytree(saved / "net.gopt", tmp_path / "net.gopt")
    rehash(tmp_path / "net.gopt", provenance=value)
    refused(tmp_path / "net.gopt", "provenance")


def test_artifacts_without_provenance_load(saved, tmp_path):
    shutil.copytree(saved / "net.gopt", tmp_path / "net.gopt")
    rehash(tmp_path / "net.gopt", provenance=None)
    assert graphopt.load(tmp_path / "net.gopt").report.model == "Net"
    assert sealed({"a": 1}) != sealed({"a": 2})


# -- builds -------------------------------------------------------------------------------------


def test_a_build_stores_one_file_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        path = configured(tmp_path / name, more="[build]\narchive = true\n")
        assert command("build", path)[0] == 0
        assert {one.name for one in (tmp_path / name / "build").iterdir()} == {
            "model.gopt.zip", "model.json", "model.html"
        }  # fmt: skip
    one, two = (tmp_path / name / "build" / "model.gopt.zip" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert command("build", path, "--locked")[0] == 0
    assert two.read_bytes() == one.read_bytes()
    lock = json.loads((tmp_path / "two" / "graphopt.lock").read_text())
    path.write_text(path.read_text().replace("archive = true", "archive = false"))
    code, text = command("build", path, "--locked")
    assert code == 6 and "configuration" in text
    assert lock == json.loads((tmp_path / "two" / "graphopt.lock").read_text())
