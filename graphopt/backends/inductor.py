"""torch.compile, with frozen weights for inference where that is safe.

Freezing folds constants into convolutions and, on a transposed one with as many input as output
channels, scales the wrong axis (torch 2.13, `_inductor/fx_passes/binary_folding.py`: it never looks
at `transposed`). A graph in which that could match is compiled without freezing.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import fx

from graphopt.backends.base import Backend

# Readers of a transposed convolution that do not decompose into arithmetic with constants.
_HARMLESS = {"relu", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
             "conv_transpose3d", "convolution", "cat", "reshape", "permute", "max_pool2d"}  # fmt: skip


def missing() -> str:
    if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return ""
    return "no C++ compiler on the path"


def may_freeze(module: fx.GraphModule) -> bool:
    """Whether no reader of a transposed convolution could be folded into it."""
    return all(
        user.op == "output" or _name(user) in _HARMLESS
        for node in module.graph.nodes
        if "conv_transpose" in _name(node) or (_name(node) == "convolution" and node.args[6])
        for user in node.users
    )


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def lower(module: fx.GraphModule, trainable: bool) -> Any:
    """Compiled lazily, on the first call. Frozen code serves calls without gradients only."""
    general = torch.compile(module)
    if trainable or not may_freeze(module):
        return general
    frozen = torch.compile(module, options={"freezing": True})

    def run(*args: Any, **kwargs: Any) -> Any:
        return general(*args, **kwargs) if torch.is_grad_enabled() else frozen(*args, **kwargs)

    return run


BACKEND = Backend("inductor", lower, missing)
