"""Known wrong results of the tools that backends are built on, and what is done about each.

An entry holds for the versions `since <= version < until` of its library. Its test runs the tool alone on a
small example and fails once the result is right: the entry then gets its `until`, or goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx
from torch.torch_version import TorchVersion

from graphopt.backends.base import BackendError
from graphopt.backends.choices import version

BYTES = (torch.int8, torch.uint8)
EXTREMES = {"amin", "amax", "min", "max", "aminmax", "argmin", "argmax"}


@dataclasses.dataclass(frozen=True)
class Defect:
    """A wrong result of `library` under `backend`.

    `applies` finds a node that it could hit. `remedy` says how the backend stays clear of it; without one it
    refuses the whole graph. `source` is where it is known from.
    """

    name: str
    backend: str
    what: str
    applies: Callable[[fx.GraphModule], fx.Node | None]
    source: str
    library: str = "torch"
    since: str = "0"
    until: str | None = None
    remedy: str = ""

    def holds(self, installed: str | None = None) -> bool:
        """Whether a version of the library has it, by default the one that is installed."""
        found = TorchVersion(installed or version(self.library) or "0")
        return bool(found >= self.since and (self.until is None or found < self.until))


def hits(backend: str, module: fx.GraphModule) -> dict[str, fx.Node]:
    """By the names of the defects of `backend` here and now that could hit the graph: one node each."""
    found = {}
    for defect in DEFECTS:
        if defect.backend == backend and defect.holds():
            node = defect.applies(module)
            if node is not None:
                found[defect.name] = node
    return found


def refuse(backend: str, module: fx.GraphModule) -> None:
    """Refuse a graph that a defect without a remedy could hit.

    Raises:
        BackendError: naming the defect and the node.
    """
    found = hits(backend, module)
    for defect in DEFECTS:
        if defect.name in found and not defect.remedy:
            node = found[defect.name]
            where = node.meta.get("where") or node.name
            raise BackendError(
                f"{backend} is not used: {defect.library} {version(defect.library)} {defect.what}, and the "
                f"graph has {op_name(node)} at {where} ({defect.source})"
            )


# -- where they apply -------------------------------------------------------------------------------


def op_name(node: fx.Node) -> str:
    """The ATen op that a node calls; empty for others."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def extremes_of_bytes(module: fx.GraphModule) -> list[fx.Node]:
    """Reductions to the least or greatest of int8 or uint8."""
    return [node for node in module.graph.nodes if op_name(node) in EXTREMES and _of_bytes(node)]


def _of_bytes(node: fx.Node) -> bool:
    overload: str = node.target._schema.overload_name  # type: ignore[union-attr]
    given = node.args[0] if node.args else node.kwargs.get("self")
    kind = given.meta.get("type") if isinstance(given, fx.Node) else None
    reduces = overload not in ("other", "out", "Tensor")
    return reduces and kind is not None and getattr(torch, kind["dtype"]) in BYTES


# Readers of a transposed convolution that do not decompose into arithmetic with constants.
_HARMLESS = {"relu", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
             "conv_transpose3d", "convolution", "cat", "reshape", "permute", "max_pool2d"}  # fmt: skip


def scaled_transposed_convolution(module: fx.GraphModule) -> fx.Node | None:
    """A transposed convolution with a reader that could be folded into it."""
    for node in module.graph.nodes:
        if "conv_transpose" in op_name(node) or (op_name(node) == "convolution" and node.args[6]):
            for user in node.users:
                if user.op != "output" and op_name(user) not in _HARMLESS:
                    return node  # type: ignore[no-any-return]
    return None


DEFECTS = (
    Defect(
        "extremes of bytes", "inductor",
        "takes 0 into the least and greatest of int8 and uint8 along the last axis (min, max, amin, amax, "
        "aminmax), and argmin and argmax of them are 0 or beyond the axis",
        lambda module: next(iter(extremes_of_bytes(module)), None),
        "pytorch/pytorch#191499; torch 2.13 on a CPU with AVX-512",
        since="2.11", remedy="they are computed in int32",
    ),
    Defect(
        "frozen transposed convolution", "inductor",
        "scales the wrong axis of the weight of a transposed convolution when it freezes",
        scaled_transposed_convolution,
        "torch 2.13, _inductor/fx_passes/binary_folding.py: it never looks at `transposed`",
        since="2.11", remedy="the graph is compiled without freezing",
    ),
)  # fmt: skip
