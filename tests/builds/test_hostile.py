"""Artifacts and weights that anybody may have made: refused in words, without running what is in them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch

import graphopt
from graphopt import artifact as artifacts
from graphopt.artifact import ArtifactError
from tests.builds import nets
from tests.builds.helpers import configured, contents, refused, rehash


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "net.gopt"
    model, inputs = nets.both()
    dims = torch.export.Dim("batch")
    graphopt.optimize(model, inputs, dynamic_shapes=({0: dims}, {0: dims})).save(folder)
    return folder


@pytest.fixture
def artifact(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "net.gopt")
    return tmp_path / "net.gopt"


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Iterator[str]:
    """A path that nothing may write to."""
    path = tmp_path / "marker"
    yield str(path)
    assert not path.exists(), "code of the file was executed"


def load(path: Path, message: str = "") -> None:
    """Loading is refused, in one line that names the artifact."""
    with pytest.raises(ArtifactError) as caught:
        graphopt.load(path)
    said = str(caught.value)
    assert str(path) in said and message in said and "\n" not in said, said


def loads(path: Path) -> bool:
    """Whether an artifact loads; if not, it is named."""
    try:
        str(graphopt.load(path).report)
    except ArtifactError as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise AssertionError(f"{error} does not name the artifact") from error
        return False
    return True


def graph_of(folder: Path) -> Any:
    return json.loads((folder / "graph.json").read_text())


def put(folder: Path, graph: Any) -> None:
    """With hashes that fit: what is in the graph has to be looked at."""
    (folder / "graph.json").write_text(json.dumps(graph))
    rehash(folder)


def call(graph: Any, kind: str = "call_function") -> Any:
    return next(one for one in graph["nodes"] if one["op"] == kind)


# -- the files ----------------------------------------------------------------------------------


def test_rehashing_alone_changes_nothing(artifact):
    put(artifact, graph_of(artifact))
    again = graphopt.load(artifact)
    model, inputs = nets.both()
    assert torch.allclose(again(*inputs), model(*inputs), atol=1e-5)


FILES = ("manifest.json", "graph.json", "weights.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(artifact, name):
    path = artifact / name
    whole = path.read_bytes()
    for place in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        for bit in (0, 5, 7):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            load(artifact)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(artifact, name):
    path = artifact / name
    whole = path.read_bytes()
    for size in {0, 1, 7, 8, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        load(artifact)
    path.write_bytes(whole + b" ")
    load(artifact)


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        shutil.copy(path, path.parent.parent / "outside")
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return make


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "make",
    [link_to("../outside"), link_to("{name}"), link_to("/dev/zero"), folder, pipe, missing],
    ids=["link", "cyclic link", "endless link", "folder", "pipe", "missing"],
)
def test_what_is_no_file_of_its_own(artifact, name, make):
    make(artifact / name)
    load(artifact, name)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "sub/../../outside", "..", ".", "", "a\x00b", "a\nb", ".hidden",
     "sub\\outside", "C:outside", "nowhere", "a" * 5000],
)  # fmt: skip
def test_names_that_lead_elsewhere(artifact, name):
    (artifact.parent / "outside").write_text("x")
    manifest = json.loads((artifact / "manifest.json").read_text())
    for table in ("sha256", "bytes"):
        manifest[table][name] = manifest[table]["graph.json"]
    (artifact / "manifest.json").write_text(artifacts.sealed(manifest))
    load(artifact)


@pytest.mark.timeout(30)
def test_sizes_are_looked_at_before_anything_is_read(artifact, monkeypatch):
    """The files are empty on the disk, and as large as they can be."""
    whole = (artifact / "manifest.json").read_bytes()
    os.truncate(artifact / "manifest.json", 1 << 40)
    load(artifact, "more than 256 MiB")
    (artifact / "manifest.json").write_bytes(whole)
    os.truncate(artifact / "weights.safetensors", 1 << 40)
    load(artifact, f"it has {1 << 40} bytes, expected")

    manifest = json.loads(whole)
    manifest["bytes"] |= {name: 1 << 40 for name in manifest["bytes"]}
    (artifact / "manifest.json").write_text(artifacts.sealed(manifest))
    os.truncate(artifact / "graph.json", 1 << 40)
    monkeypatch.setattr(artifacts, "_sha256", lambda path: manifest["sha256"][path.name])
    load(artifact, "more than 256 MiB")


def test_files_that_may_not_be_read(artifact, monkeypatch):
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(artifacts, "_sha256", refuse)
    load(artifact, "graph.json cannot be read: PermissionError")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 1 << 27) + b"{" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{",
        b"\x80\x04.",
        b"",
        struct.pack("<Q", 80) + json.dumps(
            {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).ljust(80).encode(),
        struct.pack("<Q", 80) + json.dumps(
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, -4]}}).ljust(80).encode(),
    ],
)  # fmt: skip
def test_headers_of_safetensors(artifact, header):
    (artifact / "weights.safetensors").write_bytes(header)
    rehash(artifact)
    load(artifact, "not readable as an artifact")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "1", "null", '"', "{}", "NaN"]
)
@pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
def test_other_json(artifact, name, text):
    (artifact / name).write_text(text)
    if name == "graph.json":
        rehash(artifact)
    load(artifact)


def test_deep_arguments(artifact):
    graph = graph_of(artifact)
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    call(graph)["kwargs"] = {"dict": [["x", deep]]}
    text = json.dumps(graph)
    (artifact / "graph.json").write_text(
        text.replace("[" * 900, "[" * 30_000).replace("]" * 900, "]" * 30_000)
    )
    rehash(artifact)
    load(artifact)


# -- what is in them ----------------------------------------------------------------------------


def paths(data: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in plain data that has a place."""
    if prefix:
        yield prefix
    inner = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in inner:
        yield from paths(value, (*prefix, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path; without it if there is none."""
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


DROPPED = object()


def test_every_key_of_the_graph_is_needed(artifact):
    """Except for what is known of a node, which is for reading."""
    graph = graph_of(artifact)
    free = {"where", "made_by", "type"}
    for key in graph:
        put(artifact, changed(graph, (key,), DROPPED))
        load(artifact, key)
    for number, node in enumerate(graph["nodes"]):
        for key in node.keys() - free:
            put(artifact, changed(graph, ("nodes", number, key), DROPPED))
            load(artifact, key)
    for key in graph["signature"]:
        put(artifact, changed(graph, ("signature", key), DROPPED))
        load(artifact, key)


@pytest.mark.parametrize(
    "value", [None, 3, -1.5, "x", [], {}, [[]], True, {"node": "no"}, {"torch": "x"}]
)
def test_every_value_of_the_graph_has_its_type(artifact, value):
    graph = graph_of(artifact)
    tried = [(key,) for key in graph]
    tried += [
        ("nodes", n, key) for n in (0, 3, len(graph["nodes"]) - 1) for key in graph["nodes"][n]
    ]
    tried += [("signature", key) for key in graph["signature"]]
    tried += [("tensors", 0), *(("tensors", 0, n) for n in range(4))]
    tried += [("signature", "parameters", "tuple", 0), ("signature", "inputs", 0)]
    for path in tried:
        put(artifact, changed(graph, path, value))
        assert not loads(artifact) or harmless(graph, path, value), (path, value)


def harmless(graph: Any, path: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is of the type that belongs there, or means nothing to loading."""
    now = graph
    for key in path:
        now = now[key]
    same = type(now) is type(value) and path not in {("aliases",), ("backend",)}
    free = path[-1] in ("where", "made_by", "type", "name", "args") or path[:2] == (
        "signature",
        "inputs",
    )
    return same or free or (path == ("aliases",) and value == {}) or path[:2] == ("tensors", 0)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_change_of_the_graph_is_refused_or_loads(original, tmp_path_factory, data):
    """Nothing but ArtifactError leaves `load`, whatever stands in the graph or the report."""
    folder = tmp_path_factory.mktemp("changed") / "net.gopt"
    shutil.copytree(original, folder)
    values = st.sampled_from([DROPPED, None, -1, 0, 2.5, "", "x", "aten::relu.default", [], {}, True,
                              {"tuple": []}, {"node": "image"}, {"dict": [["self", 1]]}, {"dict": [[[], 1]]},
                              {"float": "x"}, {"slice": []}, {"torch": "device", "value": "moon"},
                              {"torch": "dtype", "value": "save"}, [[1]]])  # fmt: skip
    graph = graph_of(folder)
    report = json.loads((folder / "manifest.json").read_text())["report"]
    whole = {"graph": graph, "report": report}
    path = data.draw(st.sampled_from(sorted(paths(whole), key=str)))
    value = data.draw(values)
    if len(path) > 1:
        whole = changed(whole, path, value)
        (folder / "graph.json").write_text(json.dumps(whole["graph"]))
        rehash(folder, report=whole["report"])
    loads(folder)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3, expected 2"),
        ({"format": "2"}, "format '2', expected 2"),
        ({"sha256": None}, "sha256"),
        ({"sha256": {}}, "expected the sha256 of graph.json and weights.safetensors"),
        ({"sha256": {"graph.json": 3, "weights.safetensors": "a"}}, "sha256.graph.json"),
        ({"bytes": None}, "bytes"),
        ({"bytes": {}}, "expected None"),
        ({"bytes": []}, "bytes"),
        ({"report": None}, "report"),
        ({"report": {}}, "the report is none"),
        ({"report": []}, "report"),
        ({"torch": 3}, "torch"),
        ({"build": "x"}, "build"),
        ({"more": 1}, "more"),
    ],
)
def test_manifests(artifact, change, message):
    manifest = json.loads((artifact / "manifest.json").read_text())
    data = {key: value for key, value in {**manifest, **change}.items() if value is not None}
    (artifact / "manifest.json").write_text(artifacts.sealed(data))
    load(artifact, message)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.load", "operator.attrgetter", "aten::no_such.default",
     "aten::from_file.default", "aten::save.default", "load_library::__func__.__call__",
     "import_module::__func__.__call__", "aten::relu.__class__", "aten::__class__.__call__",
     "__class__::__init__.__call__", "profiler::_record_function_enter.default", "graphopt.ir.source",
     "math.__loader__", "operator.__loader__", "", "::", "relu", "::."],
)  # fmt: skip
def test_targets_that_are_no_ops(artifact, target):
    graph = graph_of(artifact)
    call(graph)["target"] = target
    put(artifact, graph)
    load(artifact)


CODE = "__import__('pathlib').Path({marker!r}).touch()"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("placeholder", {"target": "image={code}"}),
        ("placeholder", {"target": "image\n    {code}\n    image"}),
        ("placeholder", {"target": "image): pass\n{code}\ndef f(x"}),
        ("placeholder", {"target": "*image"}),
        ("placeholder", {"target": "None"}),
        ("call_function", {"kwargs": {"dict": [["x={code}, y", 1]]}}),
        ("call_function", {"kwargs": {"dict": [["**{code}", 1]]}}),
        ("call_function", {"op": "call_method", "target": "numpy().tofile"}),
        ("call_function", {"op": "call_module", "target": "conv"}),
        ("call_function", {"op": "root"}),
        ("get_attr", {"target": "__class__"}),
        ("get_attr", {"target": "conv"}),
        ("get_attr", {"target": "conv.weight.__class__"}),
        ("get_attr", {"target": 'x"), {code}, ("'}),
    ],
)
def test_code_in_names_of_nodes(artifact, marker, kind, change):
    """torch.fx writes these names into Python code and executes it."""
    graph = graph_of(artifact)
    text = json.dumps(change).replace("{code}", json.dumps(CODE.format(marker=marker))[1:-1])
    call(graph, kind).update(json.loads(text))
    put(artifact, graph)
    load(artifact)


@pytest.mark.parametrize(
    "name", ['x"), {code}, ("', "conv.__class__", "a..b", "", "conv", "a\nb", "a\\"]
)
def test_code_in_names_of_tensors(artifact, marker, name):
    name = name.replace("{code}", CODE.format(marker=marker))
    graph = graph_of(artifact)
    tensors = safetensors.torch.load_file(artifact / "weights.safetensors")
    old = "conv.weight"
    tensors[name] = tensors.pop(old)
    graph = json.loads(json.dumps(graph).replace(json.dumps(old), json.dumps(name)))
    safetensors.torch.save_file(tensors, artifact / "weights.safetensors")
    put(artifact, graph)
    load(artifact)


def test_code_in_names_of_parameters(artifact, marker):
    for place in ("in_spec", "parameters"):
        graph = graph_of(artifact)
        code = CODE.format(marker=marker)
        if place == "parameters":
            graph["signature"]["parameters"]["tuple"][0]["tuple"][0] = f"image={code}"
        else:
            spec = json.loads(graph["signature"]["in_spec"])
            args, kwargs = spec[1]["children_spec"]
            kwargs.update(
                context=json.dumps([f"image={code}", "scale"]), children_spec=args["children_spec"]
            )
            args["children_spec"] = []
            graph["signature"]["in_spec"] = json.dumps(spec)
        put(artifact, graph)
        load(artifact)


def test_code_in_a_backward_pass(artifact, marker):
    """Which is a text in an argument, and becomes code as well."""
    graph = graph_of(artifact)
    node = call(graph)
    entry = ["x", "placeholder", f"x={CODE.format(marker=marker)}", [], {"dict": []}]
    end = ["output", "output", "output", [{"tuple": []}], {"dict": []}]
    for nodes in (
        [entry, end],
        [["c", "call_function", "os.system", ["true"], {"dict": []}], end],
        [],
        [3],
    ):
        text = json.dumps({"nodes": nodes, "name": "x", "fixed": [], "place": []})
        node.update(target="graphopt::with_gradient.default", args={"tuple": [text, [], [], []]},
                    kwargs={"dict": []})  # fmt: skip
        put(artifact, graph)
        load(artifact)


@pytest.mark.parametrize(
    "structure",
    [
        {"type": "no.such.Class", "context": "null", "children_spec": []},
        {"type": "builtins.list", "context": '{"__enum__": true, "fqn": "evil:X", "name": "a"}'},
        {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "os:environ", "name": "PATH"}]'},
        {"type": "collections.defaultdict", "context": {
            "default_factory_module": "evil", "default_factory_name": "X", "dict_context": []}},
        {"type": "collections.defaultdict", "context": {
            "default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []}},
        {"type": 3, "context": "null"}, {}, [], 3, None, {"type": "builtins.list"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["in_spec", "out_spec"])
def test_structures_import_nothing(artifact, marker, monkeypatch, structure, place):
    (artifact.parent / "evil.py").write_text(CODE.format(marker=marker) + "\nX = list\n")
    monkeypatch.syspath_prepend(artifact.parent)
    if isinstance(structure, dict) and "context" in structure:
        structure = {"children_spec": [], **structure}
    graph = graph_of(artifact)
    graph["signature"][place] = json.dumps([1, structure])
    put(artifact, graph)
    load(artifact)


@pytest.mark.parametrize(
    "tuples",
    [{"a.B": ["B; x", []]}, {"a.B": ["B", ["x=1"]]}, {"a.B": ["B", ["x", "x"]]}, {"a.B": [3, []]},
     {"": ["B", []]}, {"a.B": []}, {"a b": ["B", []]}],
)  # fmt: skip
def test_named_tuples(artifact, tuples):
    graph = graph_of(artifact)
    graph["signature"]["named_tuples"] = tuples
    put(artifact, graph)
    load(artifact)


@pytest.mark.parametrize(
    ("name", "message"),
    [("evil", "unknown backend"), ("../x", "unknown backend"), ("", "unknown backend")],
)
def test_backends(artifact, name, message):
    graph = graph_of(artifact)
    graph["backend"] = name
    put(artifact, graph)
    load(artifact, message)


def test_tensors_are_those_of_the_graph(artifact):
    tensors = safetensors.torch.load_file(artifact / "weights.safetensors")
    for other in (
        {**tensors, "more": torch.zeros(1)},
        {name: one for name, one in tensors.items() if name != "conv.bias"},
        {**tensors, "conv.bias": torch.zeros(8, dtype=torch.int64)},  # has no gradient
    ):
        safetensors.torch.save_file(other, artifact / "weights.safetensors")
        rehash(artifact)
        load(artifact)


# -- weights and data ---------------------------------------------------------------------------


class Bomb:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def state() -> dict[str, Any]:
    return nets.net().state_dict()


def weights(path: Path, make: str, marker: str) -> None:
    """A file of weights with something wrong."""
    good = state()
    save: dict[str, Callable[[], Any]] = {
        "pickle with code": lambda: path.write_bytes(pickle.dumps(Bomb(marker))),
        "state_dict with code": lambda: torch.save({**good, "x": Bomb(marker)}, path),
        "whole model": lambda: torch.save(nets.net(), path),
        "not a number": lambda: torch.save({**good, "conv.bias": torch.full((8,), float("nan"))}, path),
        "infinite": lambda: torch.save({**good, "conv.bias": torch.full((8,), float("inf"))}, path),
        "statistics not a number": lambda: torch.save(
            {**good, "bn.running_var": torch.full((8,), float("nan"))}, path),
        "wrong shape": lambda: torch.save({**good, "conv.bias": torch.zeros(9)}, path),
        "missing": lambda: torch.save({k: v for k, v in good.items() if k != "head.bias"}, path),
        "unexpected": lambda: torch.save({**good, "extra.weight": torch.zeros(1)}, path),
        "complex": lambda: torch.save({**good, "conv.bias": torch.zeros(8, dtype=torch.complex64)}, path),
        "number": lambda: torch.save({**good, "conv.bias": 3.0}, path),
        "list": lambda: torch.save([good], path),
        "nested": lambda: torch.save({"state_dict": good}, path),
        "keys": lambda: torch.save({1: torch.zeros(1)}, path),
        "meta": lambda: torch.save({**good, "conv.bias": torch.zeros(8, device="meta")}, path),
        "sparse": lambda: torch.save({**good, "conv.bias": torch.zeros(8).to_sparse()}, path),
        "expanded": lambda: torch.save({**good, "conv.bias": torch.zeros(1).expand(1 << 40)}, path),
        "empty": lambda: path.write_bytes(b""),
        "truncated": lambda: (torch.save(good, path), os.truncate(path, path.stat().st_size // 2)),
        "text": lambda: path.write_text("weights"),
        "zip": lambda: zipped(path, "x", b"x"),
        "zip bomb": lambda: zipped(path, "archive/data.pkl", bytes(120 << 20)),
        "folder": path.mkdir,
        "cyclic link": lambda: path.symlink_to(path),
    }  # fmt: skip
    save[make]()


def zipped(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("pickle with code", "cannot be read"),
        ("state_dict with code", "cannot be read"),
        ("whole model", "cannot be read"),
        ("not a number", "conv.bias is not finite everywhere"),
        ("infinite", "conv.bias is not finite everywhere"),
        ("statistics not a number", "bn.running_var is not finite everywhere"),
        ("wrong shape", "conv.bias has the shape (9,), expected (8,)"),
        ("missing", "w.pt lacks head.bias"),
        ("unexpected", "Net of the source has no place for extra.weight"),
        ("complex", "conv.bias is complex"),
        ("number", "conv.bias is float, expected a tensor"),
        ("list", "holds list, expected tensors by name"),
        ("nested", "state_dict is"),
        ("keys", "expected tensors by name"),
        ("meta", "is no plain tensor"),
        ("sparse", "is no plain tensor"),
        ("expanded", "conv.bias is larger than what is stored of it"),
        ("empty", "cannot be read"),
        ("truncated", "cannot be read"),
        ("text", "cannot be read"),
        ("zip", "cannot be read"),
        ("zip bomb", "120 MiB in a file of"),
        ("folder", "is not a file"),
        ("cyclic link", "is not a file"),
    ],
)
def test_weights(tmp_path, marker, make, message):
    path = configured(tmp_path, model='weights = "w.pt"')
    weights(tmp_path / "w.pt", make, marker)
    said = refused(2, path)
    assert f"{path}:3: model.weights: " in said and message in said, said
    assert not (tmp_path / "build").exists() and not (tmp_path / "graphopt.lock").exists()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, struct.pack("<Q", 1 << 62) + b"{}", pickle.dumps(3)]
)
def test_safetensors_that_are_none(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    said = refused(2, configured(tmp_path, model='weights = "w.safetensors"'))
    assert "w.safetensors cannot be read" in said


def arrays(**changes: Any) -> dict[str, Any]:
    image, scale = np.zeros((4, 3, 8, 8), np.float32), np.ones((4, 1), np.float32)
    given = {"image": image, "scale": scale, **changes}
    return {name: one for name, one in given.items() if one is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "it holds image; expected image, scale"),
        ({"more": np.zeros(4)}, "expected image, scale"),
        ({"scale": np.ones((3, 1))}, "expected as many samples of every input"),
        ({"scale": np.array(1.0)}, "expected as many samples of every input"),
        ({"scale": np.zeros((0, 1)), "image": np.zeros((0, 3, 8, 8))}, "expected as many samples"),
        ({"scale": np.array([Bomb("x")] * 4, dtype=object)}, "cannot be read"),
        ({"scale": np.array(["a"] * 4)}, "cannot be read"),
    ],
)
def test_calibration_arrays(tmp_path, change, message):
    np.savez(tmp_path / "d.npz", **arrays(**change))
    said = refused(2, configured(tmp_path, more='[calibration]\nfile = "d.npz"'))
    assert "calibration.file: " in said and message in said


def lying(path: Path) -> None:
    """An array whose header says that it has 2**50 elements."""
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as archive:
        data = {one: archive.read(one) for one in archive.namelist()}
    header = data["image.npy"].replace(b"(4, 3, 8, 8)", b"(1125899906842624,)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("scale.npy", data["scale.npy"])
        archive.writestr("image.npy", header)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: zipped(path, "image.npy", bytes(120 << 20)), "120 MiB in a file of"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "cannot be read"),
        (
            lambda path: zipped(path, "image.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr'"),
            "cannot be read",
        ),
        (lambda path: zipped(path, "../../image.npy", b"x"), ""),
        (lambda path: path.write_bytes(pickle.dumps(Bomb("x"))), "cannot be read"),
        (lying, "cannot be read"),
        (lambda path: None, "is not a file"),
    ],
    ids=["bomb", "truncated", "header", "names", "pickle", "lying", "missing"],
)
def test_calibration_files(tmp_path, make, message):
    make(tmp_path / "d.npz")
    said = refused(2, configured(tmp_path, more='[calibration]\nfile = "d.npz"'))
    assert "calibration.file: d.npz" in said or message == "", said
    assert message in said


def test_a_source_that_is_not_a_number_is_not_built(tmp_path):
    said = refused(2, configured(tmp_path, "not_a_number"))
    assert ":2: model.source: " in said and "conv.weight is not finite everywhere" in said
    assert sorted(contents(tmp_path)) == ["graphopt.toml"]


def test_a_pt2_needs_trust(tmp_path):
    torch.export.save(torch.export.export(*nets.both()), tmp_path / "net.pt2")
    text = '[model]\nsource = "net.pt2"\n'
    (tmp_path / "graphopt.toml").write_text(text)
    said = refused(2, tmp_path / "graphopt.toml")
    assert "graphopt.toml:2: model.source: " in said and "can execute code" in said
    (tmp_path / "net.pt2").write_bytes(b"PK\x03\x04 truncated")
    (tmp_path / "graphopt.toml").write_text(text + "trust = true\n")
    assert "truncated" in refused(2, tmp_path / "graphopt.toml")
