"""Saved models: a directory with a JSON graph, safetensors weights, and a manifest with their
sha256. No pickle, and nothing that is stored is executed: `graphopt.artifact_check` says what is believed.

    model/graph.json  model/weights.safetensors  model/manifest.json  model/kernels.py

The last one has the sources of generated kernels, if there are any, for reading: nothing runs them.

Writing goes to a temporary directory beside the target, which takes its place at the end in one step: a
crash leaves the old artifact (or none), never half of one.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from graphopt.files import beside, replace
from graphopt.ir.graph import Signature
from graphopt.ir.text_graph import TextError, decode, encode, target_name, target_of
from graphopt.module import OptimizedModule, assemble
from graphopt.report import Report

if TYPE_CHECKING:
    from graphopt.artifact_check import Manifest

FORMAT = 2
LARGEST = 1 << 28  # bytes of a JSON file
_FILES = ("graph.json", "weights.safetensors")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_KEPT = ("where", "made_by", "type")  # of what is known of a node


class ArtifactError(RuntimeError):
    """A model that cannot be saved, or a file that is not an intact artifact."""


def save(
    module: OptimizedModule, path: str | os.PathLike[str], *, about: dict[str, Any] | None = None,
    add: Callable[[Path], None] | None = None, timed: bool = True,
) -> None:  # fmt: skip
    """Write `module` to the directory `path`, replacing an earlier artifact there.

    Args:
        module: a result of `graphopt.optimize`, of one graph.
        path: a directory; its parents are made.
        about: plain data for the manifest, under "build".
        add: puts more files into the directory it is called with; they are hashed like the others.
        timed: False leaves out of the report what differs from run to run.

    Raises:
        ArtifactError: if the model was captured by region, uses ops without a portable name, or if
            `path` exists and is not an artifact.
    """
    from safetensors.torch import save_file

    target = Path(path)
    check_place(target)
    graph, signature, tensors, report, training = dismantle(module)
    if not timed:
        report = module.report.untimed().to_dict()
    graph["signature"] = _encode_signature(signature)
    graph["tensors"] = [[name, *entry[1:]] for name, entry in tensors.items()]  # in order
    graph["training"] = training
    with beside(target) as folder:
        work = folder / target.name
        work.mkdir()
        (work / "graph.json").write_text(_dumped(graph))
        save_file(
            {name: entry[0].detach().contiguous().clone() for name, entry in tensors.items()},
            work / "weights.safetensors",
        )
        os.chmod(work / "weights.safetensors", 0o644)  # safetensors makes it private
        if sources := [one.source for one in getattr(module._run, "kernels", ())]:
            (work / "kernels.py").write_text("\n\n".join(sources))
        if add is not None:
            add(work)
        files = sorted(work.iterdir())
        manifest = {
            "format": FORMAT,
            "torch": torch.__version__,
            "bytes": {one.name: one.stat().st_size for one in files},
            "sha256": {one.name: _sha256(one) for one in files},
            "report": report,
            **({} if about is None else {"build": about}),
        }
        (work / "manifest.json").write_text(sealed(manifest))
        replace(work, target)


def check_place(target: Path) -> None:
    """
    Raises:
        ArtifactError: if there is something that is not an artifact, and would be lost.
    """
    if target.is_symlink() or (target.exists() and not (target / "manifest.json").is_file()):
        raise ArtifactError(f"{target} exists and is not a graphopt artifact; not overwriting it")


def load(path: str | os.PathLike[str]) -> OptimizedModule:
    """Read an artifact written by `save`.

    Raises:
        ArtifactError: naming the file that is missing, truncated, altered or of another format, or what in
            it is not as `save` writes it.
    """
    from safetensors.torch import load_file

    from graphopt import artifact_check as check

    source = Path(path)
    if not source.is_dir():
        raise ArtifactError(f"{source} is not a graphopt artifact (a directory with manifest.json)")
    manifest = _manifest(source)
    for name, digest in manifest.sha256.items():
        try:
            _check_file(source, name, manifest.bytes.get(name), digest)
        except OSError as error:
            raise ArtifactError(f"{source / name} cannot be read: {said(error)}") from error
    text = _read(source / "graph.json")
    try:
        loaded = load_file(source / "weights.safetensors")
        check.check_graph(text, loaded)
        graph = json.loads(text)
        tensors = {name: (loaded[name], *entry) for name, *entry in graph.pop("tensors")}
        signature = _decode_signature(graph.pop("signature"))
        check.check_signature(signature, graph["nodes"])
        report = check.report_of(manifest.report).to_dict()
        return rebuild(graph, signature, tensors, report, graph.pop("training"))
    except Exception as error:  # of several libraries, on files that anybody may have made
        raise ArtifactError(f"{source}: not readable as an artifact: {said(error)}") from error


def _check_file(source: Path, name: str, expected: int | None, digest: str) -> None:
    file = source / name
    if not _NAME.fullmatch(name) or file.is_symlink():
        raise ArtifactError(f"{source}: {name!r} is no file of its own folder")
    if not file.is_file():
        raise ArtifactError(f"{file} is missing, or no file")
    if (size := file.stat().st_size) != expected:
        raise ArtifactError(
            f"{file} is truncated or altered: it has {size} bytes, expected {expected}"
        )
    if _sha256(file) != digest:
        raise ArtifactError(f"{file} is truncated or altered: its sha256 is not the manifest's")


def _manifest(source: Path) -> Manifest:
    from graphopt.artifact_check import Manifest

    path = source / "manifest.json"
    text = _read(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {said(error)}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    if data.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {data.get('format')!r:.80}, expected {FORMAT}")
    try:
        if sealed(data) != text:
            raise ArtifactError(f"{path} is altered: it is not what its seal is of")
        found = Manifest.model_validate(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {said(error)}") from error
    if not all(name in found.sha256 for name in _FILES):
        raise ArtifactError(f"{path}: expected the sha256 of {' and '.join(_FILES)}")
    return found


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with the sha256 of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return _dumped({**rest, "seal": hashlib.sha256(_dumped(rest).encode()).hexdigest()})


def _dumped(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False)


def _read(path: Path) -> str:
    """The text of a JSON file, if it is a file, and not too large for one."""
    try:
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path} is missing, or no file")
        if path.stat().st_size > LARGEST:
            raise ArtifactError(f"{path} cannot be read: more than {LARGEST >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {said(error)}") from error


def said(error: Exception) -> str:
    """An error in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}, found {first['input']!r:.80}"
    lines = str(error).strip().splitlines() or [""]
    known = type(error) in (ValueError, TextError, ArtifactError)
    return lines[0][:300] if known else f"{type(error).__name__}: {lines[0]:.300}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- module <-> plain data ----------------------------------------------------------------------

Plain = tuple[dict[str, Any], Signature, dict[str, tuple[Any, ...]], dict[str, Any], bool]


def dismantle(module: OptimizedModule) -> Plain:
    """Graph as plain data, signature, tensors with (kind, saved, requires_grad), report as data,
    training flag."""
    gm = module.graph_module
    if gm is None:
        raise ArtifactError(
            "a model captured by region cannot be saved as one artifact; "
            f"left out: {', '.join(module.report.capture.left_out) or 'the whole model'}"
        )
    tensors: dict[str, tuple[Any, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    transient = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, child in module.named_modules(remove_duplicate=False)
        for name in child._non_persistent_buffers_set
    }
    named: list[tuple[str, Any, str]] = [
        (name, one, "parameter") for name, one in module.named_parameters(remove_duplicate=False)
    ]
    named += [(name, one, "buffer") for name, one in module.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = (tensor, kind, name not in transient, tensor.requires_grad)
    signature: Signature = module._signature
    try:
        nodes = [
            {
                "name": node.name, "op": node.op, "target": target_name(node),
                "args": encode(node.args), "kwargs": encode(node.kwargs),
                **{key: encode(node.meta[key]) for key in _KEPT if key in node.meta},
            }
            for node in gm.graph.nodes
        ]  # fmt: skip
    except TextError as error:
        raise ArtifactError(str(error)) from error
    graph = {"nodes": nodes, "aliases": aliases, "backend": module.report.backend}
    return graph, signature, tensors, module.report.to_dict(), module.training


def rebuild(
    graph: dict[str, Any],
    signature: Signature,
    tensors: dict[str, tuple[Any, ...]],
    report: dict[str, Any],
    training: bool,
) -> OptimizedModule:
    """The inverse of `dismantle`."""
    from graphopt.backends.base import find

    code = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in graph["nodes"]:
        args = decode(entry["args"], nodes)
        kwargs = decode(entry["kwargs"], nodes)
        try:
            target = target_of(entry["op"], entry["target"])
        except TextError as error:
            raise ArtifactError(str(error)) from error
        node = code.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        node.meta = {key: decode(entry[key], nodes) for key in _KEPT if key in entry}
        nodes[entry["name"]] = node
    states = {}
    for name, (tensor, kind, saved, grad) in tensors.items():
        if kind == "parameter" and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=grad)
        states[name] = (tensor, kind, saved)
    inner = assemble(code, signature, states, graph["aliases"])
    result = Report.from_dict(report)
    module = OptimizedModule(inner, signature, result, find(graph["backend"]).lower_again(result))
    module.training = training
    return module


def _encode_signature(signature: Signature) -> dict[str, Any]:
    """A signature as JSON. Named tuples are saved by name and fields, so that loading needs no
    import of the module that defines them."""
    tuples: dict[str, Any] = {}
    for spec in (signature.in_spec, signature.out_spec):
        for cls in _named_tuples(spec):
            name = f"{cls.__module__}.{cls.__qualname__}"
            tuples[name] = [cls.__name__, list(cls._fields)]
            _register(cls, name)
    try:
        return {
            "in_spec": pytree.treespec_dumps(signature.in_spec),
            "out_spec": pytree.treespec_dumps(signature.out_spec),
            "inputs": [encode(one) for one in signature.inputs],
            "parameters": encode(signature.parameters),
            "names": list(signature.names),
            "named_tuples": tuples,
        }
    except (NotImplementedError, TypeError, KeyError, TextError) as error:
        raise ArtifactError(
            f"the structure of inputs or outputs cannot be saved: {error}"
        ) from error


def _decode_signature(data: dict[str, Any]) -> Signature:
    for name, (title, fields) in data["named_tuples"].items():
        if name not in _registered():
            _register(collections.namedtuple(title, fields), name)
    try:
        specs = [pytree.treespec_loads(data[key]) for key in ("in_spec", "out_spec")]
    except Exception as error:
        raise ArtifactError(
            f"the saved model uses a structure that is not registered here ({error}); import the "
            "library that defines it first"
        ) from error
    inputs = tuple(decode(one, {}) for one in data["inputs"])
    parameters = tuple(map(tuple, decode(data["parameters"], {})))
    return Signature(specs[0], specs[1], inputs, parameters, tuple(data["names"]))


def _named_tuples(spec: Any) -> list[Any]:
    found = [spec.context] if spec.type is collections.namedtuple else []
    for child in spec.children():
        found += _named_tuples(child)
    return found


def _registered() -> Any:
    return pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE


def _register(cls: Any, name: str) -> None:
    """Let torch's pytree name a named tuple in saved structures."""
    if name not in _registered():
        pytree._register_namedtuple(cls, serialized_type_name=name)
