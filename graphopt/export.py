"""Optimized models as files of other formats, loadable where graphopt is not installed.

    .onnx        ONNX                          .pt2        torch.export
    .xml .bin    OpenVINO IR                   .aoti.pt2   AOTInductor: compiled for this machine

It is the optimized graph that is exported, with the names of inputs and outputs of the source model and
its dynamic sizes; operators of this package are decomposed. A file is written beside its place, loaded, run,
and compared with the graph in float64; it takes its place only if it is right.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphopt.backends.base import BackendError
from graphopt.backends.exported import Exported, exported, in_aten, quiet, traced_inputs
from graphopt.backends.frozen import state
from graphopt.filecheck import ExportError, Loaded, Source, compared
from graphopt.files import beside
from graphopt.ir.source import first_line
from graphopt.module import OptimizedModule


@dataclasses.dataclass(frozen=True)
class Export:
    """A written file.

    `error` and `own_error` are the errors of the file and of the optimized module against its graph in
    float64, relative in the 2-norm, the largest over outputs and inputs tried. `left_out` names inputs that
    the graph does not read and results that it does not compute: they are not in ONNX and IR files.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    left_out: tuple[str, ...]
    error: float
    own_error: float
    seconds: float

    def __str__(self) -> str:
        size = sum(one.stat().st_size for one in self.files)
        lines = [
            f"{self.path}: {self.format}, {size / 2**20:.1f} MiB in {len(self.files)} file(s), "
            f"{self.seconds:.1f} s",
            f"  {', '.join(self.inputs)} -> {', '.join(self.outputs)}",
            f"  error against float64: {self.error:.1e} (the optimized module's: {self.own_error:.1e})",
        ]
        if self.left_out:
            lines.append(
                f"  not in it, for the graph does not compute with them: {', '.join(self.left_out)}"
            )
        return "\n".join(lines)


Written = tuple[Loaded, list[str], list[str], list[str]]


def export(
    module: OptimizedModule, path: str | os.PathLike[str], args: Any = None,
    kwargs: Mapping[str, Any] | None = None, *, format: str | None = None,
) -> Export:  # fmt: skip
    """Write an optimized module to `path`.

    Args:
        module: a result of `graphopt.optimize`, of one graph, on the CPU unless the format is torch's.
        path: an existing file is replaced, once the new one is right. Its folder is made.
        args, kwargs: inputs to compare on; random ones of the captured shapes by default.
        format: "onnx", "openvino", "pt2" or "aotinductor"; by default the one of the suffix: .onnx, .xml,
            .pt2, .aoti.pt2.

    Raises:
        ExportError: naming the format, what it cannot express, and what to do.
    """
    target = Path(path)
    name = _format(target, format)
    if args is not None and not isinstance(args, (tuple, list)):
        args = (args,)
    source = _source(module, args, kwargs, name)
    start = time.perf_counter()
    if target.is_dir():
        raise ExportError(f"{target} is a folder")
    with beside(target) as work:
        try:
            loaded, inputs, outputs, left_out = FORMATS[name](source, work / target.name)
        except BackendError as error:
            reason = str(error).rstrip(".")
            raise ExportError(f"{name}: {reason}. {_ADVICE[name]}") from error
        errors = compared(module, source, loaded, name)
        files = _moved(work, target)
    return Export(
        target, name, files, tuple(inputs), tuple(outputs), tuple(left_out), *errors,
        time.perf_counter() - start,
    )  # fmt: skip


def _format(path: Path, format: str | None) -> str:
    """The format asked for, or that of the suffix."""
    if format is None:
        for suffix, name in SUFFIXES.items():
            if path.name.endswith(suffix):
                return name
        raise ExportError(f"{path}: expected a name that ends with one of {', '.join(SUFFIXES)}")
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    suffix = "." + next(one for one, name in SUFFIXES.items() if name == format).rpartition(".")[2]
    if path.suffix != suffix:
        raise ExportError(
            f"{path}: expected a name that ends with {suffix} for the format {format}"
        )
    return format


def _source(module: OptimizedModule, args: Any, kwargs: Any, format: str) -> Source:
    if not isinstance(module, OptimizedModule):
        raise TypeError(f"expected a result of graphopt.optimize, found {type(module).__name__}")
    graph = module.graph_module
    if graph is None:
        raise ExportError(
            f"{format}: the model was captured by region, which is not one graph; left out: "
            f"{', '.join(module.report.capture.left_out) or 'the whole model'}"
        )
    if args is None and not kwargs:
        args, kwargs = module.example_inputs()
    device = next((one.device for one in (*graph.parameters(), *graph.buffers())), None)
    args, kwargs = module._bind(tuple(args or ()), dict(kwargs or {}))
    if device is not None:
        args, kwargs = pytree.tree_map_only(Tensor, lambda one: one.to(device), (args, kwargs))
    return Source(graph, args, kwargs, module._signature.names, _output_names(graph))


def _output_names(module: fx.GraphModule) -> tuple[str, ...]:
    """The path of every leaf in the result: `logits`, `states_0`; `output` where it has none."""
    spec: Any = module._out_spec
    paths, _ = pytree.tree_flatten_with_path(
        pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    )
    names: list[str] = []
    for path, _ in paths:
        parts = [
            str(getattr(one, "key", getattr(one, "idx", getattr(one, "name", "")))) for one in path
        ]
        name = "_".join(parts) if parts and not parts[0].isdigit() else "_".join(["output", *parts])
        names.append(name if name not in names else f"{name}_{len(names)}")
    return tuple(names)


# -- formats ------------------------------------------------------------------------------------


def _onnx(source: Source, path: Path) -> Written:
    from graphopt.backends import onnxruntime

    _need("onnx", onnxruntime.missing())
    onnxruntime.refuse_types(source.module, source.leaves)
    part = exported(source.module, source.leaves)
    inputs, outputs, left = source.flat(part)
    program = onnxruntime.convert(source.module, part.program, inputs, list(map(_OUT, outputs)))
    outputs = _name_outputs(program.model.graph, outputs)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # traces with the paths of this machine
    onnxruntime.save(program, path, sum(state(source.module, name).nbytes for name in part.states))
    session = onnxruntime.session(path, torch.get_num_threads())

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = part.given(pytree.tree_leaves((args, kwargs)))
        feed = {name: one.contiguous().numpy() for name, one in zip(inputs, given, strict=True)}
        return _placed(part, [torch.as_tensor(one) for one in session.run(outputs, feed)])

    return run, inputs, outputs, left


_OUT = "{}_out".format


def _name_outputs(graph: Any, names: list[str]) -> list[str]:
    """Give the outputs of an `onnx_ir.Graph` their names, in which all values share one space: what is only
    computed makes room, an input or a weight does not."""
    taken = {one.name for one in graph.inputs} | set(graph.initializers)
    found: list[str] = []
    for name in names:
        while name in taken:
            name = _OUT(name)
        taken.add(name)
        found.append(name)
    ends = {id(one) for one in graph.outputs}
    inside = [value for node in graph for value in node.outputs if id(value) not in ends]
    for value in inside:
        if value.name in found:
            while value.name in taken:
                value.name = f"{value.name}_inside"
            taken.add(value.name)
    for value, name in zip(graph.outputs, found, strict=True):
        value.name = name
    return found


def _openvino(source: Source, path: Path) -> Written:
    from graphopt.backends import openvino

    _need("openvino", openvino.missing())
    library = importlib.import_module("openvino")
    openvino.refuse_types(source.module, source.leaves)
    part = exported(source.module, source.leaves)
    inputs, outputs, left = source.flat(part)
    model = openvino.convert(source.module, part.program, part.shapes)
    names = dict(zip(part.names, inputs, strict=True))
    ends = [(port, names[port.any_name]) for port in model.inputs]
    for port, name in (*ends, *zip(model.outputs, outputs, strict=True)):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    weights = path.with_suffix(".bin")
    library.serialize(model, path, weights)  # save_model rounds weights to float16 by default
    again = library.Core().read_model(path, weights)
    plugin = openvino.Plugin(again, openvino.precision_of(source.module, source.leaves))

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = dict(zip(inputs, part.given(pytree.tree_leaves((args, kwargs))), strict=True))
        return _placed(part, plugin([given[name] for name in plugin.inputs]))

    return run, inputs, outputs, left


def _torch(source: Source, path: Path) -> Written:
    program = _program(source)
    with quiet():
        whole = io.BytesIO()  # torch's own writer ends the process when the disk is full
        torch.export.save(program, whole)
        path.write_bytes(whole.getbuffer())
        loaded = torch.export.load(path).module()
    return _calling(loaded), *_ends(source)


def _aotinductor(source: Source, path: Path) -> Written:
    inductor = importlib.import_module("torch._inductor")
    program = _program(source)
    try:
        with quiet():
            inductor.aoti_compile_and_package(program, package_path=str(path))
            loaded = inductor.aoti_load_package(str(path))
    except Exception as error:
        raise BackendError(f"not compiled: {first_line(error)}") from error
    return _calling(loaded), *_ends(source)


FORMATS: dict[str, Callable[[Source, Path], Written]] = {
    "onnx": _onnx, "openvino": _openvino, "aotinductor": _aotinductor, "pt2": _torch,
}  # fmt: skip
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".aoti.pt2": "aotinductor", ".pt2": "pt2"}
_ADVICE = {
    "onnx": "Export to .pt2, which holds whatever torch.export does",
    "openvino": "Export to .onnx, or to .pt2, which holds whatever torch.export does",
    "aotinductor": "Export to .pt2, which needs no compiler",
    "pt2": "Save it as an artifact: module.save(folder)",
}


def _need(format: str, reason: str) -> None:
    if reason:
        raise ExportError(f"{format}: {reason}")


def _calling(loaded: Callable[..., Any]) -> Loaded:
    return lambda args, kwargs: pytree.tree_leaves(loaded(*args, **kwargs))


def _ends(source: Source) -> tuple[list[str], list[str], list[str]]:
    """The names of a format that keeps the call as it is."""
    named = zip(source.inputs, source.leaves, strict=True)
    return [name for name, leaf in named if isinstance(leaf, Tensor)], list(source.outputs), []


def _placed(part: Exported, computed: list[Tensor]) -> list[Any]:
    """The leaves of the result that a program computes."""
    return [computed[key] if kind == "computed" else None for kind, key in part.results]


def _program(source: Source) -> Any:
    """The graph as a program of `torch.export` that is called like the source model.

    Raises:
        BackendError: if it is not exported, or takes other sizes than the graph does.
    """
    reason = ""
    for dynamic in (True, False):
        values, dims = traced_inputs(source.module, source.leaves, dynamic)
        args, kwargs = pytree.tree_unflatten(values, source.spec)
        shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for value, dim in zip(values, dims, strict=True):
            if dim:
                shapes[value] = dim
        try:
            with quiet(), torch.no_grad():
                program = in_aten(
                    torch.export.export(source.module, args, kwargs, dynamic_shapes=shapes)
                )
        except Exception as error:
            reason = reason or first_line(error)
            continue
        for node in program.graph.nodes:
            for trace in ("stack_trace", "from_node"):  # paths and addresses of this process
                node.meta.pop(trace, None)
        return program
    raise BackendError(f"torch.export: {reason}")


# -- in its place ------------------------------------------------------------------------------


def _moved(work: Path, target: Path) -> tuple[Path, ...]:
    """Put the written files into the place of `target`, itself the last."""
    names = sorted(os.listdir(work), key=lambda name: (name == target.name, name))
    for name in names:
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(work / name, target.parent / name)
    return tuple(target.parent / name for name in reversed(names))
