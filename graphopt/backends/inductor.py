"""torch.compile, with frozen weights for inference where that is safe.

Freezing folds constants into convolutions and, on a transposed one with as many input as output
channels, scales the wrong axis (torch 2.13, `_inductor/fx_passes/binary_folding.py`: it never looks
at `transposed`). A graph in which that could match is compiled without freezing.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import torch
import torch.utils._pytree as pytree
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
    function = plain(module).forward
    general = torch.compile(function)
    frozen = None
    if not trainable and may_freeze(module):
        frozen = torch.compile(function, options={"freezing": True})
    in_spec: Any = module._in_spec
    out_spec: Any = module._out_spec
    args_spec, kwargs_spec = in_spec.children()
    flat = not kwargs_spec.context and all(one.is_leaf() for one in args_spec.children())

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = args if flat else pytree.tree_leaves((args, kwargs))
        compiled = general if frozen is None or torch.is_grad_enabled() else frozen
        found = compiled(*leaves)
        return found[0] if out_spec.is_leaf() else pytree.tree_unflatten(found, out_spec)

    return run


def plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same module from leaves to a tuple of leaves: every layer around compiled code costs as much
    as a small kernel."""
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(fx.graph.CodeGen())
    (found,) = graph.output_node().args
    graph.output_node().args = (tuple(found) if isinstance(found, (list, tuple)) else (found,),)
    twin = fx.GraphModule(module, graph)
    for registry in ("_parameters", "_buffers", "_modules"):  # also what is replaced later
        twin.__dict__[registry] = module.__dict__[registry]
    return twin


BACKEND = Backend("inductor", lower, missing)
