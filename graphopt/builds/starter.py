"""`graphopt init`: a configuration to begin with, whose comments say what else there is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphopt.ir.inputs import declared_inputs
from graphopt.sources import Source

DYNAMIC = "batch"


def starter(source: str, loaded: Source) -> str:
    """The text of a configuration that builds `source`, loaded as it is."""
    model, args, kwargs = loaded
    if not args and not kwargs:
        found = declared_inputs(model)
        args, kwargs = found[0] or (), dict(found[1] or {})
    inputs = dict(named(model, args, kwargs))
    tensors = all(isinstance(one, torch.Tensor) for one in inputs.values())
    lines = [
        "# Build with: graphopt build          Check without building: graphopt build --dry-run",
        "",
        "[model]",
        f"source = {quoted(source)}",
        '# weights = "weights.safetensors"  # or a state_dict of torch.save',
        *(["trust = true  # a .pt2 file can execute code"] if source.endswith(".pt2") else []),
        "",
    ]
    if inputs and tensors:
        rows = {one.shape[0] for one in inputs.values() if one.ndim}
        for name, one in inputs.items():
            lines += [f"[inputs.{name}]", f"shape = [{_shape(one, rows)}]"]
            lines += [f'dtype = "{str(one.dtype).removeprefix("torch.")}"']
            counts = not (one.is_floating_point() or one.is_complex() or one.dtype == torch.bool)
            if counts:
                lines += [
                    f"high = {max(int(one.max()) + 1, 2) if one.numel() else 2}  # integers are below it"
                ]
            lines += [""]
        if len(rows) == 1:
            lines += [f"[dimensions.{DYNAMIC}]  # may differ from call to call; a number instead fixes it",
                      "example = 2", "# min = 1", "# max = 64", ""]  # fmt: skip
    else:
        lines += ["# The inputs are those that the source comes with.", ""]
    lines += [
        "# [calibration]  # what lossy passes are measured on and fitted to",
        '# file = "samples.npz"  # a tensor for every input, samples first',
        "",
        "[verify]",
        "limit = 1e-10  # of the relative error in float64",
        "inputs = 2     # draws of inputs that the stored artifact is compared on",
        "",
        "[build]",
        'output = "build"',
        'lock = "graphopt.lock"',
        "",
        "[[targets]]  # one artifact each",
        'name = "model"',
        'mode = "deploy"  # or "tune", which stays trainable',
        '# passes = "deploy"      # a pipeline: see graphopt passes',
        'backend = "eager"  # what runs a loaded artifact: prepacked, inductor, openvino, onnxruntime, auto',
        '# precision = "bf16"     # or "int8"; lossy',
        '# export = ["onnx"]      # files beside it: onnx, openvino, pt2, aotinductor',
        "# budget = { error = 1e-3, bytes = 100_000_000 }",
    ]
    return "\n".join(lines) + "\n"


def named(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Inputs by the names of the parameters that take them; nothing where these are not known."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return
    kinds = bound.signature.parameters
    for name, value in bound.arguments.items():
        if kinds[name].kind in (kinds[name].VAR_POSITIONAL, kinds[name].POSITIONAL_ONLY):
            return
        if kinds[name].kind is kinds[name].VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _shape(tensor: torch.Tensor, rows: set[int]) -> str:
    """Sizes as TOML; the first is dynamic where all inputs have as many rows."""
    sizes = [str(one) for one in tensor.shape]
    if sizes and len(rows) == 1:
        sizes[0] = f'"{DYNAMIC}"'
    return ", ".join(sizes)


def quoted(text: str) -> str:
    """As a basic string of TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
