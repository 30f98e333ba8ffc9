"""What the partitioner makes of a part of the graph: one kernel, and everything known about it.

The graph is the one that `decompose` gives. Each node's `meta` has
- `val`: a fake tensor, or a SymInt; sizes are expressions in the symbols of the inputs' sizes;
- `kind`: "input", "state", "size", "view", "creation", "pointwise", "reduction", "product" or
  "external";
- `where`: the module path in the source model, and `source`: the name of the node it came from.
A node of kind "size" is made of size nodes alone; those without arguments that are sizes read
`aten.sym_size.int` of an input, and carry the symbol that they stand for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.triton.ptx import Unit

Launcher = Callable[..., tuple[torch.Tensor, ...]]


class Outside(Exception):
    """A node (or a group) cannot become a kernel; the message says why."""


@dataclasses.dataclass(eq=False)
class Region:
    """A part of the graph that runs as one kernel. Every generator of kernels makes a subclass.

    Attributes:
        name: a Python identifier, the name of the kernel; unique in a module.
        kind: "pointwise", "reduction", "product", or what a family calls itself.
        nodes: the nodes that it computes, in graph order; no other kernel computes them again.
        inputs: the tensors that it reads, in the order of the launcher's arguments: nodes outside it.
        outputs: the nodes of it that something outside reads, in the order of the results.
        sizes: nodes of kind "size" (of symbols) whose values follow the inputs in a launch.
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]

    @property
    def source(self) -> str:
        """Python source that defines the `@triton.jit` function called `name`."""
        raise NotImplementedError

    def launcher(self) -> Launcher:
        """A callable from `inputs` and the values of `sizes` to the tuple of `outputs`.

        Inputs may have any strides; outputs are new tensors. Empty outputs launch nothing.
        """
        raise NotImplementedError

    def work(self) -> tuple[sympy.Expr, sympy.Expr]:
        """(bytes that are read and written once, floating-point operations) of a launch."""
        raise NotImplementedError

    def units(self) -> list[Unit]:
        """The kernels with argument types and blocks as on a GPU, to compile without one."""
        return []

    @cached_property
    def notes(self) -> list[str]:
        """What went wrong when it was launched, and was left to torch's own ops."""
        return []

    @cached_property
    def origins(self) -> tuple[str, ...]:
        """The modules of the source model that the kernel computes, in graph order."""
        found = dict.fromkeys(str(node.meta.get("where", "")) for node in self.nodes)
        return tuple(path for path in found if path)

    @property
    def bytes(self) -> int:
        """Bytes moved for inputs as large as those that the graph was traced with."""
        return self._at_example(self.work()[0])

    @property
    def flops(self) -> int:
        """Floating-point operations for such inputs; a multiply-add counts as two."""
        return self._at_example(self.work()[1])

    def _at_example(self, count: sympy.Expr) -> int:
        found = [node.meta["val"] for node in self.sizes]
        found += [size for node in self.inputs for size in getattr(node.meta["val"], "shape", ())]
        hints = {one.node.expr: one.node.hint for one in found if isinstance(one, torch.SymInt)}
        return int(sympy.sympify(count).subs(hints))

    @cached_property
    def reference(self) -> fx.GraphModule:
        """The meaning of the kernel, with the launcher's signature: these nodes, in torch's ops."""
        return extract(self.nodes, self.inputs, self.sizes, self.outputs)


def size_of(node: fx.Node) -> sympy.Expr:
    """The expression that a node of kind "size" stands for."""
    value = node.meta["val"]
    return sympy.Integer(value) if isinstance(value, int) else value.node.expr


def extract(
    nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], sizes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:  # fmt: skip
    """The part of a graph that computes `outputs` from `inputs` and `sizes`, as a module.

    Views and sizes between are copied along as needed, whether or not they are in `nodes`.

    Raises:
        KeyError: if it needs a node that is neither given nor in `nodes`.
    """
    graph = fx.Graph()
    inside = set(nodes)
    twins: dict[fx.Node, Any] = {}
    for node in (*inputs, *sizes):
        twins[node] = graph.placeholder(node.name)

    def copy(node: fx.Node) -> Any:
        if node not in twins and node.meta.get("kind") == "size" and size_of(node).is_Integer:
            twins[node] = int(size_of(node))  # a symbol when it was read, a number since
        if node not in twins:
            if node not in inside and node.meta.get("kind") not in ("view", "size", "creation"):
                raise KeyError(f"{node.name} is neither an input nor in the region")
            for needed in node.all_input_nodes:
                copy(needed)
            twins[node] = graph.node_copy(node, twins.__getitem__)
            twins[node].meta = dict(node.meta)
        return twins[node]

    graph.output(tuple(copy(node) for node in outputs))
    return fx.GraphModule(torch.nn.Module(), graph, "Region")


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's `val`."""
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in leaves if isinstance(one, torch.Tensor)]
