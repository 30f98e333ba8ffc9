"""The Triton backend: regions of the lowered graph as generated, readable Triton kernels.

    decompose -> partition -> lower (loops, index) -> source -> runtime -> compiled

`docs/triton.md` tells what is generated and what is left to the framework.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import fx

from graphopt.backends.base import Backend


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install graphopt[triton])"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET is not 1"
    return ""


def lower(module: fx.GraphModule, trainable: bool) -> Any:
    """Compiled on the first call, for the devices and dtypes of its inputs."""
    from graphopt.backends.triton.compiled import Compiled

    return Compiled(module)


BACKEND = Backend("triton", lower, missing, worth_timing=torch.cuda.is_available)
