"""Saved models: a directory with a JSON graph, safetensors weights, and a manifest with their
sha256. No pickle: loading runs no code but the ATen ops the graph names.

    model/graph.json  model/weights.safetensors  model/manifest.json  model/kernels.py

The last one has the sources of generated kernels, if there are any, for reading: nothing runs them.

Writing goes to a temporary directory beside the target, which takes its place at the end in one step: a
crash leaves the old artifact (or none), never half of one.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from graphopt.ir.graph import Signature
from graphopt.ir.text_graph import TextError, decode, encode, target_name, target_of
from graphopt.module import OptimizedModule, assemble
from graphopt.report import Report

FORMAT = 1
_FILES = ("graph.json", "weights.safetensors")
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
    if target.exists() and not (target / "manifest.json").is_file():
        raise ArtifactError(f"{target} exists and is not a graphopt artifact; not overwriting it")
    graph, signature, tensors, report, training = dismantle(module)
    if not timed:
        report = module.report.untimed().to_dict()
    graph["signature"] = _encode_signature(signature)
    graph["tensors"] = [[name, *entry[1:]] for name, entry in tensors.items()]  # in order
    graph["training"] = training
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        text = json.dumps(graph, indent=1, sort_keys=True, allow_nan=False)
        (work / "graph.json").write_text(text)
        save_file(
            {name: entry[0].detach().contiguous().clone() for name, entry in tensors.items()},
            work / "weights.safetensors",
        )
        if sources := [one.source for one in getattr(module._run, "kernels", ())]:
            (work / "kernels.py").write_text("\n\n".join(sources))
        if add is not None:
            add(work)
        files = sorted(one.name for one in work.iterdir())
        manifest = {
            "format": FORMAT,
            "torch": torch.__version__,
            "sha256": {name: _sha256(work / name) for name in files},
            "report": report,
            **({} if about is None else {"build": about}),
        }
        (work / "manifest.json").write_text(
            json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
        )
        os.chmod(work / "weights.safetensors", 0o644)  # safetensors makes it private
        os.chmod(work, 0o755)
        replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def replace(work: Path, target: Path) -> None:
    """Put the directory `work` in the place of `target`, on the same disk. Killed at any moment, the old
    one is there or the new one, where the system can exchange directories (Linux, macOS)."""
    for name in os.listdir(work):
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    if not target.exists():
        os.rename(work, target)
    elif _exchanged(work, target):
        shutil.rmtree(work, ignore_errors=True)  # the old one
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / "artifact")
        try:
            os.rename(work, target)
        except OSError:
            os.rename(old / "artifact", target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    _settle(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths were exchanged in one step; Python has no name for it."""
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, RENAME_SWAP
    names = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return int(libc.renamex_np(*names, swap)) == 0
        return int(libc.renameat2(here, names[0], here, names[1], swap)) == 0
    except AttributeError:
        return False


def _settle(folder: Path) -> None:
    """Let a rename reach the disk."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | os.PathLike[str]) -> OptimizedModule:
    """Read an artifact written by `save`.

    Raises:
        ArtifactError: naming the file that is missing, truncated, altered or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(path)
    if not source.is_dir():
        raise ArtifactError(f"{source} is not a graphopt artifact (a directory with manifest.json)")
    manifest = _read_json(source / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{source / 'manifest.json'}: format {manifest.get('format')!r}, expected {FORMAT}"
        )
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not all(name in hashes for name in _FILES):
        raise ArtifactError(
            f"{source / 'manifest.json'}: expected the sha256 of {' and '.join(_FILES)}"
        )
    for name, expected in hashes.items():
        file = source / name
        if file.name != name or file.is_symlink():
            raise ArtifactError(f"{source}: {name!r} is no file of its own folder")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        if _sha256(file) != expected:
            raise ArtifactError(f"{file} is truncated or altered: its sha256 is not the manifest's")
    graph = _read_json(source / "graph.json")
    try:
        loaded = load_file(source / "weights.safetensors")
        tensors = {name: (loaded[name], *entry) for name, *entry in graph.pop("tensors")}
        signature = _decode_signature(graph.pop("signature"))
        return rebuild(graph, signature, tensors, manifest["report"], graph.pop("training"))
    except (KeyError, TypeError, TextError, SafetensorError) as error:
        raise ArtifactError(f"{source}: not readable as an artifact: {error!r}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return found


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
