"""What is needed to follow time through a graph: sizes by which axes are told apart, and where a value is
repeated."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.ir import ops

REPEATING = (ops.Repeat, ops.Expand, ops.Stack)


def repetition(op: Any, steps: int) -> int | None:
    """The first axis along which a value is the same at as many places as there are steps."""
    shape = op.out.shape
    if isinstance(op, ops.Stack):
        same = len(op.tensors) == steps and len({one.node for one in op.tensors}) == 1
        return op.dim % len(shape) if same else None
    new = len(shape) - op.input.ndim
    inner = (1,) * new + tuple(op.input.shape)
    for axis, (size, one) in enumerate(zip(shape, inner, strict=True)):
        if size == steps and one == 1 and steps > 1:
            alone = axis or not isinstance(op, ops.Repeat) or all(n == 1 for n in op.repeats[1:])
            return axis if alone else None
    return None


def infer(module: fx.GraphModule) -> None:
    """Give every node a fake tensor, dynamic sizes being small primes that no other size is."""
    nodes = list(module.graph.nodes)
    taken = {size for node in nodes for size in node.meta.get("type", {}).get("shape", ())
             if isinstance(size, int)}  # fmt: skip
    primes = (
        one for one in itertools.count(11)
        if one not in taken and all(one % i for i in range(2, one))
    )  # fmt: skip
    sizes: dict[str, int] = defaultdict(lambda: next(primes))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        for node in nodes:
            if node.op == "placeholder":
                kind = node.meta["type"]
                shape = [one if isinstance(one, int) else sizes[one] for one in kind["shape"]]
                node.meta["val"] = torch.empty(shape, dtype=getattr(torch, kind["dtype"]))
            elif node.op == "get_attr":
                held = operator.attrgetter(str(node.target))(module)
                node.meta["val"] = mode.from_tensor(held.detach(), static_shapes=True)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
