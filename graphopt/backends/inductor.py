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

_FOLDED = ("aten::add", "aten::sub", "aten::mul", "aten::div")


def missing() -> str:
    if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return ""
    return "no C++ compiler on the path"


def may_freeze(module: fx.GraphModule) -> bool:
    """Whether no elementwise arithmetic follows a transposed convolution."""
    for node in module.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        transposed = "conv_transpose" in name or (name == "aten::convolution" and node.args[6])
        if transposed:
            for user in node.users:
                if getattr(getattr(user.target, "_schema", None), "name", "") in _FOLDED:
                    return False
    return True


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
