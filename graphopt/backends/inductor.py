"""torch.compile, with frozen weights for inference where that is safe.

What it computes wrong, and how each such graph is compiled instead, is in `defects`.
"""

from __future__ import annotations

import copy
import operator
import shutil
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._inductor import config

from graphopt.backends import defects
from graphopt.backends.base import Backend
from graphopt.backends.frozen import Watch, on_cpu, plain_call
from graphopt.ir.process import alone

FREEZINGS = 3  # of one module whose weights change
aten = torch.ops.aten


def missing() -> str:
    if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return ""
    return "no C++ compiler on the path"


class Inductor:
    """`module` as a callable, compiled on the first call: with its present weights as constants for calls
    without gradients on a CPU, in general for all others and for weights that keep changing.

    Freezing is asked for by the setting, not by `options` of torch.compile: those do not reach Dynamo, which
    then passes the weights as inputs, and nothing is frozen (torch 2.13).
    """

    def __init__(self, module: fx.GraphModule, freeze: bool) -> None:
        self.module = module
        self.freezings = FREEZINGS if freeze else 0  # left
        self._general: Any = torch.compile(program(module))
        self._frozen: Any = None
        self._compiled: set[Any] = set()  # kinds of inputs that frozen code is there for
        self._seen = Watch()
        in_spec: Any = module._in_spec
        args_spec, kwargs_spec = in_spec.children()
        self._flat = not kwargs_spec.context and all(one.is_leaf() for one in args_spec.children())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = args if self._flat else pytree.tree_leaves((args, kwargs))
        if not plain_call() or not self._is_frozen() or not all(map(on_cpu, leaves)):
            found = self._general(*leaves)
        else:
            kind = (torch.get_num_threads(), *map(_kind, leaves))  # what Dynamo compiles anew for
            if kind in self._compiled:
                found = self._frozen(*leaves)
            else:
                with alone(), config.patch(freezing=True):  # type: ignore[no-untyped-call]
                    found = self._frozen(*leaves)
                self._compiled.add(kind)
        out_spec: Any = self.module._out_spec
        return found[0] if out_spec.is_leaf() else pytree.tree_unflatten(found, out_spec)

    def _is_frozen(self) -> bool:
        """Whether there is a program of the weights as they are, making one if there is reason to."""
        if self._frozen is None or not self._seen.unchanged():
            self._frozen = None
            if self.freezings == 0:
                return False
            self.freezings -= 1
            states = {str(one.target) for one in self.module.graph.nodes if one.op == "get_attr"}
            self._seen = Watch(self.module, states)
            self._frozen = torch.compile(program(self.module))
            self._compiled.clear()
        return True


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.shape, leaf.dtype, leaf.stride() if leaf.layout == torch.strided else leaf.layout


def lower(module: fx.GraphModule, trainable: bool) -> Inductor:
    """Compiled lazily. What can be trained is not frozen."""
    frozen_wrong = "frozen transposed convolution" in defects.hits("inductor", module)
    return Inductor(module, freeze=not trainable and not frozen_wrong)


def program(module: fx.GraphModule) -> Any:
    """`module` from leaves to a tuple of leaves, as a function that can be compiled."""
    twin = plain(module)
    if "extremes of bytes" in defects.hits("inductor", module):
        widen(twin)
    return twin.forward


def widen(module: fx.GraphModule) -> None:
    """Compute the least and greatest of bytes in int32, in place: that is exact."""
    graph = module.graph
    for node in defects.extremes_of_bytes(module):
        (given,) = node.all_input_nodes
        dtype = getattr(torch, given.meta["type"]["dtype"])
        with graph.inserting_before(node):
            node.replace_input_with(given, graph.call_function(aten.to.dtype, (given, torch.int32)))
        for value in _extremes(node):
            users = list(value.users)
            with graph.inserting_after(value):
                narrow = graph.call_function(aten.to.dtype, (value, dtype))
            for user in users:
                user.replace_input_with(value, narrow)
    module.recompile()


def _extremes(node: fx.Node) -> list[fx.Node]:
    """The values of a node that are extremes; the rest are places."""
    name = defects.op_name(node)
    if name in ("argmin", "argmax"):
        return []
    if all(user.target is operator.getitem for user in node.users):
        return [user for user in node.users if name == "aminmax" or user.args[1] == 0]
    return [node]


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


BACKEND = Backend("inductor", lower, missing, build_seconds=(5.0, 0.15))
