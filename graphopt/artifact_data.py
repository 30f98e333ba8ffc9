"""A model as plain data and tensors, and back: what an artifact stores, and what a pickle holds."""

from __future__ import annotations

import collections
from typing import Any

import torch.utils._pytree as pytree
from torch import fx, nn

from graphopt.ir.graph import Signature
from graphopt.ir.text_graph import TextError, decode, encode, target_name, target_of
from graphopt.module import OptimizedModule, assemble
from graphopt.report import Report

_KEPT = ("where", "made_by", "type")  # of what is known of a node


class ArtifactError(RuntimeError):
    """A model that cannot be saved, or a file that is not an intact artifact."""


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
    from graphopt.backends.base import BackendError, find, names

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
    try:
        backend = find(graph["backend"])
    except BackendError as error:
        if graph["backend"] not in names():
            raise
        backend, result.backend = find("eager"), "eager"
        result.backend_notes.append(f"{error}; runs eager")
    module = OptimizedModule(inner, signature, result, backend.lower_again(result))
    module.training = training
    return module


def provenance(module: OptimizedModule) -> dict[str, list[str]]:
    """Of every node of the graph, the paths of the modules of the source that it stands for: of an op its
    own and those that it has absorbed, of a parameter the module that has it. "" is the model itself."""
    ops = {one.name: one.origins for one in module.report.ops_after}
    found = {}
    for node in [] if module.graph_module is None else module.graph_module.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target).rpartition(".")[0]
            while path and path not in module.report.modules:
                path = path.rpartition(".")[0]
            found[node.name] = [path]
        elif node.op == "call_function":
            found[node.name] = list(ops.get(node.name) or [node.meta.get("where", "")])
    return found


def encode_signature(signature: Signature) -> dict[str, Any]:
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


def decode_signature(data: dict[str, Any]) -> Signature:
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
