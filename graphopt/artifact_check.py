"""What is believed of a stored graph: nothing before it was looked at here.

A graph becomes Python code (`torch.fx` writes and executes it), and structures of inputs name classes. So
names have to be names, calls have to be ops of torch, states have to be stored, and structures may name
only what is registered already: no text of an artifact is executed or imported.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import sys
from collections.abc import Iterable, Mapping
from enum import EnumMeta
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from pydantic import BaseModel, ConfigDict, TypeAdapter

from graphopt.ir.graph import Signature
from graphopt.ir.ops.gradient import TARGET as WITH_GRADIENT
from graphopt.ir.text_graph import decode, target_of
from graphopt.report import Report

Kind = Literal["placeholder", "get_attr", "call_function", "output"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StoredNode(Section):
    """A node; `where`, `made_by` and `type` as `text_graph.encode` writes them."""

    name: str
    op: Kind
    target: str
    args: Any
    kwargs: Any
    where: str = ""
    made_by: Any = None
    type: Any = None


class StoredSignature(Section):
    in_spec: str
    out_spec: str
    inputs: list[Any]
    parameters: dict[Literal["tuple"], list[Any]]
    names: list[str]
    named_tuples: dict[str, tuple[str, list[str]]]


class StoredGraph(Section):
    nodes: list[StoredNode]
    aliases: dict[str, str]
    backend: str
    signature: StoredSignature
    tensors: list[tuple[str, Literal["parameter", "buffer"], bool, bool]]
    training: bool


class Manifest(Section):
    """`bytes` and `sha256` of every file; `seal` is the sha256 of the manifest without it; `provenance` has
    the modules that the nodes of the graph stand for, see `artifact_data.provenance`."""

    format: int
    torch: str
    bytes: dict[str, int]
    sha256: dict[str, str]
    report: dict[str, Any]
    seal: str
    build: dict[str, Any] | None = None
    provenance: dict[str, list[str]] = {}


def check_graph(text: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        text: of `graph.json`.
        tensors: those stored.

    Raises:
        ValueError: naming what was expected and what was found.
    """
    graph = StoredGraph.model_validate_json(text)
    kinds = {name: (kind, grad) for name, kind, _, grad in graph.tensors}
    if len(kinds) < len(graph.tensors) or kinds.keys() != tensors.keys():
        differing = sorted(kinds.keys() ^ tensors.keys())
        raise ValueError(f"tensors of the graph are not those stored: {', '.join(differing[:3])}")
    for name, (_, grad) in kinds.items():
        if grad and not (tensors[name].is_floating_point() or tensors[name].is_complex()):
            raise ValueError(f"{name} is {tensors[name].dtype}, which has no gradient")
    for alias, name in graph.aliases.items():
        if name not in kinds or alias in kinds:
            raise ValueError(f"{alias} is said to be {name}")
    states = {*kinds, *graph.aliases}
    for name in states:
        _check_state(name, states)
    data = json.loads(text)
    for entry in data["nodes"]:
        for key in ("where", "made_by", "type"):
            _check_meta(key, decode(entry.get(key), {}))
    check_calls(
        ([one.name, one.op, one.target, one.args, one.kwargs] for one in graph.nodes), states
    )
    for name, (title, fields) in graph.signature.named_tuples.items():
        for one in (*name.split("."), title, *fields):
            if one != "<locals>":
                _check_name(one, "a name of a named tuple")
    known = {*pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, *graph.signature.named_tuples}
    for spec in (graph.signature.in_spec, graph.signature.out_spec):
        check_structure(json.loads(spec)[1], known)


def check_provenance(found: Mapping[str, list[str]], nodes: Iterable[dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: if it is of other nodes than the graph has.
    """
    if unknown := found.keys() - {one["name"] for one in nodes}:
        raise ValueError(f"provenance of {min(unknown)!r:.80}, which is no node")


def check_signature(signature: Signature, nodes: Iterable[dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: if the structures do not fit the graph's inputs and outputs.
    """
    spec = signature.in_spec
    shape = [spec.type, *(one.type for one in spec.children())]
    if shape != [tuple, tuple, dict]:
        raise ValueError(f"inputs are structured as {shape}, expected ([...], {{...}})")
    placeholders = sum(one["op"] == "placeholder" for one in nodes)
    counts = {spec.num_leaves, len(signature.inputs), len(signature.names), placeholders}
    if len(counts) > 1:
        raise ValueError(f"found {sorted(counts)} inputs, which should be one number")
    for key in signature.arity[1]:
        _check_name(key, "an input")
    for name, kind, default in signature.parameters:
        _check_name(name, "a parameter")
        if kind not in range(5) or not (default is None or isinstance(default, (int, float, str))):
            raise ValueError(f"parameter {name} is of kind {kind!r}, {default!r}")
    if not all(isinstance(one, str) for one in signature.names):
        raise ValueError(f"names of inputs are {signature.names}")


def check_calls(entries: Iterable[Any], states: set[str]) -> None:
    """Entries are [name, kind, target, args, kwargs].

    Raises:
        ValueError: if what `torch.fx` would write is not what the entries say.
    """
    nodes: dict[str, Any] = {}
    kind = ""
    for name, kind, target, args, kwargs in entries:
        if kind not in ("placeholder", "get_attr", "call_function", "output") or "output" in nodes:
            raise ValueError(f"{name!r} is of the kind {kind!r}, or behind the output")
        if not isinstance(name, str) or not isinstance(target, str) or not name or name in nodes:
            raise ValueError(f"{name!r} is no name of a node, or that of another")
        found, given = decode(args, nodes), decode(kwargs, nodes)
        if not isinstance(found, (tuple, list)) or not isinstance(given, dict):
            raise ValueError(f"{name}: arguments are {args!r:.80} and {kwargs!r:.80}")
        for key in given:
            _check_name(key, f"a keyword of {name}")
        if kind == "placeholder":
            _check_name(target, "an input")
        elif kind == "get_attr" and target not in states:
            raise ValueError(f"{name} reads {target!r}, which is not stored")
        elif kind == "call_function":
            _check_op(target, found, given)
        elif kind == "output" and len(found) != 1:
            raise ValueError(f"the output has {len(found)} arguments, expected 1")
        nodes["output" if kind == "output" else name] = None
    if kind != "output":
        raise ValueError("the last node is not the output")


def _check_op(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    found = target_of("call_function", name)
    if "::" not in name:
        return  # of the list of functions on sizes
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name} is no op")
    touched = [one.name for one in found._schema.arguments if re.search("file|path", one.name)]
    if touched or found.namespace in ("prim", "profiler", "debugprims"):
        raise ValueError(f"{name} is an op on files or on the process, which no graph has")
    if found is WITH_GRADIENT:
        text = args[0] if args else kwargs["backward"]
        data = json.loads(text)
        for entry in data["nodes"]:
            if entry[1] == "get_attr":
                raise ValueError("a backward pass reads a state")
        check_calls(data["nodes"], set())


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{what} is called {name!r:.80}, which is no identifier")


def _check_state(name: str, states: set[str]) -> None:
    parts = name.split(".")
    for part in parts:
        if not part or part.startswith("__") or not part.isprintable() or {*part} & {'"', "\\"}:
            raise ValueError(f"a tensor is called {name!r:.80}")
    for count in range(1, len(parts)):
        if ".".join(parts[:count]) in states:
            raise ValueError(f"{name} would be inside of a tensor")


def _check_meta(key: str, value: Any) -> None:
    if value is None:
        return
    if key == "where":
        ok = isinstance(value, str)
    elif key == "made_by":
        ok = isinstance(value, tuple) and all(isinstance(one, (str, int)) for one in value)
    else:
        captured = value.get("captured", []) if isinstance(value, dict) else None
        ok = (
            isinstance(captured, list) and value.keys() - {"captured"} == {"dtype", "shape"}
            and isinstance(value["dtype"], str)
            and isinstance(getattr(torch, value["dtype"], None), torch.dtype)
            and isinstance(value["shape"], list)
            and all(isinstance(one, (str, int)) for one in value["shape"])
            and all(type(one) is int and one >= 0 for one in captured)
            and len(captured) in (0, len(value["shape"]))
        )  # fmt: skip
    if not ok:
        raise ValueError(f"{key} of a node is {value!r:.80}")


def check_structure(spec: Any, known: set[str]) -> None:
    """A structure as `torch.utils._pytree.treespec_dumps` writes it, of classes with `known` names.

    Raises:
        ValueError: if a class is not known, or reading it would import a module.
    """
    kind = spec["type"]
    if kind is not None and kind not in known:
        raise ValueError(f"the model uses a structure that is not registered here, {kind!r:.80}; import the "
                         "library that defines it first")  # fmt: skip
    _check_context(spec["context"])
    for child in spec["children_spec"]:
        check_structure(child, known)


def _check_context(value: Any) -> None:
    """No enumeration and no factory of a module that is not imported."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return  # a name
        if isinstance(value, str):
            return
    if isinstance(value, list):
        for one in value:
            _check_context(one)
    elif isinstance(value, dict):
        if "__enum__" in value:
            module, _, name = value["fqn"].partition(":")
            _check_enum(module, name)
        if "default_factory_module" in value:
            factory = value["default_factory_module"], value["default_factory_name"]
            if factory not in [
                ("builtins", name) for name in ("list", "dict", "int", "float", "set")
            ]:
                raise ValueError(f"a defaultdict of {'.'.join(factory)} cannot be loaded")
        for one in value.values():
            _check_context(one)


def _check_enum(module: str, name: str) -> None:
    if module not in sys.modules:
        raise ValueError(f"the model uses {module!r:.80}, which is not imported here")
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, EnumMeta):
        raise ValueError(f"{module}.{name} is no enumeration")


def report_of(data: dict[str, Any]) -> Report:
    """
    Raises:
        ValueError: if a field is of another type than `Report` says.
    """
    try:
        report = Report.from_dict(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the report is none: {error!r}") from error
    fields = _numbers(report.to_dict())
    TypeAdapter(Report).validate_python(fields)
    return report


def _numbers(value: Any, key: str = "") -> Any:
    """Numbers that were not finite are None in plain data."""
    if isinstance(value, dict):
        return {key: _numbers(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    known = ("error", "bound", "float64_error", "source_error", "limit", "ties", "excused")
    return math.nan if value is None and key in known else value
