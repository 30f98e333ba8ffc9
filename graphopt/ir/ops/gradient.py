"""Values whose gradient is given: what a `torch.autograd.Function` leaves in a graph.

    graphopt::with_gradient(backward, results, inputs, saved) -> results

has the values of `results`, and for gradients g_1, g_2, ... of them the gradients backward(*saved, g_1, g_2,
...) of `inputs`, as a spike has that of its surrogate: neither `results` nor `saved` get one by it.
`backward` is the text of a graph (`graphopt.ir.text_graph`), so that a graph can be saved, copied and
exported without the class it comes from. Decomposed, the op is an alias of `results` with a node of autograd,
which compilers see through.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import Function, once_differentiable

from graphopt.ir import text_graph
from graphopt.ir.ops.base import Op, op
from graphopt.ir.value import Value

_library: Any = torch.library.Library
_LIBRARY = _library("graphopt", "FRAGMENT")
_LIBRARY.define(
    "with_gradient(str backward, Tensor[] results, Tensor[] inputs, Tensor[] saved) -> Tensor[]"
)
TARGET = torch.ops.graphopt.with_gradient.default


class Backward:
    """The backward pass that a text holds. `fixed` are the indices of results without a gradient."""

    def __init__(self, text: str) -> None:
        self.graph, data = text_graph.read(text)
        self.name: str = data["name"]
        self.fixed: list[int] = data["fixed"]
        self._first = next(i for i in range(len(self.fixed) + 1) if i not in self.fixed)
        self._traced: tuple[torch.dtype, torch.device] = text_graph.decode(data["place"], {})
        self._moved: dict[Any, fx.GraphModule] = {self._traced: self.graph}

    def formulas(self) -> list[str]:
        """For reading: what it takes, and a line for each call."""
        lines = []
        for node in self.graph.graph.nodes:
            if node.op == "call_function":
                given = [
                    *map(str, node.args),
                    *(f"{key}={one}" for key, one in node.kwargs.items()),
                ]
                lines.append(f"{node.name} = {node.target.__name__}({', '.join(given)})")
            elif node.op == "output":
                lines.append(f"return {', '.join(map(str, node.args[0]))}")
        names = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        return [f"backward of {self.name}({', '.join(names)})", *lines]

    def __call__(self, saved: Any, gradients: Any) -> tuple[Tensor | None, ...]:
        first = gradients[self._first]
        place = first.dtype, first.device
        if place not in self._moved:
            self._moved[place] = _moved(self.graph, dict(zip(self._traced, place, strict=True)))
        found: tuple[Tensor | None, ...] = self._moved[place](*saved, *gradients)
        return found


@lru_cache(maxsize=1024)
def backward_of(text: str) -> Backward:
    """A text, read."""
    return Backward(text)


def straight(value: Tensor) -> str:
    """The text that gives a value, of this dtype, the gradient of what stands in its place."""
    graph = fx.Graph()
    graph.output((graph.placeholder("gradient"),))
    place = text_graph.encode((value.dtype, value.device))
    return text_graph.write(graph, name="straight", fixed=[], place=place)


def _moved(module: fx.GraphModule, change: dict[Any, Any]) -> fx.GraphModule:
    """A graph for another dtype and device than it was traced with."""

    def swap(value: Any) -> Any:
        if isinstance(value, (torch.device, torch.dtype)):
            return change.get(value, value)
        return value

    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        twin = mapping[node] = graph.node_copy(node, mapping.__getitem__)
        if node.op == "call_function":
            twin.args = fx.node.map_aggregate(twin.args, swap)  # type: ignore[assignment]
            twin.kwargs = fx.node.map_aggregate(twin.kwargs, swap)  # type: ignore[assignment]
    return fx.GraphModule(torch.nn.Module(), graph)


class _WithGradient(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, backward: Backward, results: list[Tensor], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backward_graph, ctx.count = backward, count
        ctx.save_for_backward(*tensors[count:])
        found = tuple(one.detach() for one in results)
        ctx.mark_non_differentiable(*(found[index] for index in backward.fixed))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = ctx.backward_graph(ctx.saved_tensors, gradients)
        return None, None, None, *found, *(None for _ in ctx.saved_tensors)


def _with_gradient(
    backward: str, results: list[Tensor], inputs: list[Tensor], saved: list[Tensor]
) -> list[Tensor]:
    if not torch.is_grad_enabled() or not any(one.requires_grad for one in inputs):
        return [one.detach() for one in results]
    apply: Any = _WithGradient.apply
    return list(apply(backward_of(backward), list(results), len(inputs), *inputs, *saved))


_LIBRARY.impl("with_gradient", _with_gradient, "CompositeImplicitAutograd")


@op("graphopt::with_gradient.default")
class WithGradient(Op):
    """`results`, with the gradients of `inputs` that `backward` computes from `saved` and theirs."""

    backward: str
    results: tuple[Value, ...]
    inputs: tuple[Value, ...]
    saved: tuple[Value, ...]

    def formulas(self) -> list[str]:
        """The backward for reading."""
        return backward_of(self.backward).formulas()
